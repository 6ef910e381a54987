"""Samplers: each one turns a noise schedule into a table of coefficients; one `update` applies them all."""

from t2v_core.config import SamplerName
from t2v_core.samplers.coefficients import Coefficients, update
from t2v_core.samplers.ddim import ddim
from t2v_core.samplers.dpmpp import dpmpp_2m, dpmpp_3m
from t2v_core.samplers.euler import euler, euler_a
from t2v_core.samplers.unipc import unipc
from t2v_core.schedule import Schedule

__all__ = ["Coefficients", "coefficients", "update"]


_SAMPLERS = {
    "euler": euler,
    "euler_a": euler_a,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "unipc": unipc,
}


def coefficients(
    sampler: SamplerName, schedule: Schedule, num_inference_steps: int, *, first_step: int = 0, eta: float = 0.0
) -> Coefficients:
    """A sampler's plan, by its name, for `num_inference_steps` steps of which those before `first_step` are left out.

    A video-to-video request starts late, at the noise level of its first step, on the grid of all steps.
    `eta` is DDIM's alone.
    """
    if sampler == "ddim":
        return ddim(schedule, num_inference_steps, first_step, eta)
    return _SAMPLERS[sampler](schedule, num_inference_steps, first_step)
