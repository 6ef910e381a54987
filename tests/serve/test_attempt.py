"""One attempt at a job, with a real job store and real files; the stages are stood in for, to fail as wanted."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from serve_app import sweeper
from serve_app.artifacts import ArtifactStore
from serve_app.attempt import Attempt, Tools
from serve_app.calls import Checkpoint, DenoiseCall, Progress, Rendered, RenderedFile
from serve_app.config import GeneratorConfig
from serve_app.errors import JobNotFound, Unavailable
from serve_app.jobs import Job, JobStore, NewJob, new_job_id
from serve_app.metrics import Metrics
from serve_app.sweeper import sweep
from t2v_core.config import GenerationDefaults
from t2v_core.errors import EngineBroken, GenerationFailed, UnreadableTrajectory
from t2v_core.params import resolve

RENDERED = Rendered(
    RenderedFile("video.mp4", b"video", "video/mp4"),
    RenderedFile("thumbnail.webp", b"thumbnail", "image/webp"),
    RenderedFile("spritesheet.webp", b"sheet", "image/webp"),
)
OWNER = "a generator"


class Stages:
    """Gives these events, raises an error among them, and waits where there is a None."""

    def __init__(self, *events: Any) -> None:
        self.events = events
        self.calls: list[DenoiseCall] = []
        self.is_closed = False

    async def run(self, call: DenoiseCall) -> AsyncGenerator[Any, None]:
        self.calls.append(call)
        try:
            for event in self.events:
                if event is None:
                    await asyncio.sleep(3600)
                elif isinstance(event, Exception):
                    raise event
                else:
                    yield event
        finally:
            self.is_closed = True


class Bench:
    """A store, files, and attempts at the one job in it."""

    def __init__(self, jobs: JobStore, folder: Path) -> None:
        self.jobs = jobs
        self.artifacts = ArtifactStore(str(folder / "store"))
        self.folder = folder / "store"
        self.model = "demo"

    async def attempt(self, stages: Stages, outage_s: float = 5.0) -> Attempt:
        (job,) = await self.jobs.claim(OWNER, limit=1, lease_s=30)
        config = GeneratorConfig(outage_s=outage_s)
        tools = Tools(OWNER, config, self.model, self.jobs, self.artifacts, stages, Metrics())  # type: ignore[arg-type]
        return Attempt(job, tools)

    async def job(self) -> Job:
        return await self.jobs.get(self.job_id)

    async def create(self) -> None:
        params = resolve("a red circle", {"num_inference_steps": 5, "seed": 7}, GenerationDefaults())
        names = ("negative_prompt", "width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale")
        settings = {name: getattr(params, name) for name in (*names, "sampler", "seed")}
        self.job_id = new_job_id()
        new = NewJob(
            id=self.job_id, owner="me", model="demo", prompt=params.prompt, params=settings, priority="normal",
            metadata={}, remixed_from=None, input_path=None, idempotency_key=None, body_hash=None,
        )  # fmt: skip
        await self.jobs.create(new)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture
async def bench(tmp_path):
    jobs = await JobStore.open(f"sqlite:///{tmp_path / 'jobs.db'}")
    bench = Bench(jobs, tmp_path)
    await bench.create()
    yield bench
    await jobs.close()


async def ended(attempt: Attempt) -> None:
    await asyncio.wait_for(asyncio.wait([attempt.task]), 10)


pytestmark = pytest.mark.anyio


async def test_a_finished_attempt_leaves_the_files_that_the_job_names_and_no_trajectory(bench: Bench):
    attempt = await bench.attempt(Stages(Progress(1, 5, 1.0), Checkpoint(2, b"trajectory"), RENDERED))
    await ended(attempt)
    job = await bench.job()
    assert job.status == "completed"
    assert bench.files() == {artifact.path for artifact in job.artifacts.values()}


async def test_an_attempt_goes_on_from_the_checkpoint_of_the_one_before(bench: Bench):
    await ended(await bench.attempt(Stages(Checkpoint(3, b"where it stood"), Unavailable("the denoiser died"))))
    job = await bench.job()
    assert (job.status, job.resumes, job.attempts, job.checkpoint_step) == ("queued", 1, 0, 3)
    stages = Stages(RENDERED)
    await ended(await bench.attempt(stages))
    assert stages.calls[0].trajectory == b"where it stood"
    assert stages.calls[0].fence == 2


@pytest.mark.parametrize("error", [EngineBroken("lost its GPU"), Unavailable("died"), ValueError("a bug")])
async def test_what_is_not_the_jobs_fault_is_tried_again(bench: Bench, error: Exception):
    await ended(await bench.attempt(Stages(error)))
    job = await bench.job()
    assert (job.status, job.attempts) == ("queued", 1)


async def test_what_is_the_jobs_fault_fails_it_at_once(bench: Bench):
    await ended(await bench.attempt(Stages(GenerationFailed("values are not finite"))))
    job = await bench.job()
    assert (job.status, job.error_code, job.error_message) == ("failed", "generation_failed", "values are not finite")


async def test_a_job_of_a_model_that_is_not_served_any_more_fails_and_says_so(bench: Bench):
    await ended(await bench.attempt(Stages(Checkpoint(3, b"where it stood"), Unavailable("died"))))
    bench.model = "another"
    stages = Stages(RENDERED)
    await ended(await bench.attempt(stages))
    job = await bench.job()
    assert (job.status, job.error_code) == ("failed", "invalid_request")
    assert job.error_message == "model demo: is not served any more; make the video again"
    assert stages.calls == []


async def test_a_checkpoint_that_cannot_be_used_is_forgotten(bench: Bench):
    await ended(await bench.attempt(Stages(Checkpoint(3, b"damaged"), Unavailable("died"))))
    await ended(await bench.attempt(Stages(UnreadableTrajectory("damaged"))))
    job = await bench.job()
    assert (job.status, job.checkpoint_path, job.checkpoint_step) == ("queued", None, 0)


@pytest.mark.parametrize(
    ("why", "status"), [("cancelled", "cancelled"), ("drained", "queued"), ("lost", "in_progress")]
)
async def test_an_attempt_that_is_stopped_closes_the_stages_and_leaves_the_job_as_it_should_be(bench, why, status):
    stages = Stages(Progress(1, 5, 1.0), None)
    attempt = await bench.attempt(stages)
    await asyncio.sleep(0.2)
    attempt.stop(why)
    await ended(attempt)
    assert stages.is_closed
    job = await bench.job()
    assert (job.status, job.attempts) == (status, 0)


async def test_an_attempt_that_is_stopped_while_it_waits_to_try_again_is_stopped_all_the_same(bench: Bench):
    attempt = await bench.attempt(Stages(Unavailable("died")))
    await asyncio.sleep(0.2)
    attempt.stop("drained")
    await ended(attempt)
    job = await bench.job()
    assert (job.status, job.attempts) == ("queued", 0)


async def test_a_commit_whose_answer_is_lost_does_not_cost_the_video(bench: Bench, monkeypatch):
    complete: Callable[..., Any] = bench.jobs.complete
    answers = iter([True, False])

    async def complete_and_lose(*args: Any, **kwargs: Any) -> bool:
        done: bool = await complete(*args, **kwargs)
        if next(answers):
            raise Unavailable("the connection was lost after the commit")
        return done

    monkeypatch.setattr(bench.jobs, "complete", complete_and_lose)
    await ended(await bench.attempt(Stages(RENDERED)))
    job = await bench.job()
    assert job.status == "completed"
    assert {artifact.path for artifact in job.artifacts.values()} <= bench.files()


async def test_a_finished_video_waits_for_the_database_however_long_that_is_away(bench: Bench, monkeypatch):
    put, complete = AsyncMock(wraps=bench.artifacts.put), bench.jobs.complete
    is_back = asyncio.Event()

    async def complete_when_back(*args: Any, **kwargs: Any) -> bool:
        if not is_back.is_set():
            raise Unavailable("the job store cannot be reached")
        return await complete(*args, **kwargs)

    monkeypatch.setattr(bench.jobs, "complete", complete_when_back)
    monkeypatch.setattr(bench.artifacts, "put", put)
    attempt = await bench.attempt(Stages(RENDERED), outage_s=0.1)
    await asyncio.sleep(1.5)  # it was tried a few times
    is_back.set()
    await ended(attempt)
    job = await bench.job()
    assert (job.status, job.attempts) == ("completed", 0)
    assert put.await_count == 3  # each file once


@pytest.mark.parametrize("why", ["lost", "cancelled"])
async def test_an_attempt_whose_job_has_completed_is_not_stopped(bench: Bench, monkeypatch, why):
    """As by a heartbeat that finds the job nobody's any more."""
    delete = bench.artifacts.delete

    async def delete_slowly(path: str) -> None:
        attempt.stop(why)
        await asyncio.sleep(0.1)
        await delete(path)

    monkeypatch.setattr(bench.artifacts, "delete", delete_slowly)
    attempt = await bench.attempt(Stages(Checkpoint(2, b"trajectory"), RENDERED))
    await ended(attempt)
    job = await bench.job()
    assert job.status == "completed"
    assert bench.files() == {artifact.path for artifact in job.artifacts.values()}


