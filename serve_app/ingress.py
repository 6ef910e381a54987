"""The way in, as a deployment: the HTTP API, and the methods that other Ray jobs call by handle."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Unpack, cast

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import ApplicationStatusOverview
from torch import Tensor

from serve_app.api import ApiParts, Finished, Limits, create_app
from serve_app.artifacts import ArtifactStore
from serve_app.auth import ApiKeys
from serve_app.bounds import Callers
from serve_app.calls import GeneratedVideo, PreviewPicture, Progress
from serve_app.config import DATABASE_PATIENCE_S, IngressConfig, KeysConfig, StorageConfig, WebhooksConfig
from serve_app.events import Watcher
from serve_app.inputs import resolve_within
from serve_app.job_logs import log_through_serve
from serve_app.job_metrics import count_change
from serve_app.jobs import JobStore
from serve_app.metrics import Metrics
from serve_app.origin import origin
from serve_app.owners import ray_job, this_replica
from serve_app.remote import plain_errors, result_of, stop
from serve_app.sizes import SizeLimit, smallest
from serve_app.webhooks import check_url
from t2v_core.errors import InvalidRequest
from t2v_core.params import GenerationParams, Settings
from t2v_core.weights import open_checkpoint, public_name

logger = logging.getLogger(__name__)

_LEARN_EVERY_S, _LEARN_FIRST_S = 60.0, 1.0
_STATUS_HOLDS_S, _STATUS_WITHIN_S = 0.5, 2.0  # one question to the controller serves all who ask meanwhile


class Ingress:
    """Validates, writes jobs, tells of them, and hands out files."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: IngressConfig,
        storage: StorageConfig,
        keys: KeysConfig,
        webhooks: WebhooksConfig,
        expires_in_s: float,
        model: str,
        revision: str | None,
        generator: "DeploymentHandle[Any]",
        denoiser: "DeploymentHandle[Any]",
    ) -> None:
        log_through_serve()
        self._generator, self._denoiser = generator, denoiser
        self._name = this_replica()
        self._app_name = serve.get_replica_context().app_name
        self._defaults = open_checkpoint(model, revision=revision, networks=()).config.defaults
        self._jobs = await JobStore.open(
            storage.database,
            keep_ended_s=expires_in_s,
            patience_s=DATABASE_PATIENCE_S,
            on_change=partial(count_change, Metrics()),
        )
        self._watcher = Watcher(self._jobs)
        self._status: tuple[float, ApplicationStatusOverview | None] = (-math.inf, None)
        self._asking: asyncio.Task[None] | None = None
        limits = Limits(
            max_queued=config.max_queued,
            max_queued_per_owner=config.max_queued_per_key,
            max_calls=config.max_calls,
            max_calls_per_owner=config.max_calls_per_key,
            max_body_bytes=config.max_body_bytes,
            max_upload_bytes=config.max_upload_bytes,
            max_pixel_frames=config.max_pixel_frames,
        )
        self._parts = ApiParts(
            jobs=self._jobs,
            artifacts=ArtifactStore(storage.artifacts, storage.artifact_options),
            keys=ApiKeys.configured(keys.file, keys.keys),
            watcher=self._watcher,
            models=(public_name(model),),
            defaults=self._defaults,
            limits=limits,
            generate=self._finish,
            wake=self._wake,
            is_ready=self._is_ready,
            check_webhook=partial(check_url, config=webhooks),
            callers=Callers(limits.max_calls, limits.max_calls_per_owner),
            origin=origin,
            measured_limit=lambda: self._measured_limit,
            watching=_watchers(config.max_ongoing),
        )
        self._measured_limit: SizeLimit | None = None
        self._measuring: asyncio.Task[None] | None = None
        if config.max_pixel_frames is None:
            self._measuring = asyncio.create_task(self._learn_size_limit())

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app()
        app.state.parts = self._parts
        return app

    async def generate(
        self,
        prompt: str,
        *,
        video: bytes | Tensor | None = None,
        caller: str | None = None,
        **settings: Unpack[Settings],
    ) -> GeneratedVideo:
        """A video, for another Ray job: `await serve.get_app_handle("t2v").generate.remote("A panda.", seed=7)`.

        Settings that are not given are the checkpoint's own. With a `video`, a file's bytes or uint8 frames
        (f, h, w, 3), it is made of that one; `strength` says how much anew. Cancelling the response stops the work. So
        does the end of the calling job, killed or not, if `caller` is its id:
        `ray.get_runtime_context().get_job_id()`.
        Raises InvalidRequest, GenerationFailed, and what is worth another try: Unavailable, and QueueFull, which says
        when, where `ingress.max_calls` wait already.
        """
        with self._parts.callers.one():
            params = await self._resolved(prompt, settings, video)
            return await self._made(params, self._owned(caller), caller or "")

    async def generate_stream(
        self,
        prompt: str,
        *,
        video: bytes | Tensor | None = None,
        caller: str | None = None,
        **settings: Unpack[Settings],
    ) -> AsyncIterator[Progress | PreviewPicture | GeneratedVideo]:
        """The same, with its progress and previews before the video: by a handle with `options(stream=True)`."""
        with self._parts.callers.one():
            params = await self._resolved(prompt, settings, video)
            stream = cast(
                "DeploymentResponseGenerator[Progress | PreviewPicture | GeneratedVideo]",
                self._generator.options(stream=True).generate_stream.remote(params, self._owned(caller), caller or ""),
            )
            try:
                with plain_errors("generator"):
                    async for event in stream:
                        yield event
            finally:
                stop(stream)

    async def size_limit(self) -> SizeLimit | None:
        """How large a video may be, and who says so. None until a Denoiser has told, where nothing is configured."""
        return self._parts.size_limit()

    async def __del__(self) -> None:
        if self._measuring is not None:
            self._measuring.cancel()
        self._parts.reading.shutdown(wait=False, cancel_futures=True)
        await self._watcher.close()
        await self._jobs.close()

    async def _finish(self, params: GenerationParams, owner: str) -> Finished:
        video = await self._made(params, self._owned(None), owner)
        return Finished(video.video, video.media_type, params.seed)

    async def _made(self, params: GenerationParams, owners: tuple[str, ...], caller: str) -> GeneratedVideo:
        with plain_errors("generator"):
            video: GeneratedVideo = await result_of(self._generator.generate.remote(params, owners, caller))
        return video

    async def _resolved(self, prompt: str, settings: Settings, video: bytes | Tensor | None) -> GenerationParams:
        if not isinstance(video, bytes | Tensor | None):  # a path would be one of this machine, not of the caller's
            raise InvalidRequest(
                f"video {video!r:.100}: must be the bytes of a file, or frames; read the file", param="video"
            )
        resolved = partial(
            resolve_within,
            self._parts.size_limit(),
            prompt,
            settings,
            self._defaults,
            video,
            max_bytes=self._parts.limits.max_upload_bytes,
        )
        return resolved() if video is None else await self._parts.read(resolved)

    async def _learn_size_limit(self) -> None:
        """From the Denoisers, now and then: others may run than before, and on another kind of machine."""
        while True:
            try:
                limits = await self._denoiser.broadcast("size_limit").results_async(timeout_s=5.0)
                self._measured_limit = smallest(limits)
            except Exception as error:  # none runs, or they are being replaced: the last answer holds
                logger.debug("no Denoiser tells its size limit: %r", error)
            await asyncio.sleep(_LEARN_EVERY_S if self._measured_limit else _LEARN_FIRST_S)

    def _owned(self, caller: str | None) -> tuple[str, ...]:
        return (self._name,) if caller is None else (self._name, ray_job(caller))

    async def _wake(self) -> None:
        """A Generator that is not reached looks by itself a little later."""
        try:
            await self._generator.broadcast("wake").results_async(timeout_s=1.0)
        except Exception as error:
            logger.warning("no Generator was woken: %r", error)

    async def _is_ready(self) -> dict[str, bool]:
        parts = {"jobs": await self._reaches_jobs()}
        status = await self._last_status()
        for name, deployment in sorted((status.deployments if status else {}).items()):
            is_running = any(state == "RUNNING" and count for state, count in deployment.replica_states.items())
            parts[name] = is_running or deployment.status == "HEALTHY"  # none are needed while it is scaled to zero
        return parts

    async def _last_status(self) -> ApplicationStatusOverview | None:
        """What Serve says of the application, or said last: while its head is away, replicas work as they did."""
        if self._asking is None and time.monotonic() - self._status[0] > _STATUS_HOLDS_S:
            self._asking = asyncio.create_task(self._ask_status())
        if self._asking is not None:
            await asyncio.wait([self._asking], timeout=_STATUS_WITHIN_S)
        return self._status[1]

    async def _ask_status(self) -> None:
        try:
            overview = await asyncio.to_thread(serve.status)
            self._status = (time.monotonic(), overview.applications.get(self._app_name))
        except Exception as error:  # the head is away
            logger.warning("Serve does not tell its status: %r", error)
        finally:
            self._asking = None

    async def _reaches_jobs(self) -> bool:
        try:
            await asyncio.wait_for(self._jobs.now(), 2.0)
        except Exception as error:
            logger.warning("the job store cannot be reached: %r", error)
            return False
        return True


def _watchers(max_ongoing: int) -> Callers:
    """Half of what Serve lets in at a time, and a quarter of it of one key: so there is room for all else."""
    return Callers(max(1, max_ongoing // 2), max(1, max_ongoing // 4), what="event streams", most_retry_after_s=5.0)
