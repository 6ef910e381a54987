"""A replica is replaced when its work fails time after time, or does not end; never for what was asked of it."""

import asyncio
import logging
import multiprocessing
import threading

import pytest
import torch

from serve_app import health
from serve_app.errors import Unavailable
from serve_app.health import Health
from t2v_core.errors import GenerationFailed

pytestmark = pytest.mark.anyio


def fail(error: Exception) -> None:
    raise error


def fails(part: Health, error: Exception) -> None:
    with pytest.raises(type(error)):
        part.watched(fail, error)


async def test_one_that_fails_time_after_time_is_broken_until_it_succeeds(monkeypatch):
    monkeypatch.setattr(health, "_BROKEN_PAUSE_S", 0.01)
    part = Health("decoder")
    for _ in range(2):
        fails(part, RuntimeError("CUDA error: an illegal memory access was encountered"))
        part.check()
        await part.admit()
    fails(part, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(Unavailable, match=r"decoder broke down.*illegal memory access"):
        part.check()
    with pytest.raises(Unavailable, match="decoder broke down") as told:  # without our insides
        await part.admit()
    assert "CUDA" not in str(told.value)
    assert part.watched(lambda: 7) == 7
    part.check()
    await part.admit()


async def test_one_whose_gpu_is_lost_is_broken_at_once():
    part = Health("decoder")
    fails(part, torch.AcceleratorError("CUDA error: unspecified launch failure"))
    with pytest.raises(Unavailable, match=r"decoder broke down.*unspecified launch failure"):
        part.check()


async def test_one_whose_memory_ran_out_once_is_not_broken():
    part = Health("decoder")
    fails(part, torch.AcceleratorError("CUDA error: out of memory"))
    part.check()


async def test_what_is_the_requests_fault_breaks_nothing():
    part = Health("decoder")
    for _ in range(9):
        fails(part, GenerationFailed("values were not finite"))
    part.check()


@pytest.mark.parametrize("stuck_after_s", [0.05, None])
async def test_one_that_does_not_come_to_an_end_ends_its_process(stuck_after_s, monkeypatch):
    ended = []
    monkeypatch.setattr(health, "end_process", ended.append)
    part, may_end = Health("decoder", stuck_after_s), threading.Event()
    work = asyncio.create_task(asyncio.to_thread(part.watched, may_end.wait, 10))
    await asyncio.sleep(0.2)
    part.check()
    may_end.set()
    await work
    assert [why.partition(" for ")[0] for why in ended] == ["the decoder has been at one thing"] * bool(stuck_after_s)
    ended.clear()
    part.check()
    assert not ended


def hang_and_end() -> None:
    logging.basicConfig()
    threading.Thread(target=threading.Event().wait).start()
    health.end_process("the decoder hangs")


def test_a_process_ends_though_its_threads_do_not_and_its_log_says_why(capfd):
    process = multiprocessing.get_context("spawn").Process(target=hang_and_end)
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 1
    assert "the decoder hangs: its process ends" in capfd.readouterr().err
