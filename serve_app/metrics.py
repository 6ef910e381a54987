"""Every metric of the service: its name, what it tells, its labels. Declared here, told by the replicas through Ray.

Ray adds `ray_` before each name, and the labels `application`, `deployment` and `replica`. What it exports of a
histogram is exact in the buckets and the count; the sum is put together from the middles of the buckets.
"""

from dataclasses import dataclass
from typing import Literal, cast

from ray.serve import metrics as ray_metrics

Kind = Literal["counter", "gauge", "histogram"]
Stage = Literal["queue", "text", "denoise", "decode", "encode", "store"]

_STEP_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
_STAGE_S = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    20.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
    1800.0,
)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """A metric as it is declared. Labels have few values: never an id, never a size."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()  # of a histogram's buckets

    @property
    def exported(self) -> str:
        """The name that Prometheus knows it by."""
        return f"ray_{self.name}"


# Of the database. Each Generator tells the same, so that none is missed: take the max over replicas, not the sum.
JOBS = MetricSpec("t2v_jobs", "gauge", "Jobs that are kept, by status.", ("status",))
QUEUE_DEPTH = MetricSpec("t2v_queue_depth", "gauge", "Queued jobs, by priority.", ("priority",))
QUEUE_OLDEST = MetricSpec("t2v_queue_oldest_age_seconds", "gauge", "Age of the oldest queued job; 0 if there is none.")

# Of jobs, each counted once, by whoever made the change.
JOBS_ENDED = MetricSpec("t2v_jobs_ended_total", "counter", "Jobs that ended, by their last status.", ("status",))
ATTEMPTS = MetricSpec("t2v_attempts_total", "counter", "Attempts begun: claims of jobs.")
RETRIES = MetricSpec("t2v_retries_total", "counter", "Jobs queued again after an attempt that failed.")
RESUMES = MetricSpec("t2v_resumes_total", "counter", "Jobs queued again to go on from a checkpoint.")
STEPS_REPEATED = MetricSpec("t2v_steps_repeated_total", "counter", "Steps lost behind a checkpoint, to be done again.")
STAGE_TIME = MetricSpec(
    "t2v_stage_seconds", "histogram", "Time of a request in a stage, its waits there included.", ("stage",), _STAGE_S
)

# Of engines.
STEPS = MetricSpec("t2v_steps_total", "counter", "Denoising steps of whole batches.")
STEP_TIME = MetricSpec("t2v_step_seconds", "histogram", "Time of one step of a batch.", (), _STEP_S)
ROWS = MetricSpec("t2v_rows_total", "counter", "Rows of all steps: two a video with guidance. By steps: rows a step.")
ROW_BUDGET = MetricSpec(
    "t2v_row_budget_total", "counter", "Rows that these steps could have held. Under rows: occupancy."
)
CANCELS = MetricSpec("t2v_cancels_total", "counter", "Requests stopped before their last step, for whatever reason.")
PREVIEWS = MetricSpec("t2v_previews_total", "counter", "Previews drawn.")
OUT_OF_MEMORY = MetricSpec("t2v_out_of_memory_total", "counter", "Steps and previews that did not fit into GPU memory.")
MEMORY_ALLOCATED = MetricSpec("t2v_gpu_memory_allocated_bytes", "gauge", "GPU memory that tensors of the replica take.")
MEMORY_RESERVED = MetricSpec(
    "t2v_gpu_memory_reserved_bytes", "gauge", "GPU memory that the replica holds from its GPU."
)

METRICS: tuple[MetricSpec, ...] = (
    JOBS,
    QUEUE_DEPTH,
    QUEUE_OLDEST,
    JOBS_ENDED,
    ATTEMPTS,
    RETRIES,
    RESUMES,
    STEPS_REPEATED,
    STAGE_TIME,
    STEPS,
    STEP_TIME,
    ROWS,
    ROW_BUDGET,
    CANCELS,
    PREVIEWS,
    OUT_OF_MEMORY,
    MEMORY_ALLOCATED,
    MEMORY_RESERVED,
)


class Metrics:
    """A replica's own. For any thread. Labels are named as their metric declares them."""

    def __init__(self) -> None:
        # Ray's signatures say exactly one label, and mean any number.
        labels = {spec: cast("tuple[str]", spec.labels) for spec in METRICS}
        self._counters = {s: ray_metrics.Counter(s.name, s.help, labels[s]) for s in _of("counter")}
        self._gauges = {s: ray_metrics.Gauge(s.name, s.help, labels[s]) for s in _of("gauge")}
        self._histograms = {
            s: ray_metrics.Histogram(s.name, s.help, list(s.boundaries), labels[s]) for s in _of("histogram")
        }

    def count(self, spec: MetricSpec, by: float = 1, **labels: str) -> None:
        """Add to a counter; nothing is no change."""
        if by > 0:
            self._counters[spec].inc(by, labels)

    def set(self, spec: MetricSpec, value: float, **labels: str) -> None:
        """What a gauge shows from now on."""
        self._gauges[spec].set(value, labels)

    def observe(self, spec: MetricSpec, value: float, **labels: str) -> None:
        """One more value of a histogram."""
        self._histograms[spec].observe(value, labels)

    def stage(self, stage: Stage, seconds: float) -> None:
        """A request has been through a stage."""
        self.observe(STAGE_TIME, seconds, stage=stage)


def table() -> str:
    """All metrics as docs/service.md lists them."""
    lines = ["| metric | kind | labels | |", "|---|---|---|---|"]
    for spec in METRICS:
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        lines.append(f"| `{spec.exported}` | {spec.kind} | {labels} | {spec.help} |")
    return "\n".join(lines)


def _of(kind: Kind) -> list[MetricSpec]:
    return [spec for spec in METRICS if spec.kind == kind]
