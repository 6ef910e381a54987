"""The text encoder as a deployment: prompts that arrive together are one batch, and those seen before are kept."""

import asyncio
import logging
import time
from collections import OrderedDict
from functools import partial

from ray import serve
from torch import Tensor, inference_mode

from serve_app.config import TextEncoderConfig
from serve_app.devices import place
from serve_app.health import Health
from serve_app.job_logs import log_through_serve, name_job
from serve_app.metrics import Metrics
from t2v_core import stages
from t2v_core.guidance import Conditioning
from t2v_core.params import GenerationParams
from t2v_core.text_encoder import Tokenizer
from t2v_core.weights import load_text_encoder

logger = logging.getLogger(__name__)


class TextEncoder:
    """Prompts to text embeddings."""

    def __init__(self, model: str, revision: str | None, config: TextEncoderConfig) -> None:
        log_through_serve()
        self._metrics = Metrics()
        checkpoint, device, dtype = place(model, revision, config, ["text_encoder"])
        self._health = Health("text encoder")
        self._tokenizer = Tokenizer(checkpoint.config.text_encoder.context_length)
        self._network = load_text_encoder(checkpoint, device, dtype)
        self._run([self._tokenizer("")])  # no request waits for what the first call does
        self._cache: OrderedDict[bytes, asyncio.Task[Tensor]] = OrderedDict()  # also what is only being embedded
        self._cache_entries = config.cache_entries
        # Here and not as a decorator, since what it is given comes from the config.
        self._embed_batch = serve.batch(max_batch_size=config.max_batch, batch_wait_timeout_s=config.batch_wait_s)(
            self._embed_together
        )

    async def encode(self, params: GenerationParams, job_id: str, fence: int) -> Conditioning:
        """What steers the request. Raises InvalidRequest for a prompt that is too long."""
        name_job(job_id, fence)
        began = time.monotonic()
        await self._health.admit()
        token_ids = stages.tokenize(self._tokenizer, params)
        embeds = await asyncio.gather(*map(self._embed, token_ids))
        seconds = time.monotonic() - began
        self._metrics.stage("text", seconds)
        logger.info("text encoded: job=%s fence=%d text_s=%.3f", job_id, fence, seconds)
        return stages.conditioning_of(embeds, params)

    def check_health(self) -> None:
        """Serve replaces a replica whose GPU is lost."""
        self._health.check()

    async def _embed(self, token_ids: Tensor) -> Tensor:
        """(chunks, 77) -> (chunks * 77, d), from the cache if it is there; requests that come together share it too."""
        key = token_ids.numpy().tobytes()
        if key not in self._cache:
            task = self._cache[key] = asyncio.create_task(self._embed_batch(token_ids))
            task.add_done_callback(partial(self._forget_failed, key))
            while len(self._cache) > self._cache_entries:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return await asyncio.shield(self._cache[key])  # a request that is cancelled does not end it for the others

    def _forget_failed(self, key: bytes, task: "asyncio.Task[Tensor]") -> None:
        if (task.cancelled() or task.exception()) and self._cache.get(key) is task:
            del self._cache[key]

    async def _embed_together(self, token_ids: list[Tensor]) -> list[Tensor]:
        return await asyncio.to_thread(self._health.watched, self._run, token_ids)

    @inference_mode()
    def _run(self, token_ids: list[Tensor]) -> list[Tensor]:
        # Copies: a part of the batch's embeddings would keep all of them in the cache.
        return [embeds.cpu().clone() for embeds in self._network.encode(token_ids)]
