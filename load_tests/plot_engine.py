"""Draws the results of `bench_engine.py`: latency over load, and its distribution at 80 % of capacity.

pip install matplotlib
python load_tests/plot_engine.py build/engine.json build/engine.png
"""

import argparse
from pathlib import Path
from typing import Any

from figures import ACCEPTED_LOAD, SATURATED_LOAD, pools
from results import Results
from systems import SYSTEMS

_LABELS = {
    "one": "one at a time",
    "serve_batch": "serve.batch",
    "static": "static batches at their best",
    "static_urgent": "the same, urgent first",
    "engine": "engine",
}
_COLOURS = dict(zip(SYSTEMS, ("#9e9e9e", "#c58b4a", "#4a7fb5", "#9bbfe0", "#c0392b"), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path, help=".png, .svg or .pdf")
    arguments = parser.parse_args()
    draw(Results.load(arguments.results)).savefig(arguments.picture, dpi=150)


def draw(results: Results) -> Any:  # matplotlib's Figure, which is not imported for its type alone
    """A column a scenario: below, what was found at 80 % of capacity; above, at several loads, where there are some."""
    from matplotlib.figure import Figure

    scenarios = list(dict.fromkeys(run.scenario for run in results.runs))
    has_loads = len({run.load for run in results.runs if run.load < SATURATED_LOAD}) > 1
    num_rows = 2 if has_loads else 1
    figure = Figure(figsize=(4.6 * len(scenarios), 3.9 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, len(scenarios), squeeze=False)
    for scenario, column in zip(scenarios, axes.T, strict=True):
        column[0].set_title(scenario)
        _draw_distribution(column[-1], results, scenario)
        if has_loads:
            _draw_over_load(column[0], results, scenario)
    handles, labels = axes[-1][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    setup = results.setup
    figure.suptitle(
        f"{'Simulated: ' if setup.simulated else ''}{setup.machine}, {setup.dtype.removeprefix('torch.')}, "
        f"{setup.num_jobs} requests a run, 20/25/50 steps times {setup.step_scale:g}"
    )
    return figure


def _draw_over_load(axes: Any, results: Results, scenario: str) -> None:
    loads = sorted({run.load for run in results.runs if run.scenario == scenario and run.load < SATURATED_LOAD})
    by_load = {load: pools(results, scenario, load) for load in loads}
    for system in SYSTEMS:
        points = [(100 * load, by_load[load][system].parts["all"].p95) for load in loads if system in by_load[load]]
        urgent = [(100 * load, by_load[load][system].parts["urgent"].p95) for load in loads if system in by_load[load]]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=_COLOURS[system])
            axes.plot(
                *zip(*urgent, strict=True), ":", marker=".", color=_COLOURS[system]
            )  # nothing where there are none
    axes.set(xlabel=f"load, % of capacity{_dots(results, scenario)}", ylabel="p95 latency, s", yscale="log")
    _label(axes.yaxis)
    axes.grid(which="both", alpha=0.2)


def _draw_distribution(axes: Any, results: Results, scenario: str) -> None:
    """The share of requests, and apart of urgent ones in dots, that took at most so long."""
    by_system = pools(results, scenario, ACCEPTED_LOAD)
    for system, pool in sorted(by_system.items(), key=lambda item: SYSTEMS.index(item[0])):
        pairs = [pair for run in pool.runs for pair in zip(run.latencies_s, run.is_urgent, strict=True)]
        for latencies, style, label in (
            (sorted(latency for latency, is_urgent in pairs if not is_urgent), "-", _LABELS[system]),
            (sorted(latency for latency, is_urgent in pairs if is_urgent), ":", None),
        ):
            shares = [(number + 1) / len(latencies) for number in range(len(latencies))]
            axes.plot(latencies, shares, style, label=label, color=_COLOURS[system], drawstyle="steps-post")
    dots = _dots(results, scenario)
    axes.set(xlabel=f"latency at {ACCEPTED_LOAD:.0%} load, s{dots}", ylabel="share of requests", xscale="log")
    _label(axes.xaxis)
    axes.grid(which="both", alpha=0.2)


def _dots(results: Results, scenario: str) -> str:
    has_urgent = any(any(run.is_urgent) for run in results.runs if run.scenario == scenario)
    return "; dots: urgent ones" if has_urgent else ""


def _label(axis: Any) -> None:
    """A logarithmic axis in plain seconds."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    main()
