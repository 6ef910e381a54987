"""The stages between a request and its frames, each with the network it needs and no other.

The pipeline runs them one after the other in one process; the service runs them in processes of their own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from t2v_core.autoencoder import Autoencoder, frames_per_chunk
from t2v_core.errors import GenerationFailed
from t2v_core.guidance import Conditioning
from t2v_core.out_of_memory import out_of_memory_explained
from t2v_core.params import GenerationParams
from t2v_core.samplers import Coefficients, coefficients
from t2v_core.schedule import Schedule
from t2v_core.text_encoder import Tokenizer
from t2v_core.trajectory import NoiseSource, Trajectory
from t2v_core.transfers import to_device


class EncodedVideo(NamedTuple):
    """The latents of an input video: their mean and standard deviation, each (c, f, h, w)."""

    mean: Tensor
    std: Tensor

    def to(self, device: torch.device | str) -> "EncodedVideo":
        """The same on another device."""
        device = torch.device(device)
        return EncodedVideo(to_device(self.mean, device), to_device(self.std, device))


def tokenize(tokenizer: Tokenizer, params: GenerationParams) -> list[Tensor]:
    """The token ids of the prompt and, where guidance is on, of the negative prompt, each (chunks, 77).

    Both rows go through the UNet together, so the shorter text is filled up with empty pieces. Raises InvalidRequest.
    """
    texts = [tokenizer(params.prompt)]
    if params.guidance_scale > 1.0:
        texts.append(tokenizer(params.negative_prompt, param="negative_prompt"))
    num_chunks = max(len(ids) for ids in texts)
    return [torch.cat([ids, tokenizer("").repeat(num_chunks - len(ids), 1)]) for ids in texts]


def conditioning_of(text_embeds: Sequence[Tensor], params: GenerationParams) -> Conditioning:
    """What steers the request, from the embeddings of what `tokenize` gave: one or two, each (n, d)."""
    prompt, *negative = text_embeds
    return Conditioning(prompt, negative[0] if negative else None, params.guidance_scale)


def plan(schedule: Schedule, params: GenerationParams) -> Coefficients:
    """The sampler's scalars for every step that this request runs."""
    return coefficients(
        params.sampler, schedule, params.num_inference_steps, first_step=params.first_step, eta=params.eta
    )


@torch.inference_mode()
@out_of_memory_explained()
def start(
    params: GenerationParams,
    plan: Coefficients,
    device: torch.device,
    dtype: torch.dtype,
    video: EncodedVideo | None = None,
) -> Trajectory:
    """The request before its first step: noise or, from an input video, its latents with noise on top.

    Latents are float32 or better, whatever the networks run in: steps must not add up rounding.
    """
    shape = params.shape.latents()
    source = NoiseSource(params.seed)
    latents_dtype = torch.promote_types(dtype, torch.float32)
    if video is None:
        latents = plan.noise_scale * to_device(source.video(shape), device, latents_dtype)
    else:
        x0 = video.mean + video.std * to_device(source.frames(shape), device, latents_dtype)
        noise = to_device(source.frames(shape), device, latents_dtype)
        latents = plan.alpha[0].item() * x0 + plan.sigma[0].item() * noise
    return Trajectory.start(latents, source.state, plan.num_steps)


@torch.inference_mode()
@out_of_memory_explained()
def encode_frames(autoencoder: Autoencoder, frames: Tensor) -> EncodedVideo:
    """The latents of uint8 frames (f, h, w, 3), a chunk at a time."""
    parameter = next(autoencoder.parameters())
    means, stds = [], []
    for chunk in torch.split(frames, frames_per_chunk(*frames.shape[1:3])):
        pixels = chunk.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32)) / 127.5 - 1.0
        mean, std = autoencoder.encode(rearrange(pixels, "f h w c -> 1 c f h w").to(parameter.dtype))
        means.append(mean[0].to(pixels))
        stds.append(std[0].to(pixels))
    return EncodedVideo(torch.cat(means, dim=1), torch.cat(stds, dim=1))


@torch.inference_mode()
@out_of_memory_explained()
def decode_frames(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Frames from final latents: (c, f, h, w) -> uint8 (f, 8h, 8w, 3), on the CPU. Raises GenerationFailed."""
    parameter = next(autoencoder.parameters())
    chunks = []
    for chunk in autoencoder.decode_chunks(latents.to(parameter)):
        check_finite(chunk, parameter)
        pixels = (chunk.float() / 2 + 0.5).clamp(0, 1) * 255
        chunks.append(rearrange(pixels.to(torch.uint8), "f c h w -> f h w c").cpu())
    return torch.cat(chunks)


def check_finite(values: Tensor, parameter: Tensor) -> None:
    """Raises GenerationFailed where the network that the parameter is of gave anything but finite values."""
    if not values.isfinite().all():
        raise GenerationFailed(
            f"the network in {parameter.dtype} on {parameter.device} gave values that are not finite: "
            "use bf16 or fp32, or a lower guidance scale"
        )
