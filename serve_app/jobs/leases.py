"""Leases: whose a job is while it is made, and which are not renewed. Within the transaction of a caller."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.jobs.model import Heartbeat, Job, Progress
from serve_app.jobs.queue import Candidate
from serve_app.jobs.schema import jobs, now_s
from serve_app.jobs.transitions import change, held, job_of, one

_LATE = and_(jobs.c.status == "in_progress", jobs.c.lease_until < now_s())


async def lease(connection: AsyncConnection, candidate: Candidate, claimer: str, lease_s: float) -> Job | None:
    """The job, now the claimer's, with the priority that counts now; None where another was quicker."""
    row = await change(
        connection,
        one(candidate.id, jobs.c.fence == candidate.fence, jobs.c.status == "queued"),
        status="in_progress",
        fence=candidate.fence + 1,
        claimed_by=claimer,
        claimed_step=jobs.c.checkpoint_step,
        lease_until=now_s() + lease_s,
        started_at=func.coalesce(jobs.c.started_at, now_s()),
    )
    if row is None:
        return None
    return replace(job_of(row), priority="urgent") if candidate.is_hastened else job_of(row)


async def renew(connection: AsyncConnection, claimer: str, progress: Sequence[Progress], lease_s: float) -> Heartbeat:
    """Report progress and renew the leases.

    A row that is locked by another is left for the next time: to wait for it might cost all the others' leases.
    """
    mine = select(jobs.c.id, jobs.c.fence, jobs.c.cancel_requested).where(_held_by(claimer))
    free = {(row.id, row.fence) for row in await connection.execute(mine.with_for_update(skip_locked=True))}
    for report in progress:
        if (report.job_id, report.fence) not in free:
            continue
        values: dict[str, Any] = {"step": report.step, "num_steps": report.num_steps, "eta_s": report.eta_s}
        if report.preview_path is not None:
            values |= {"preview_path": report.preview_path, "preview_step": report.preview_step}
        await change(connection, held(report.job_id, report.fence), lease_until=now_s() + lease_s, **values)
    rows = (await connection.execute(mine)).all()  # those of locked rows, too
    still_mine = {(row.id, row.fence) for row in rows}
    lost = {report.job_id for report in progress if (report.job_id, report.fence) not in still_mine}
    return Heartbeat(lost, {row.id for row in rows if row.cancel_requested} - lost)


async def to_cancel(connection: AsyncConnection, claimer: str) -> set[str]:
    """The claimer's jobs that are to be cancelled."""
    query = select(jobs.c.id).where(_held_by(claimer), jobs.c.cancel_requested)
    return set((await connection.execute(query)).scalars())


async def run_out(connection: AsyncConnection) -> set[tuple[str, float]]:
    """The leases that have run out: jobs and until when."""
    return set((await connection.execute(select(jobs.c.id, jobs.c.lease_until).where(_LATE))).tuples())


async def still_run_out(connection: AsyncConnection, seen: set[tuple[str, float]]) -> list[Row[Any]]:
    """The rows of those that nobody has renewed since they were seen, locked."""
    rows = (await connection.execute(select(jobs).where(_LATE).with_for_update(skip_locked=True))).all()
    return [row for row in rows if (row.id, row.lease_until) in seen]


def _held_by(claimer: str) -> ColumnElement[bool]:
    return and_(jobs.c.claimed_by == claimer, jobs.c.status == "in_progress")
