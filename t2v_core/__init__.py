"""Text to video with ModelScope's 1.7 B diffusion model, in process: `load` a checkpoint, `generate`, `save`."""

from t2v_core.errors import (
    CheckpointError,
    CheckpointNotFound,
    GenerationFailed,
    InvalidRequest,
    OutOfMemory,
    OutputError,
    T2VError,
    UnreadableVideo,
    UnsafeCheckpoint,
)
from t2v_core.params import GenerationParams, Settings
from t2v_core.pipeline import Pipeline, load
from t2v_core.trajectory import Trajectory
from t2v_core.video import Video

__all__ = [
    "CheckpointError",
    "CheckpointNotFound",
    "GenerationFailed",
    "GenerationParams",
    "InvalidRequest",
    "OutOfMemory",
    "OutputError",
    "Pipeline",
    "Settings",
    "T2VError",
    "Trajectory",
    "UnreadableVideo",
    "UnsafeCheckpoint",
    "Video",
    "load",
]
