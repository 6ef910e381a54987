"""How large a video may be: as the configuration says or, where it says nothing, as the Denoisers measured."""

from collections.abc import Iterable
from dataclasses import dataclass

from t2v_core.engine import Profile
from t2v_core.errors import InvalidRequest
from t2v_core.params import GenerationParams
from t2v_core.shapes import SPATIAL_SCALE

ROWS_A_VIDEO = 2  # with guidance
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class SizeLimit:
    """At most so many pixels in all frames together: width x height x num_frames. `source` says who says so."""

    max_pixel_frames: int
    source: str


def check_size(params: GenerationParams, limit: SizeLimit | None) -> None:
    """Raises InvalidRequest for a video that is too large."""
    pixel_frames = params.width * params.height * params.num_frames
    if limit is not None and pixel_frames > limit.max_pixel_frames:
        raise InvalidRequest(
            f"{params.num_frames} frames of {params.width}x{params.height} are {pixel_frames} pixels: this service "
            f"makes at most {limit.max_pixel_frames} ({limit.source}); ask for a smaller size or fewer frames",
            param="size",
        )


def configured(max_pixel_frames: int | None) -> SizeLimit | None:
    """What the operator has set."""
    return None if max_pixel_frames is None else SizeLimit(max_pixel_frames, "set by ingress.max_pixel_frames")


def measured(profile: Profile, free_bytes: int) -> SizeLimit | None:
    """What fits into this much memory, by what the largest measured step took; None where that is not known.

    What a step takes grows with its latents, or slower: attention makes no table of all pairs.
    """
    if profile.bytes_per_latent is None:
        return None
    bytes_per_pixel = ROWS_A_VIDEO * profile.bytes_per_latent / SPATIAL_SCALE**2
    return SizeLimit(
        max(1, int(free_bytes / bytes_per_pixel)),
        f"measured on {profile.device}: {free_bytes / _GIB:.1f} GiB free, {bytes_per_pixel:.0f} bytes a pixel",
    )


def smallest(limits: Iterable[SizeLimit | None]) -> SizeLimit | None:
    """The limit that holds on every Denoiser, for any of them may get the video."""
    return min((limit for limit in limits if limit is not None), key=lambda limit: limit.max_pixel_frames, default=None)
