"""Input videos of edits: read once, when they come, and kept as the frames that the job will need."""

from safetensors.torch import load, save
from torch import Tensor

from t2v_core.video_input import VideoLimits

MEDIA_TYPE = "application/octet-stream"


def limits(max_bytes: int) -> VideoLimits:
    """What an upload may cost to read: a strangers' file must not keep a core busy for minutes."""
    return VideoLimits(max_bytes=max_bytes, max_pixels=4096 * 2304, max_duration_s=120.0, max_decoded_frames=4_000)


def path_of(job_id: str) -> str:
    """Where the frames of a job's input are kept: under the fence that no claim has."""
    return f"{job_id}/0/input.safetensors"


def to_bytes(frames: Tensor) -> bytes:
    """frames: (f, h, w, 3) uint8."""
    return save({"frames": frames.contiguous()})


def frames_of(data: bytes) -> Tensor:
    """What `to_bytes` wrote."""
    return load(data)["frames"]
