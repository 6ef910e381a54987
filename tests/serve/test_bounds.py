"""How many callers may wait for their videos, and what the next one is told."""

import asyncio
import pickle
from typing import Any

import pytest
from api_service import ALICE, BOB, KEYS, error_of

from serve_app.api import Limits
from serve_app.bounds import Callers
from serve_app.errors import QueueFull

BODY = {"prompt": "a"}


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def retry_after_s(callers: Callers) -> float:
    with pytest.raises(QueueFull) as refused, callers.one():
        pass
    return refused.value.retry_after_s


def test_the_time_to_try_again_follows_the_rate_at_which_calls_end() -> None:
    clock = Clock()
    callers = Callers(1, None, clock)
    for _ in range(29):
        clock.now_s += 1
        with callers.one():
            pass
    with callers.one():
        assert retry_after_s(callers) == pytest.approx(300 / 29)
        clock.now_s += 291  # the first 19 of them are too long ago
        assert retry_after_s(callers) == pytest.approx(300 / 10)
        clock.now_s += 300
        assert retry_after_s(callers) == 120


def test_one_who_fails_makes_room_too() -> None:
    callers = Callers(1, None)
    with pytest.raises(RuntimeError), callers.one():
        raise RuntimeError
    with callers.one():
        pass


def test_of_a_caller_without_a_key_only_all_together_are_bounded() -> None:
    callers = Callers(3, 1)
    refusal = pytest.raises(QueueFull, match="3 calls in all wait already: at most 3 may; try again in 120 s")
    with callers.one(), callers.one(), callers.one("alice"), refusal, callers.one():
        pass


def test_a_refusal_keeps_its_time_on_the_way_to_another_process() -> None:
    again = pickle.loads(pickle.dumps(QueueFull("full", 7.5)))
    assert (type(again), str(again), again.retry_after_s) == (QueueFull, "full", 7.5)


@pytest.mark.anyio
async def test_a_full_sync_is_429_until_somebody_leaves(run_service: Any) -> None:
    service = await run_service(limits=Limits(max_calls=2))
    waiting = [asyncio.create_task(service.client.post("/v1/videos/sync", json=BODY)) for _ in range(2)]
    await service.gpu.was_asked(2)
    response = await service.client.post("/v1/videos/sync", json=BODY)
    error = error_of(response, 429)
    assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
    assert error["message"] == "2 calls in all wait already: at most 2 may; try again in 120 s"
    assert response.headers["retry-after"] == "120"
    assert (await service.client.post("/v1/videos", json=BODY)).status_code == 200  # jobs have their own bound
    waiting.pop().cancel()
    await asyncio.wait_for(service.gpu.stopped.wait(), 5)
    service.gpu.may_finish.set()
    for _ in range(3):
        assert (await service.client.post("/v1/videos/sync", json=BODY)).status_code == 200
    assert (await waiting.pop()).status_code == 200


@pytest.mark.anyio
async def test_one_keys_calls_leave_room_for_anothers(run_service: Any) -> None:
    service = await run_service(keys=KEYS, limits=Limits(max_calls_per_owner=1))

    async def make(key: str) -> Any:
        return await service.client.post("/v1/videos/sync", json=BODY, headers={"authorization": f"Bearer {key}"})

    alice = asyncio.create_task(make(ALICE))
    await service.gpu.was_asked(1)
    assert "1 calls of this key" in error_of(await make(ALICE), 429)["message"]
    bob = asyncio.create_task(make(BOB))
    await service.gpu.was_asked(2)
    service.gpu.may_finish.set()
    assert {(await alice).status_code, (await bob).status_code} == {200}
    assert service.gpu.owners == ["alice", "bob"]  # of whom the Generator has to know whose turn it is
