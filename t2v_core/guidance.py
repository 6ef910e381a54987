"""Classifier-free guidance (Ho and Salimans 2022): one call of the network for all rows that a batch needs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Conditioning(NamedTuple):
    """What steers one request. `negative` is None where no guidance is wanted, and then costs nothing.

    prompt, negative: (n, d) text embeddings of one length.
    """

    prompt: Tensor
    negative: Tensor | None
    guidance_scale: float


def predict_eps(unet: nn.Module, latents: Tensor, timesteps: Tensor, conditionings: Sequence[Conditioning]) -> Tensor:
    """The guided noise prediction for each request of a batch: eps_uncond + scale (eps_cond - eps_uncond).

    latents: (b, c, f, h, w); timesteps: (b,); one conditioning a request, all of the same n.
    The network runs in its own precision; the result has the latents'.
    """
    guided = [row for row, conditioning in enumerate(conditionings) if conditioning.negative is not None]
    rows = [*range(len(conditionings)), *guided]
    prompts = [conditioning.prompt for conditioning in conditionings]
    negatives = [c.negative for c in conditionings if c.negative is not None]
    text_embeds = torch.stack([*prompts, *negatives])

    out = unet(latents[rows].to(text_embeds.dtype), timesteps[rows], text_embeds).to(latents.dtype)
    eps, eps_uncond = out[: len(conditionings)], out[len(conditionings) :]
    if guided:
        scales = eps.new_tensor([conditionings[row].guidance_scale for row in guided]).view(-1, 1, 1, 1, 1)
        eps[guided] = eps_uncond + scales * (eps[guided] - eps_uncond)
    return eps
