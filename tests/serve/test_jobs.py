"""The job store: one suite for SQLite and PostgreSQL."""

import asyncio
import dataclasses
import functools
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psycopg
import pytest
from job_processes import claim_all, new_job, open_and_create, processes, video_of, work_for_ever
from sqlalchemy import select, text, update

from serve_app.errors import IdempotencyConflict, JobEnded, JobLive, JobNotFound, QueueFull, Unavailable
from serve_app.jobs import Job, JobStore, Progress, new_job_id
from serve_app.jobs.database import _POSTGRESQL_SESSION, Database, lock
from serve_app.jobs.schema import jobs as table
from serve_app.jobs.schema import outbox
from t2v_core.engine.batching import PATIENCE_S
from t2v_core.errors import InvalidRequest

pytestmark = pytest.mark.anyio

LEASE_S = 60.0
OVER = -1.0  # a lease that has run out when it is given

OpenStore = Callable[..., Awaitable[JobStore]]


@pytest.fixture
async def open_store(database_url: str) -> AsyncIterator[OpenStore]:
    """Another store on the test's database."""
    opened = []

    async def open_one(**options: Any) -> JobStore:
        opened.append(await JobStore.open(database_url, **options))
        return opened[-1]

    yield open_one
    for store in opened:
        await store.close()


@pytest.fixture
async def store(open_store: OpenStore) -> JobStore:
    return await open_store()


async def accept(store: JobStore, **asked: Any) -> Job:
    job, is_new = await store.create(new_job(**asked))
    assert is_new
    return job


async def claimed(store: JobStore, claimer: str = "worker", *, lease_s: float = LEASE_S) -> Job:
    (job,) = await store.claim(claimer, limit=1, lease_s=lease_s)
    return job


async def retried(store: JobStore, job: Job, reason: str) -> Job:
    assert await store.retry(job.id, job.fence, reason)
    return await store.get(job.id)


async def complete(store: JobStore, job: Job, *, expires_in_s: float = 3600.0) -> bool:
    return await store.complete(job.id, job.fence, video_of(job.id, job.fence), expires_in_s=expires_in_s)


async def end_as(store: JobStore, job: Job, status: str) -> bool:
    if status == "completed":
        return await complete(store, job)
    if status == "failed":
        return await store.fail(job.id, job.fence, "generation_failed", "values were not finite")
    return await store.cancelled(job.id, job.fence)


async def run_sql(url: str, statement: Any) -> list[Any]:
    database = Database(url)
    async with database.writing() as connection:
        result = await connection.execute(statement)
        rows = list(result) if result.returns_rows else []
    await database.close()
    return rows


async def told(url: str) -> list[tuple[str, str]]:
    return [tuple(row) for row in await run_sql(url, select(outbox.c.job_id, outbox.c.event).order_by(outbox.c.id))]


def report(job: Job, step: int, **values: Any) -> Progress:
    return Progress(job.id, job.fence, step, 5, 1.5, **values)


# Accepting


async def test_an_accepted_job_is_what_was_asked_for(store: JobStore) -> None:
    asked = new_job(
        prompt="ein Kreis, 赤い円 🔴",
        params={"num_inference_steps": 25, "guidance_scale": 7.5, "seed": 2**63, "sampler": "ddim", "strength": None},
        metadata={"k": "v\0", "🔑": "ü"},
        priority="low",
        remixed_from="video_0",
        input_path="video_0/0/input",
    )
    job, is_new = await store.create(asked)
    assert is_new
    for field in dataclasses.fields(asked):
        assert getattr(job, field.name) == getattr(asked, field.name)
    assert (job.status, job.step, job.num_steps, job.fence, job.attempts, job.artifacts) == ("queued", 0, 25, 0, 0, {})
    assert await store.get(asked.id) == job


async def test_times_are_unix_seconds_of_the_database(store: JobStore) -> None:
    before = await store.now()
    job = await accept(store)
    assert before <= job.created_at <= await store.now()
    assert before == pytest.approx(time.time(), abs=5)


async def test_jobs_are_there_after_a_restart(open_store: OpenStore) -> None:
    first = await open_store()
    waiting, running, done = [await accept(first) for _ in range(3)]
    live = {job.id: job for job in await first.claim("worker", limit=3, lease_s=LEASE_S)}
    await first.release(waiting.id, live[waiting.id].fence)
    await complete(first, live[done.id])
    ids = [waiting.id, running.id, done.id]
    before = await first.get_many(ids)
    await first.close()
    second = await open_store()
    assert await second.get_many(ids) == before
    assert before[done.id].artifacts == video_of(done.id, 1)


async def test_the_same_key_and_body_give_the_same_job(store: JobStore) -> None:
    first, is_new = await store.create(new_job(idempotency_key="k", body_hash="a"))
    again, is_new_again = await store.create(new_job(idempotency_key="k", body_hash="a"))
    assert (is_new, is_new_again, again) == (True, False, first)
    assert await store.num_queued() == 1


async def test_the_same_key_gives_the_job_as_it_stands_now(store: JobStore) -> None:
    await store.create(new_job(idempotency_key="k", body_hash="a"))
    await complete(store, await claimed(store))
    again, _ = await store.create(new_job(idempotency_key="k", body_hash="a"))
    assert again.status == "completed"


async def test_the_same_key_with_another_body_is_refused(store: JobStore) -> None:
    first, _ = await store.create(new_job(idempotency_key="k", body_hash="a"))
    with pytest.raises(IdempotencyConflict, match=f"'k'.*{first.id}.*new key"):
        await store.create(new_job(idempotency_key="k", body_hash="b"))


async def test_keys_are_each_owners_own(store: JobStore) -> None:
    await accept(store, idempotency_key="k", body_hash="a")
    await accept(store, idempotency_key="k", body_hash="b", owner="bob")


async def test_jobs_without_a_key_are_all_different(store: JobStore) -> None:
    await accept(store)
    await accept(store)


