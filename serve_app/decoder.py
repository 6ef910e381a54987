"""The decoder as a deployment: latents to frames in one thread, frames to files in others."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from serve_app.calls import Rendered, RenderedFile
from serve_app.config import DecoderConfig
from serve_app.devices import place
from serve_app.health import Health
from serve_app.job_logs import log_through_serve, name_job
from serve_app.memory import gpu_memory, tell_memory
from serve_app.metrics import Metrics
from t2v_core import stages
from t2v_core.autoencoder import Autoencoder
from t2v_core.graphs import replay_decoder
from t2v_core.media import VideoFormat
from t2v_core.params import GenerationParams
from t2v_core.pictures import encode_spritesheet, encode_thumbnail
from t2v_core.shapes import VideoShape
from t2v_core.video import Video
from t2v_core.weights import load_autoencoder, public_name

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
MEDIA_TYPES: dict[VideoFormat, str] = {"mp4": "video/mp4", "webm": "video/webm", "gif": "image/gif"}


class Decoder:
    """Final latents to the files of a video."""

    def __init__(self, model: str, revision: str | None, config: DecoderConfig) -> None:
        log_through_serve()
        self._metrics = Metrics()
        weights, self._device, dtype = place(model, revision, config, ["autoencoder"])
        self._model = public_name(model)
        self._network = replay_decoder(load_autoencoder(weights, self._device, dtype))
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            self._rehearse(weights.config.defaults.shape)
        self._health = Health("decoder", config.stuck_after_s if on_gpu else None)  # a CPU may take that long
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="decode")  # one fills the device
        self._encoding = ThreadPoolExecutor(config.encoding_threads, thread_name_prefix="encode")

    async def encode(self, frames: Tensor) -> stages.EncodedVideo:
        """The latents of an input video, on the CPU. frames: (f, h, w, 3) uint8."""
        return await self._on_device(_encode, frames)

    async def decode(self, latents: Tensor, params: GenerationParams, job_id: str, fence: int) -> Rendered:
        """The video's files. latents: (c, f, h, w). Raises GenerationFailed where they are not finite."""
        name_job(job_id, fence)
        began = time.monotonic()
        frames = await self._on_device(stages.decode_frames, latents)
        decoded = time.monotonic()
        loop = asyncio.get_running_loop()
        video, thumbnail, spritesheet = await asyncio.gather(
            loop.run_in_executor(self._encoding, Video(frames, params, self._model).encode),
            loop.run_in_executor(self._encoding, encode_thumbnail, frames),
            loop.run_in_executor(self._encoding, encode_spritesheet, frames),
        )
        encoded = time.monotonic()
        self._metrics.stage("decode", decoded - began)
        self._metrics.stage("encode", encoded - decoded)
        logger.info(
            "video decoded: job=%s fence=%d decode_s=%.3f encode_s=%.3f num_bytes=%d",
            job_id,
            fence,
            decoded - began,
            encoded - decoded,
            len(video),
        )
        return Rendered(
            RenderedFile(f"video.{params.format}", video, MEDIA_TYPES[params.format]),
            RenderedFile("thumbnail.webp", thumbnail, "image/webp"),
            RenderedFile("spritesheet.webp", spritesheet, "image/webp"),
        )

    def check_health(self) -> None:
        """Serve replaces a replica whose GPU is lost, or hangs. It asks often enough for gauges, which Ray forgets."""
        tell_memory(self._metrics, gpu_memory(self._device))
        self._health.check()

    def _rehearse(self, shape: VideoShape) -> None:
        """A video of the model's own size there and back: no request waits for what that compiles and captures."""
        frames = stages.decode_frames(self._network, torch.zeros(shape.latents()))
        stages.encode_frames(self._network, frames)
        torch.cuda.empty_cache()  # for the others on this GPU

    async def _on_device(self, work: Callable[[Autoencoder, Tensor], _Result], given: Tensor) -> _Result:
        """In the one thread that has the device, when it is its turn."""
        await self._health.admit()
        run = partial(self._health.watched, work, self._network, given)
        return await asyncio.get_running_loop().run_in_executor(self._decoding, run)


def _encode(autoencoder: Autoencoder, frames: Tensor) -> stages.EncodedVideo:
    return stages.encode_frames(autoencoder, frames).to("cpu")
