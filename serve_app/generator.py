"""The generator as a deployment: it claims jobs, sees each through the stages, and answers calls by handle."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from ray.serve.handle import DeploymentHandle

from serve_app.artifacts import ArtifactStore
from serve_app.attempt import Attempt, Tools
from serve_app.calls import Checkpoint, DenoiseCall, GeneratedVideo, PreviewPicture, Progress, Rendered
from serve_app.chain import Chain
from serve_app.config import DATABASE_PATIENCE_S, GeneratorConfig, StorageConfig, WebhooksConfig
from serve_app.errors import Unavailable
from serve_app.job_logs import fields, log_through_serve, name_job
from serve_app.job_metrics import count_change, tell_census
from serve_app.jobs import JobStore, Outbox
from serve_app.metrics import ATTEMPTS, Metrics
from serve_app.owners import this_replica
from serve_app.sweeper import sweep
from serve_app.turns import Turns
from serve_app.webhooks import Deliverer
from t2v_core.params import GenerationParams
from t2v_core.weights import open_checkpoint, public_name

logger = logging.getLogger(__name__)

_TOLD_FOR_S = 7 * 86_400.0  # how long it is kept who was told of what
_CENSUS_EVERY_S = 5.0
_SWEPT_AFTER_S = 60.0  # beside two leases: what an attempt has written, but not yet named, must stay


class Generator:
    """Jobs from the store and calls from handles, through text encoder, denoiser and decoder."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: GeneratorConfig,
        storage: StorageConfig,
        webhooks: WebhooksConfig,
        model: str,
        revision: str | None,
        max_jobs: int,
        urgent_reserve: int,
        text_encoder: "DeploymentHandle[Any]",
        denoiser: "DeploymentHandle[Any]",
        decoder: "DeploymentHandle[Any]",
    ) -> None:
        log_through_serve()
        open_checkpoint(model, revision=revision, networks=())  # one with a wrong name must not fail others' jobs
        self._metrics = Metrics()
        self._config, self._max_jobs, self._urgent_reserve = config, max_jobs, urgent_reserve
        self._name = this_replica()
        self._jobs = await JobStore.open(
            storage.database,
            max_attempts=config.max_attempts,
            keep_ended_s=config.expires_in_s,
            patience_s=DATABASE_PATIENCE_S,
            on_change=partial(count_change, self._metrics),
        )
        self._since = await self._jobs.now()
        self._tools = Tools(
            owner=self._name,
            config=config,
            model=public_name(model),
            jobs=self._jobs,
            artifacts=ArtifactStore(storage.artifacts, storage.artifact_options),
            chain=Chain(text_encoder, denoiser.options(stream=True), decoder),
            metrics=self._metrics,
        )
        self._attempts: dict[str, Attempt] = {}  # by job
        self._woken = asyncio.Event()
        self._num_calls = 0
        # Where there are enough of both, jobs and calls have half of the room each, and one at least.
        self._calls = Turns(lambda: max(1, max_jobs // 2, max_jobs - len(self._attempts)))
        self._claim_lock, self._is_draining = asyncio.Lock(), False
        self._claiming = asyncio.create_task(self._repeat(self._claim, config.poll_s, self._woken))
        self._outbox = Outbox(self._jobs.database)
        self._deliverer = Deliverer(self._outbox, webhooks)
        self._upkeep = [
            asyncio.create_task(self._repeat(self._deliverer.begin_due, webhooks.look_every_s)),
            asyncio.create_task(self._repeat(self._beat, config.heartbeat_s)),
            asyncio.create_task(self._repeat(self._reap, config.lease_s / 2)),
            asyncio.create_task(self._repeat(self._sweep, config.sweep_every_s)),
            asyncio.create_task(self._repeat(self._tell_census, _CENSUS_EVERY_S)),
        ]

    async def wake(self) -> None:
        """There is a job to claim, or one to cancel."""
        self._woken.set()

    async def generate(self, params: GenerationParams, owners: tuple[str, ...], caller: str) -> GeneratedVideo:
        """A video for a caller that waits; cancelling the call stops the work. Callers take turns."""
        async with aclosing(self._generate(params, owners, caller)) as events:
            async for event in events:
                if isinstance(event, GeneratedVideo):
                    return event
        raise AssertionError("a generation ends with its video")

    async def generate_stream(
        self, params: GenerationParams, owners: tuple[str, ...], caller: str
    ) -> AsyncIterator[Progress | PreviewPicture | GeneratedVideo]:
        """The same, with its progress and previews before the video."""
        async with aclosing(self._generate(params, owners, caller, previews=True)) as events:
            async for event in events:
                yield event

    async def __del__(self) -> None:
        """Stop claiming, let jobs end that are about to, and give the others back: they go on from where they are."""
        self._is_draining = True
        async with self._claim_lock:  # jobs that are being claimed right now are ours to give back
            self._claiming.cancel()
        attempts = list(self._attempts.values())
        tasks = [attempt.task for attempt in attempts]
        if tasks:
            await asyncio.wait(tasks, timeout=self._config.drain_s)
        for attempt in attempts:
            attempt.stop("drained")
        if tasks:
            await asyncio.wait(tasks, timeout=self._config.lease_s)
        for loop in self._upkeep:
            loop.cancel()
        await self._deliverer.close()
        await self._jobs.close()

    async def _generate(
        self, params: GenerationParams, owners: tuple[str, ...], caller: str, *, previews: bool = False
    ) -> AsyncGenerator[Progress | PreviewPicture | GeneratedVideo, None]:
        self._num_calls += 1
        call = DenoiseCall(
            id=f"call {self._num_calls} of {self._name}",
            fence=1,
            owners=(*owners, self._name),
            params=params,
            previews=previews,
        )
        name_job(call.id, call.fence)
        logger.info("called: job=%s", call.id)
        try:
            async with self._calls.one(caller), aclosing(self._tools.chain.run(call)) as events:
                async for event in events:
                    if isinstance(event, Rendered):
                        yield GeneratedVideo(event.video.data, event.video.media_type, event.thumbnail.data, params)
                    elif not isinstance(event, Checkpoint):
                        yield event
        finally:
            self._woken.set()  # there may be room for a job

    async def _claim(self) -> None:
        self._woken.clear()
        try:
            for job_id in await self._jobs.cancel_requests(self._name):
                if job_id in self._attempts:
                    self._attempts[job_id].stop("cancelled")
            async with self._claim_lock:
                if not self._is_draining:
                    bound = max(self._max_jobs - self._max_jobs // 2, self._max_jobs - len(self._calls))
                    await self._claim_up_to(bound, urgent_only=False)
                    await self._claim_up_to(bound + self._urgent_reserve, urgent_only=True)
        finally:
            self._calls.let_in()  # where a job has ended, the next had to be asked for first

    async def _claim_up_to(self, bound: int, *, urgent_only: bool) -> None:
        room = bound - len(self._attempts)
        if room < 1:
            return
        claimed = await self._jobs.claim(
            self._name,
            limit=room,
            lease_s=self._config.lease_s,
            urgent_only=urgent_only,
            model=self._tools.model,
            since=self._since,
        )
        for job in claimed:
            self._metrics.count(ATTEMPTS)
            if job.id in self._attempts:  # its lease had run out, and nobody was quicker than we
                self._attempts[job.id].stop("lost")
            attempt = self._attempts[job.id] = Attempt(job, self._tools)
            attempt.task.add_done_callback(partial(self._forget, attempt))

    def _forget(self, attempt: Attempt, task: "asyncio.Task[None]") -> None:
        if self._attempts.get(attempt.job.id) is attempt:  # given back, it may have been claimed again already
            del self._attempts[attempt.job.id]
        if not task.cancelled() and (error := task.exception()) is not None:
            # Its lease runs out, and the job is taken from there.
            job = attempt.job
            extra = fields(job.id, job.fence)
            logger.error("an attempt could not be ended: job=%s error=%r", job.id, error, extra=extra)
        self._woken.set()

    async def _beat(self) -> None:
        attempts = list(self._attempts.values())  # while this is under way, a job may be lost and claimed again
        if not attempts:
            return
        progress = [attempt.progress for attempt in attempts]
        beat = await self._jobs.heartbeat(self._name, progress, lease_s=self._config.lease_s)
        for attempt in attempts:
            if attempt.job.id in beat.lost:
                attempt.stop("lost")
            elif attempt.job.id in beat.cancel_requested:
                attempt.stop("cancelled")

    async def _reap(self) -> None:
        await self._beat()  # our own leases first; others must have had the time for theirs, also after an outage
        if await self._jobs.reap(calm_s=self._config.lease_s, pause_s=2 * self._config.heartbeat_s):
            self._woken.set()

    async def _sweep(self) -> None:
        await self._outbox.forget(_TOLD_FOR_S)  # first, as it needs no files
        await sweep(self._jobs, self._tools.artifacts, min_age_s=2 * self._config.lease_s + _SWEPT_AFTER_S)

    async def _tell_census(self) -> None:
        await tell_census(self._metrics, self._jobs)

    async def _repeat(
        self, action: Callable[[], Awaitable[None]], every_s: float, woken: asyncio.Event | None = None
    ) -> None:
        """For as long as this replica lives: a database that is away for a while must not end it."""
        while True:
            began = time.monotonic()
            try:
                await action()
            except Unavailable as error:
                logger.warning("%s is tried again: error=%s", getattr(action, "__name__", action), error)
            except Exception:
                logger.exception("%s failed and is tried again", getattr(action, "__name__", action))
            await _wait(woken, max(0.0, every_s - (time.monotonic() - began)))


async def _wait(woken: asyncio.Event | None, seconds: float) -> None:
    if woken is None:
        await asyncio.sleep(seconds)
        return
    try:
        await asyncio.wait_for(woken.wait(), seconds)
    except TimeoutError:
        return
