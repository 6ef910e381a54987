"""The errors a caller can meet, in one tree.

Every message holds three things: the value, the rule it broke, and the remedy.

    T2VError
    ├── InvalidRequest          the caller asked for something that cannot be made
    │   └── UnreadableVideo     the input video cannot be used
    ├── CheckpointError         the weights cannot be used as they are
    │   ├── CheckpointNotFound  no such folder, hub id, revision or file
    │   └── UnsafeCheckpoint    a pickle holds more than tensors and plain values
    ├── GenerationFailed        the networks ran and produced nothing usable
    │   └── OutOfMemory         this device cannot hold the request
    ├── EngineBroken            the engine failed, and not this request: another one can go on with it
    ├── InvalidProfile          a saved profile of the engine cannot be used
    ├── UnreadableTrajectory    a saved request is damaged
    └── OutputError             the video could not be written
"""


class T2VError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidRequest(T2VError):
    """A setting, or a combination of settings, is not allowed.

    `param` names the setting at fault, as the API spells it, or is None when several are.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnreadableVideo(InvalidRequest):
    """The input video is damaged, empty, too large, or not a video."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="video")


class CheckpointError(T2VError):
    """A checkpoint is damaged, incomplete, or of a kind that this model cannot hold."""


class CheckpointNotFound(CheckpointError):
    """The checkpoint, its revision or one of its files does not exist or cannot be reached."""


class UnsafeCheckpoint(CheckpointError):
    """A pickled file asks to import code. It was not run."""


class GenerationFailed(T2VError):
    """The model produced values that are not finite."""


class OutOfMemory(GenerationFailed):
    """The device's memory cannot hold this request."""


class EngineBroken(T2VError):
    """The engine failed, and not this request: another one can go on with it."""


class InvalidProfile(T2VError):
    """The file is no profile of how long steps take."""


class UnreadableTrajectory(T2VError):
    """The bytes are not a request that was saved between two steps."""


class OutputError(T2VError):
    """Writing the result failed. The destination is as it was before."""
