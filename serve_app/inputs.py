"""Input videos of edits: read once, when they come, and kept as the frames that the job will need."""

import dataclasses

from safetensors.torch import load, save
from torch import Tensor

from serve_app.sizes import SizeLimit, check_size
from t2v_core.config import GenerationDefaults
from t2v_core.params import GenerationParams, Settings, resolve
from t2v_core.video_input import VideoLimits

MEDIA_TYPE = "application/octet-stream"

# What frames take in memory, three bytes a pixel, has nothing to do with the size of their file.
_MOST_READ = SizeLimit(2**28, "the most that is read of an input video")


def resolve_within(
    limit: SizeLimit | None,
    prompt: str,
    settings: Settings,
    defaults: GenerationDefaults,
    video: bytes | Tensor | None = None,
    *,
    max_bytes: int = 0,
) -> GenerationParams:
    """As `params.resolve`, of a video that is not too large: where it is, nothing of its input is read.

    An input of `max_bytes` at most takes a while. Raises InvalidRequest.
    """
    if video is None:
        params = resolve(prompt, settings, defaults)
    else:
        limit = min(limit or _MOST_READ, _MOST_READ, key=lambda limit: limit.max_pixel_frames)
        asked = resolve(prompt, settings | {"strength": None}, defaults)
        # Where nobody says how long it is, the input may be shorter than is usual.
        check_size(asked if settings.get("num_frames") else dataclasses.replace(asked, num_frames=1), limit)
        frames_fit = limit.max_pixel_frames // (asked.width * asked.height)
        # By one more, it is seen to be too large.
        params = resolve(prompt, settings, defaults, video, _limits(max_bytes, max_frames=frames_fit + 1))
    check_size(params, limit)
    return params


def _limits(max_bytes: int, max_frames: int) -> VideoLimits:
    """What an upload may cost to read: a strangers' file must not keep a core busy for minutes, nor fill the memory."""
    return VideoLimits(
        max_bytes=max_bytes,
        max_pixels=4096 * 2304,
        max_duration_s=120.0,
        max_frames=max_frames,
        max_decoded_frames=4_000,
    )


def path_of(job_id: str) -> str:
    """Where the frames of a job's input are kept: under the fence that no claim has."""
    return f"{job_id}/0/input.safetensors"


def to_bytes(frames: Tensor) -> bytes:
    """frames: (f, h, w, 3) uint8."""
    return save({"frames": frames.contiguous()})


def frames_of(data: bytes) -> Tensor:
    """What `to_bytes` wrote."""
    return load(data)["frames"]
