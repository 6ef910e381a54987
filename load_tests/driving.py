"""Gives a system the jobs of a trace as they come, and notes when each is answered."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from arrivals import Job
from systems import Clock, System


class VirtualClock:
    """Time that passes only where someone says so."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def skip_to(self, time_s: float) -> None:
        self._now = max(self._now, time_s)


class RealClock:
    """The wall clock, but that nobody sits idle time out: it is skipped, which saves time and changes no latency."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    def skip_to(self, time_s: float) -> None:
        self._start -= max(0.0, time_s - self.now())


@dataclass(slots=True)
class Run:
    """What came of a trace. `latencies_s` are from arrival to answer, in the order of the trace."""

    latencies_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    busy_s: float = 0.0
    num_steps: int = 0
    num_rows: int = 0  # of all steps
    progress: list[tuple[float, float]] = field(default_factory=list)  # at each answer: when, and work done so far

    @property
    def work_rate(self) -> float:
        """Work a second until three quarters are done: without the end, when batches run out of jobs."""
        goal = 0.75 * self.progress[-1][1]
        return next(work_s / end_s for end_s, work_s in self.progress if work_s >= goal)


def drive(system: System, clock: Clock, jobs: Sequence[Job], step_work_s: Callable[[Job], float]) -> Run:
    """Run a trace to its end, in one thread: jobs that came during a unit of work are added after it.

    `step_work_s` is the work in one step of a job, to compare how much of it is done in a second.
    """
    answered_s: dict[str, float] = {}
    run, work_s, num_added = Run(), 0.0, 0
    while len(answered_s) < len(jobs):
        while num_added < len(jobs) and jobs[num_added].arrival_s <= clock.now():
            system.add(jobs[num_added])
            num_added += 1
        started_s, ready_s = clock.now(), system.ready_s()
        if ready_s > started_s:
            next_arrival_s = jobs[num_added].arrival_s if num_added < len(jobs) else math.inf
            clock.skip_to(min(ready_s, next_arrival_s))
            continue
        worked = system.work()
        now = clock.now()
        run.busy_s += now - started_s
        run.num_steps += bool(worked.stepped)
        run.num_rows += sum(job.rows for job in worked.stepped)
        work_s += sum(map(step_work_s, worked.stepped))
        if worked.answered:
            answered_s.update({job.id: now for job in worked.answered})
            run.progress.append((now, work_s))
    run.end_s = clock.now()
    run.latencies_s = [answered_s[job.id] - job.arrival_s for job in jobs]
    return run
