"""Every sampler takes the steps that diffusers' scheduler of this family takes."""

import diffusers
import pytest
import torch
from einops import rearrange
from references import relative_error
from torch import Tensor

from t2v_core.config import SAMPLER_NAMES, ScheduleConfig
from t2v_core.samplers import coefficients, update
from t2v_core.schedule import Schedule
from t2v_core.shapes import LatentShape
from t2v_core.trajectory import NoiseSource

SHAPE = LatentShape(4, 3, 8, 8)
SCHEDULE = Schedule(ScheduleConfig())
FAMILY = diffusers.DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "linspace"}),
    "dpmpp_3m": (diffusers.DPMSolverMultistepScheduler, {"timestep_spacing": "linspace", "solver_order": 3}),
    "unipc": (diffusers.UniPCMultistepScheduler, {"timestep_spacing": "linspace"}),
}


def network(x: Tensor, timestep: float) -> Tensor:
    """A noise prediction that depends on everything and has no symmetry that could hide a mistake."""
    phase = torch.sin(torch.tensor(timestep / 100.0))
    return 0.9 * torch.tanh(1.3 * x + 0.1 * phase) + 0.1 * x.roll(1, -1)


def ours(sampler: str, steps: int, first_step: int = 0, x0: Tensor | None = None, eta: float = 0.0):
    plan = coefficients(sampler, SCHEDULE, steps, first_step=first_step, eta=eta)
    source = NoiseSource(seed=3)
    noise = source.video(SHAPE)
    x = plan.noise_scale * noise if x0 is None else plan.alpha[0].float() * x0 + plan.sigma[0].float() * noise
    x, history = x[None], torch.zeros(1, 2, *SHAPE)
    for i in range(plan.num_steps):
        eps = network(x, plan.timesteps[i].item())
        step_noise = source.frames(SHAPE)[None] if plan.draws_noise(i) else None
        x, history = update(x, eps, history, step_noise, plan.row(i)[None])
    return x, plan.timesteps.tolist()


def theirs(sampler: str, steps: int, first_step: int = 0, x0: Tensor | None = None, eta: float = 0.0):
    cls, settings = SCHEDULERS[sampler]
    scheduler = cls.from_config(FAMILY.config, **settings)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, *SHAPE, generator=generator)
    timesteps = scheduler.timesteps[first_step:]
    if x0 is None:
        x = noise * scheduler.init_noise_sigma
    else:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first_step)
        x = scheduler.add_noise(x0[None], noise, timesteps[:1])
    extra = {"generator": generator} if sampler in ("ddim", "euler", "euler_a") else {}
    if eta:
        extra["eta"] = eta
    for t in timesteps:
        eps = network(scheduler.scale_model_input(x, t), float(t))
        # The pipeline hands frames over as images, and so draws noise in that order.
        images, eps = (rearrange(v, "b c f h w -> (b f) c h w") for v in (x, eps))
        x = rearrange(scheduler.step(eps, t, images, **extra).prev_sample, "(b f) c h w -> b c f h w", b=1)
    return x, timesteps.tolist()


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
@pytest.mark.parametrize("steps", [2, 3, 4, 5, 9, 14, 15, 25, 30, 50, 100])
def test_the_path_is_that_of_diffusers(sampler, steps):
    x, timesteps = ours(sampler, steps)
    x_reference, timesteps_reference = theirs(sampler, steps)
    assert timesteps == pytest.approx(timesteps_reference, abs=1e-4)
    assert relative_error(x, x_reference) <= 1e-5


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
@pytest.mark.parametrize(("steps", "first_step"), [(10, 7), (25, 10), (30, 12), (50, 0), (50, 49)])
def test_the_path_from_a_noised_video_is_that_of_diffusers(sampler, steps, first_step):
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    x, timesteps = ours(sampler, steps, first_step, x0)
    x_reference, timesteps_reference = theirs(sampler, steps, first_step, x0)
    assert timesteps == pytest.approx(timesteps_reference, abs=1e-4)
    assert relative_error(x, x_reference) <= 1e-5


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta_is_that_of_diffusers(eta):
    x, _ = ours("ddim", 25, eta=eta)
    x_reference, _ = theirs("ddim", 25, eta=eta)
    assert relative_error(x, x_reference) <= 1e-5
    assert relative_error(x, ours("ddim", 25)[0]) > 1e-2


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_with_a_perfect_network_every_sampler_finds_the_video(sampler):
    """If eps always points from x to one and the same x0, then every step that ends at no noise must end at x0."""
    x0 = torch.randn(1, *SHAPE, dtype=torch.float64)
    plan = coefficients(sampler, SCHEDULE, 20)
    x, history = torch.randn(1, *SHAPE, dtype=torch.float64), torch.zeros(1, 2, *SHAPE, dtype=torch.float64)
    for i in range(plan.num_steps):
        eps = (x - plan.alpha[i] * x0) / plan.sigma[i]
        x, history = update(x, eps, history, torch.randn_like(x), plan.row(i)[None])
    tolerance = 0.2 if sampler == "ddim" else 1e-9  # ddim ends at timestep 0, which has a little noise
    torch.testing.assert_close(x, x0, rtol=0, atol=tolerance)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
@pytest.mark.parametrize("steps", [1, 7, 334, 999])
def test_every_number_of_steps_has_a_finite_plan(sampler, steps):
    plan = coefficients(sampler, SCHEDULE, steps)
    assert plan.num_steps == steps
    assert all(plan.row(i).isfinite().all() for i in range(steps))
    assert (plan.timesteps.diff() < 0).all()
