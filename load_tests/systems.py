"""The ways to serve a trace of jobs that are compared, each the same on a GPU and in a simulator.

What differs between the two is who does the steps, and the clock.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from arrivals import ROWS_A_VIDEO, Job, Kind

from t2v_core.engine import Profile, RowBudgets
from t2v_core.engine.batching import Entry, Group, choose, due
from t2v_core.shapes import LatentShape

SYSTEMS = ("one", "serve_batch", "static", "static_urgent", "engine")
PRIORITY_BLIND = ("one", "serve_batch", "static")


class Setting(NamedTuple):
    """How a system is set, as far as it has a choice: one request at a time, unless said otherwise."""

    base: LatentShape
    cap_rows: int = ROWS_A_VIDEO  # of a batch of the base shape
    timeout_s: float = 0.0

    def max_videos(self, shape: LatentShape) -> int:
        """Of a batch of this shape: with about as many latents as the base shape's has."""
        rows = self.cap_rows * math.prod(self.base) / math.prod(shape)
        return max(1, round(rows / ROWS_A_VIDEO))


class Worked(NamedTuple):
    """One unit of work: whose step it was, and whom it gave an answer. Both may be empty."""

    stepped: Sequence[Job]
    answered: Sequence[Job]


class System(Protocol):
    """Takes jobs when they come, and does one unit of work, at most one denoising step, at a time."""

    def add(self, job: Job) -> None:
        """Take a job in. Jobs come in the order of their arrival."""

    def ready_s(self) -> float:
        """From when on there is work to do: 0 for now, infinity where nothing is left."""

    def work(self) -> Worked:
        """Do some."""


class Steps(Protocol):
    """Does the denoising steps of all systems but the engine."""

    def __call__(self, jobs: Sequence[Job]) -> list[Job]:
        """One step of jobs of one shape. Returns those of them that were at their last."""


class Clock(Protocol):
    """Seconds since a run began."""

    def now(self) -> float: ...

    def skip_to(self, time_s: float) -> None:
        """Nothing happens until then."""


class StaticBatches:
    """Batches that nobody joins: formed when the device is free, of the job that came first and others of its kind.

    This is static batching at its best: no waiting for a batch to fill, and no row of another shape or step count, so
    that none is padded and each leaves when it is done. With `urgent_first`, urgent jobs are first in the queue and
    form batches among themselves, filled up with others.
    """

    def __init__(self, steps: Steps, setting: Setting, *, urgent_first: bool = False) -> None:
        self._steps, self._setting, self._urgent_first = steps, setting, urgent_first
        self._queue: list[Job] = []
        self._running: list[Job] = []

    def add(self, job: Job) -> None:
        self._queue.append(job)

    def ready_s(self) -> float:
        return 0.0 if self._queue or self._running else math.inf

    def work(self) -> Worked:
        if not self._running:
            self._running = self._form()
        stepped = self._running
        done = self._steps(stepped)
        self._running = [job for job in stepped if job not in done]
        return Worked(stepped, done)

    def _form(self) -> list[Job]:
        if self._urgent_first:
            self._queue.sort(key=lambda job: job.priority != "urgent")  # stable: otherwise first come, first served
        kind = self._queue[0].kind
        alike = [job for job in self._queue if job.kind == kind]
        batch = alike[: self._setting.max_videos(kind.shape)]
        self._queue = [job for job in self._queue if job not in batch]
        return batch


class ServeBatches:
    """Batches as Ray Serve's `serve.batch` forms them: when requests come, not when the device is free.

    The first request of a batch waits for others until it is full or a timeout ends. Then the batch queues, is run
    kind by kind, and all of it is answered together at its end.
    """

    def __init__(self, steps: Steps, clock: Clock, setting: Setting) -> None:
        self._steps, self._clock, self._timeout_s = steps, clock, setting.timeout_s
        self._max_batch_size = setting.max_videos(setting.base)
        self._forming: list[Job] = []
        self._formed: deque[list[Job]] = deque()
        self._answers: list[Job] = []  # of the batch that runs
        self._parts: deque[list[Job]] = deque()  # what is left of it, kind by kind

    def add(self, job: Job) -> None:
        self._close_if_due(job.arrival_s)
        self._forming.append(job)
        if len(self._forming) == self._max_batch_size:
            self._close()

    def ready_s(self) -> float:
        if self._parts or self._formed:
            return 0.0
        return self._forming[0].arrival_s + self._timeout_s if self._forming else math.inf

    def work(self) -> Worked:
        self._close_if_due(self._clock.now())
        if not self._parts:
            self._answers = self._formed.popleft()
            parts: dict[Kind, list[Job]] = {}
            for job in self._answers:
                parts.setdefault(job.kind, []).append(job)
            self._parts = deque(parts.values())
        stepped = self._parts[0]
        if self._steps(stepped):
            self._parts.popleft()
        return Worked(stepped, [] if self._parts else self._answers)

    def _close_if_due(self, now: float) -> None:
        if self._forming and now >= self._forming[0].arrival_s + self._timeout_s:
            self._close()

    def _close(self) -> None:
        self._formed.append(self._forming)
        self._forming = []


class SimulatedEngine:
    """`t2v_core.engine.Engine` without its tensors: the same policy, the same budgets, the same estimates."""

    def __init__(self, steps: Steps, clock: Clock, budgets: RowBudgets) -> None:
        self._steps, self._clock, self._budgets = steps, clock, budgets
        self._entries: dict[str, tuple[Entry, Job]] = {}
        self._num_added = 0

    def add(self, job: Job) -> None:
        alone_s = job.kind.num_steps * self._budgets.step_s(job.kind.shape, job.rows)
        due_s = due(self._clock.now(), alone_s, job.priority)
        group = Group(job.kind.shape, 77)
        entry = Entry(job.id, group, job.rows, due_s, self._num_added, job.priority == "urgent")
        self._entries[job.id] = entry, job
        self._num_added += 1

    def ready_s(self) -> float:
        return 0.0 if self._entries else math.inf

    def work(self) -> Worked:
        entries = choose([entry for entry, _ in self._entries.values()], self._budgets.rows)
        stepped = [self._entries[entry.id][1] for entry in entries]
        done = self._steps(stepped)
        for job in done:
            del self._entries[job.id]
        return Worked(stepped, done)


class SimulatedSteps:
    """Steps that only take time, as long as the profile says."""

    def __init__(self, profile: Profile, clock: Clock) -> None:
        self._profile, self._clock = profile, clock
        self._steps_left: dict[str, int] = {}

    def __call__(self, jobs: Sequence[Job]) -> list[Job]:
        rows = sum(job.rows for job in jobs)
        self._clock.skip_to(self._clock.now() + self._profile.step_s(jobs[0].kind.shape, rows))
        for job in jobs:
            self._steps_left[job.id] = self._steps_left.get(job.id, job.kind.num_steps) - 1
        return [job for job in jobs if self._steps_left[job.id] == 0]