async def test_an_attempt_that_waits_for_the_database_to_end_its_job_is_given_back_when_it_drains(
    bench: Bench, monkeypatch
):
    monkeypatch.setattr(bench.jobs, "complete", AsyncMock(side_effect=Unavailable("the job store is away")))
    attempt = await bench.attempt(Stages(RENDERED))
    await asyncio.sleep(0.2)
    attempt.stop("drained")
    await ended(attempt)
    assert (await bench.job()).status == "queued"


async def test_files_that_cannot_be_removed_do_not_hold_an_attempt_up_whose_job_has_completed(
    bench, monkeypatch, caplog
):
    async def away(_: str) -> None:
        raise Unavailable("the artifact store does not answer")

    monkeypatch.setattr(bench.artifacts, "delete", away)
    await ended(await bench.attempt(Stages(Checkpoint(3, b"where it stood"), RENDERED)))
    assert (await bench.job()).status == "completed"
    assert "checkpoint not removed" in caplog.text
    assert "attempt failed" not in caplog.text  # or it would pause before it ends


async def test_a_database_that_goes_away_after_a_claim_costs_no_attempt(bench, monkeypatch):
    now, asked = bench.jobs.now, []

    async def away_at_first() -> float:
        asked.append(1)
        if len(asked) < 3:
            raise Unavailable("the job store cannot be reached")
        return await now()

    monkeypatch.setattr(bench.jobs, "now", away_at_first)
    await ended(await bench.attempt(Stages(RENDERED)))
    job = await bench.job()
    assert (job.status, job.attempts, job.fence) == ("completed", 0, 1)


