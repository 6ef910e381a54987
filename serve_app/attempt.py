"""One attempt at a job: from its claim to its end, or back to the queue."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

from serve_app.artifacts import ArtifactStore
from serve_app.calls import Checkpoint, DenoiseCall, PreviewPicture, Progress, RenderedFile
from serve_app.chain import Chain
from serve_app.config import GeneratorConfig
from serve_app.errors import ArtifactGone, Unavailable
from serve_app.inputs import frames_of
from serve_app.job_logs import name_job
from serve_app.jobs import Artifact, Job, JobStore
from serve_app.jobs import Progress as JobProgress
from serve_app.metrics import Metrics
from serve_app.origin import going_on
from t2v_core.errors import GenerationFailed, InvalidRequest, OutOfMemory, UnreadableTrajectory
from t2v_core.params import GenerationParams

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

WhyStopped = Literal["cancelled", "lost", "drained"]

_PAUSE_S, _MAX_PAUSE_S = 0.5, 30.0
# What is no fault of the replica that met it: another would fail in the same way.
_PERMANENT = (InvalidRequest, GenerationFailed)


@dataclass(frozen=True, slots=True)
class Tools:
    """What every attempt of a Generator works with. `owner` is the Generator itself, `model` what it serves."""

    owner: str
    config: GeneratorConfig
    model: str
    jobs: JobStore
    artifacts: ArtifactStore
    chain: Chain
    metrics: Metrics


class Attempt:
    """A job under the lease of its Generator. `progress` is what the next heartbeat reports."""

    def __init__(self, job: Job, tools: Tools) -> None:
        self.job = job
        self.progress = JobProgress(job.id, job.fence, job.checkpoint_step, job.num_steps, None)
        self._tools = tools
        self._folder = f"{job.id}/{job.fence}"
        self._trajectory = f"{self._folder}/trajectory.safetensors"
        self._why_stopped: WhyStopped | None = None
        self._is_kept = False  # all its files are where they belong
        self.task = asyncio.create_task(self._work())

    def stop(self, why: WhyStopped) -> None:
        """Stop the work at the next step. Cancelled: the job ends; drained: it goes back; lost: it is another's.

        When all its files are kept, whether it is cancelled or lost is found as the job ends, or it has ended already.
        """
        if self._why_stopped is None and (why == "drained" or not self._is_kept):
            self._why_stopped = why
            self.task.cancel()

    async def _work(self) -> None:
        with going_on(self.job):
            await self._begin()

    async def _begin(self) -> None:
        job, jobs = self.job, self._tools.jobs
        name_job(job.id, job.fence)
        logger.info(
            "job claimed: job=%s fence=%d step=%d request=%s", job.id, job.fence, job.checkpoint_step, job.request_id
        )
        try:
            await self._make_or_retry()
        except asyncio.CancelledError:
            logger.info("attempt stopped: job=%s fence=%d reason=%s", job.id, job.fence, self._why_stopped)
            if self._why_stopped == "cancelled":
                await jobs.cancelled(job.id, job.fence)
            elif self._why_stopped == "drained":
                await jobs.release(job.id, job.fence)
            elif self._why_stopped is None:  # not by us: the call was cancelled on its way
                await jobs.retry(job.id, job.fence, "its work was cancelled from outside")
        except UnreadableTrajectory as error:
            logger.warning("checkpoint cannot be used: job=%s error=%s", job.id, error)
            await jobs.save_checkpoint(job.id, job.fence, None, 0)
            await jobs.retry(job.id, job.fence, str(error))
        except _PERMANENT as error:
            logger.info("job failed: job=%s error=%s", job.id, error)
            await jobs.fail(job.id, job.fence, _code(error), str(error))

    async def _make_or_retry(self) -> None:
        try:
            await self._make()
        except (UnreadableTrajectory, *_PERMANENT):
            raise
        except Exception as error:
            job = self.job
            logger.warning("attempt failed: job=%s fence=%d error=%r", job.id, job.fence, error)
            # A replica that is broken says no at once, and is replaced after some seconds.
            await asyncio.sleep(min(_MAX_PAUSE_S, _PAUSE_S * 16**job.attempts))
            await self._tools.jobs.retry(job.id, job.fence, str(error))

    async def _make(self) -> None:
        job = self.job
        if job.model != self._tools.model:
            raise InvalidRequest(f"model {job.model}: is not served any more; make the video again", param="model")
        try:
            params, trajectory, waited_s = await self._patiently(self._kept)
        except Unavailable as error:  # nothing was done yet: it waits in the queue, for as long as the stores are away
            logger.warning("job given back: job=%s fence=%d error=%s", job.id, job.fence, error)
            await self._tools.jobs.release(job.id, job.fence)
            return
        if job.fence == 1:  # later it has waited for what failed before
            self._tools.metrics.stage("queue", waited_s)
        call = DenoiseCall(
            id=job.id,
            fence=job.fence,
            owners=(self._tools.owner,),
            params=params,
            priority=job.priority,
            waited_s=waited_s,
            trajectory=trajectory,
            keeps_checkpoints=True,
            previews=True,
        )
        rendered = None
        async with aclosing(self._tools.chain.run(call)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    step, num_steps, eta_s = event.step, event.num_steps, event.eta_s
                    self.progress = replace(self.progress, step=step, num_steps=num_steps, eta_s=eta_s)
                elif isinstance(event, PreviewPicture):
                    await self._keep_preview(event)
                elif isinstance(event, Checkpoint):
                    await self._keep_checkpoint(event)
                else:
                    rendered = event
        assert rendered is not None
        files = rendered.by_variant()
        began = time.monotonic()
        artifacts = await self._patiently(lambda: self._keep(files))
        self._is_kept = True
        # However long the database is away: nobody can claim the job meanwhile, and the fence guards it afterwards.
        if await self._patiently(lambda: self._complete(artifacts), outage_s=math.inf):
            seconds = time.monotonic() - began
            self._tools.metrics.stage("store", seconds)
            logger.info("job completed: job=%s fence=%d store_s=%.3f", job.id, job.fence, seconds)
            with self._spared("checkpoint not removed"):
                await self._tools.artifacts.delete(self._trajectory)
            return
        with self._spared("files not removed"):
            if not await self._tools.jobs.names_prefix(self._folder):  # it was cancelled, or is somebody else's now
                await self._tools.artifacts.delete_prefix(f"{self._folder}/")

    async def _keep_preview(self, preview: PreviewPicture) -> None:
        with self._spared("preview not kept"):
            kept = await self._tools.artifacts.put(f"{self._folder}/preview.webp", preview.picture, "image/webp")
            self.progress = replace(self.progress, preview_path=kept.path, preview_step=preview.step)

    async def _keep_checkpoint(self, checkpoint: Checkpoint) -> None:
        with self._spared("checkpoint not kept"):
            await self._tools.artifacts.put(self._trajectory, checkpoint.trajectory, "application/octet-stream")
            await self._tools.jobs.save_checkpoint(self.job.id, self.job.fence, self._trajectory, checkpoint.step)

    async def _keep(self, files: dict[str, RenderedFile]) -> dict[str, Artifact]:
        put = self._tools.artifacts.put
        return {
            variant: await put(f"{self._folder}/{file.name}", file.data, file.media_type)
            for variant, file in files.items()
        }

    async def _complete(self, artifacts: dict[str, Artifact]) -> bool:
        """Whether the job was still ours to end."""
        return await self._tools.jobs.complete(
            self.job.id, self.job.fence, artifacts, expires_in_s=self._tools.config.expires_in_s
        )

    async def _patiently(self, action: Callable[[], Awaitable[_Result]], outage_s: float | None = None) -> _Result:
        """Through an outage of a store, if it is not longer than `outage_s`: by default, as it is configured."""
        deadline = time.monotonic() + (self._tools.config.outage_s if outage_s is None else outage_s)
        while True:
            try:
                return await action()
            except Unavailable as error:
                if time.monotonic() > deadline:
                    raise
                logger.warning("waiting for a store: job=%s error=%s", self.job.id, error)
            await asyncio.sleep(_PAUSE_S)

    @contextmanager
    def _spared(self, consequence: str) -> Iterator[None]:
        """What a job can do without while a store is away."""
        try:
            yield
        except Unavailable as error:
            logger.warning("%s: job=%s error=%s", consequence, self.job.id, error)

    async def _kept(self) -> tuple[GenerationParams, bytes | None, float]:
        """What is asked for, where the attempt before stood, and how many seconds the job has waited."""
        params, trajectory = await self._params(), await self._saved_trajectory()
        return params, trajectory, max(0.0, await self._tools.jobs.now() - self.job.created_at)

    async def _params(self) -> GenerationParams:
        job, video = self.job, None
        if job.input_path is not None:
            video = await asyncio.to_thread(frames_of, await self._tools.artifacts.read(job.input_path))
        return GenerationParams(prompt=job.prompt, video=video, **cast(dict[str, Any], job.params))

    async def _saved_trajectory(self) -> bytes | None:
        """Where the attempt before stood; without it the job starts anew."""
        if self.job.checkpoint_path is None:
            return None
        try:
            return await self._tools.artifacts.read(self.job.checkpoint_path)
        except ArtifactGone:
            logger.warning("checkpoint is gone: job=%s path=%s", self.job.id, self.job.checkpoint_path)
            return None


def _code(error: Exception) -> str:
    if isinstance(error, OutOfMemory):
        return "out_of_memory"
    return "invalid_request" if isinstance(error, InvalidRequest) else "generation_failed"
