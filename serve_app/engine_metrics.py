"""What an engine does, told to the metrics step by step."""

from collections.abc import Mapping
from dataclasses import fields

from serve_app import metrics
from serve_app.metrics import Metrics
from t2v_core.engine import Event, Preview
from t2v_core.engine.counters import Counters
from t2v_core.shapes import LatentShape


class EngineMetrics:
    """The growth of an engine's counters, summed over shapes. For the engine's thread.

    A step hands out an event of each of its requests before the next begins, so the first of them finds that one step.
    """

    def __init__(self, told: Metrics, counters: Mapping[LatentShape, Counters]) -> None:
        self._told, self._counters = told, counters
        self._before = Counters()

    def tell(self, event: Event) -> None:
        """The event, and all that has happened since the one before."""
        if isinstance(event, Preview):
            self._told.count(metrics.PREVIEWS)
        before, now = self._before, _summed(self._counters)
        if now != before:
            self._before = now
            self._tell_growth(before, now)

    def _tell_growth(self, before: Counters, now: Counters) -> None:
        told, num_steps = self._told, now.steps - before.steps
        if num_steps:
            told.observe(metrics.STEP_TIME, (now.step_s - before.step_s) / num_steps)
        told.count(metrics.STEPS, num_steps)
        told.count(metrics.ROWS, now.rows - before.rows)
        told.count(metrics.ROW_BUDGET, now.budget_rows - before.budget_rows)
        told.count(metrics.CANCELS, now.cancelled - before.cancelled)
        told.count(metrics.OUT_OF_MEMORY, now.out_of_memory - before.out_of_memory)


def _summed(counters: Mapping[LatentShape, Counters]) -> Counters:
    of_shapes = list(counters.values())
    return Counters(**{field.name: sum(getattr(c, field.name) for c in of_shapes) for field in fields(Counters)})
