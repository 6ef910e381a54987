"""DPM-Solver++ in its multistep forms of order 2 and 3 (Lu et al. 2022), ending at a noise of zero."""

import torch

from t2v_core.samplers.coefficients import Coefficients
from t2v_core.samplers.grids import linspace_integers
from t2v_core.samplers.log_snr import LogSNR
from t2v_core.schedule import Schedule

_FEW_STEPS = 15  # below this, the last steps fall back to lower orders one by one


def dpmpp_2m(schedule: Schedule, num_inference_steps: int, first_step: int = 0) -> Coefficients:
    """Order 2, midpoint."""
    return _dpmpp(schedule, num_inference_steps, first_step, max_order=2)


def dpmpp_3m(schedule: Schedule, num_inference_steps: int, first_step: int = 0) -> Coefficients:
    """Order 3."""
    return _dpmpp(schedule, num_inference_steps, first_step, max_order=3)


def _dpmpp(schedule: Schedule, n: int, first_step: int, *, max_order: int) -> Coefficients:
    timesteps = linspace_integers(schedule, n)
    snr = LogSNR(schedule, timesteps)
    a = torch.zeros(n, dtype=torch.float64)
    b = torch.zeros(n, 3, dtype=torch.float64)
    for i in range(first_step, n):
        order = min(max_order, i - first_step + 1)
        if i == n - 1:
            order = 1
        elif i == n - 2 and n < _FEW_STEPS:
            order = min(order, 2)
        a[i], b[i] = _step(snr, i, order)
    rows = slice(first_step, None)
    alpha, sigma = schedule.alpha_sigma(timesteps[rows])
    return Coefficients(timesteps[rows], alpha, sigma, a[rows], b[rows], torch.zeros_like(alpha))


def _step(snr: LogSNR, i: int, order: int) -> tuple[float, torch.Tensor]:
    """The scalars of x_i and of (D_i, D_{i-1}, D_{i-2}) in x_{i+1}."""
    h = snr.lambdas[i + 1] - snr.lambdas[i]
    alpha = snr.alphas[i + 1]
    em1 = torch.expm1(-h)

    # Divided differences of D over lambda, as weights on (D_i, D_{i-1}, D_{i-2}).
    d0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    b = -alpha * em1 * d0
    if order >= 2:
        r0 = (snr.lambdas[i] - snr.lambdas[i - 1]) / h
        d1_0 = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64) / r0
        if order == 2:
            b = b - 0.5 * alpha * em1 * d1_0
        else:
            r1 = (snr.lambdas[i - 1] - snr.lambdas[i - 2]) / h
            d1_1 = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64) / r1
            d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            b = b + alpha * (em1 / h + 1.0) * d1 - alpha * ((em1 + h) / h**2 - 0.5) * d2
    return (snr.sigmas[i + 1] / snr.sigmas[i]).item(), b
