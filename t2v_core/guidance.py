"""Classifier-free guidance (Ho and Salimans 2022): one call of the network for all rows that a batch needs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from t2v_core.out_of_memory import out_of_memory_explained
from t2v_core.transfers import to_device
from t2v_core.unet3d import NoisePredictor, TextKeysValues


class Conditioning(NamedTuple):
    """What steers one request. `negative` is None where no guidance is wanted, and then costs nothing.

    prompt, negative: (n, d) text embeddings of one length.
    """

    prompt: Tensor
    negative: Tensor | None
    guidance_scale: float

    @property
    def num_rows(self) -> int:
        """How many rows of the network's batch the request takes."""
        return 1 if self.negative is None else 2


class BatchConditioning(NamedTuple):
    """What steers a batch, ready for the network: it serves as long as the batch holds the same requests.

    rows: which request each row of the network's batch belongs to; those of the prompts come first.
    guided: the requests that have a second row; scales: (guided, 1, 1, 1, 1).
    """

    text: TextKeysValues
    dtype: torch.dtype
    rows: Tensor
    guided: Tensor
    scales: Tensor


@torch.inference_mode()
@out_of_memory_explained()
def condition(unet: NoisePredictor, conditionings: Sequence[Conditioning]) -> BatchConditioning:
    """Let the network read the texts of a batch, one conditioning a request, all of the same n.

    Raises OutOfMemory.
    """
    guided = [request for request, c in enumerate(conditionings) if c.negative is not None]
    negatives = [c.negative for c in conditionings if c.negative is not None]
    text_embeds = torch.stack([*(c.prompt for c in conditionings), *negatives])
    device = text_embeds.device
    rows = torch.tensor([*range(len(conditionings)), *guided])
    scales = torch.tensor([conditionings[request].guidance_scale for request in guided], dtype=torch.float64)
    return BatchConditioning(
        text=unet.read_text(text_embeds),
        dtype=text_embeds.dtype,
        rows=to_device(rows, device),
        guided=to_device(torch.tensor(guided, dtype=torch.long), device),
        scales=to_device(scales, device).view(-1, 1, 1, 1, 1),
    )


def predict_eps(unet: NoisePredictor, latents: Tensor, timesteps: Tensor, conditioning: BatchConditioning) -> Tensor:
    """The guided noise prediction for each request of a batch: eps_uncond + scale (eps_cond - eps_uncond).

    latents: (b, c, f, h, w); timesteps: (b,). The network runs in its own precision; the result has the latents'.
    """
    out = unet(latents.to(conditioning.dtype), timesteps, conditioning.text, conditioning.rows)
    return _guided(out.to(latents.dtype), len(latents), conditioning)


def predict_eps_and_features(
    unet: NoisePredictor,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: BatchConditioning,
    features: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same with features of the step before, if they are given, and those of this one. See `UNet3D.predict`."""
    out, features = unet.predict(
        latents.to(conditioning.dtype), timesteps, conditioning.text, conditioning.rows, features
    )
    return _guided(out.to(latents.dtype), len(latents), conditioning), features


def _guided(out: Tensor, num_requests: int, conditioning: BatchConditioning) -> Tensor:
    guided = conditioning.guided
    eps, eps_uncond = out[:num_requests], out[num_requests:]
    if len(guided):
        eps[guided] = eps_uncond + conditioning.scales.to(eps) * (eps[guided] - eps_uncond)
    return eps
