"""The results file of `bench_engine.py`: what was measured so far, to go on with, to report and to plot."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from t2v_core.engine import Profile


class Setup(BaseModel):
    """What all runs of a file have in common; runs of another setup belong into another file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: str
    dtype: str
    tiny: bool
    simulated: bool
    step_scale: float
    num_jobs: int


class RunRecord(BaseModel):
    """One trace served by one system. Latencies in seconds from arrival to the last step, in order of arrival."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scenario: str
    load: float
    system: str
    seed: int
    cap_rows: int
    timeout_s: float
    rate_per_s: float
    end_s: float  # when the last answer came
    num_steps: int
    num_rows: int
    work_rate: float  # see driving.py
    latencies_s: tuple[float, ...]
    is_urgent: tuple[bool, ...]

    @property
    def key(self) -> tuple[str, float, str, int]:
        return self.scenario, self.load, self.system, self.seed


class Overhead(BaseModel):
    """Medians of the engine's step and of the bare UNet call on the same rows, taken by turns.

    `noise` is how far two series of the bare call lie apart, as a share of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampler: str
    num_videos: int
    engine_s: float
    unet_s: float
    noise: float

    @property
    def share(self) -> float:
        """The share of a step that is not the UNet."""
        return 1.0 - self.unet_s / self.engine_s


class Results(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid")

    setup: Setup
    profile: Profile
    runs: list[RunRecord] = []
    overheads: list[Overhead] = []

    @classmethod
    def load(cls, path: Path) -> "Results":
        return cls.model_validate_json(path.read_text())

    def save(self, path: Path) -> None:
        """Whole or not at all, so that a run that is killed loses none of those before it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(self.model_dump_json(indent=1))
        partial.replace(path)