async def test_of_equal_requests_at_once_one_is_accepted(open_store: OpenStore) -> None:
    stores = [await open_store() for _ in range(6)]
    for key in "abc":
        answers = await asyncio.gather(*(store.create(new_job(idempotency_key=key, body_hash="a")) for store in stores))
        assert sorted(is_new for _, is_new in answers) == [False] * 5 + [True]
        assert len({job.id for job, _ in answers}) == 1


async def test_of_equal_requests_at_once_in_a_bounded_queue_one_is_accepted(open_store: OpenStore) -> None:
    stores = [await open_store() for _ in range(6)]
    answers = await asyncio.gather(
        *(store.create(new_job(idempotency_key="k", body_hash="a"), max_queued=1) for store in stores)
    )
    assert sorted(is_new for _, is_new in answers) == [False] * 5 + [True]


async def test_a_full_queue_takes_no_more(store: JobStore) -> None:
    for _ in range(2):
        await store.create(new_job(), max_queued=2)
    with pytest.raises(QueueFull, match=r"2 videos in all wait already: at most 2 may; try again in") as refused:
        await store.create(new_job(owner="bob"), max_queued=2)
    assert 1 <= refused.value.retry_after_s <= 120
    await claimed(store)  # which makes room: only those that wait count
    await store.create(new_job(), max_queued=2)


async def test_an_owner_may_queue_so_many_and_others_still_can(store: JobStore) -> None:
    await store.create(new_job(), max_queued_per_owner=1)
    with pytest.raises(QueueFull, match="1 videos of this key wait already"):
        await store.create(new_job(), max_queued_per_owner=1)
    await store.create(new_job(owner="bob"), max_queued_per_owner=1)


async def test_a_full_queue_still_gives_the_job_of_a_known_key(store: JobStore) -> None:
    first, _ = await store.create(new_job(idempotency_key="k", body_hash="a"), max_queued=1)
    again, _ = await store.create(new_job(idempotency_key="k", body_hash="a"), max_queued=1)
    assert again == first


async def test_a_queue_is_tried_again_sooner_where_jobs_are_made_fast(store: JobStore) -> None:
    async def retry_after_s() -> float:
        with pytest.raises(QueueFull) as refused:
            await store.create(new_job(), max_queued=0)
        return refused.value.retry_after_s

    idle = await retry_after_s()
    for _ in range(20):
        await accept(store)
        await complete(store, await claimed(store))
    assert await retry_after_s() < idle


async def test_of_many_requests_at_once_only_so_many_are_accepted(open_store: OpenStore) -> None:
    stores = [await open_store() for _ in range(6)]
    answers = await asyncio.gather(
        *(store.create(new_job(), max_queued=4) for store in stores for _ in range(3)), return_exceptions=True
    )
    assert sum(isinstance(answer, QueueFull) for answer in answers) == 14
    assert await stores[0].num_queued() == 4


async def test_a_prompt_that_postgresql_cannot_keep_is_refused_by_both(store: JobStore) -> None:
    with pytest.raises(InvalidRequest, match=r"U\+0000") as refused:
        await store.create(new_job(prompt="a\0b"))
    assert refused.value.param == "prompt"


# Finding


@pytest.mark.parametrize("job_id", ["video_0", "", "' OR 1=1 --", "video\0", "v" * 10_000])
async def test_an_unknown_job_is_not_found(store: JobStore, job_id: str) -> None:
    with pytest.raises(JobNotFound):
        await store.get(job_id)
    assert "video_0" not in await store.queue_positions()


async def test_another_owners_job_is_as_if_it_were_not_there(store: JobStore) -> None:
    job = await accept(store)
    for call in (
        store.get(job.id, "bob"),
        store.cancel(job.id, "bob"),
        store.delete(job.id, "bob"),
        store.list("bob", after=job.id),
    ):
        with pytest.raises(JobNotFound):
            await call
    removed = await accept(store)
    await store.cancel(removed.id, "ann")
    await store.delete(removed.id, "ann")
    with pytest.raises(JobNotFound):
        await store.list("bob", after=removed.id)
    assert (await store.list("bob")).jobs == []
    assert await store.get(job.id, "ann") == job


async def test_many_are_read_at_once(store: JobStore) -> None:
    made = [await accept(store) for _ in range(3)]
    assert await store.get_many([made[0].id, made[2].id, "video_0"]) == {job.id: job for job in (made[0], made[2])}
    assert await store.get_many([]) == {}


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_hold_each_job_once_though_times_are_equal(store: JobStore, database_url: str, order: Any) -> None:
    made = [await accept(store) for _ in range(7)]
    await accept(store, owner="bob")
    for job, created_at in zip(made, [10.0, 20.0, 20.0, 20.0, 20.0, 20.0, 30.0], strict=True):
        await run_sql(database_url, update(table).where(table.c.id == job.id).values(created_at=created_at))
    listed: list[Job] = []
    sizes = []
    while len(sizes) < 5:
        page = await store.list("ann", after=listed[-1].id if listed else None, limit=2, order=order)
        listed += page.jobs
        sizes.append(len(page.jobs))
        if not page.has_more:
            break
    assert sizes == [2, 2, 2, 1]
    expected = sorted([made[0].id, made[6].id, *(job.id for job in made[1:6])])
    assert sorted(job.id for job in listed) == expected
    places = [(job.created_at, job.id) for job in listed]
    assert places == sorted(places, reverse=order == "desc")


async def test_a_page_that_is_just_full_has_no_more(store: JobStore) -> None:
    for _ in range(2):
        await accept(store)
    assert not (await store.list("ann", limit=2)).has_more
    assert (await store.list("ann", limit=1)).has_more


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("expires", [True, False])
async def test_a_page_after_a_job_that_was_removed_goes_on_from_where_it_was(
    store: JobStore, database_url: str, order: Any, expires: bool
) -> None:
    made = [await accept(store) for _ in range(6)]
    for job, created_at in zip(made, [10.0, 20.0, 20.0, 20.0, 20.0, 30.0], strict=True):
        await run_sql(database_url, update(table).where(table.c.id == job.id).values(created_at=created_at))
    whole = [job.id for job in (await store.list("ann", order=order)).jobs]
    first = [job.id for job in (await store.list("ann", order=order, limit=3)).jobs]
    for job_id in first:
        await store.cancel(job_id, "ann")
        await (store.forget(job_id) if expires else store.delete(job_id, "ann"))
    for _ in range(2):
        assert [job.id for job in (await store.list("ann", after=first[-1], order=order)).jobs] == whole[3:]
        await store.forget_removed(older_than_s=60)
    await store.forget_removed(older_than_s=-1)
    with pytest.raises(JobNotFound):
        await store.list("ann", after=first[-1], order=order)


