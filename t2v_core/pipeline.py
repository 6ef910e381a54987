"""One process, one video: prompt -> text embeddings -> noise -> latents -> frames. Read this first."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

import torch
from einops import rearrange
from torch import Tensor

from t2v_core.autoencoder import Autoencoder, frames_per_chunk
from t2v_core.config import GenerationDefaults
from t2v_core.denoising import Denoising, denoise_step
from t2v_core.errors import GenerationFailed, InvalidRequest
from t2v_core.guidance import Conditioning, condition
from t2v_core.out_of_memory import out_of_memory_explained
from t2v_core.params import GenerationParams, InputVideo, Settings, resolve
from t2v_core.samplers import Coefficients, coefficients
from t2v_core.schedule import Schedule
from t2v_core.text_encoder import TextEncoder, Tokenizer
from t2v_core.trajectory import NoiseSource, Trajectory
from t2v_core.unet3d import UNet3D
from t2v_core.video import Video
from t2v_core.weights import DEMO, is_folder, load_autoencoder, load_text_encoder, load_unet, open_checkpoint


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The three networks of a checkpoint on one device. It holds no state of any request."""

    name: str
    tokenizer: Tokenizer = field(repr=False)
    text_encoder: TextEncoder = field(repr=False)
    unet: UNet3D = field(repr=False)
    autoencoder: Autoencoder = field(repr=False)
    schedule: Schedule = field(repr=False)
    defaults: GenerationDefaults
    device: torch.device
    dtype: torch.dtype

    def generate(self, prompt: str, *, video: Video | InputVideo | None = None, **settings: Unpack[Settings]) -> Video:
        """A video of what the prompt says or, with an input `video`, that video made anew.

        The input is another `Video`, a file, its bytes, or frames (f, h, w, 3). Settings that are not given are the
        checkpoint's own; see `Settings`. Raises InvalidRequest for what is not allowed, OutOfMemory, and
        GenerationFailed where the numbers are no longer finite.
        """
        params = self.params(prompt, video=video, **settings)
        for trajectory in self.denoise(params):
            latents = trajectory.latents
        return Video(self.decode(latents), params, self.name)

    def params(
        self, prompt: str, *, video: Video | InputVideo | None = None, **settings: Unpack[Settings]
    ) -> GenerationParams:
        """A valid request, with every setting filled in and the input video read. Raises InvalidRequest."""
        return resolve(prompt, settings, self.defaults, video.frames if isinstance(video, Video) else video)

    def denoise(self, params: GenerationParams) -> Iterator[Trajectory]:
        """The request after each of its steps. Stop iterating to cancel; the last latents are the video's.

        Raises GenerationFailed after the last step where the latents are not finite.
        """
        request = self.prepare(params)
        conditioning = condition(self.unet, [request.conditioning])
        while not request.trajectory.is_finished:
            (request,) = denoise_step(self.unet, [request], conditioning)
            yield request.trajectory
        self._check_finite(request.trajectory.latents)

    def prepare(self, params: GenerationParams) -> Denoising:
        """The request before its first step, with all that its steps need."""
        plan = self.plan(params)
        return Denoising(self.start(params, plan), plan, self.encode_prompt(params))

    @torch.inference_mode()
    @out_of_memory_explained()
    def encode_prompt(self, params: GenerationParams) -> Conditioning:
        """The text embeddings of the prompt and, where guidance is on, of the negative prompt."""
        prompt = self.tokenizer(params.prompt)
        if params.guidance_scale <= 1.0:
            return Conditioning(self.text_encoder.encode([prompt])[0], None, params.guidance_scale)
        negative = self.tokenizer(params.negative_prompt, param="negative_prompt")
        # Both rows go through the UNet together, so the shorter text is filled up with empty pieces.
        num_chunks = max(len(prompt), len(negative))
        padded = [torch.cat([ids, self.tokenizer("").repeat(num_chunks - len(ids), 1)]) for ids in (prompt, negative)]
        prompt_embeds, negative_embeds = self.text_encoder.encode(padded)
        return Conditioning(prompt_embeds, negative_embeds, params.guidance_scale)

    def plan(self, params: GenerationParams) -> Coefficients:
        """The sampler's scalars for every step that this request runs."""
        return coefficients(
            params.sampler, self.schedule, params.num_inference_steps, first_step=params.first_step, eta=params.eta
        )

    @torch.inference_mode()
    @out_of_memory_explained()
    def start(self, params: GenerationParams, plan: Coefficients) -> Trajectory:
        """The request before its first step: noise or, from an input video, its latents with noise on top."""
        shape = params.shape.latents()
        source = NoiseSource(params.seed)
        if params.video is None:
            latents = plan.noise_scale * self._to_latents(source.video(shape))
        else:
            mean, std = self._encode(params.video)
            x0 = mean + std * self._to_latents(source.frames(shape))
            noise = self._to_latents(source.frames(shape))
            latents = plan.alpha[0].to(x0) * x0 + plan.sigma[0].to(x0) * noise
        return Trajectory.start(latents, source.state, plan.num_steps)

    @torch.inference_mode()
    @out_of_memory_explained()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames from final latents: (c, f, h, w) -> uint8 (f, 8h, 8w, 3), on the CPU. Raises GenerationFailed."""
        chunks = []
        for chunk in self.autoencoder.decode_chunks(latents.to(self.dtype)):
            self._check_finite(chunk)
            pixels = (chunk.float() / 2 + 0.5).clamp(0, 1) * 255
            chunks.append(rearrange(pixels.to(torch.uint8), "f c h w -> f h w c").cpu())
        return torch.cat(chunks)

    def _encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents of uint8 frames (f, h, w, 3), a chunk at a time: two of (c, f, h, w)."""
        means, stds = [], []
        for chunk in torch.split(frames, frames_per_chunk(*frames.shape[1:3])):
            pixels = rearrange(self._to_latents(chunk) / 127.5 - 1.0, "f h w c -> 1 c f h w")
            mean, std = self.autoencoder.encode(pixels.to(self.dtype))
            means.append(self._to_latents(mean[0]))
            stds.append(self._to_latents(std[0]))
        return torch.cat(means, dim=1), torch.cat(stds, dim=1)

    def _to_latents(self, values: Tensor) -> Tensor:
        """On the device, in float32 or better: whatever the networks run in, steps must not add up rounding."""
        return values.to(self.device, torch.promote_types(self.dtype, torch.float32))

    def _check_finite(self, values: Tensor) -> None:
        if not values.isfinite().all():
            raise GenerationFailed(
                f"{self.name} in {self.dtype} on {self.device} gave values that are not finite: "
                "use bf16 or fp32, or a lower guidance scale"
            )


DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def load(
    model: str | Path = DEMO,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Pipeline:
    """A checkpoint ready to generate: "demo", a folder or a hub id, in the diffusers or the ModelScope layout.

    "demo" comes with this package and draws coloured shapes that move; for a folder of that name, say "./demo".
    `revision` is a hub id's branch, tag or commit. The device is a GPU where there is one; the networks run in fp16
    there and in fp32 on the CPU, unless `dtype` says otherwise: "fp32", "bf16", "fp16", or torch's own.
    Raises CheckpointNotFound or CheckpointError; InvalidRequest for a device or a type that cannot be used.
    """
    torch_device = _device(device)
    torch_dtype = _dtype(dtype, torch_device)
    checkpoint = open_checkpoint(model, revision=revision, half=torch_dtype == torch.float16)
    return Pipeline(
        # It is written into videos, and where a folder lies is nobody's business.
        name=Path(model).expanduser().resolve().name if is_folder(model) else checkpoint.name,
        tokenizer=Tokenizer(checkpoint.config.text_encoder.context_length),
        text_encoder=load_text_encoder(checkpoint, torch_device, torch_dtype),
        unet=load_unet(checkpoint, torch_device, torch_dtype),
        autoencoder=load_autoencoder(checkpoint, torch_device, torch_dtype),
        schedule=Schedule(checkpoint.config.schedule),
        defaults=checkpoint.config.defaults,
        device=torch_device,
        dtype=torch_dtype,
    )


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidRequest(f"device {name}: cannot be used here ({reason}); use cpu", param="device") from error
    return device


def _dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if name is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype is None or dtype not in DTYPES.values():
        raise InvalidRequest(f"dtype {name}: must be one of {', '.join(DTYPES)}", param="dtype")
    return dtype
