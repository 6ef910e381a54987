"""The timesteps that samplers visit, as diffusers spaces them for this family. All: (n,), float64, falling."""

import torch
from torch import Tensor

from t2v_core.schedule import Schedule


def leading(schedule: Schedule, n: int) -> Tensor:
    """Multiples of 1000 // n, plus one: 981, 961, ..., 1 for 50 steps."""
    spacing = schedule.num_train_timesteps // n
    return torch.arange(n - 1, -1, -1, dtype=torch.float64) * spacing + 1


def linspace(schedule: Schedule, n: int) -> Tensor:
    """Even spacing from the noisiest timestep to 0, both included: 999, 957.375, ..., 0 for 25 steps."""
    last = schedule.num_train_timesteps - 1
    if n == 1:
        return torch.tensor([float(last)], dtype=torch.float64)
    return torch.linspace(last, 0, n, dtype=torch.float64)


def linspace_integers(schedule: Schedule, n: int) -> Tensor:
    """n + 1 evenly spaced timesteps, rounded, without the final 0: 999, 959, ..., 40 for 25 steps."""
    # The exact expression matters: where a product ends in .5 (30 steps), another order rounds another way.
    spacing = (schedule.num_train_timesteps - 1) / n
    return (torch.arange(n + 1, dtype=torch.float64) * spacing).round().flip(0)[:-1]
