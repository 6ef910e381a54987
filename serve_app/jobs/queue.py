"""The queue of waiting jobs: how it is bounded, and who is next.

A job is due PATIENCE_S after it came, at once where it is urgent; who is due first is claimed first. So urgent jobs go
before normal ones, and those before low ones, but none waits for ever behind others that came long after it.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import ColumnElement, Row, func, insert, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.errors import QueueFull
from serve_app.jobs.model import Job, NewJob
from serve_app.jobs.schema import jobs, now_s
from serve_app.jobs.transitions import job_of, one
from t2v_core.engine.batching import PATIENCE_S

_WAITING = jobs.c.status == "queued"
_RATE_OVER_S = 300.0
_MAX_RETRY_AFTER_S = 120.0


async def enqueue(connection: AsyncConnection, new: NewJob) -> None:
    await connection.execute(
        insert(jobs).values(
            **asdict(new),
            status="queued",
            num_steps=int(new.params.get("num_inference_steps") or 0),
            created_at=now_s(),
            due_at=now_s() + PATIENCE_S[new.priority],
        )
    )


async def accepted_before(connection: AsyncConnection, new: NewJob) -> Job | None:
    """The job that came with the same idempotency key."""
    if new.idempotency_key is None:
        return None
    same = select(jobs).where(jobs.c.owner == new.owner, jobs.c.idempotency_key == new.idempotency_key)
    row = (await connection.execute(same)).first()
    return None if row is None else job_of(row)


async def candidates(connection: AsyncConnection, limit: int, *, urgent_only: bool) -> Sequence[Row[Any, Any]]:
    """Ids and fences of those who are next. PostgreSQL passes over rows that somebody else is about to claim."""
    urgent = [jobs.c.priority == "urgent"] if urgent_only else []
    next_ones = select(jobs.c.id, jobs.c.fence).where(_WAITING, *urgent).order_by(jobs.c.due_at, jobs.c.id)
    return (await connection.execute(next_ones.limit(limit).with_for_update(skip_locked=True))).all()


async def position(connection: AsyncConnection, job_id: str) -> int | None:
    """How many are to be claimed before this one; None if it does not wait."""
    me = (await connection.execute(select(jobs.c.due_at, jobs.c.id).where(one(job_id, _WAITING)))).first()
    if me is None:
        return None
    return await _count(connection, _WAITING, tuple_(jobs.c.due_at, jobs.c.id) < (me.due_at, me.id))


async def num_queued(connection: AsyncConnection, owner: str | None) -> int:
    mine = [] if owner is None else [jobs.c.owner == owner]
    return await _count(connection, _WAITING, *mine)


async def check_bound(connection: AsyncConnection, bound: int | None, owner: str | None) -> None:
    """Raises QueueFull where `bound` jobs of the owner, or of all, wait already."""
    if bound is None or (waiting := await num_queued(connection, owner)) < bound:
        return
    recent = await _count(connection, jobs.c.status == "completed", jobs.c.completed_at > now_s() - _RATE_OVER_S)
    retry_after_s = min(_MAX_RETRY_AFTER_S, max(1.0, (waiting - bound + 1) * _RATE_OVER_S / max(1, recent)))
    whose = "of this key" if owner is not None else "in all"
    raise QueueFull(
        f"{waiting} videos {whose} wait already: at most {bound} may; try again in {retry_after_s:.0f} s",
        retry_after_s,
    )


async def _count(connection: AsyncConnection, *where: ColumnElement[bool]) -> int:
    return (await connection.execute(select(func.count()).select_from(jobs).where(*where))).scalar_one()
