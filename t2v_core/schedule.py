"""The noise schedule: how much of a training sample was left at each timestep."""

import torch
from torch import Tensor

from t2v_core.config import ScheduleConfig


class Schedule:
    """x_t = alpha_t x0 + sigma_t noise, with alpha_t^2 + sigma_t^2 = 1. Everything in float64."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.num_train_timesteps = config.num_train_timesteps
        roots = torch.linspace(
            config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps, dtype=torch.float64
        )
        self.alphas_cumprod = torch.cumprod(1.0 - roots**2, dim=0)

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise scales at timesteps in [0, 999]: (n,) -> two of (n,).

        Between two integers, sigma / alpha is linear in the timestep, as in diffusers' Euler.
        """
        ratios = ((1.0 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        below = timesteps.floor().long()
        above = timesteps.ceil().long()
        ratio = torch.lerp(ratios[below], ratios[above], timesteps.double() - below)
        alpha = (1.0 + ratio**2).rsqrt()
        return alpha, ratio * alpha
