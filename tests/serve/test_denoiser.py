"""The denoiser's replica, without Serve around it: how it notices that its GPU is lost, or hangs."""

import asyncio
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from replica_context import unserved

from serve_app import denoiser as module
from serve_app import health
from serve_app.calls import DenoiseCall, Denoised, Progress
from serve_app.config import DenoiserConfig
from serve_app.denoiser import Denoiser
from serve_app.errors import Unavailable
from serve_app.health import Health

pytestmark = pytest.mark.anyio

STUCK_AFTER_S = 0.3


@pytest.fixture
def ended(monkeypatch):
    """Why the process would have ended."""
    reasons = []
    monkeypatch.setattr(health, "end_process", reasons.append)
    return reasons


@pytest.fixture
def on_cpu(tiny_checkpoint, monkeypatch):
    async def never():
        return None

    monkeypatch.setattr(module, "leaves_in_s", never)  # it would ask Ray
    config = DenoiserConfig(dtype="fp32", num_threads=1, stuck_after_s=STUCK_AFTER_S)
    denoiser = unserved(Denoiser)(str(tiny_checkpoint), None, config)
    yield denoiser
    denoiser._thread.close()


@pytest.fixture
def on_gpu(on_cpu):
    """As far as a CPU can be one."""
    on_cpu._health = Health("denoiser", STUCK_AFTER_S)
    return on_cpu


@pytest.fixture
def denoise(tiny_pipeline):
    params = tiny_pipeline.params("a panda", num_inference_steps=2, num_frames=2, width=16, height=16)
    conditioning = tiny_pipeline.encode_prompt(params)

    async def run(denoiser, job_id):
        call = DenoiseCall(id=job_id, fence=1, owners=(), params=params)
        async for event in denoiser.denoise(call, conditioning):
            last = event
        return last

    return run


@contextmanager
def hanging(denoiser, where):
    """Holds steps, or what comes before them, until the end of the block. Gives what says that one has begun."""
    begun, may_end = threading.Event(), threading.Event()

    def hang(*_):
        begun.set()
        assert may_end.wait(60)

    with pytest.MonkeyPatch.context() as patch:
        if where == "step":
            denoiser._engine._unet.register_forward_pre_hook(hang)
        else:
            patch.setattr(module, "to_device", hang)
        try:
            yield begun
        finally:
            may_end.set()


async def test_a_gpu_that_is_lost_while_nothing_is_done_is_noticed_by_the_next_call(on_gpu, denoise, monkeypatch):
    def lost(*_):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(health, "_BROKEN_PAUSE_S", 0.01)
    assert isinstance(await denoise(on_gpu, "before"), Denoised)
    on_gpu.check_health()
    monkeypatch.setattr(module, "to_device", lost)  # the first that a call does there
    with pytest.raises(torch.AcceleratorError):
        await denoise(on_gpu, "a")
    with pytest.raises(Unavailable, match=r"denoiser broke down.*unspecified launch failure"):
        on_gpu.check_health()
    with pytest.raises(Unavailable, match="is replaced: try again"):
        await denoise(on_gpu, "b")


async def test_what_is_left_is_reckoned_by_the_steps_that_are_done(on_cpu, tiny_pipeline, monkeypatch):
    monkeypatch.setattr(module, "_PROGRESS_EVERY_S", 0.0)
    on_cpu._engine._unet.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    params = tiny_pipeline.params("a panda", num_inference_steps=5, num_frames=1, width=16, height=16)
    call = DenoiseCall(id="a", fence=1, owners=(), params=params, waited_s=100.0)
    events = [event async for event in on_cpu.denoise(call, tiny_pipeline.encode_prompt(params))]
    told = [event for event in events if isinstance(event, Progress)]
    assert [event.step for event in told] == [1, 2, 3, 4, 5]
    assert all(event.eta_s >= (5 - event.step) * 0.05 for event in told)
    assert told[0].eta_s < 100.0  # what it has waited before is no time of a step


@pytest.mark.parametrize("where", ["step", "preparation"])
async def test_one_that_hangs_ends_also_where_each_caller_soon_gives_up(on_gpu, denoise, ended, where):
    await denoise(on_gpu, "before")
    await asyncio.sleep(1.5 * STUCK_AFTER_S)
    on_gpu.check_health()
    assert not ended  # there was nothing to do
    with hanging(on_gpu, where):
        for number in range(30):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(denoise(on_gpu, f"job {number}"), 0.4 * STUCK_AFTER_S)
            on_gpu.check_health()
            if ended:
                break
    assert [why.partition(" for ")[0] for why in ended] == ["the denoiser has been at one thing"]


async def test_on_a_cpu_a_step_may_take_long(on_cpu, denoise, ended):
    with hanging(on_cpu, "step") as begun:
        work = asyncio.create_task(denoise(on_cpu, "a"))
        assert await asyncio.to_thread(begun.wait, 60)
        await asyncio.sleep(2 * STUCK_AFTER_S)
        on_cpu.check_health()
    assert not ended
    assert isinstance(await work, Denoised)
