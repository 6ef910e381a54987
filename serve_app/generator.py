"""The generator as a deployment: it claims jobs and sees each through the stages, until it has ended."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve_app.artifacts import ArtifactStore
from serve_app.calls import (
    Checkpoint,
    DenoiseCall,
    Denoised,
    DenoiseEvent,
    GeneratedVideo,
    PreviewPicture,
    Progress,
    Rendered,
)
from serve_app.config import GeneratorConfig, StorageConfig
from serve_app.errors import ArtifactGone
from serve_app.jobs import Artifact, Job, JobStore
from serve_app.jobs import Progress as JobProgress
from serve_app.owners import this_replica
from serve_app.remote import plain_errors
from serve_app.sweeper import sweep
from t2v_core.errors import GenerationFailed, InvalidRequest, OutOfMemory, UnreadableTrajectory
from t2v_core.params import GenerationParams

logger = logging.getLogger(__name__)

WhyStopped = Literal["cancelled", "lost", "drained"]

_PAUSE_S = 0.5  # a part that is not there fails at once, and would use up all attempts
# What is no fault of the replica that met it: another would fail in the same way.
_PERMANENT = (InvalidRequest, GenerationFailed)


@dataclass(slots=True, eq=False)
class _Live:
    """A job that this Generator holds the lease of."""

    job: Job
    progress: JobProgress
    task: "asyncio.Task[None] | None" = None
    why_stopped: WhyStopped | None = None

    def stop(self, why: WhyStopped) -> None:
        if self.why_stopped is None and self.task is not None:
            self.why_stopped = why
            self.task.cancel()


class Generator:
    """Jobs from the store, and calls from handles, through text encoder, denoiser and decoder."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: GeneratorConfig,
        storage: StorageConfig,
        max_jobs: int,
        urgent_reserve: int,
        text_encoder: "DeploymentHandle[Any]",
        denoiser: "DeploymentHandle[Any]",
        decoder: "DeploymentHandle[Any]",
    ) -> None:
        self._config, self._max_jobs, self._urgent_reserve = config, max_jobs, urgent_reserve
        self._text_encoder, self._decoder = text_encoder, decoder
        self._denoiser = denoiser.options(stream=True)
        self._name = this_replica()
        self._artifacts = ArtifactStore(storage.artifacts, storage.artifact_options)
        self._jobs = await JobStore.open(storage.database, max_attempts=config.max_attempts)
        self._live: dict[str, _Live] = {}
        self._woken = asyncio.Event()
        self._num_calls = 0
        self._loops = [
            asyncio.create_task(self._repeat(self._claim, config.poll_s, self._woken)),
            asyncio.create_task(self._repeat(self._beat, config.heartbeat_s)),
            asyncio.create_task(self._repeat(self._reap, config.lease_s / 2)),
            asyncio.create_task(self._repeat(self._sweep, config.sweep_every_s)),
        ]

    async def wake(self) -> None:
        """There is a job to claim, or one to cancel."""
        self._woken.set()

    async def generate(self, params: GenerationParams, owners: tuple[str, ...]) -> GeneratedVideo:
        """A video for a caller that waits; cancelling the call stops the work."""
        async for event in self._generate(params, owners):
            if isinstance(event, GeneratedVideo):
                return event
        raise AssertionError("a generation ends with its video")

    async def generate_stream(
        self, params: GenerationParams, owners: tuple[str, ...]
    ) -> AsyncIterator[Progress | PreviewPicture | GeneratedVideo]:
        """The same, with its progress and previews before the video."""
        async for event in self._generate(params, owners, previews=True):
            yield event

    async def __del__(self) -> None:
        """Stop claiming, let jobs end that are about to, and give the others back: they go on from where they are."""
        for loop in self._loops[:1]:
            loop.cancel()
        tasks = [live.task for live in self._live.values() if live.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=self._config.drain_s)
        for live in self._live.values():
            live.stop("drained")
        if tasks:
            await asyncio.wait(tasks, timeout=self._config.lease_s)
        for loop in self._loops:
            loop.cancel()
        await self._jobs.close()

    async def _generate(
        self, params: GenerationParams, owners: tuple[str, ...], *, previews: bool = False
    ) -> AsyncIterator[Progress | PreviewPicture | GeneratedVideo]:
        self._num_calls += 1
        call = DenoiseCall(
            id=f"call {self._num_calls} of {self._name}",
            fence=1,
            owners=(*owners, self._name),
            params=params,
            previews=previews,
        )
        async for event in self._make(call):
            if isinstance(event, Rendered):
                yield GeneratedVideo(event.video.data, event.video.media_type, event.thumbnail.data, params)
            elif not isinstance(event, Checkpoint):
                yield event

    async def _make(self, call: DenoiseCall) -> AsyncIterator[Progress | Checkpoint | PreviewPicture | Rendered]:
        """One request through the three stages. Closing it cancels what runs."""
        conditioning = self._text_encoder.encode.remote(call.params)
        stream = cast("DeploymentResponseGenerator[DenoiseEvent]", self._denoiser.denoise.remote(call, conditioning))
        latents = None
        try:
            with plain_errors("denoiser"):
                async for event in stream:
                    if isinstance(event, Denoised):
                        latents = event.latents
                    else:
                        yield event
        finally:
            stream.cancel()  # type: ignore[no-untyped-call]
        assert latents is not None
        with plain_errors("decoder"):
            rendered: Rendered = await self._decoder.decode.remote(latents, call.params)
        yield rendered

    async def _claim(self) -> None:
        self._woken.clear()
        for job_id in await self._jobs.cancel_requests(self._name):
            if job_id in self._live:
                self._live[job_id].stop("cancelled")
        room = self._max_jobs - len(self._live)
        claimed = await self._jobs.claim(self._name, limit=room, lease_s=self._config.lease_s) if room > 0 else []
        reserve = self._max_jobs + self._urgent_reserve - len(self._live) - len(claimed)
        if reserve > 0:
            claimed += await self._jobs.claim(self._name, limit=reserve, lease_s=self._config.lease_s, urgent_only=True)
        for job in claimed:
            logger.info("job claimed: job=%s fence=%d step=%d", job.id, job.fence, job.checkpoint_step)
            live = _Live(job, JobProgress(job.id, job.fence, job.checkpoint_step, job.num_steps, None))
            self._live[job.id] = live
            live.task = asyncio.create_task(self._work(live))

    async def _work(self, live: _Live) -> None:
        """One job to its end, or back to the queue; and then at once another."""
        job = live.job
        try:
            await self._run(live)
        except asyncio.CancelledError:
            if live.why_stopped == "cancelled":
                await self._jobs.cancelled(job.id, job.fence)
            elif live.why_stopped == "drained":
                await self._jobs.release(job.id, job.fence)
        except Exception as error:
            await self._explain(job, error)
        finally:
            del self._live[job.id]
            self._woken.set()

    async def _run(self, live: _Live) -> None:
        job, folder = live.job, f"{live.job.id}/{live.job.fence}"
        trajectory = f"{folder}/trajectory.safetensors"
        params = GenerationParams(prompt=job.prompt, **cast(dict[str, Any], job.params))
        call = DenoiseCall(
            id=job.id,
            fence=job.fence,
            owners=(self._name,),
            params=params,
            priority=job.priority,
            waited_s=max(0.0, await self._jobs.now() - job.created_at),
            trajectory=await self._trajectory(job),
            keeps_checkpoints=True,
            previews=True,
        )
        rendered = None
        async for event in self._make(call):
            if isinstance(event, Progress):
                live.progress = replace(live.progress, step=event.step, num_steps=event.num_steps, eta_s=event.eta_s)
            elif isinstance(event, PreviewPicture):
                preview = await self._artifacts.put(f"{folder}/preview.webp", event.picture, "image/webp")
                live.progress = replace(live.progress, preview_path=preview.path, preview_step=event.step)
            elif isinstance(event, Checkpoint):
                await self._artifacts.put(trajectory, event.trajectory, "application/octet-stream")
                await self._jobs.save_checkpoint(job.id, job.fence, trajectory, event.step)
            else:
                rendered = event
        assert rendered is not None
        artifacts: dict[str, Artifact] = {}
        for variant, file in rendered.by_variant().items():
            artifacts[variant] = await self._artifacts.put(f"{folder}/{file.name}", file.data, file.media_type)
        is_ours = await self._jobs.complete(job.id, job.fence, artifacts, expires_in_s=self._config.expires_in_s)
        if is_ours:
            await self._artifacts.delete(trajectory)
        else:  # somebody else has it now, or it was cancelled: these files are nobody's
            await self._artifacts.delete_prefix(f"{folder}/")
        logger.info("job made: job=%s fence=%d kept=%s", job.id, job.fence, is_ours)

    async def _trajectory(self, job: Job) -> bytes | None:
        """Where the last attempt stood; without it the job starts anew."""
        if job.checkpoint_path is None:
            return None
        try:
            return await self._artifacts.read(job.checkpoint_path)
        except ArtifactGone:
            logger.warning("checkpoint is gone: job=%s path=%s", job.id, job.checkpoint_path)
            return None

    async def _explain(self, job: Job, error: Exception) -> None:
        """A job that cannot be made has failed; what went wrong around it is tried again."""
        if isinstance(error, UnreadableTrajectory):
            logger.warning("checkpoint cannot be used: job=%s error=%s", job.id, error)
            await self._jobs.save_checkpoint(job.id, job.fence, None, 0)
            await self._jobs.retry(job.id, job.fence, str(error))
        elif isinstance(error, _PERMANENT):
            logger.info("job failed: job=%s error=%s", job.id, error)
            await self._jobs.fail(job.id, job.fence, _code(error), str(error))
        else:
            logger.warning("attempt failed: job=%s fence=%d error=%r", job.id, job.fence, error)
            await asyncio.sleep(_PAUSE_S)
            await self._jobs.retry(job.id, job.fence, str(error))

    async def _beat(self) -> None:
        if not self._live:
            return
        progress = [live.progress for live in self._live.values()]
        beat = await self._jobs.heartbeat(self._name, progress, lease_s=self._config.lease_s)
        for job_id, why in [*((j, "lost") for j in beat.lost), *((j, "cancelled") for j in beat.cancel_requested)]:
            if job_id in self._live:
                self._live[job_id].stop("lost" if why == "lost" else "cancelled")

    async def _reap(self) -> None:
        if await self._jobs.reap():
            self._woken.set()

    async def _sweep(self) -> None:
        await sweep(self._jobs, self._artifacts, min_age_s=2 * self._config.lease_s + 60)

    async def _repeat(
        self, action: Callable[[], Awaitable[None]], every_s: float, woken: asyncio.Event | None = None
    ) -> None:
        """For as long as this replica lives: a database that is away for a while must not end it."""
        while True:
            began = time.monotonic()
            try:
                await action()
            except Exception:
                logger.exception("%s failed and is tried again", getattr(action, "__name__", action))
            pause_s = max(0.0, every_s - (time.monotonic() - began))
            await _wait(woken, pause_s)


async def _wait(woken: asyncio.Event | None, seconds: float) -> None:
    if woken is None:
        await asyncio.sleep(seconds)
        return
    try:
        await asyncio.wait_for(woken.wait(), seconds)
    except TimeoutError:
        return


def _code(error: Exception) -> str:
    if isinstance(error, OutOfMemory):
        return "out_of_memory"
    return "invalid_request" if isinstance(error, InvalidRequest) else "generation_failed"
