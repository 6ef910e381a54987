"""What the engine tells about a request. Each is handed out once, in this order: admitted, steps, one ending.

A request that is taken out, to go on elsewhere, has no ending here.
"""

from dataclasses import dataclass

from torch import Tensor

from t2v_core.errors import T2VError
from t2v_core.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Admitted:
    """Its first step is next, after `queue_s` seconds of waiting."""

    id: str
    queue_s: float


@dataclass(frozen=True, slots=True)
class Stepped:
    """Step `step_index` of `num_steps` is done."""

    id: str
    step_index: int
    num_steps: int


@dataclass(frozen=True, slots=True, eq=False)
class Preview:
    """What the video will be like, as the engine's previewer shows it: uint8 (f, h, w, 3), on the CPU."""

    id: str
    step_index: int
    frames: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """All steps are done. The engine has forgotten the request."""

    id: str
    trajectory: Trajectory


@dataclass(frozen=True, slots=True)
class Failed:
    """It cannot go on, and the engine has forgotten it. Other requests are not affected."""

    id: str
    error: T2VError


@dataclass(frozen=True, slots=True)
class Cancelled:
    """It was taken out before its end: its rows are free from the next step on."""

    id: str


Event = Admitted | Stepped | Preview | Finished | Failed | Cancelled
ENDINGS = (Finished, Failed, Cancelled)
