"""DDIM (Song et al. 2021)."""

import torch

from t2v_core.samplers.coefficients import Coefficients
from t2v_core.samplers.grids import leading
from t2v_core.schedule import Schedule


def ddim(schedule: Schedule, num_inference_steps: int, first_step: int = 0, eta: float = 0.0) -> Coefficients:
    """Eq. 12. eta 0 is deterministic, eta 1 as noisy as DDPM.

    The step after the last timestep leads to timestep 0, not to a noise of zero, as both references do.
    """
    t = leading(schedule, num_inference_steps)[first_step:]
    s = (t - schedule.num_train_timesteps // num_inference_steps).clamp(min=0)
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    alpha_s, sigma_s = schedule.alpha_sigma(s)

    c = eta * (sigma_s / sigma_t) * (1.0 - (alpha_t / alpha_s) ** 2).clamp(min=0).sqrt()  # eq. 16
    a = (sigma_s**2 - c**2).clamp(min=0).sqrt() / sigma_t
    b = torch.zeros(len(t), 3, dtype=torch.float64)
    b[:, 0] = alpha_s - a * alpha_t
    return Coefficients(t, alpha_t, sigma_t, a, b, c)
