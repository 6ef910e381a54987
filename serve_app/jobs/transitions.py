"""How a job goes from one state to the next, within the transaction of a caller.

    queued ── claim ──> in_progress ── end ──> completed, failed, cancelled
       ^                    │  │
       └────── requeue ─────┘  └ a cancelled or exhausted job ends instead of being requeued

Every write names the state that it starts from, so that of two only one finds it.
"""

from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.errors import JobNotFound
from serve_app.jobs.database import tell
from serve_app.jobs.model import Artifact, Ended, Job, JobStatus, Requeued
from serve_app.jobs.outbox import post
from serve_app.jobs.schema import jobs, now_s, removed


@dataclass(frozen=True, slots=True)
class Rules:
    """How often a job is tried without progress, and how long it is kept when it ends without a video."""

    max_attempts: int
    keep_ended_s: float


def one(job_id: str, *where: ColumnElement[bool]) -> ColumnElement[bool]:
    return and_(jobs.c.id == job_id, *where)


def held(job_id: str, fence: int) -> ColumnElement[bool]:
    """The job, if the claim with this fence is still the one that counts."""
    return one(job_id, jobs.c.fence == fence, jobs.c.status == "in_progress")


def job_of(row: Row[Any]) -> Job:
    values = {field.name: getattr(row, field.name) for field in fields(Job)}
    values["artifacts"] = {variant: Artifact(**artifact) for variant, artifact in row.artifacts.items()}
    return Job(**values)


async def read(connection: AsyncConnection, job_id: str, owner: str | None = None, *, lock: bool = False) -> Job:
    """One job, where `lock` as nobody else can change it before we do. Raises JobNotFound."""
    query = select(jobs).where(jobs.c.id == job_id)
    # PostgreSQL keeps no NUL and refuses to look for one.
    row = None if "\0" in job_id else (await connection.execute(query.with_for_update() if lock else query)).first()
    if row is None or owner not in (None, row.owner):
        raise JobNotFound(f"video {job_id!r:.100}: there is none of this id; it may have expired")
    return job_of(row)


async def held_row(connection: AsyncConnection, job_id: str, fence: int) -> Row[Any] | None:
    """The row of a job whose claim still counts, locked."""
    return (await connection.execute(select(jobs).where(held(job_id, fence)).with_for_update())).first()


async def change(
    connection: AsyncConnection,
    where: ColumnElement[bool],
    **values: Any,  # of columns, or SQL for them
) -> Row[Any] | None:
    """The one row, changed; None if it was not as it should be."""
    return (await connection.execute(update(jobs).where(where).values(**values).returning(*jobs.c))).first()


async def end(
    connection: AsyncConnection,
    where: ColumnElement[bool],
    status: JobStatus,
    *,
    keep_s: float,
    **values: Any,  # of columns, or SQL for them
) -> bool:
    """Whether the job was as it should be; it has ended then, is kept for `keep_s`, and the outbox tells of it."""
    ended = await change(
        connection,
        where,
        status=status,
        completed_at=now_s(),
        expires_at=now_s() + keep_s,
        claimed_by=None,
        lease_until=None,
        eta_s=None,
        checkpoint_path=None,  # with no row that names them, these files are swept away
        preview_path=None,
        input_path=jobs.c.input_path if status == "completed" else None,
        **values,
    )
    if ended is not None:
        tell(connection, Ended(status))
        await post(connection, ended)
    return ended is not None


async def remove(connection: AsyncConnection, where: ColumnElement[bool]) -> None:
    """Take the row of an ended job away, and keep its place and its end. Of two that do, one finds it."""
    kept = jobs.c.id, jobs.c.owner, jobs.c.created_at, jobs.c.status, jobs.c.completed_at
    for row in (await connection.execute(delete(jobs).where(where).returning(*kept))).all():
        await connection.execute(insert(removed).values(**row._mapping, removed_at=now_s()))


async def requeue(connection: AsyncConnection, row: Row[Any], rules: Rules, *, attempts: int, is_retry: bool) -> None:
    """Give a held and locked job back, to go on from its checkpoint. One that is to be cancelled ends here."""
    where = held(row.id, row.fence)
    if row.cancel_requested:
        await end(connection, where, "cancelled", keep_s=rules.keep_ended_s)
        return
    changed = Requeued(is_retry, row.checkpoint_path is not None, max(0, row.step - row.checkpoint_step))
    await change(
        connection,
        where,
        status="queued",
        attempts=attempts,
        claimed_by=None,
        lease_until=None,
        eta_s=None,
        step=row.checkpoint_step,
        resumes=row.resumes + changed.is_resume,
        steps_repeated=row.steps_repeated + changed.steps_repeated,
    )
    tell(connection, changed)


async def give_up_attempt(connection: AsyncConnection, row: Row[Any], rules: Rules, reason: str) -> None:
    """Requeue a held and locked job after an attempt that failed. It counts unless it gained a checkpoint."""
    attempts = row.attempts + (row.checkpoint_step <= row.claimed_step)
    if attempts < rules.max_attempts or row.cancel_requested:
        await requeue(connection, row, rules, attempts=attempts, is_retry=True)
        return
    await end(
        connection,
        held(row.id, row.fence),
        "failed",
        keep_s=rules.keep_ended_s,
        attempts=attempts,
        error_code="attempts_exhausted",
        error_message=f"{attempts} attempts ended without progress, the last since {reason}: try again later",
    )
