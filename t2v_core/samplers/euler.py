"""Euler's method on the probability-flow ODE, and its ancestral variant (Karras et al. 2022; k-diffusion).

Both work on x / alpha, in which the noise has the standard deviation k = sigma / alpha.
"""

import torch
from torch import Tensor

from t2v_core.samplers.coefficients import Coefficients
from t2v_core.samplers.grids import linspace
from t2v_core.schedule import Schedule


def euler(schedule: Schedule, num_inference_steps: int, first_step: int = 0) -> Coefficients:
    """Algorithm 1 without churn."""
    return _euler(schedule, num_inference_steps, first_step, ancestral=False)


def euler_a(schedule: Schedule, num_inference_steps: int, first_step: int = 0) -> Coefficients:
    """Each step goes below its target's noise level and adds fresh noise to come back to it."""
    return _euler(schedule, num_inference_steps, first_step, ancestral=True)


def _euler(schedule: Schedule, num_inference_steps: int, first_step: int, *, ancestral: bool) -> Coefficients:
    timesteps = linspace(schedule, num_inference_steps)
    alpha_t, sigma_t = schedule.alpha_sigma(timesteps)
    alpha_s, sigma_s = _shift(alpha_t, 1.0), _shift(sigma_t, 0.0)
    k_t, k_s = sigma_t / alpha_t, sigma_s / alpha_s

    k_up = k_s * (1.0 - (k_s / k_t) ** 2).sqrt() if ancestral else torch.zeros_like(k_s)
    k_down = (k_s**2 - k_up**2).sqrt()
    a = (k_down / k_t) * (alpha_s / alpha_t)
    b = torch.zeros(len(timesteps), 3, dtype=torch.float64)
    b[:, 0] = alpha_s * (1.0 - k_down / k_t)
    c = alpha_s * k_up
    # diffusers starts with noise of k_0 where sqrt(1 + k_0^2) would be the schedule's; in this frame: sigma_0.
    noise_scale = sigma_t[0].item()
    rows = slice(first_step, None)
    return Coefficients(
        timesteps[rows], alpha_t[rows], sigma_t[rows], a[rows], b[rows], c[rows], noise_scale=noise_scale
    )


def _shift(values: Tensor, final: float) -> Tensor:
    """Each value's successor; the last one's is `final`."""
    return torch.cat([values[1:], torch.tensor([final], dtype=values.dtype)])