async def test_of_two_that_forget_a_job_none_fails(open_store: OpenStore) -> None:
    stores = [await open_store() for _ in range(4)]
    for _ in range(5):
        job = await accept(stores[0])
        await stores[0].cancel(job.id, "ann")
        await asyncio.gather(*(store.forget(job.id) for store in stores))


@pytest.mark.parametrize("after", ["video_0", "", "video\0", "v" * 10_000])
async def test_a_page_after_an_unknown_job_is_refused(store: JobStore, after: str) -> None:
    with pytest.raises(JobNotFound) as refused:
        await store.list("ann", after=after)
    assert refused.value.param == "after"


async def test_jobs_are_counted_by_status_and_owner(store: JobStore) -> None:
    for _ in range(5):
        await accept(store)
    await accept(store, owner="bob")
    for status in ("completed", "failed"):
        await end_as(store, await claimed(store), status)
    await claimed(store)
    assert (await store.census()).by_status == {
        "queued": 3,
        "in_progress": 1,
        "completed": 1,
        "failed": 1,
        "cancelled": 0,
    }
    assert (await store.num_queued(), await store.num_queued("ann"), await store.num_queued("eve")) == (3, 2, 0)


# Claiming


async def test_a_claim_is_a_lease_with_a_fence(store: JobStore) -> None:
    waiting = await accept(store)
    before = await store.now()
    job = await claimed(store, lease_s=100)
    after = await store.now()
    assert job.lease_until is not None
    assert before + 100 <= job.lease_until <= after + 100
    assert job.started_at is not None
    assert before <= job.started_at <= after
    assert (job.id, job.status, job.fence, job.claimed_by) == (waiting.id, "in_progress", 1, "worker")
    assert job == await store.get(job.id)
    assert await store.claim("other", limit=5, lease_s=1) == []


async def test_a_job_began_when_it_was_first_claimed(store: JobStore) -> None:
    await accept(store)
    first = await claimed(store)
    await store.release(first.id, first.fence)
    second = await claimed(store)
    assert (second.started_at, second.fence) == (first.started_at, 2)


async def test_urgent_jobs_go_first_and_then_the_oldest(store: JobStore) -> None:
    priorities = ["low", "normal", "urgent", "normal", "low", "urgent"]
    made = []
    for priority in priorities:
        made.append((await accept(store, priority=priority)).id)
        await asyncio.sleep(0.002)  # SQLite's clock has milliseconds
    expected = [made[place] for place in (2, 5, 1, 3, 0, 4)]
    assert await store.queue_positions() == {job_id: place for place, job_id in enumerate(expected)}
    assert [job.id for job in await store.claim("worker", limit=2, lease_s=LEASE_S)] == expected[:2]
    positions = await store.queue_positions()
    assert expected[0] not in positions
    assert positions[expected[2]] == 0
    assert [job.id for job in await store.claim("worker", limit=9, lease_s=LEASE_S)] == expected[2:]


@pytest.mark.parametrize(("longer_s", "first"), [(-60, "urgent"), (60, "low")])
async def test_a_low_job_is_overtaken_by_urgent_ones_until_its_patience_is_over(
    store: JobStore, database_url: str, longer_s: float, first: str
) -> None:
    await accept(store, priority="low")
    waited_s = PATIENCE_S["low"] + longer_s
    await run_sql(database_url, update(table).values(due_at=table.c.due_at - waited_s))
    await accept(store, priority="urgent")
    assert (await claimed(store)).priority == first


async def test_a_job_given_back_keeps_its_place(store: JobStore) -> None:
    first = await accept(store)
    job = await claimed(store)
    await asyncio.sleep(0.002)
    await accept(store)
    await store.release(job.id, job.fence)
    assert (await claimed(store)).id == first.id


async def of_owners(store: JobStore, *owners: str, priority: str = "normal") -> list[str]:
    """Jobs of these owners, accepted one after the other."""
    ids = []
    for owner in owners:
        ids.append((await accept(store, owner=owner, priority=priority)).id)
        await asyncio.sleep(0.002)  # SQLite's clock has milliseconds
    return ids


async def test_owners_take_turns(store: JobStore) -> None:
    a0, a1, a2, a3, b0, b1, c0 = await of_owners(store, "a", "a", "a", "a", "b", "b", "c")
    expected = [a0, b0, c0, a1, b1, a2, a3]
    assert await store.queue_positions() == {job_id: place for place, job_id in enumerate(expected)}
    assert [job.id for job in await store.claim("worker", limit=4, lease_s=LEASE_S)] == expected[:4]
    assert [job.id for job in await store.claim("worker", limit=9, lease_s=LEASE_S)] == expected[4:]


async def test_what_an_owner_has_in_hand_counts_for_its_turns(store: JobStore) -> None:
    await of_owners(store, "a", "a")
    assert len(await store.claim("worker", limit=2, lease_s=LEASE_S)) == 2
    (a2,) = await of_owners(store, "a")
    b0, b1, b2 = await of_owners(store, "b", "b", "b")
    assert list(await store.queue_positions()) == [b0, b1, a2, b2]


async def test_an_urgent_job_goes_before_its_owners_others_and_not_before_those_of_others(store: JobStore) -> None:
    a0, b0 = await of_owners(store, "a", "b")
    (a1,) = await of_owners(store, "a", priority="urgent")
    assert list(await store.queue_positions()) == [a1, b0, a0]


