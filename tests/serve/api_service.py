"""The service without Ray and without a GPU: the real API, job store and files on a free port. A test is the worker."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import uvicorn
from fastapi import FastAPI

from serve_app.api import ApiParts, Finished, Limits, create_app
from serve_app.artifacts import ArtifactStore
from serve_app.auth import ApiKeys
from serve_app.bounds import Callers
from serve_app.config import WebhooksConfig
from serve_app.events import Watcher
from serve_app.jobs.model import Artifact, Job, Origin, Progress
from serve_app.jobs.store import JobStore
from serve_app.sizes import SizeLimit
from serve_app.webhooks import check_url
from t2v_core.config import GenerationDefaults
from t2v_core.params import GenerationParams

DEFAULTS = GenerationDefaults(width=64, height=48, num_frames=8, fps=4, num_inference_steps=5)
LEASE_S = 30.0

ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789"
KEYS = f"alice:{ALICE}\nbob:{BOB}"
UNKNOWN = "video_00000000000000000000000000000000"

# Whatever needs a key, and works on a video that is there.
OWNED = [
    ("GET", ""),
    ("DELETE", ""),
    ("POST", "/cancel"),
    ("POST", "/remix"),
    ("GET", "/content"),
    ("HEAD", "/content"),
    ("GET", "/events"),
]


@dataclass(frozen=True)
class Files:
    """The files of one finished video."""

    video: bytes
    thumbnail: bytes
    spritesheet: bytes


@dataclass
class Gpu:
    """Stands in for the GPU behind /sync. It makes the same video of everything, when it may."""

    video: bytes
    may_finish: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    asked: list[GenerationParams] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    async def was_asked(self, times: int) -> None:
        async with asyncio.timeout(10):
            while len(self.asked) < times:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def generate(self, params: GenerationParams, owner: str) -> Finished:
        self.asked.append(params)
        self.owners.append(owner)
        self.started.set()
        try:
            await self.may_finish.wait()
        except asyncio.CancelledError:
            self.stopped.set()
            raise
        if self.error is not None:
            raise self.error
        return Finished(self.video, "video/mp4", params.seed)


@dataclass
class Work:
    """A job that was claimed, in the hands of the test."""

    job: Job
    jobs: JobStore
    artifacts: ArtifactStore
    files: Files
    eta_s: float | None = None

    async def step(self, step: int, *, preview: bytes | None = None) -> set[str]:
        """Report a step. Returns the ids of jobs that are to be cancelled."""
        path = None
        if preview is not None:
            path = f"{self.job.id}/{self.job.fence}/preview.webp"
            await self.artifacts.put(path, preview, "image/webp")
        progress = Progress(self.job.id, self.job.fence, step, 5, self.eta_s, path, step if preview is not None else 0)
        assert self.job.claimed_by is not None
        beat = await self.jobs.heartbeat(self.job.claimed_by, [progress], lease_s=LEASE_S)
        assert not beat.lost
        return set(beat.cancel_requested)

    async def complete(self, *, or_cancelled: bool = False) -> None:
        """End it with its files. The store refuses that of a job whose cancelling was asked for meanwhile."""
        artifacts: dict[str, Artifact] = {}
        for name, data, media_type in [
            ("video.mp4", self.files.video, "video/mp4"),
            ("thumbnail.webp", self.files.thumbnail, "image/webp"),
            ("spritesheet.webp", self.files.spritesheet, "image/webp"),
        ]:
            path = f"{self.job.id}/{self.job.fence}/{name}"
            artifacts[name.partition(".")[0]] = await self.artifacts.put(path, data, media_type)
        completed = await self.jobs.complete(self.job.id, self.job.fence, artifacts, expires_in_s=3600)
        assert completed or or_cancelled

    async def fail(self) -> None:
        assert await self.jobs.fail(self.job.id, self.job.fence, "generation_failed", "values were not finite")

    async def cancelled(self) -> None:
        assert await self.jobs.cancelled(self.job.id, self.job.fence)


@dataclass
class Service:
    """A running API, and what a test needs of its inside."""

    url: str
    app: FastAPI
    jobs: JobStore
    artifacts: ArtifactStore
    watcher: Watcher
    gpu: Gpu
    files: Files
    client: httpx2.AsyncClient
    num_woken: list[None]

    async def create(self, prompt: str = "a red circle", **settings: Any) -> dict[str, Any]:
        response = await self.client.post("/v1/videos", json={"prompt": prompt, **settings})
        assert response.status_code == 200, response.text
        return response.json()

    async def claim(self) -> Work:
        (job,) = await self.jobs.claim("the test", limit=1, lease_s=LEASE_S)
        return Work(job, self.jobs, self.artifacts, self.files)

    async def completed(self, **settings: Any) -> dict[str, Any]:
        """A video that is made already, as its owner sees it."""
        video = await self.create(**settings)
        work = await self.claim()
        await work.complete()
        return (await self.client.get(f"/v1/videos/{video['id']}")).json()

    @asynccontextmanager
    async def working(self, step_s: float = 0.01) -> AsyncIterator[None]:
        """While this lasts, jobs are made, one after the other."""
        task = asyncio.create_task(self._work_on(step_s))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _work_on(self, step_s: float) -> None:
        while True:
            for job in await self.jobs.claim("the test", limit=1, lease_s=LEASE_S):
                work = Work(job, self.jobs, self.artifacts, self.files)
                await self._make(work, step_s)
            await asyncio.sleep(step_s)

    async def _make(self, work: Work, step_s: float) -> None:
        for step in range(1, 6):
            await asyncio.sleep(step_s)
            if work.job.id in await work.step(step):
                await work.cancelled()
                return
        await work.complete(or_cancelled=True)


@asynccontextmanager
async def running(
    folder: Path,
    files: Files,
    keys: str = "",
    key: str | None = None,
    limits: Limits | None = None,
    ready: dict[str, bool] | None = None,
    measured_limit: SizeLimit | None = None,
) -> AsyncIterator[Service]:
    jobs = await JobStore.open(f"sqlite:///{folder / 'jobs.db'}")
    artifacts = ArtifactStore(str(folder / "artifacts"))
    watcher = Watcher(jobs, every_s=0.02, positions_every_s=0.02)
    gpu = Gpu(files.video)
    num_woken: list[None] = []

    async def wake() -> None:
        num_woken.append(None)

    async def is_ready() -> dict[str, bool]:
        return ready or {"jobs": True, "generator": True}

    limits = limits or Limits(max_body_bytes=64_000, max_pixel_frames=64 * 64 * 64)
    app = create_app()
    app.state.parts = ApiParts(
        jobs=jobs,
        artifacts=artifacts,
        keys=ApiKeys.parse(keys),
        watcher=watcher,
        models=("tiny", "other"),
        defaults=DEFAULTS,
        limits=limits,
        generate=gpu.generate,
        wake=wake,
        is_ready=is_ready,
        check_webhook=partial(check_url, config=WebhooksConfig(secret="a secret of sixteen")),
        callers=Callers(limits.max_calls, limits.max_calls_per_owner),
        origin=lambda: Origin("request 1", None),
        measured_limit=lambda: measured_limit,
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110  # uvicorn tells it in no other way
        await asyncio.sleep(0.001)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=20) as client:
            client.event_hooks["response"].append(Declared(app).check)
            yield Service(url, app, jobs, artifacts, watcher, gpu, files, client, num_woken)
    finally:
        await watcher.close()
        server.should_exit = True
        await serving
        await jobs.close()


class Declared:
    """Holds every answer against /openapi.json: its status, media type, headers and JSON must be declared there."""

    def __init__(self, app: FastAPI) -> None:
        self._document = app.openapi()

    async def check(self, response: httpx2.Response) -> None:
        operation = next(self._operations(response.request), None)
        if operation is None:
            return
        declared = operation["responses"]
        status = str(response.status_code)
        assert status in declared, f"{response.request.method} {response.request.url.path} answered {status}"
        for name in declared[status].get("headers", {}):
            assert name in response.headers, f"{status} has no {name}"
        content = declared[status].get("content", {})
        media_type = response.headers.get("content-type", "").partition(";")[0]
        if not content or response.request.method == "HEAD":
            return
        assert media_type in content, f"{status} is {media_type}"
        if media_type == "application/json":
            await response.aread()
            jsonschema.validate(
                response.json(), content[media_type]["schema"] | {"components": self._document["components"]}
            )

    def _operations(self, request: httpx2.Request) -> Iterator[dict[str, Any]]:
        for template, operations in self._document["paths"].items():
            pattern = re.sub(r"\{\w+\}", "[^/]+", template)
            if re.fullmatch(pattern, request.url.path) and request.method.lower() in operations:
                yield operations[request.method.lower()]


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The error in an answer that must have this status."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    return dict(error)
