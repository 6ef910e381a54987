"""What the deployments say to each other, and what a Python handle gives its caller."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from t2v_core.engine import Priority
from t2v_core.params import GenerationParams
from t2v_core.stages import EncodedVideo


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenoiseCall:
    """One request for a Denoiser.

    id, fence: a call supersedes another one of its id and a lower fence, wherever its owner has gone.
    owners: the replicas, by the names of their actors, of which every one must live for the work to be wanted.
    trajectory: where an earlier attempt stood, as `Trajectory.to_bytes` wrote it.
    video: the latents of an input video, on the CPU; needed only where there is no trajectory.
    """

    id: str
    fence: int
    owners: tuple[str, ...]
    params: GenerationParams
    priority: Priority = "normal"
    waited_s: float = 0.0
    trajectory: bytes | None = field(default=None, repr=False)
    video: EncodedVideo | None = field(default=None, repr=False)
    keeps_checkpoints: bool = False
    previews: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """Step `step` of `num_steps` is done, and the last will be in about `eta_s` seconds."""

    step: int
    num_steps: int
    eta_s: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a request stands after `step`: `Trajectory.to_bytes`."""

    step: int
    trajectory: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class PreviewPicture:
    """What the video will be like, after `step`: a webp of a few frames side by side."""

    step: int
    picture: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Denoised:
    """The final latents, (c, f, h, w), on the CPU."""

    latents: Tensor = field(repr=False)


@dataclass(frozen=True, slots=True)
class HandedBack:
    """The last event of a replica whose node goes away: another one goes on from this `Trajectory.to_bytes`."""

    step: int
    trajectory: bytes = field(repr=False)


DenoiseEvent = Progress | Checkpoint | PreviewPicture | Denoised | HandedBack


@dataclass(frozen=True, slots=True)
class RenderedFile:
    """One file of a finished video."""

    name: str
    data: bytes = field(repr=False)
    media_type: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """The files of a finished video."""

    video: RenderedFile
    thumbnail: RenderedFile
    spritesheet: RenderedFile

    def by_variant(self) -> dict[str, RenderedFile]:
        return {"video": self.video, "thumbnail": self.thumbnail, "spritesheet": self.spritesheet}


@dataclass(frozen=True, slots=True)
class GeneratedVideo:
    """A video for the caller of a Python handle. `params` are all its settings, the drawn seed among them."""

    video: bytes = field(repr=False)
    media_type: str
    thumbnail: bytes = field(repr=False)
    params: GenerationParams

    def save(self, path: str | Path) -> Path:
        """Write the video."""
        path = Path(path)
        path.write_bytes(self.video)
        return path


@dataclass(frozen=True, slots=True)
class DenoiserStatus:
    """What a Denoiser has done since it started, and what it works on."""

    replica: str
    steps: int
    rows: int
    live: tuple[str, ...]
