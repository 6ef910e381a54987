"""A step between its launch and its end, with its results on their way to the CPU."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from t2v_core.denoising import Denoising
from t2v_core.engine.batching import Entry
from t2v_core.shapes import LatentShape
from t2v_core.trajectory import Trajectory
from t2v_core.transfers import to_cpu

StepKind = tuple[LatentShape, int, bool]


class Outcome(NamedTuple):
    """A request after its step. preview: uint8 (f, h, w, 3)."""

    entry: Entry
    denoising: Denoising
    preview: Tensor | None


class SettledRow(NamedTuple):
    """What came of a request. After its last step, its trajectory is on the CPU; a preview is there always."""

    entry: Entry
    trajectory: Trajectory
    is_finite: bool
    preview: Tensor | None


class Settled(NamedTuple):
    """What came of a step.

    device_s is how long the device was at it, None where it does not say; it was_over before anybody waited for it.
    """

    rows: Sequence[SettledRow]
    device_s: float | None
    was_over: bool


class Launched:
    """A step that a GPU may still be at. All copies to the CPU are behind it in its queue, and before the next step.

    `start` is the mark that was made before it. Steps of one `kind` take the device as long as each other, previews
    aside: of one shape and number of rows, and either whole or with features that were there.
    """

    def __init__(self, outcomes: Sequence[Outcome], start: torch.cuda.Event | None, launched_s: float) -> None:
        self.outcomes, self.launched_s = outcomes, launched_s
        self.entries = tuple(outcome.entry for outcome in outcomes)
        self.shape: LatentShape = self.entries[0].group.shape
        self.rows = sum(entry.rows for entry in self.entries)
        features = outcomes[0].denoising.features
        self.kind: StepKind = self.shape, self.rows, features is not None and features.age > 0
        latents = torch.stack([outcome.denoising.trajectory.latents for outcome in outcomes])
        self._are_finite = to_cpu(latents.isfinite().flatten(1).all(dim=1))
        self._rows = [
            (entry, _when_finished_on_cpu(denoising.trajectory), None if preview is None else to_cpu(preview))
            for entry, denoising, preview in outcomes
        ]
        self._start, self._end = start, mark(latents.device)

    def wait(self) -> Settled:
        """Until the step has ended."""
        device_s, was_over = None, False
        if self._start is not None and self._end is not None:
            was_over = bool(self._end.query())  # type: ignore[no-untyped-call]
            self._end.synchronize()
            device_s = self._start.elapsed_time(self._end) / 1000
        rows = [
            SettledRow(entry, trajectory, is_finite, preview)
            for (entry, trajectory, preview), is_finite in zip(self._rows, self._are_finite.tolist(), strict=True)
        ]
        return Settled(rows, device_s, was_over)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """A point in a GPU's queue, as it is now; None on a CPU, which queues nothing."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _when_finished_on_cpu(trajectory: Trajectory) -> Trajectory:
    if not trajectory.is_finished:
        return trajectory
    return replace(trajectory, latents=to_cpu(trajectory.latents), history=to_cpu(trajectory.history))
