"""Processes that work on jobs, for tests that race them and kill them. Each has a store of its own."""

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Barrier
from typing import Any

from serve_app.jobs import Artifact, JobStore, NewJob, new_job_id

# Processes come from one that has the imports done and no threads: the test's own has some, and cannot be forked.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["serve_app.jobs"])

Work = Callable[..., None]


def new_job(**asked: Any) -> NewJob:
    values: dict[str, Any] = {
        "id": new_job_id(),
        "owner": "ann",
        "model": "tiny",
        "prompt": "a red circle",
        "params": {"num_inference_steps": 5, "seed": 7},
        "priority": "normal",
        "metadata": {},
        "remixed_from": None,
        "input_path": None,
        "idempotency_key": None,
        "body_hash": None,
    }
    return NewJob(**values | asked)


def video_of(job_id: str, fence: int) -> dict[str, Artifact]:
    return {"video": Artifact(f"{job_id}/{fence}/video.mp4", "video/mp4", 10, "0" * 64)}


@contextmanager
def processes(work: Work, url: str, number: int) -> Iterator[list[tuple[ForkServerProcess, Connection]]]:
    """So many processes that do the same work at the same moment, and what they send. They end with the block."""
    together = _context.Barrier(number)
    running = []
    for _ in range(number):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=work, args=(url, together, theirs), daemon=True)
        process.start()
        theirs.close()
        running.append((process, ours))
    try:
        yield running
    finally:
        for process, _ in running:
            process.kill()
            process.join()


def open_and_create(url: str, together: Barrier, tell: Connection) -> None:
    """Open a database that nobody has opened before, a few times at once, and accept jobs."""

    async def open_one() -> str:
        store = await JobStore.open(url)
        job, _ = await store.create(new_job())
        await store.close()
        return job.id

    async def work() -> None:
        together.wait(60)
        tell.send(await asyncio.gather(*(open_one() for _ in range(4))))

    asyncio.run(work())


def claim_all(url: str, together: Barrier, tell: Connection) -> None:
    """Claim a few jobs at a time until there are none."""

    async def work() -> None:
        store = await JobStore.open(url)
        name = f"process {os.getpid()}"
        together.wait(60)
        claimed = await store.claim(name, limit=2, lease_s=60)
        together.wait(60)  # or the first to come would have all
        while some := await store.claim(name, limit=2, lease_s=60):
            claimed += some
        tell.send([(job.id, job.fence) for job in claimed])
        await store.close()

    asyncio.run(work())


def work_for_ever(url: str, together: Barrier, tell: Connection) -> None:
    """Accept jobs, and complete those that are claimed; tell of each when the store has said so."""

    async def work() -> None:
        store = await JobStore.open(url)
        together.wait(60)
        while True:
            tell.send(("accepted", (await store.create(new_job()))[0].id))
            for job in await store.claim(f"process {os.getpid()}", limit=2, lease_s=0.5):
                if await store.complete(job.id, job.fence, video_of(job.id, job.fence), expires_in_s=3600):
                    tell.send(("completed", job.id))

    asyncio.run(work())
