"""One denoising step of a batch of requests: what the pipeline does for one and the engine for many."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from t2v_core.guidance import BatchConditioning, Conditioning, predict_eps, predict_eps_and_features
from t2v_core.out_of_memory import out_of_memory_explained
from t2v_core.samplers import Coefficients, update
from t2v_core.trajectory import NoiseSource, Trajectory
from t2v_core.transfers import to_device
from t2v_core.unet3d import NoisePredictor

_EARLY_SHARE = 0.2  # of a request's steps


class Features(NamedTuple):
    """What the UNet's coarser resolutions made of a request, by row: (f, h, w, c).

    `age`: how many steps ago the oldest in its batch was made.
    """

    of_rows: tuple[Tensor, ...]
    age: int


@dataclass(frozen=True, slots=True, eq=False)
class Denoising:
    """A request between two steps: where it stands, its sampler's scalars, and what steers it.

    `features` are there only where steps may reuse them, and go with no trajectory: it goes on without.
    """

    trajectory: Trajectory
    plan: Coefficients
    conditioning: Conditioning
    features: Features | None = None


@torch.inference_mode()
@out_of_memory_explained()
def denoise_step(
    unet: NoisePredictor, batch: Sequence[Denoising], conditioning: BatchConditioning, *, cached_steps: int = 0
) -> list[Denoising]:
    """Every request one step further. They share a latent shape and may differ in all else.

    `conditioning` is made of the requests' own, in this order. A GPU is only given its work: nothing here waits for it.
    With `cached_steps`, so many steps in a row may use the features of the one before them, which is faster and not
    exact: not a request's first ones, which decide what the video shows. Raises OutOfMemory.
    """
    latents = torch.stack([request.trajectory.latents for request in batch])
    history = torch.stack([request.trajectory.history for request in batch])
    steps = [request.trajectory.step_index for request in batch]
    timesteps = torch.stack([request.plan.timesteps[i] for request, i in zip(batch, steps, strict=True)])
    rows = torch.stack([request.plan.row(i) for request, i in zip(batch, steps, strict=True)])

    timesteps = to_device(timesteps, latents.device, torch.float32)
    features: list[Features | None] = [None] * len(batch)
    if cached_steps:
        reused, age = _reusable(batch, cached_steps)
        eps, made = predict_eps_and_features(unet, latents, timesteps, conditioning, reused)
        features = [Features(of_rows, age) for of_rows in _by_request(made, batch)]
    else:
        eps = predict_eps(unet, latents, timesteps, conditioning)
    noise, noise_states = _draw_noise(batch, latents)  # a GPU is still at the prediction
    rows = to_device(rows, latents.device, latents.dtype)
    latents, history = update(latents, eps, history, noise, rows)
    stepped = []
    for request, x, past, state, made_of_it in zip(batch, latents, history, noise_states, features, strict=True):
        before = request.trajectory
        trajectory = Trajectory(x, past, state, before.num_steps, before.step_index + 1)
        stepped.append(replace(request, trajectory=trajectory, features=made_of_it))
    return stepped


def _reusable(batch: Sequence[Denoising], cached_steps: int) -> tuple[Tensor | None, int]:
    """The features of all rows, if no request lacks any that may be used once more; and their age after this step."""
    ages = [
        cached_steps if request.features is None or _is_early(request.trajectory) else request.features.age
        for request in batch
    ]
    if max(ages) >= cached_steps:
        return None, 0
    of_requests = [request.features.of_rows for request in batch if request.features is not None]
    of_prompts = [of_rows[0] for of_rows in of_requests]
    return torch.stack([*of_prompts, *(of_rows[1] for of_rows in of_requests if len(of_rows) > 1)]), max(ages) + 1


def _is_early(trajectory: Trajectory) -> bool:
    return trajectory.step_index < _EARLY_SHARE * trajectory.num_steps


def _by_request(features: Tensor, batch: Sequence[Denoising]) -> list[tuple[Tensor, ...]]:
    """(rows, f, h, w, c), those of the prompts first."""
    of_negatives = iter(features[len(batch) :])
    return [
        (of_prompt,) if request.conditioning.negative is None else (of_prompt, next(of_negatives))
        for request, of_prompt in zip(batch, features, strict=False)
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
