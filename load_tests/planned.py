"""What can be known before a run: step times of an H200, durations, and the best settings of systems that have any."""

import bisect
from collections.abc import Sequence

from arrivals import ROWS_A_VIDEO, Job, Kind, Scenario, capacity_per_s, trace, work_s
from driving import Run, VirtualClock, drive
from figures import percentile
from systems import ServeBatches, Setting, SimulatedEngine, SimulatedSteps, StaticBatches, System

from t2v_core.engine import Profile, RowBudgets
from t2v_core.engine.profile import ROWS, Measurement
from t2v_core.shapes import LatentShape

_H200_STEP_S = {2: 0.060, 4: 0.100, 8: 0.175, 16: 0.320, 32: 0.620}  # fp16, by rows of 16 x 32 x 32 latents
_H200_LATENTS = 16 * 32 * 32
_LAUNCH_S = 0.055  # no step is shorter: so long it takes to launch its kernels

_RAY_TIMEOUT_S = 0.01  # the default of serve.batch
_TIMEOUTS = (0.25, 0.5, 1.0)  # longer ones, in times in which as many requests come as a batch holds
_SEARCH_JOBS, _SEARCH_SEED = 500, 1234


def h200_profile(shapes: Sequence[LatentShape]) -> Profile:
    """Step times by the number of latents in all rows, between the measured ones in a straight line."""
    measured = [(rows * _H200_LATENTS, step_s) for rows, step_s in _H200_STEP_S.items()]

    def step_s(latents: int) -> float:
        above = min(max(1, bisect.bisect([known for known, _ in measured], latents)), len(measured) - 1)
        (x0, y0), (x1, y1) = measured[above - 1], measured[above]
        return max(_LAUNCH_S, y0 + (y1 - y0) * (latents - x0) / (x1 - x0))

    measurements = tuple(
        Measurement(
            shape=shape,
            rows=rows,
            step_s=step_s(rows * shape.num_frames * shape.height * shape.width),
            memory_bytes=0,
        )
        for shape in shapes
        for rows in ROWS
    )
    return Profile(device="an H200, as planned", dtype="torch.float16", measurements=measurements)


def simulate(system: str, setting: Setting, profile: Profile, jobs: Sequence[Job]) -> Run:
    """A trace in virtual time."""
    clock = VirtualClock()
    steps = SimulatedSteps(profile, clock)
    scheduler: System
    if system == "engine":
        scheduler = SimulatedEngine(steps, clock, RowBudgets(profile))
    elif system == "serve_batch":
        scheduler = ServeBatches(steps, clock, setting)
    else:
        scheduler = StaticBatches(steps, setting, urgent_first=system == "static_urgent")
    return drive(scheduler, clock, jobs, lambda job: step_work_s(job.kind, profile))


def step_work_s(kind: Kind, profile: Profile) -> float:
    """The work in one step of a request: the time that it takes where the device is used best."""
    return work_s(kind, profile) / kind.num_steps


def best_setting(system: str, scenario: Scenario, load: float, profile: Profile, base: LatentShape) -> Setting:
    """The setting whose 95th percentile of latency is least in a long simulated trace, other than the one to be run."""
    rate_per_s = load * capacity_per_s(scenario, profile)
    caps = [m.rows for m in profile.measurements if m.shape == base and m.rows > ROWS_A_VIDEO]
    if system in ("static", "static_urgent"):
        choices = [Setting(base, cap_rows) for cap_rows in caps]
    elif system == "serve_batch":
        choices = [
            Setting(base, rows, timeout_s)
            for rows in caps[::2]
            for timeout_s in (_RAY_TIMEOUT_S, *(share * rows / ROWS_A_VIDEO / rate_per_s for share in _TIMEOUTS))
        ]
    else:
        return Setting(base)
    jobs = trace(scenario, _SEARCH_JOBS, rate_per_s, _SEARCH_SEED)
    return min(choices, key=lambda setting: percentile(simulate(system, setting, profile, jobs).latencies_s, 95))