async def test_the_first_job_of_an_owner_is_urgent_while_another_has_several_in_hand(store: JobStore) -> None:
    await of_owners(store, "a", "a", "a")
    assert {job.priority for job in await store.claim("worker", limit=2, lease_s=LEASE_S)} == {"normal"}
    b0, b1 = await of_owners(store, "b", "b")
    (hastened,) = await store.claim("worker", limit=5, lease_s=LEASE_S, urgent_only=True)
    assert (hastened.id, hastened.priority) == (b0, "urgent")
    assert (await store.get(b0)).priority == "normal"  # what was asked for stays
    assert await store.claim("worker", limit=5, lease_s=LEASE_S, urgent_only=True) == []
    rest = await store.claim("worker", limit=5, lease_s=LEASE_S)
    assert [job.priority for job in rest] == ["normal", "normal"]
    assert rest[0].id == b1


async def test_nobody_is_urgent_where_all_have_as_much(store: JobStore) -> None:
    await of_owners(store, "a", "b")
    taken = await store.claim("worker", limit=2, lease_s=LEASE_S)
    assert [job.priority for job in taken] == ["normal", "normal"]
    await of_owners(store, "c")
    assert (await claimed(store)).priority == "normal"


@pytest.mark.parametrize("urgent_only", [False, True])
async def test_jobs_of_another_model_are_left_to_those_that_came_after_its_change(
    store: JobStore, urgent_only: bool
) -> None:
    old = await accept(store, priority="urgent", model="old")
    await asyncio.sleep(0.01)
    changed_at = await store.now()
    await asyncio.sleep(0.01)
    new = await accept(store, priority="urgent", model="new")
    claim = functools.partial(store.claim, limit=2, lease_s=LEASE_S, urgent_only=urgent_only)
    first = await claim("before", model="old", since=0.0)
    assert [job.id for job in first] == [old.id]
    await store.release(old.id, first[0].fence)
    assert {job.id for job in await claim("after", model="new", since=changed_at)} == {old.id, new.id}


@pytest.mark.parametrize("urgent_only", [False, True])
async def test_a_job_that_those_of_its_model_have_left_behind_is_taken_in_the_end(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, urgent_only: bool
) -> None:
    changed_at = await store.now()
    await asyncio.sleep(0.01)
    late = {(await accept(store, priority="urgent", model="old")).id for _ in range(2)}
    claim = functools.partial(
        store.claim, "after", model="new", since=changed_at, limit=2, lease_s=LEASE_S, urgent_only=urgent_only
    )
    assert await claim() == []
    monkeypatch.setattr("serve_app.jobs.queue._LEFT_FOR_S", 0.0)
    (made,) = await store.claim("before", model="old", limit=1, lease_s=LEASE_S)
    await asyncio.sleep(0.01)
    assert await claim() == []  # somebody makes videos with it still
    await store.release(made.id, made.fence)
    assert {job.id for job in await claim()} == late


async def test_a_reserve_for_the_urgent_takes_no_other(store: JobStore) -> None:
    await accept(store, priority="normal")
    urgent = await accept(store, priority="urgent")
    taken = await store.claim("worker", limit=2, lease_s=LEASE_S, urgent_only=True)
    assert [job.id for job in taken] == [urgent.id]
    assert await store.claim("worker", limit=0, lease_s=LEASE_S) == []


async def test_of_many_stores_each_job_is_claimed_by_one(open_store: OpenStore) -> None:
    stores = [await open_store() for _ in range(5)]
    made = {(await accept(stores[0])).id for _ in range(20)}

    async def claim_some(name: str, store: JobStore) -> list[Job]:
        mine = []
        while some := await store.claim(name, limit=3, lease_s=LEASE_S):
            mine += some
        return mine

    claims = await asyncio.gather(*(claim_some(str(number), store) for number, store in enumerate(stores)))
    assert sorted(job.id for mine in claims for job in mine) == sorted(made)
    for number, mine in enumerate(claims):
        assert {(job.fence, job.claimed_by) for job in mine} <= {(1, str(number))}


async def test_of_many_processes_each_job_is_claimed_by_one(store: JobStore, database_url: str) -> None:
    made = [(await accept(store)).id for _ in range(60)]
    with processes(claim_all, database_url, 3) as running:
        claims = [await asyncio.to_thread(answers.recv) for _, answers in running]
    assert Counter(claim for mine in claims for claim in mine) == Counter((job_id, 1) for job_id in made)
    assert all(claims)


async def test_a_new_database_may_be_opened_by_many_processes_at_once(database_url: str) -> None:
    with processes(open_and_create, database_url, 2) as running:
        made = [job_id for _, answers in running for job_id in await asyncio.to_thread(answers.recv)]
    assert len(made) == 8
    store = await JobStore.open(database_url)
    assert (await store.get_many(made)).keys() == set(made)
    await store.close()


async def test_a_new_sqlite_file_that_another_writes_is_waited_for(tmp_path: Path) -> None:
    """SQLite itself does not: the mode of a new file changes at once or not at all."""
    path = tmp_path / "jobs.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        opening = asyncio.create_task(JobStore.open(f"sqlite:///{path}"))
        await asyncio.sleep(0.3)
        assert not opening.done()
        other.execute("COMMIT")
        store = await opening
    await accept(store)
    await store.close()


# Leases and fences


