"""One process, one video: prompt -> text embeddings -> noise -> latents -> frames. Read this first."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack, get_args

import torch
from torch import Tensor

from t2v_core import stages
from t2v_core.autoencoder import Autoencoder
from t2v_core.config import MAX_CACHED_STEPS, GenerationDefaults, Precision
from t2v_core.denoising import Denoising, denoise_step
from t2v_core.errors import InvalidRequest
from t2v_core.graphs import replay_decoder, replayed_unet
from t2v_core.guidance import Conditioning, condition
from t2v_core.kernels.ops import HOPPER
from t2v_core.out_of_memory import out_of_memory_explained
from t2v_core.params import GenerationParams, InputVideo, Settings, resolve
from t2v_core.samplers import Coefficients
from t2v_core.schedule import Schedule
from t2v_core.text_encoder import TextEncoder, Tokenizer
from t2v_core.trajectory import Trajectory
from t2v_core.unet3d import NoisePredictor
from t2v_core.video import Video
from t2v_core.weights import (
    DEMO,
    load_autoencoder,
    load_text_encoder,
    load_unet,
    open_checkpoint,
    public_name,
)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The three networks of a checkpoint on one device. It holds no state of any request.

    `cached_steps`: see `denoising.denoise_step`.
    """

    name: str
    tokenizer: Tokenizer = field(repr=False)
    text_encoder: TextEncoder = field(repr=False)
    unet: NoisePredictor = field(repr=False)
    autoencoder: Autoencoder = field(repr=False)
    schedule: Schedule = field(repr=False)
    defaults: GenerationDefaults
    device: torch.device
    dtype: torch.dtype
    cached_steps: int = 0

    def generate(self, prompt: str, *, video: Video | InputVideo | None = None, **settings: Unpack[Settings]) -> Video:
        """A video of what the prompt says or, with an input `video`, that video made anew.

        The input is another `Video`, a file, its bytes, or frames (f, h, w, 3). It is played as fast as before: files
        and their bytes are read at this request's frame rate, and a `Video` keeps its own unless another is given;
        frames have none. Settings that are not given are the checkpoint's own; see `Settings`.
        Raises InvalidRequest for what is not allowed, OutOfMemory, and GenerationFailed where the numbers are no
        longer finite.
        """
        params = self.params(prompt, video=video, **settings)
        for trajectory in self.denoise(params):
            latents = trajectory.latents
        return Video(self.decode(latents), params, self.name)

    def params(
        self, prompt: str, *, video: Video | InputVideo | None = None, **settings: Unpack[Settings]
    ) -> GenerationParams:
        """A valid request, with every setting filled in and the input video read. Raises InvalidRequest."""
        if isinstance(video, Video):
            given = settings.get("fps")
            fps = video.params.fps if given is None else given
            return resolve(prompt, settings | {"fps": fps}, self.defaults, video.frames_at(fps))
        return resolve(prompt, settings, self.defaults, video)

    def denoise(self, params: GenerationParams) -> Iterator[Trajectory]:
        """The request after each of its steps. Stop iterating to cancel; the last latents are the video's.

        Raises GenerationFailed after the last step where the latents are not finite.
        """
        request = self.prepare(params)
        conditioning = condition(self.unet, [request.conditioning])
        while not request.trajectory.is_finished:
            (request,) = denoise_step(self.unet, [request], conditioning, cached_steps=self.cached_steps)
            yield request.trajectory
        stages.check_finite(request.trajectory.latents, next(self.unet.parameters()))

    def prepare(self, params: GenerationParams) -> Denoising:
        """The request before its first step, with all that its steps need."""
        plan = self.plan(params)
        return Denoising(self.start(params, plan), plan, self.encode_prompt(params))

    @torch.inference_mode()
    @out_of_memory_explained()
    def encode_prompt(self, params: GenerationParams) -> Conditioning:
        """The text embeddings of the prompt and, where guidance is on, of the negative prompt."""
        return stages.conditioning_of(self.text_encoder.encode(stages.tokenize(self.tokenizer, params)), params)

    def plan(self, params: GenerationParams) -> Coefficients:
        """The sampler's scalars for every step that this request runs."""
        return stages.plan(self.schedule, params)

    def start(self, params: GenerationParams, plan: Coefficients) -> Trajectory:
        """The request before its first step: noise or, from an input video, its latents with noise on top."""
        video = None if params.video is None else stages.encode_frames(self.autoencoder, params.video)
        return stages.start(params, plan, self.device, self.dtype, video)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames from final latents: (c, f, h, w) -> uint8 (f, 8h, 8w, 3), on the CPU. Raises GenerationFailed."""
        return stages.decode_frames(self.autoencoder, latents)


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
    precision: Precision = "exact",
    cached_steps: int = 0,
) -> Pipeline:
    """A checkpoint ready to generate: "demo", a folder or a hub id, in the diffusers or the ModelScope layout.

    "demo" comes with this package and draws coloured shapes that move; for a folder of that name, say "./demo".
    `revision` is a hub id's branch, tag or commit. The device is a GPU where there is one; the networks run in fp16
    there and in fp32 on the CPU, unless `dtype` says otherwise: "fp32", "bf16", "fp16", "fp64", or torch's own.
    With the precision "fp8", products after a norm are of 8-bit numbers: faster on a Hopper GPU, and the same on a CPU
    to try. With `cached_steps`, so many steps in a row reuse what the UNet's coarser resolutions made of the step
    before them: faster anywhere, and the less exact the more there are.
    Raises CheckpointNotFound or CheckpointError; InvalidRequest for a device or a type that cannot be used; and
    OutOfMemory.
    """
    torch_device = device_of(device)
    torch_dtype = dtype_of(dtype, torch_device)
    check_precision(precision, torch_dtype, torch_device)
    if not 0 <= cached_steps <= MAX_CACHED_STEPS:
        reason = f"cached_steps {cached_steps}: must be from 0 to {MAX_CACHED_STEPS}"
        raise InvalidRequest(reason, param="cached_steps")
    checkpoint = open_checkpoint(model, revision=revision, half=torch_dtype == torch.float16)
    return Pipeline(
        name=public_name(model),
        tokenizer=Tokenizer(checkpoint.config.text_encoder.context_length),
        text_encoder=load_text_encoder(checkpoint, torch_device, torch_dtype),
        unet=replayed_unet(load_unet(checkpoint, torch_device, torch_dtype, fp8=precision == "fp8")),
        autoencoder=replay_decoder(load_autoencoder(checkpoint, torch_device, torch_dtype)),
        schedule=Schedule(checkpoint.config.schedule),
        defaults=checkpoint.config.defaults,
        device=torch_device,
        dtype=torch_dtype,
        cached_steps=cached_steps,
    )


def device_of(name: str | torch.device | None) -> torch.device:
    """A device that can be used; None is a GPU where there is one. Raises InvalidRequest."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
            raise InvalidRequest(
                f"device {name}: must be the first GPU that the process sees; "
                f"set CUDA_VISIBLE_DEVICES={device.index}, and use cuda",
                param="device",
            )
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidRequest(f"device {name}: cannot be used here ({reason}); use cpu", param="device") from error
    return device


def dtype_of(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """What networks run in; None is fp16 on a GPU and fp32 elsewhere. Raises InvalidRequest."""
    if name is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype = DTYPES.get(name) if isinstance(name, str) else name
    if dtype is None or dtype not in DTYPES.values():
        raise InvalidRequest(f"dtype {name}: must be one of {', '.join(DTYPES)}", param="dtype")
    return dtype


def check_precision(precision: Precision, dtype: torch.dtype, device: torch.device) -> None:
    """Raises InvalidRequest where a precision cannot be had."""
    if precision not in get_args(Precision):
        raise InvalidRequest(
            f"precision {precision}: must be one of {', '.join(get_args(Precision))}", param="precision"
        )
    if precision == "exact" or device.type == "cpu":
        return
    if torch.cuda.get_device_capability(device) < HOPPER:
        name = torch.cuda.get_device_name(device)
        raise InvalidRequest(
            f"precision fp8: needs a Hopper GPU or a later one, not {name}; use exact", param="precision"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        raise InvalidRequest(
            f"precision fp8: goes with fp16 or bf16, not with {name}; leave dtype out", param="precision"
        )
