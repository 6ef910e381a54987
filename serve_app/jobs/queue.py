"""The queue of waiting jobs: how it is bounded, and who is next.

Owners take turns: a job's turn is its place among its owner's own, those that are being made included. So one who asks
for a hundred videos delays nobody's first by more than the work in hand. Within a turn, and among one owner's jobs, who
is due first is first: PATIENCE_S after it came, at once where it is urgent. None waits for ever behind later ones.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple, get_args

from sqlalchemy import ColumnElement, Subquery, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.bounds import RATE_OVER_S, queue_full
from serve_app.jobs.database import lock
from serve_app.jobs.model import Census, Job, JobStatus, NewJob
from serve_app.jobs.schema import jobs, now_s
from serve_app.jobs.transitions import job_of
from t2v_core.engine.batching import PATIENCE_S, Priority

_WAITING = jobs.c.status == "queued"
_LEFT_FOR_S = 3_600.0  # to those who serve its model: longer than an update takes


async def enqueue(connection: AsyncConnection, new: NewJob) -> None:
    await connection.execute(
        insert(jobs).values(
            **asdict(new),
            status="queued",
            num_steps=_num_steps(new),
            created_at=now_s(),
            due_at=now_s() + PATIENCE_S[new.priority],
        )
    )


def _num_steps(new: NewJob) -> int:
    """Of an edit, only the last ones are run."""
    num_steps, strength = new.params.get("num_inference_steps"), new.params.get("strength")
    assert isinstance(num_steps, int)
    return num_steps if strength is None else int(num_steps * float(strength))


async def accepted_before(connection: AsyncConnection, new: NewJob) -> Job | None:
    """The job that came with the same idempotency key."""
    if new.idempotency_key is None:
        return None
    same = select(jobs).where(jobs.c.owner == new.owner, jobs.c.idempotency_key == new.idempotency_key)
    row = (await connection.execute(same)).first()
    return None if row is None else job_of(row)


class Candidate(NamedTuple):
    """A job that may be claimed next. `is_hastened`: its owner has none in hand, and another several."""

    id: str
    fence: int
    is_hastened: bool


async def candidates(
    connection: AsyncConnection, limit: int, *, urgent_only: bool, model: str | None, since: float
) -> Sequence[Candidate]:
    """Those who are next; with `urgent_only`, the urgent and the hastened among them. For one caller at a time.

    With a `model`, none that came after `since` for another one: unless nobody has taken it for an hour, and nobody
    makes any for that model.
    """
    await lock(connection, "claim")
    running = {row.owner: row.num for row in await connection.execute(select(_running()))}
    line = _line()
    next_ones = select(line).order_by(line.c.turn, line.c.due_at, line.c.id)
    if model is not None:
        made = select(jobs.c.model).where(jobs.c.status == "in_progress")
        is_left_over = (line.c.created_at < now_s() - _LEFT_FOR_S) & line.c.model.not_in(made)
        next_ones = next_ones.where((line.c.model == model) | (line.c.created_at < since) | is_left_over)
    # Of all who wait, no more are read than may be next.
    next_ones = (
        next_ones.where((line.c.priority == "urgent") | (line.c.turn == 1)) if urgent_only else next_ones.limit(limit)
    )
    rows = await connection.execute(next_ones)
    found = []
    for row in rows:
        most_of_another = max((num for owner, num in running.items() if owner != row.owner), default=0)
        is_hastened = row.turn == 1 and most_of_another > 1
        if not urgent_only or is_hastened or row.priority == "urgent":
            found.append(Candidate(row.id, row.fence, is_hastened))
            if len(found) == limit:
                break
    return found


async def positions(connection: AsyncConnection) -> dict[str, int]:
    """How many are to be claimed before each that waits."""
    line = _line()
    ids = await connection.scalars(select(line.c.id).order_by(line.c.turn, line.c.due_at, line.c.id))
    return {job_id: place for place, job_id in enumerate(ids)}


async def num_queued(connection: AsyncConnection, owner: str | None) -> int:
    mine = [] if owner is None else [jobs.c.owner == owner]
    return await _count(connection, _WAITING, *mine)


async def census(connection: AsyncConnection) -> Census:
    """All jobs at this moment, by one query."""
    age_s = now_s() - func.min(jobs.c.created_at)
    groups = select(jobs.c.status, jobs.c.priority, func.count(), age_s).group_by(jobs.c.status, jobs.c.priority)
    by_status: dict[JobStatus, int] = dict.fromkeys(get_args(JobStatus), 0)
    queued: dict[Priority, int] = dict.fromkeys(get_args(Priority), 0)
    oldest_queued_s = 0.0
    for status, priority, num_jobs, oldest_s in await connection.execute(groups):
        by_status[status] += num_jobs
        if status == "queued":
            queued[priority] = num_jobs
            oldest_queued_s = max(oldest_queued_s, oldest_s)
    return Census(by_status, queued, oldest_queued_s)


async def check_bound(connection: AsyncConnection, bound: int | None, owner: str | None) -> None:
    """Raises QueueFull where `bound` jobs of the owner, or of all, wait already."""
    if bound is None or (waiting := await num_queued(connection, owner)) < bound:
        return
    recent = await _count(connection, jobs.c.status == "completed", jobs.c.completed_at > now_s() - RATE_OVER_S)
    raise queue_full(f"videos {'of this key' if owner is not None else 'in all'}", waiting, bound, recent)


def _running() -> Subquery:
    """How many jobs of each owner are being made."""
    made = select(jobs.c.owner, func.count().label("num")).where(jobs.c.status == "in_progress")
    return made.group_by(jobs.c.owner).subquery()


def _line() -> Subquery:
    """All who wait, each with its turn: 1 is that of an owner's only job."""
    running = _running()
    place = func.row_number().over(partition_by=jobs.c.owner, order_by=(jobs.c.due_at, jobs.c.id))
    turn = (place + func.coalesce(running.c.num, 0)).label("turn")
    names = "id", "fence", "owner", "model", "priority", "created_at", "due_at"
    return (
        select(*(jobs.c[name] for name in names), turn)
        .outerjoin(running, jobs.c.owner == running.c.owner)
        .where(_WAITING)
        .subquery()
    )


async def _count(connection: AsyncConnection, *where: ColumnElement[bool]) -> int:
    return (await connection.execute(select(func.count()).select_from(jobs).where(*where))).scalar_one()