async def test_leases_go_by_the_databases_clock(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    await accept(store)
    for wrong_s in (0.0, 4e9):
        monkeypatch.setattr(time, "time", functools.partial(float, wrong_s))
        job = await claimed(store)
        assert await store.reap() == []
        await store.heartbeat("worker", [report(job, 1)], lease_s=OVER)
        assert await store.reap() == [job.id]


async def test_a_lease_that_had_to_wait_for_its_row_begins_when_it_is_written(
    store: JobStore, database_url: str
) -> None:
    await accept(store)
    database = Database(database_url)
    async with database.writing() as connection:
        await connection.execute(update(table).values(model="other"))
        claiming = asyncio.create_task(claimed(store))
        await asyncio.sleep(0.5)
        still_waiting_at = await store.now()
    lease_until = (await claiming).lease_until
    await database.close()
    assert lease_until is not None
    assert lease_until >= still_waiting_at + LEASE_S


async def test_a_row_that_another_has_locked_costs_no_other_its_lease(store: JobStore, database_url: str) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip("SQLite locks no rows")
    await accept(store)
    await accept(store)
    locked, free = await store.claim("worker", limit=2, lease_s=OVER)
    await store.cancel(locked.id, "ann")
    database = Database(database_url)
    async with database.writing() as connection, asyncio.timeout(5):
        await connection.execute(update(table).where(table.c.id == locked.id).values(model="other"))
        reports = [report(locked, 3), report(free, 3, preview_path="p", preview_step=3)]
        beat = await store.heartbeat("worker", reports, lease_s=LEASE_S)
    await database.close()
    assert (beat.lost, beat.cancel_requested) == (set(), {locked.id})
    seen = await store.get(free.id)
    assert (seen.step, seen.preview_path, seen.preview_step) == (3, "p", 3)
    assert await store.reap() == [locked.id]


async def test_a_lease_is_lost_when_it_is_found_late_twice(store: JobStore, database_url: str) -> None:
    """As after a database stood still, when heartbeats that it held up come through."""
    for _ in range(3):
        await accept(store)
    late, renewed = await store.claim("worker", limit=2, lease_s=OVER)
    later = await claimed(store)
    reaping = asyncio.create_task(store.reap(pause_s=1.0))
    await asyncio.sleep(0.2)
    await store.heartbeat("worker", [report(renewed, 1)], lease_s=LEASE_S)
    # Both run out before it looks again, but not as they were when it looked first.
    await run_sql(database_url, update(table).where(table.c.id.in_([renewed.id, later.id])).values(lease_until=1.0))
    assert await reaping == [late.id]
    assert {job.id for job in (await store.list("ann")).jobs if job.status == "in_progress"} == {renewed.id, later.id}


async def test_a_lease_runs_out_by_itself(store: JobStore) -> None:
    await accept(store)
    job = await claimed(store, lease_s=0.05)
    deadline = time.monotonic() + 20
    while await store.reap() != [job.id]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert (await store.get(job.id)).status == "queued"


async def test_a_heartbeat_renews_the_lease_and_tells_of_progress(store: JobStore) -> None:
    await accept(store)
    job = await claimed(store, lease_s=OVER)
    beat = await store.heartbeat("worker", [report(job, 2)], lease_s=LEASE_S)
    assert (beat.lost, beat.cancel_requested) == (set(), set())
    assert await store.reap() == []
    seen = await store.get(job.id)
    assert (seen.step, seen.num_steps, seen.eta_s, seen.progress, seen.preview_path) == (2, 5, 1.5, 40, None)


async def test_a_preview_stays_until_there_is_another(store: JobStore) -> None:
    await accept(store)
    job = await claimed(store)
    await store.heartbeat("worker", [report(job, 2, preview_path="a", preview_step=2)], lease_s=LEASE_S)
    await store.heartbeat("worker", [report(job, 3)], lease_s=LEASE_S)
    seen = await store.get(job.id)
    assert (seen.step, seen.preview_path, seen.preview_step) == (3, "a", 2)


async def test_one_lost_job_does_not_keep_a_heartbeat_from_the_others(store: JobStore) -> None:
    await accept(store)
    await accept(store)
    first, second = await store.claim("worker", limit=2, lease_s=LEASE_S)
    await store.release(first.id, first.fence)
    await claimed(store, "other")
    beat = await store.heartbeat("worker", [report(first, 3), report(second, 3)], lease_s=LEASE_S)
    assert beat.lost == {first.id}
    assert ((await store.get(first.id)).step, (await store.get(second.id)).step) == (0, 3)


@pytest.mark.parametrize("lost_to", ["nobody yet", "another", "itself", "an end"])
async def test_a_late_owner_cannot_write(store: JobStore, database_url: str, lost_to: str) -> None:
    await accept(store)
    late = await claimed(store, lease_s=OVER)
    await store.reap()
    if lost_to == "another":
        await claimed(store, "other")
    elif lost_to == "itself":
        await claimed(store)
    elif lost_to == "an end":
        await complete(store, await claimed(store, "other"))
    before, told_before = await store.get(late.id), await told(database_url)

    beat = await store.heartbeat("worker", [report(late, 4, preview_path="p", preview_step=4)], lease_s=LEASE_S)
    assert beat.lost == {late.id}
    assert not await store.save_checkpoint(late.id, late.fence, "late", 4)
    assert not await complete(store, late)
    assert not await store.fail(late.id, late.fence, "code", "message")
    assert not await store.cancelled(late.id, late.fence)
    assert not await store.release(late.id, late.fence)
    assert not await store.retry(late.id, late.fence, "reason")
    assert await store.get(late.id) == before
    assert await told(database_url) == told_before


async def test_a_fence_that_is_still_to_come_cannot_write(store: JobStore) -> None:
    await accept(store)
    job = await claimed(store)
    assert not await complete(store, dataclasses.replace(job, fence=2))
    assert await store.get(job.id) == job


async def test_another_claimer_cannot_renew_a_lease_though_it_knows_the_fence(store: JobStore) -> None:
    await accept(store)
    job = await claimed(store)
    assert (await store.heartbeat("other", [report(job, 4)], lease_s=LEASE_S)).lost == {job.id}
    assert await store.get(job.id) == job


# Attempts


async def test_a_job_fails_after_so_many_attempts_without_progress(open_store: OpenStore, database_url: str) -> None:
    store = await open_store(max_attempts=3)
    made = await accept(store)
    seen = []
    for reason in ("the denoiser died", "out of luck", "the decoder died"):
        job = await claimed(store)
        after = await retried(store, job, reason)
        seen.append((after.status, after.attempts, after.claimed_by, after.lease_until))
    assert seen == [("queued", 1, None, None), ("queued", 2, None, None), ("failed", 3, None, None)]
    failed = await store.get(made.id)
    assert failed.error_code == "attempts_exhausted"
    assert failed.error_message == (
        "3 attempts ended without progress, the last since the decoder died: try again later"
    )
    assert await told(database_url) == [(made.id, "video.failed")]


async def test_lost_workers_use_up_attempts(open_store: OpenStore, database_url: str) -> None:
    store = await open_store(max_attempts=2)
    made = await accept(store)
    for _ in range(2):
        await claimed(store, lease_s=OVER)
        assert await store.reap() == [made.id]
    failed = await store.get(made.id)
    assert (failed.status, failed.error_code, failed.attempts) == ("failed", "attempts_exhausted", 2)
    assert "its worker was lost" in (failed.error_message or "")
    assert await told(database_url) == [(made.id, "video.failed")]


async def test_attempts_that_gained_a_checkpoint_do_not_count(open_store: OpenStore) -> None:
    store = await open_store(max_attempts=2)
    await accept(store)
    for step in (1, 2, 3, 4):
        job = await claimed(store)
        assert await store.save_checkpoint(job.id, job.fence, f"{job.id}/{job.fence}/trajectory", step)
        assert (await retried(store, job, "unlucky")).attempts == 0
    job = await claimed(store)
    assert (job.checkpoint_step, job.step, job.resumes) == (4, 4, 4)
    assert (await retried(store, job, "stuck")).attempts == 1
    job = await claimed(store)
    await store.save_checkpoint(job.id, job.fence, "the same place", 4)  # which is no progress
    assert (await retried(store, job, "stuck")).status == "failed"


async def test_steps_of_a_lost_attempt_are_counted_as_repeated(store: JobStore) -> None:
    await accept(store)
    job = await claimed(store)
    await store.save_checkpoint(job.id, job.fence, "a", 2)
    await store.heartbeat("worker", [report(job, 4)], lease_s=OVER)
    await store.reap()
    again = await store.get(job.id)
    assert (again.step, again.steps_repeated, again.resumes, again.eta_s) == (2, 2, 1, None)
    job = await claimed(store)
    await store.heartbeat("worker", [report(job, 3)], lease_s=OVER)
    await store.reap()
    again = await store.get(job.id)
    assert (again.step, again.steps_repeated, again.resumes) == (2, 3, 2)


async def test_a_checkpoint_ahead_of_the_last_heartbeat_repeats_nothing(store: JobStore) -> None:
    await accept(store)
    job = await claimed(store)
    await store.heartbeat("worker", [report(job, 1)], lease_s=LEASE_S)
    await store.save_checkpoint(job.id, job.fence, "a", 3)
    again = await retried(store, job, "unlucky")
    assert (again.step, again.steps_repeated) == (3, 0)


async def test_a_job_without_a_checkpoint_starts_anew_and_does_not_resume(store: JobStore) -> None:
    await accept(store)
    job = await claimed(store)
    await store.heartbeat("worker", [report(job, 3)], lease_s=LEASE_S)
    again = await retried(store, job, "unlucky")
    assert (again.step, again.steps_repeated, again.resumes) == (0, 3, 0)


async def test_a_checkpoint_that_cannot_be_used_is_forgotten_and_the_attempt_counts(store: JobStore) -> None:
    await accept(store)
    job = await claimed(store)
    await store.save_checkpoint(job.id, job.fence, "damaged", 3)
    await store.release(job.id, job.fence)
    job = await claimed(store)
    assert await store.save_checkpoint(job.id, job.fence, None, 0)
    again = await retried(store, job, "damaged")
    assert (again.attempts, again.checkpoint_path, again.checkpoint_step, again.step) == (1, None, 0, 0)


async def test_a_job_that_is_released_loses_no_attempt(open_store: OpenStore) -> None:
    store = await open_store(max_attempts=1)
    await accept(store)
    for _ in range(3):
        job = await claimed(store)
        assert await store.release(job.id, job.fence)
    again = await store.get(job.id)
    assert (again.status, again.attempts, again.claimed_by, again.lease_until) == ("queued", 0, None, None)


async def test_a_job_that_is_gone_is_not_retried(store: JobStore) -> None:
    assert not await store.retry("video_0", 1, "reason")


# Ending


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
async def test_an_end_is_told_once_and_final(store: JobStore, database_url: str, status: str) -> None:
    await accept(store)
    job = await claimed(store)
    await store.save_checkpoint(job.id, job.fence, "a", 2)
    await store.heartbeat("worker", [report(job, 2, preview_path="p", preview_step=2)], lease_s=LEASE_S)
    before = await store.now()
    assert await end_as(store, job, status)
    after = await store.now()
    for again in ("completed", "failed", "cancelled"):
        assert not await end_as(store, job, again)
    ended = await store.get(job.id)
    assert (ended.status, ended.is_ended, ended.claimed_by, ended.lease_until) == (status, True, None, None)
    assert (ended.eta_s, ended.checkpoint_path, ended.preview_path) == (None, None, None)
    assert ended.completed_at is not None
    assert ended.expires_at is not None
    assert before <= ended.completed_at <= after
    assert ended.expires_at - ended.completed_at == pytest.approx(3600 if status == "completed" else 86_400, abs=5)
    assert await store.claim("worker", limit=1, lease_s=1) == []
    assert await told(database_url) == [(job.id, f"video.{status}")]


async def test_a_completed_job_names_its_files_and_is_at_100_percent(store: JobStore) -> None:
    await accept(store)
    job = await claimed(store)
    await store.heartbeat("worker", [report(job, 5)], lease_s=LEASE_S)
    assert (await store.get(job.id)).progress == 99
    await complete(store, job)
    done = await store.get(job.id)
    assert (done.progress, done.step, done.artifacts) == (100, 5, video_of(job.id, 1))


async def test_a_failed_job_says_why(store: JobStore) -> None:
    await accept(store)
    job = await claimed(store)
    await store.fail(job.id, job.fence, "generation_failed", "values were not finite")
    failed = await store.get(job.id)
    assert (failed.error_code, failed.error_message) == ("generation_failed", "values were not finite")


async def test_an_end_that_cannot_be_told_has_not_happened(store: JobStore, database_url: str) -> None:
    await accept(store)
    job = await claimed(store)
    await run_sql(database_url, text("ALTER TABLE outbox RENAME TO mislaid"))
    for status in ("completed", "failed", "cancelled"):
        with pytest.raises(Exception, match=r"outbox|the job store cannot be reached"):
            await end_as(store, job, status)
    assert await store.get(job.id) == job
    await run_sql(database_url, text("ALTER TABLE mislaid RENAME TO outbox"))
    assert await complete(store, job)


# Cancelling and deleting


async def test_a_waiting_job_is_cancelled_at_once(store: JobStore, database_url: str) -> None:
    made = await accept(store)
    assert (await store.cancel(made.id, "ann")).status == "cancelled"
    assert await store.claim("worker", limit=1, lease_s=1) == []
    assert await told(database_url) == [(made.id, "video.cancelled")]


async def test_a_running_job_is_cancelled_by_its_owner(store: JobStore, database_url: str) -> None:
    await accept(store)
    await accept(store)
    job, other = await store.claim("worker", limit=2, lease_s=LEASE_S)
    asked = await store.cancel(job.id, "ann")
    assert (asked.status, asked.cancel_requested) == ("in_progress", True)
    assert await store.cancel(job.id, "ann") == asked
    assert await told(database_url) == []
    assert await store.cancel_requests("worker") == {job.id}
    assert await store.cancel_requests("other") == set()
    beat = await store.heartbeat("worker", [report(job, 1), report(other, 1)], lease_s=LEASE_S)
    assert (beat.cancel_requested, beat.lost) == ({job.id}, set())
    assert await store.cancelled(job.id, job.fence)
    assert await store.cancel_requests("worker") == set()
    assert (await store.get(job.id)).status == "cancelled"


@pytest.mark.parametrize("how", ["complete", "release", "retry", "reap"])
async def test_a_job_to_be_cancelled_ends_so_however_its_attempt_ends(
    store: JobStore, database_url: str, how: str
) -> None:
    await accept(store)
    job = await claimed(store, lease_s=OVER)
    await store.cancel(job.id, "ann")
    if how == "complete":
        assert not await complete(store, job)
    elif how == "release":
        assert await store.release(job.id, job.fence)
    elif how == "retry":
        await store.retry(job.id, job.fence, "unlucky")
    else:
        assert await store.reap() == [job.id]
    ended = await store.get(job.id)
    assert (ended.status, ended.artifacts, ended.claimed_by) == ("cancelled", {}, None)
    assert await told(database_url) == [(job.id, "video.cancelled")]


async def test_a_job_to_be_cancelled_is_not_failed_for_its_attempts(open_store: OpenStore) -> None:
    store = await open_store(max_attempts=1)
    await accept(store)
    job = await claimed(store)
    await store.cancel(job.id, "ann")
    assert (await retried(store, job, "unlucky")).status == "cancelled"


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
async def test_an_ended_job_can_be_deleted_and_not_cancelled(store: JobStore, status: str) -> None:
    await accept(store)
    job = await claimed(store)
    await end_as(store, job, status)
    with pytest.raises(JobEnded, match=f"{job.id} is {status}.*delete it"):
        await store.cancel(job.id, "ann")
    ended = await store.get(job.id)
    assert await store.delete(job.id, "ann") == ended
    with pytest.raises(JobNotFound):
        await store.get(job.id)


async def test_a_live_job_cannot_be_deleted(store: JobStore) -> None:
    made = await accept(store)
    with pytest.raises(JobLive, match=f"{made.id} is queued: cancel it first"):
        await store.delete(made.id, "ann")
    job = await claimed(store)
    with pytest.raises(JobLive, match="in_progress"):
        await store.delete(job.id, "ann")
    assert await store.get(made.id) == job


async def test_a_cancelled_job_is_never_left_waiting_whatever_its_owner_does_meanwhile(open_store: OpenStore) -> None:
    mine, theirs = await open_store(max_attempts=99), await open_store(max_attempts=99)

    for _ in range(30):
        await accept(theirs)
        job = await claimed(mine)
        await asyncio.gather(mine.release(job.id, job.fence), theirs.cancel(job.id, "ann"))
        assert (await theirs.get(job.id)).status == "cancelled"


async def test_of_two_that_delete_a_job_one_does(open_store: OpenStore) -> None:
    stores = [await open_store() for _ in range(4)]
    await accept(stores[0])
    job = await claimed(stores[0])
    await complete(stores[0], job)
    answers = await asyncio.gather(*(store.delete(job.id, "ann") for store in stores), return_exceptions=True)
    assert sorted(type(answer).__name__ for answer in answers) == ["Job", *["JobNotFound"] * 3]


# Housekeeping


async def test_ended_jobs_expire_and_live_ones_never_do(open_store: OpenStore) -> None:
    store = await open_store(keep_ended_s=OVER)
    done, kept, failed, running = [await accept(store) for _ in range(4)]
    live = {job.id: job for job in await store.claim("worker", limit=4, lease_s=LEASE_S)}
    await complete(store, live[done.id], expires_in_s=OVER)
    await complete(store, live[kept.id], expires_in_s=3600)
    await end_as(store, live[failed.id], "failed")
    waiting = await accept(store)
    assert {job.id for job in await store.expired()} == {done.id, failed.id}
    assert len(await store.expired(limit=1)) == 1
    for job in (done, running, waiting):
        await store.forget(job.id)
    await store.forget("video_0")
    assert {job.id for job in await store.expired()} == {failed.id}
    left = await store.get_many([job.id for job in (done, kept, failed, running, waiting)])
    assert left.keys() == {kept.id, failed.id, running.id, waiting.id}


async def test_a_folder_is_needed_while_a_row_names_a_file_in_it(store: JobStore) -> None:
    made = await accept(store, id="video_1", input_path="video_1/0/input")
    assert await store.names_prefix("video_1/0")
    assert not await store.names_prefix("video_1/1")

    first = await claimed(store)
    assert await store.names_prefix("video_1/1")  # where its owner is writing, though nothing is named yet
    await store.save_checkpoint(first.id, first.fence, "video_1/1/trajectory", 1)
    await store.release(first.id, first.fence)
    second = await claimed(store)
    assert await store.names_prefix("video_1/1/")
    await store.save_checkpoint(second.id, second.fence, "video_1/2/trajectory", 2)
    assert not await store.names_prefix("video_1/1")
    await store.heartbeat("worker", [report(second, 2, preview_path="video_1/2/p", preview_step=2)], lease_s=LEASE_S)
    await store.retry(second.id, second.fence, "unlucky")
    assert await store.names_prefix("video_1/2")

    for _ in range(8):
        third = await claimed(store)
        await store.release(third.id, third.fence)
    eleventh = await claimed(store)
    assert eleventh.fence == 11
    await complete(store, eleventh)
    needed = [fence for fence in range(13) if await store.names_prefix(f"video_1/{fence}")]
    assert needed == [0, 11]
    await store.delete(made.id, "ann")
    assert not await store.names_prefix("video_1/11")


# A database that fails


async def test_a_database_that_is_away_is_said_to_be_unavailable(database_url: str, tmp_path: Any) -> None:
    kind = database_url.partition(":")[0]
    away = {
        "sqlite": f"sqlite:///{tmp_path / 'no such folder' / 'jobs.db'}",
        "postgresql": "postgresql://postgres@127.0.0.1:1/t2v",
    }[kind]
    with pytest.raises(Unavailable, match=r"cannot be reached \(.*(unable to open|refused)"):  # the operator reads it
        await JobStore.open(away)
    # aiosqlite leaves the thread of a connection that failed to end by itself, for which this event loop must be there.
    for thread in threading.enumerate():
        if "_connection_worker_thread" in thread.name:
            await asyncio.to_thread(thread.join)


async def test_what_is_said_of_a_database_that_went_away_names_nothing_of_it() -> None:
    away = Database("postgresql://somebody@127.0.0.1:1/secrets")
    with pytest.raises(Unavailable, match=r"^the job store cannot be reached: try again in a few seconds$"):
        async with away.reading():
            pass
    await away.close()


async def test_a_store_that_stands_still_in_a_transaction_holds_up_the_others_for_a_while_only(
    open_store: OpenStore, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where its machine is lost: nobody closes its connection."""
    if database_url.startswith("sqlite"):
        pytest.skip("SQLite is of one machine")
    monkeypatch.setitem(_POSTGRESQL_SESSION, "idle_in_transaction_session_timeout", "3s")
    lost, other = await open_store(), await open_store()
    await accept(other)
    with suppress(Unavailable):  # its session is over
        async with lost.database.writing() as connection:
            await lock(connection, "claim")
            async with asyncio.timeout(15):
                claimed = await other.claim("worker", limit=1, lease_s=LEASE_S)
    assert len(claimed) == 1


async def test_a_server_that_takes_no_writes_any_more_is_left_for_the_next(store: JobStore, database_url: str) -> None:
    """As after a failover, when a name leads to the former primary for a while."""
    if database_url.startswith("sqlite"):
        pytest.skip("SQLite is of one machine")
    with psycopg.connect(database_url, autocommit=True) as server:
        name = server.info.dbname
        server.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        for _ in range(3):
            with pytest.raises(Unavailable):
                await store.create(new_job())
        server.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    await accept(store)


async def test_leases_that_ran_out_while_the_database_was_away_may_still_be_renewed(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await accept(store)
    job = await claimed(store, lease_s=-1)
    with monkeypatch.context() as patched, suppress(Unavailable):
        patched.setattr(store.database, "_engine", Mock(connect=Mock(side_effect=OSError("away"))))
        await store.now()
    assert await store.reap(calm_s=30) == []
    assert await store.reap() == [job.id]


@pytest.mark.parametrize("url", ["mysql://h/d", "jobs.db", ""])
async def test_a_database_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="sqlite:///PATH or postgresql://"):
        await JobStore.open(url)


async def test_a_call_that_is_cancelled_midway_leaves_no_lock_behind(open_store: OpenStore) -> None:
    hurried, patient = await open_store(), await open_store()
    for number in range(40):
        await accept(patient)
        task = asyncio.create_task(hurried.claim("hurried", limit=5, lease_s=OVER))
        await asyncio.sleep(number / 10_000)
        task.cancel()
        await asyncio.wait([task])
        await patient.reap()
        await asyncio.wait_for(hurried.now(), 10)
    counts = (await patient.census()).by_status
    assert counts["queued"] + counts["in_progress"] + counts["failed"] == 40


async def test_what_was_said_to_be_done_is_done_though_its_process_is_killed(
    store: JobStore, database_url: str
) -> None:
    said: list[tuple[str, str]] = []
    for _ in range(3):
        with processes(work_for_ever, database_url, 2) as running:
            said.append(await asyncio.to_thread(running[0][1].recv))
            while said[-1][0] != "completed":
                said.append(await asyncio.to_thread(running[0][1].recv))
            await asyncio.sleep(random.uniform(0.05, 0.3))
            for process, _ in running:
                process.kill()
            for _, answers in running:
                said += _all_sent(answers)
    accepted = [job_id for what, job_id in said if what == "accepted"]
    completed = [job_id for what, job_id in said if what == "completed"]
    assert completed
    # A process may be killed between accepting a job and saying so, when the other has it already.
    there = await store.get_many({*accepted, *completed})
    assert there.keys() == {*accepted, *completed}
    assert {there[job_id].status for job_id in completed} == {"completed"}

    deadline = time.monotonic() + 60
    while (left := (await store.census()).by_status)["queued"] + left["in_progress"]:
        assert time.monotonic() < deadline
        await store.reap()
        for job in await store.claim("another", limit=100, lease_s=LEASE_S):
            assert await complete(store, job)
        await asyncio.sleep(0.05)
    ended = sum((await store.census()).by_status.values())
    assert len(await told(database_url)) == ended
    assert {event for _, event in await told(database_url)} <= {"video.completed", "video.failed"}


def _all_sent(answers: Any) -> list[Any]:
    """What came through before the other end was closed; the last message may be torn."""
    messages = []
    try:
        while answers.poll(1):
            messages.append(answers.recv())
    except (EOFError, OSError):
        pass
    return messages


def test_ids_are_all_different_and_as_the_api_spells_them() -> None:
    ids = {new_job_id() for _ in range(100)}
    assert len(ids) == 100
    for job_id in ids:
        assert job_id.startswith("video_")
        assert len(bytes.fromhex(job_id.removeprefix("video_"))) == 16
