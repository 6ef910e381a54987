"""Figures of runs, side by side, and whether they are what issue 4 asks for."""

import math
import statistics
from collections.abc import Sequence, Set
from typing import NamedTuple

from results import Overhead, Results, RunRecord
from systems import SYSTEMS

ACCEPTED_LOAD = 0.8  # where issue 4 compares latencies
SATURATED_LOAD = 2.0  # from here on, a run shows the throughput at saturation

# The engine's p95 by that of static batches: the most that each part of a scenario's requests may have.
_LIMITS = {
    "identical": {"all": 1.0},
    "mixed": {"all": 0.9},
    "urgent": {"urgent": 1 / 3, "others": 1.25},
    "urgent_identical": {"urgent": 1 / 3, "others": 1.25},
}


class Latencies(NamedTuple):
    """In seconds; not a number where there were no requests."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Latencies":
        if not values:
            return cls(math.nan, math.nan, math.nan, math.nan)
        return cls(statistics.fmean(values), *(percentile(values, percent) for percent in (50, 95, 99)))


def percentile(values: Sequence[float], percent: float) -> float:
    """Between two values in a straight line, as numpy does."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = ordered[math.floor(position)]
    return below + (ordered[math.ceil(position)] - below) * (position % 1)


class Pool:
    """All runs of one system in one scenario at one load, over their seeds."""

    def __init__(self, runs: Sequence[RunRecord]) -> None:
        self.runs = runs
        pairs = [pair for run in runs for pair in zip(run.latencies_s, run.is_urgent, strict=True)]
        self.parts = {
            "all": Latencies.of([latency for latency, _ in pairs]),
            "urgent": Latencies.of([latency for latency, is_urgent in pairs if is_urgent]),
            "others": Latencies.of([latency for latency, is_urgent in pairs if not is_urgent]),
        }
        self.throughput_per_s = len(pairs) / sum(run.end_s for run in runs)
        self.mean_rows = sum(run.num_rows for run in runs) / sum(run.num_steps for run in runs)
        self.num_requests = len(pairs)
        self.work_rate = statistics.fmean(run.work_rate for run in runs)

    def of_seeds(self, seeds: Set[int]) -> "Pool":
        return Pool([run for run in self.runs if run.seed in seeds])


def pools(results: Results, scenario: str, load: float) -> dict[str, Pool]:
    """By system."""
    runs = [run for run in results.runs if (run.scenario, run.load) == (scenario, load)]
    return {system: Pool([run for run in runs if run.system == system]) for system in {run.system for run in runs}}


def both(ours: Pool, theirs: Pool) -> tuple[Pool, Pool] | None:
    """Only the runs over the same arrivals; None where there are none."""
    seeds = {run.seed for run in ours.runs} & {run.seed for run in theirs.runs}
    if not seeds:
        return None
    return ours.of_seeds(seeds), theirs.of_seeds(seeds)


def report(results: Results) -> str:
    """All of the file as a table, and the lines of acceptance."""
    setup = results.setup
    how = "SIMULATED with the step times of" if setup.simulated else "measured on"
    network = ", a TINY network" if setup.tiny else ""
    lines = [
        f"{how} {setup.machine}, {setup.dtype}{network}; {setup.num_jobs} requests a run; "
        f"20, 25 and 50 steps times {setup.step_scale:g}; latencies in seconds",
        "",
        "| scenario | load | system | set to | requests | a second | capacity used | rows a step "
        "| mean | p50 | p95 | p99 | urgent: mean, p95 | others: mean, p95 | engine's p95 by this |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for scenario, load in _cells(results):
        by_system = pools(results, scenario, load)
        for system in SYSTEMS:
            if system in by_system:
                lines.append(f"| {scenario} | {load:.0%} | {system} {_row(by_system[system], by_system.get('engine'))}")
    return "\n".join([*lines, "", *acceptance(results), *map(_overhead, results.overheads)])


def acceptance(results: Results) -> list[str]:
    """Each line of issue 4 that there are runs for, met or not."""
    lines = []
    for scenario, load in _cells(results):
        by_system = pools(results, scenario, load)
        for rival in ("static", "static_urgent"):
            pair = both(by_system["engine"], by_system[rival]) if {"engine", rival} <= by_system.keys() else None
            if pair and load == ACCEPTED_LOAD:
                lines += [
                    _latency_line(scenario, part, limit, rival, *pair)
                    for part, limit in _LIMITS[scenario].items()
                    if not math.isnan(pair[0].parts[part].p95)
                ]
            elif pair and load >= SATURATED_LOAD:
                ratio = pair[0].work_rate / pair[1].work_rate
                lines.append(f"{_verdict(ratio >= 1)}: {scenario}, saturated: throughput {ratio:.3f} of {rival}'s (1)")
    return lines


def _latency_line(scenario: str, part: str, limit: float, rival: str, ours: Pool, theirs: Pool) -> str:
    our, their = ours.parts[part], theirs.parts[part]
    ratio = our.p95 / their.p95
    return (
        f"{_verdict(ratio <= limit)}: {scenario}, {ACCEPTED_LOAD:.0%}, {part}: p95 {our.p95:.2f} s is {ratio:.3f} of "
        f"{rival}'s (at most {limit:.3f}); the mean is {our.mean / their.mean:.3f} of it; {ours.num_requests} requests"
    )


def _row(pool: Pool, engine: Pool | None) -> str:
    run = pool.runs[0]
    setting = "" if run.system in ("one", "engine") else f"{run.cap_rows} rows"
    setting += f", {run.timeout_s:.2f} s" if run.system == "serve_batch" else ""
    pair = both(engine, pool) if engine else None
    ratio = f"{pair[0].parts['all'].p95 / pair[1].parts['all'].p95:.3f}" if pair else ""
    urgent, others = pool.parts["urgent"], pool.parts["others"]
    return (
        f"| {setting} | {pool.num_requests} | {pool.throughput_per_s:.3f} | {pool.work_rate:.3f} "
        f"| {pool.mean_rows:.1f} | "
        + " | ".join(f"{value:.2f}" for value in pool.parts["all"])
        + f" | {_mean_p95(urgent)} | {_mean_p95(others) if _mean_p95(urgent) else ''} | {ratio} |"
    )


def _mean_p95(latencies: Latencies) -> str:
    return "" if math.isnan(latencies.mean) else f"{latencies.mean:.2f}, {latencies.p95:.2f}"


def _overhead(overhead: Overhead) -> str:
    limit = 0.03 if overhead.num_videos == 1 else 0.01
    return (
        f"{_verdict(overhead.share < limit)}: overhead at {overhead.num_videos} video(s), {overhead.sampler}: "
        f"{overhead.share:.2%} of a step of {overhead.engine_s:.4f} s (under {limit:.0%}; noise {overhead.noise:.2%})"
    )


def _cells(results: Results) -> list[tuple[str, float]]:
    return list(dict.fromkeys((run.scenario, run.load) for run in results.runs))


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "NOT met"
