"""The generator's replica, without Serve around it and with a real job store: the stages are stood in for, and wait."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from job_processes import new_job
from replica_context import become_replica, unserved

from serve_app.calls import DenoiseCall, Rendered, RenderedFile
from serve_app.config import GeneratorConfig, StorageConfig, WebhooksConfig
from serve_app.generator import Generator
from serve_app.jobs import JobStore
from serve_app.turns import Turns
from t2v_core.config import GenerationDefaults
from t2v_core.params import resolve
from t2v_core.weights import DEMO, public_name

pytestmark = pytest.mark.anyio

Bare = unserved(Generator)


class Stages:
    """Every request is made for as long as the test likes. `names` are the prompts of those at hand."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._may_end: dict[str, asyncio.Event] = {}

    async def run(self, call: DenoiseCall) -> AsyncGenerator[Rendered, None]:
        name = call.params.prompt
        self.names.add(name)
        self._may_end[name] = asyncio.Event()
        try:
            await self._may_end[name].wait()
        finally:
            self.names.remove(name)
        file = RenderedFile("file", name.encode(), "video/mp4")
        yield Rendered(file, file, file)

    def end(self, name: str) -> None:
        self._may_end[name].set()

    async def become(self, *names: str) -> None:
        """Wait until these are made, and see that no others are begun soon."""
        async with asyncio.timeout(10):
            while self.names != set(names):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        assert self.names == set(names)


class Bench:
    """A Generator, its store, and its stages."""

    def __init__(self, generator: Generator, jobs: JobStore, stages: Stages) -> None:
        self.generator, self.jobs, self.stages = generator, jobs, stages

    def call(self, prompt: str, key: str = "alice") -> "asyncio.Task[bytes]":
        async def make() -> bytes:
            params = resolve(prompt, {}, GenerationDefaults())
            return (await self.generator.generate(params, ("an ingress",), key)).video

        return asyncio.create_task(make())

    async def job(self, prompt: str, **asked: Any) -> None:
        params = resolve(prompt, {"seed": 7}, GenerationDefaults())
        names = ("negative_prompt", "width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale")
        settings = {name: getattr(params, name) for name in (*names, "sampler", "seed")}
        await self.jobs.create(new_job(prompt=prompt, params=settings, model=public_name(DEMO), **asked))
        await self.generator.wake()


@pytest.fixture
async def start(tmp_path: Any, monkeypatch: Any) -> Any:
    """Start a Generator with this room; it ends with the test."""
    become_replica("Generator", monkeypatch)
    stages, denoiser = Stages(), SimpleNamespace(options=lambda **_: None)
    monkeypatch.setattr("serve_app.generator.Chain", lambda *_: stages)
    storage = StorageConfig(database=f"sqlite:///{tmp_path / 'jobs.db'}", artifacts=str(tmp_path / "store"))
    started = []

    async def start(max_jobs: int, urgent_reserve: int = 1) -> Bench:
        generator: Any = Bare.__new__(Bare)
        # It looks at the store where it is told to, and not by itself.
        config = GeneratorConfig(poll_s=60, drain_s=0)
        rooms = max_jobs, urgent_reserve
        await generator.__init__(config, storage, WebhooksConfig(), DEMO, None, *rooms, None, denoiser, None)
        bench = Bench(generator, await JobStore.open(storage.database), stages)
        started.append(bench)
        return bench

    yield start
    for bench in started:
        await Generator.__del__(bench.generator)
        await bench.jobs.close()


Start = Callable[..., Any]


async def test_calls_leave_the_reserve_to_an_urgent_job(start: Start) -> None:
    bench = await start(2)
    calls = [bench.call(f"call {number}") for number in range(5)]
    await bench.stages.become("call 0", "call 1")
    await bench.job("urgent", owner="bob", priority="urgent")
    await bench.stages.become("call 0", "call 1", "urgent")
    bench.stages.end("urgent")
    for number in range(5):
        await bench.stages.become(*(f"call {made}" for made in range(number, min(5, number + 2))))
        bench.stages.end(f"call {number}")
    assert await asyncio.gather(*calls) == [f"call {number}".encode() for number in range(5)]


async def test_callers_take_turns(start: Start) -> None:
    bench = await start(1)
    calls = [bench.call(f"alice's {number}", "alice") for number in range(4)]
    await bench.stages.become("alice's 0")
    calls += [bench.call(f"bob's {number}", "bob") for number in range(2)]
    for name in ("alice's 0", "alice's 1", "bob's 0", "alice's 2", "bob's 1", "alice's 3"):
        await bench.stages.become(name)
        bench.stages.end(name)
    await asyncio.gather(*calls)


async def test_a_call_that_is_cancelled_leaves_its_place_or_the_line(start: Start) -> None:
    bench = await start(1)
    made, waiting, last = (bench.call(name) for name in ("made", "waiting", "last"))
    await bench.stages.become("made")
    waiting.cancel()
    await asyncio.wait([waiting])
    made.cancel()
    await bench.stages.become("last")
    bench.stages.end("last")
    assert await last == b"last"
    assert made.cancelled()
    assert waiting.cancelled()


async def test_a_turn_that_comes_while_its_call_is_cancelled_is_the_next_ones() -> None:
    num_places = 0
    turns = Turns(lambda: num_places)

    async def take() -> None:
        async with turns.one("alice"):
            assert len(turns) == 1

    first, second = asyncio.create_task(take()), asyncio.create_task(take())
    await asyncio.sleep(0)
    num_places = 1
    turns.let_in()
    first.cancel()
    await asyncio.wait_for(second, 5)
    assert first.cancelled()
    assert len(turns) == 0


async def test_where_there_is_room_for_one_neither_a_job_nor_a_call_waits_for_a_flood_of_the_others(
    start: Start,
) -> None:
    bench = await start(1)
    for number in range(2):
        await bench.job(f"job {number}")
    await bench.stages.become("job 0")
    calls = [bench.call(f"call {number}") for number in range(2)]
    await bench.stages.become("job 0", "call 0")
    bench.stages.end("job 0")
    await bench.stages.become("call 0", "job 1")
    bench.stages.end("call 0")
    await bench.stages.become("job 1", "call 1")
    for call in calls:
        call.cancel()


async def test_jobs_and_calls_each_leave_the_other_half_of_the_room(start: Start) -> None:
    bench = await start(2)
    for number in range(4):
        await bench.job(f"job {number}")
    await bench.stages.become("job 0", "job 1")
    calls = [bench.call(f"call {number}") for number in range(3)]
    await bench.stages.become("job 0", "job 1", "call 0")
    bench.stages.end("job 0")
    await bench.stages.become("job 1", "call 0")  # one of each
    bench.stages.end("job 1")
    await bench.stages.become("call 0", "job 2")
    bench.stages.end("call 0")
    await bench.stages.become("job 2", "call 1")
    for call in calls:
        call.cancel()
    await bench.stages.become("job 2", "job 3")
    for job in ("job 2", "job 3"):
        bench.stages.end(job)
    await bench.stages.become()
