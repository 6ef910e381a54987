"""A replica is replaced when its work fails time after time, or does not end; never for what was asked of it."""

import asyncio
import threading

import pytest

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


async def test_what_is_the_requests_fault_breaks_nothing():
    part = Health("decoder")
    for _ in range(9):
        fails(part, GenerationFailed("values were not finite"))
    part.check()


@pytest.mark.parametrize("stuck_after_s", [0.05, None])
async def test_one_that_does_not_come_to_an_end_is_replaced(stuck_after_s):
    part, may_end = Health("decoder", stuck_after_s), threading.Event()
    work = asyncio.create_task(asyncio.to_thread(part.watched, may_end.wait, 10))
    await asyncio.sleep(0.2)
    if stuck_after_s is None:
        part.check()
    else:
        with pytest.raises(Unavailable, match="has been at one thing"):
            part.check()
    may_end.set()
    await work
    part.check()
