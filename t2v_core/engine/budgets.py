"""How many rows a step may have: as many as throughput asks for, by how many wait, and as memory allows."""

import sys

import torch

from t2v_core.engine.batching import Demand, Group
from t2v_core.engine.profile import Profile
from t2v_core.shapes import LatentShape

_RECOVERY_STEPS = 200
_STEP_S_UNMEASURED = 0.03  # a row
_MEMORY_SHARE = 0.9
_NO_POOL = (0, 0)  # of memory that torch gives to all but graphs

# These were found by simulation of Poisson arrivals with the step times of an H100 and an H200 (load_tests/planned.py).
_LEAST_SHARE, _MOST_SHARE = 0.90, 0.97  # of the best throughput: while few wait, and while many do
_MANY, _TOO_MANY = 1.25, 4.0  # times the rows of best throughput: from the latter on, nothing less than that will do
_URGENT_SLOWDOWN = 1.7  # how much longer riders may make a step of urgent requests


class RowBudgets:
    """The budgets of one device. They shrink when memory runs out and grow back when it seems to be free again.

    While few requests wait, small steps end sooner for all and lose little throughput. The more wait, the more of it
    a budget asks for. Beside urgent requests it is only as much as does not slow them much.

    Without a profile they are `unmeasured_rows`, by default those of one request with guidance, and urgent requests are
    alone: right on a CPU, where a larger batch saves nothing.
    """

    def __init__(
        self, profile: Profile | None = None, *, free_bytes: int | None = None, unmeasured_rows: int = 2
    ) -> None:
        self._profile, self._free_bytes, self._unmeasured_rows = profile, free_bytes, unmeasured_rows
        self._limits: dict[LatentShape, int] = {}  # of shapes that ran out of memory
        self._steps_since: dict[LatentShape, int] = {}

    def rows(self, group: Group, demand: Demand) -> int:
        """At least 1."""
        shape = group.shape
        usual = self._usual(shape, demand.rows)
        rows = min(usual, self._limits.get(shape, usual))
        if demand.urgent_rows and not self._profile:
            rows = min(rows, demand.urgent_rows)  # every other row would only make them wait
        elif demand.urgent_rows and self._profile:
            longest_s = _URGENT_SLOWDOWN * self._profile.step_s(shape, demand.urgent_rows)
            while rows > demand.urgent_rows and self._profile.step_s(shape, rows) > longest_s:
                rows -= 1
        return max(1, rows)

    def step_s(self, shape: LatentShape, rows: int) -> float:
        """How long a step of so many rows takes."""
        return self._profile.step_s(shape, rows) if self._profile else rows * _STEP_S_UNMEASURED

    def halve(self, shape: LatentShape, rows: int) -> None:
        """So many rows did not fit."""
        self._limits[shape] = max(1, rows // 2)
        self._steps_since[shape] = 0

    def succeeded(self, shape: LatentShape) -> None:
        """A step of this shape did fit. After many, more is tried again: others may have freed their memory."""
        if shape not in self._limits:
            return
        self._steps_since[shape] += 1
        if self._steps_since[shape] >= _RECOVERY_STEPS:
            self._steps_since[shape] = 0
            self._limits[shape] *= 2
            if self._limits[shape] >= self._usual(shape, sys.maxsize):  # the most that any demand asks for
                del self._limits[shape]

    def _usual(self, shape: LatentShape, demanded_rows: int) -> int:
        if self._profile is None:
            return self._unmeasured_rows
        best = self._profile.rows_for(shape)
        share = _LEAST_SHARE + (_MOST_SHARE - _LEAST_SHARE) * min(1.0, demanded_rows / (_MANY * best))
        rows = best if demanded_rows >= _TOO_MANY * best else self._profile.rows_for(shape, share)
        fitting = None if self._free_bytes is None else self._profile.rows_that_fit(shape, self._free_bytes)
        return rows if fitting is None else min(rows, fitting)


def free_memory_bytes(device: torch.device) -> int | None:
    """What steps may use of a GPU's memory: most of what is free now, or held by torch without use. None on a CPU.

    What graphs hold is theirs alone.
    """
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    unused = sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if segment["device"] == index and tuple(segment["segment_pool_id"]) == _NO_POOL
    )
    return int(_MEMORY_SHARE * (torch.cuda.mem_get_info(device)[0] + unused))
