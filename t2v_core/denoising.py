"""One denoising step of a batch of requests: what the pipeline does for one and the engine for many."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from t2v_core.guidance import BatchConditioning, Conditioning, predict_eps
from t2v_core.out_of_memory import out_of_memory_explained
from t2v_core.samplers import Coefficients, update
from t2v_core.trajectory import NoiseSource, Trajectory
from t2v_core.transfers import to_device
from t2v_core.unet3d import NoisePredictor


@dataclass(frozen=True, slots=True, eq=False)
class Denoising:
    """A request between two steps: where it stands, its sampler's scalars, and what steers it."""

    trajectory: Trajectory
    plan: Coefficients
    conditioning: Conditioning


@torch.inference_mode()
@out_of_memory_explained()
def denoise_step(unet: NoisePredictor, batch: Sequence[Denoising], conditioning: BatchConditioning) -> list[Denoising]:
    """Every request one step further. They share a latent shape and may differ in all else.

    `conditioning` is made of the requests' own, in this order. A GPU is only given its work: nothing here waits for it.
    Raises OutOfMemory.
    """
    latents = torch.stack([request.trajectory.latents for request in batch])
    history = torch.stack([request.trajectory.history for request in batch])
    steps = [request.trajectory.step_index for request in batch]
    timesteps = torch.stack([request.plan.timesteps[i] for request, i in zip(batch, steps, strict=True)])
    rows = torch.stack([request.plan.row(i) for request, i in zip(batch, steps, strict=True)])

    eps = predict_eps(unet, latents, to_device(timesteps, latents.device, torch.float32), conditioning)
    noise, noise_states = _draw_noise(batch, latents)  # a GPU is still at the prediction
    rows = to_device(rows, latents.device, latents.dtype)
    latents, history = update(latents, eps, history, noise, rows)
    return [
        replace(request, trajectory=Trajectory(x, past, state, request.trajectory.num_steps, i + 1))
        for request, x, past, state, i in zip(batch, latents, history, noise_states, steps, strict=True)
    ]


def _draw_noise(batch: Sequence[Denoising], latents: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """Each request's own noise, (b, c, f, h, w), where its sampler wants any; and where its source stands then."""
    states = [request.trajectory.noise_state for request in batch]
    drawing = [row for row, request in enumerate(batch) if request.plan.draws_noise(request.trajectory.step_index)]
    if not drawing:
        return None, states
    b, c, f, h, w = latents.shape
    frames = torch.empty(b, f, c, h, w, pin_memory=latents.is_cuda)
    for row, of_row in enumerate(frames):
        if row in drawing:
            source = NoiseSource(state=states[row])
            source.fill(of_row)
            states[row] = source.state
        else:
            of_row.zero_()  # nothing times what happens to be there may be no number
    return rearrange(to_device(frames, latents.device, latents.dtype), "b f c h w -> b c f h w"), states
