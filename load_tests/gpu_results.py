"""What `bench_gpu.py` found: its results file, and the table and plot of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_peers import CASES, UNetStep
from pydantic import BaseModel, ConfigDict

SYSTEMS = UNetStep.systems
CASE_NAMES = tuple(case.name for case in CASES)

_OURS = "t2v+graphs"  # as it is served
_COLOURS = dict(zip(SYSTEMS, ("#9e9e9e", "#c58b4a", "#4a7fb5", "#c0392b", "#7d3c98"), strict=True))


class Figures(BaseModel):
    """What was measured of a system that worked."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    error: float | None  # None where there is no reference; not a number where the result is none
    first_call_s: float
    min_ms: float
    median_ms: float
    p90_ms: float
    video_ms: float  # median_ms by the number of videos
    memory_bytes: int | None  # None on a CPU
    repeats: int


class Record(BaseModel):
    """One system in one case: its figures, or why there are none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: str
    case: str
    system: str
    figures: Figures | None = None
    failure: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.machine, self.case, self.system


class Results(BaseModel):
    """The results file."""

    model_config = ConfigDict(extra="forbid")

    records: list[Record] = []

    @classmethod
    def load(cls, path: Path) -> "Results":
        return cls.model_validate_json(path.read_text())

    def put(self, record: Record, path: Path) -> None:
        """Instead of an earlier one of the same key; saved whole or not at all."""
        self.records = [*(other for other in self.records if other.key != record.key), record]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial")
        partial_path.write_text(self.model_dump_json(indent=1))
        partial_path.replace(path)


def report(results: Results, machine: str) -> str:
    """A table for each machine, that of `machine` last."""
    lines = []
    machines = {record.machine for record in results.records}
    for name in sorted(machines, key=lambda name: (name == machine, name)):
        records = _in_order([record for record in results.records if record.machine == name])
        lines += [
            "",
            name,
            "",
            "| case | system | ms a step | ms a video | times ours | error | memory, GiB | first call, s |",
            "|---|---|---|---|---|---|---|---|",
            *(_row(record, records) for record in records),
        ]
    return "\n".join(lines) or "nothing was measured"


def _row(record: Record, records: Sequence[Record]) -> str:
    figures = record.figures
    if figures is None:
        return f"| {record.case} | {record.system} | failed: {record.failure} ||||||"
    ours = next((other.figures for other in records if (other.case, other.system) == (record.case, _OURS)), None)
    ratio = "" if ours is None else f"{figures.median_ms / ours.median_ms:.2f}"
    memory = "" if figures.memory_bytes is None else f"{figures.memory_bytes / 2**30:.2f}"
    return (
        f"| {record.case} | {record.system} | {figures.median_ms:.2f} | {figures.video_ms:.2f} | {ratio} "
        f"| {error_of(figures)} | {memory} | {figures.first_call_s:.1f} |"
    )


def draw(results: Results) -> Any:  # matplotlib's Figure, which is not imported for its type alone
    """A row a machine, a column a case, a bar a system."""
    from matplotlib.figure import Figure

    measured = [record for record in results.records if record.figures is not None]
    machines = list(dict.fromkeys(record.machine for record in measured))
    names = [name for name in CASE_NAMES if any(record.case == name for record in measured)]
    if not names:
        raise SystemExit("the results file holds no measurements to draw")
    figure = Figure(figsize=(1.2 + 2.2 * len(names), 0.6 + 3.4 * len(machines)), layout="constrained")
    for part, machine in zip(figure.subfigures(len(machines), 1, squeeze=False)[:, 0], machines, strict=True):
        part.suptitle(f"ms a video: {machine}", fontsize="medium")
        for axes, name in zip(part.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            _draw_case(axes, name, [record for record in measured if (record.machine, record.case) == (machine, name)])
    return figure


def _draw_case(axes: Any, name: str, records: Sequence[Record]) -> None:
    for record in _in_order(records):
        assert record.figures is not None
        bars = axes.bar(record.system, record.figures.video_ms, color=_COLOURS[record.system])
        axes.bar_label(bars, fmt="{:#.3g}" if record.figures.video_ms < 100 else "{:.0f}")
    axes.set_title(_title(name), fontsize="medium")
    for label in axes.get_xticklabels():
        label.set(rotation=40, horizontalalignment="right", rotation_mode="anchor")
    axes.margins(y=0.15)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _title(name: str) -> str:
    case = next(case for case in CASES if case.name == name)
    videos = "1 video" if case.num_videos == 1 else f"{case.num_videos} videos"
    return f"{'decode' if case.is_decode else f'step of {videos}'},\n{' x '.join(map(str, case.shape))}"


def _in_order(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: (CASE_NAMES.index(record.case), SYSTEMS.index(record.system)))


def error_of(figures: Figures) -> str:
    return "unknown" if figures.error is None else f"{figures.error:.1e}"