async def test_a_job_whose_checkpoint_cannot_be_read_waits_in_the_queue_and_loses_no_attempt(bench, monkeypatch):
    await ended(await bench.attempt(Stages(Checkpoint(3, b"where it stood"), Unavailable("the denoiser died"))))
    read = bench.artifacts.read

    async def away(_: str) -> bytes:
        raise Unavailable("the artifact store does not answer")

    monkeypatch.setattr(bench.artifacts, "read", away)
    stages = Stages(RENDERED)
    for _ in range(4):  # more than there are attempts
        await ended(await bench.attempt(stages, outage_s=0.1))
        job = await bench.job()
        assert (job.status, job.attempts) == ("queued", 0)
    assert stages.calls == []
    monkeypatch.setattr(bench.artifacts, "read", read)
    await ended(await bench.attempt(stages))
    assert (await bench.job()).status == "completed"
    assert [call.trajectory for call in stages.calls] == [b"where it stood"]


async def test_a_late_attempt_leaves_the_checkpoint_that_its_successor_reads(bench: Bench):
    late = await bench.attempt(Stages(Checkpoint(3, b"where it stood"), None))
    await asyncio.sleep(0.2)
    await bench.jobs.release(late.job.id, late.job.fence)  # as when its lease has run out
    successor = await bench.attempt(Stages(None))
    await sweep(bench.jobs, bench.artifacts, min_age_s=-60)
    assert f"{late.job.id}/1/trajectory.safetensors" in bench.files()
    for attempt in (late, successor):
        attempt.stop("lost")
        await ended(attempt)


async def test_a_folder_that_cannot_be_removed_keeps_no_other_from_being_swept(bench: Bench):
    (job,) = await bench.jobs.claim(OWNER, limit=1, lease_s=30)
    await bench.jobs.complete(job.id, job.fence, {}, expires_in_s=-1)
    elsewhere = bench.folder.parent / "elsewhere"
    elsewhere.mkdir()
    for job_id in (job.id, "video_" + "0" * 32):  # an expired one, and a stray one
        (bench.folder / job_id).mkdir(parents=True)
        (bench.folder / job_id / "1").symlink_to(elsewhere)  # it cannot be removed as a folder, by root either
    stray = f"video_{'f' * 32}/1/video.mp4"
    await bench.artifacts.put(stray, b"nobody's", "video/mp4")
    await sweep(bench.jobs, bench.artifacts, min_age_s=-60)
    assert stray not in bench.files()


async def test_sweeping_keeps_the_places_of_removed_jobs_for_a_while(bench: Bench, monkeypatch):
    await ended(await bench.attempt(Stages(RENDERED)))
    owner = (await bench.jobs.delete(bench.job_id, (await bench.job()).owner)).owner
    await sweep(bench.jobs, bench.artifacts, min_age_s=0)
    assert (await bench.jobs.list(owner, after=bench.job_id)).jobs == []
    monkeypatch.setattr(sweeper, "_PLACES_FOR_S", -1.0)
    await sweep(bench.jobs, bench.artifacts, min_age_s=0)
    with pytest.raises(JobNotFound):
        await bench.jobs.list(owner, after=bench.job_id)


async def test_sweeping_leaves_what_a_job_names_and_takes_the_rest(bench: Bench):
    await ended(await bench.attempt(Stages(RENDERED)))
    named = bench.files()
    stray = f"{new_job_id()}/1/video.mp4"
    await bench.artifacts.put(stray, b"nobody's", "video/mp4")
    await sweep(bench.jobs, bench.artifacts, min_age_s=3600)
    assert bench.files() == named | {stray}
    await sweep(bench.jobs, bench.artifacts, min_age_s=-60)
    assert bench.files() == named
