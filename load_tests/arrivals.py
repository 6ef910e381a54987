"""Which requests come, and when: seeded traces that every system under test is given alike."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from t2v_core.engine import Priority, Profile
from t2v_core.shapes import LatentShape

T = TypeVar("T")

ROWS_A_VIDEO = 2  # guidance is on

_BASE = LatentShape(4, 16, 32, 32)  # 16 frames of 256x256
_SHORT = LatentShape(4, 8, 32, 32)  # 8 frames of 256x256
_LARGE = LatentShape(4, 24, 40, 72)  # 24 frames of 576x320, a step of which costs 4.4 times as much


class Kind(NamedTuple):
    """What a request wants."""

    shape: LatentShape
    num_steps: int


@dataclass(frozen=True, slots=True)
class Scenario:
    """A mix of requests: the share of each kind, and the share of urgent ones among all."""

    kinds: Mapping[Kind, float]
    urgent: float = 0.0

    @property
    def priorities(self) -> dict[Priority, float]:
        return {"urgent": self.urgent, "normal": 1.0 - self.urgent}

    @property
    def shapes(self) -> list[LatentShape]:
        return sorted({kind.shape for kind in self.kinds})

    def scaled(self, step_scale: float, *, tiny: bool = False) -> "Scenario":
        """With so many times the steps and, for a tiny network on a CPU, a 64th of the latents."""
        return replace(
            self,
            kinds={
                Kind(_tiny(kind.shape) if tiny else kind.shape, max(1, round(kind.num_steps * step_scale))): share
                for kind, share in self.kinds.items()
            },
        )


_MIXED = {
    Kind(shape, num_steps): share / 3
    for shape, share in {_BASE: 0.6, _SHORT: 0.3, _LARGE: 0.1}.items()
    for num_steps in (20, 25, 50)
}

SCENARIOS: dict[str, Scenario] = {
    "identical": Scenario({Kind(_BASE, 25): 1.0}),
    "mixed": Scenario(_MIXED),
    "urgent": Scenario(_MIXED, urgent=0.1),
    "urgent_identical": Scenario({Kind(_BASE, 25): 1.0}, urgent=0.1),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a trace."""

    id: str
    arrival_s: float
    kind: Kind
    priority: Priority = "normal"

    @property
    def rows(self) -> int:
        return ROWS_A_VIDEO


def base_shape(*, tiny: bool = False) -> LatentShape:
    """The usual size: caps and overheads are stated for it."""
    return _tiny(_BASE) if tiny else _BASE


def trace(scenario: Scenario, num_jobs: int, rate_per_s: float, seed: int) -> list[Job]:
    """Poisson arrivals, of which as many come in the whole time as the rate says, so that short traces have their load.

    The shares of kinds and of urgent ones are kept exactly as well, in random order. The same seed gives the same jobs
    at every rate, nearer to each other or farther apart, and the same but for priorities where the kinds are the same.
    """
    source = random.Random(seed)
    arrivals_s = sorted(source.uniform(0.0, num_jobs / rate_per_s) for _ in range(num_jobs))
    kinds = _shuffled(scenario.kinds, num_jobs, source)
    priorities = _shuffled(scenario.priorities, num_jobs, source)
    return [Job(f"job-{number}", *job) for number, job in enumerate(zip(arrivals_s, kinds, priorities, strict=True))]


def capacity_per_s(scenario: Scenario, profile: Profile) -> float:
    """The best rate of this mix that could be sustained: every step at the rows of its shape's best throughput."""
    return 1.0 / sum(share * work_s(kind, profile) for kind, share in scenario.kinds.items())


def work_s(kind: Kind, profile: Profile) -> float:
    """Seconds of the device that a request costs at the least: its steps in the fullest, most efficient batches."""
    row_s = min(m.step_s / m.rows for m in profile.measurements if m.shape == kind.shape)
    return kind.num_steps * ROWS_A_VIDEO * row_s


def _shuffled(shares: Mapping[T, float], number: int, source: random.Random) -> list[T]:
    """So many values in random order, each as often as its share says, the largest remainders rounded up."""
    counts = {value: math.floor(share * number) for value, share in shares.items()}
    by_remainder = sorted(shares, key=lambda value: counts[value] - shares[value] * number)
    for value in by_remainder[: number - sum(counts.values())]:
        counts[value] += 1
    values = [value for value, count in counts.items() for _ in range(count)]
    source.shuffle(values)
    return values


def _tiny(shape: LatentShape) -> LatentShape:
    return LatentShape(shape.channels, shape.num_frames // 4, shape.height // 4, shape.width // 4)
