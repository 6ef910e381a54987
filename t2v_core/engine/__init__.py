"""The engine: many requests share one UNet, and join, leave, pause and resume between any two of its steps."""

from t2v_core.engine.batching import Priority
from t2v_core.engine.budgets import RowBudgets, free_memory_bytes
from t2v_core.engine.engine import Engine, Request
from t2v_core.engine.events import Admitted, Cancelled, Event, Failed, Finished, Preview, Stepped
from t2v_core.engine.preview import FewFrames, LatentsToRGB
from t2v_core.engine.profile import ROWS, Profile, measure, warm_up
from t2v_core.engine.thread import EngineThread

__all__ = [
    "ROWS",
    "Admitted",
    "Cancelled",
    "Engine",
    "EngineThread",
    "Event",
    "Failed",
    "FewFrames",
    "Finished",
    "LatentsToRGB",
    "Preview",
    "Priority",
    "Profile",
    "Request",
    "RowBudgets",
    "Stepped",
    "free_memory_bytes",
    "measure",
    "warm_up",
]
