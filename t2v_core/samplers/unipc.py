"""UniPC of order 2 (Zhao et al. 2023), B(h) = e^h - 1, predicting x0, ending at a noise of zero.

The method predicts x_{i+1} and corrects it once D_{i+1} is known, without another call of the network. Corrected
minus predicted is linear in the D's, so the correction of x_i is folded into the step from i to i + 1.
"""

import torch
from torch import Tensor

from t2v_core.samplers.coefficients import Coefficients
from t2v_core.samplers.grids import linspace_integers
from t2v_core.samplers.log_snr import LogSNR
from t2v_core.schedule import Schedule


def unipc(schedule: Schedule, num_inference_steps: int, first_step: int = 0) -> Coefficients:
    """Algorithms 5 to 8 as one table."""
    n = num_inference_steps
    timesteps = linspace_integers(schedule, n)
    snr = LogSNR(schedule, timesteps)
    a = torch.zeros(n, dtype=torch.float64)
    b = torch.zeros(n, 3, dtype=torch.float64)
    order = 0  # of the previous step
    for i in range(first_step, n):
        correction = _correction(snr, i, order) if order else torch.zeros(3, dtype=torch.float64)
        order = min(2, n - i, i - first_step + 1)
        a[i] = snr.sigmas[i + 1] / snr.sigmas[i]
        b[i] = a[i] * correction + _prediction(snr, i, order)
    rows = slice(first_step, None)
    alpha, sigma = schedule.alpha_sigma(timesteps[rows])
    return Coefficients(timesteps[rows], alpha, sigma, a[rows], b[rows], torch.zeros_like(alpha))


def _prediction(snr: LogSNR, i: int, order: int) -> Tensor:
    """The weights of (D_i, D_{i-1}, D_{i-2}) in the predicted x_{i+1}."""
    h = snr.lambdas[i + 1] - snr.lambdas[i]
    b_h = torch.expm1(-h)
    weights = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    if order == 2:
        r = (snr.lambdas[i - 1] - snr.lambdas[i]) / h
        weights = weights + 0.5 / r * torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64)
    return -snr.alphas[i + 1] * b_h * weights


def _correction(snr: LogSNR, i: int, order: int) -> Tensor:
    """The weights of (D_i, D_{i-1}, D_{i-2}) in corrected minus predicted x_i, which a step of `order` predicted."""
    h = snr.lambdas[i] - snr.lambdas[i - 1]
    b_h = torch.expm1(-h)
    newest = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)  # D_i - D_{i-1}
    if order == 1:
        return -snr.alphas[i] * b_h * 0.5 * newest
    # The 2 x 2 system of eq. 9: rho_0 + rho_1 = g_1, r rho_0 + rho_1 = g_2.
    r = (snr.lambdas[i - 2] - snr.lambdas[i - 1]) / h
    phi_2 = b_h / -h - 1.0
    phi_3 = phi_2 / -h - 0.5
    g_1, g_2 = phi_2 / b_h, 2.0 * phi_3 / b_h
    rho_0 = (g_1 - g_2) / (1.0 - r)
    rho_1 = g_1 - rho_0
    older = torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64) / r  # (D_{i-2} - D_{i-1}) / r
    return -snr.alphas[i] * b_h * ((rho_0 - 0.5) * older + rho_1 * newest)
