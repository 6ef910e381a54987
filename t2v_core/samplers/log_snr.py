"""Half the log signal-to-noise ratio along a grid: the variable in which the fast solvers are written."""

import torch
from torch import Tensor

from t2v_core.schedule import Schedule


class LogSNR:
    """lambda = log(alpha / sigma) at each of n timesteps, and at the end: alpha 1, sigma 0, lambda infinite.

    alphas, sigmas, lambdas: (n + 1,), float64.
    """

    def __init__(self, schedule: Schedule, timesteps: Tensor) -> None:
        alphas, sigmas = schedule.alpha_sigma(timesteps)
        self.alphas = torch.cat([alphas, alphas.new_ones(1)])
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        self.lambdas = self.alphas.log() - self.sigmas.log()
