"""An owner's jobs, a page at a time."""

from typing import Literal

from sqlalchemy import select, tuple_, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.errors import JobNotFound
from serve_app.jobs.model import Page
from serve_app.jobs.schema import jobs, removed
from serve_app.jobs.transitions import job_of


async def page_of(
    connection: AsyncConnection, owner: str, after: str | None, limit: int, order: Literal["asc", "desc"]
) -> Page:
    """By their creation, those behind `after`, which may have been removed not long ago. Raises JobNotFound."""
    place = tuple_(jobs.c.created_at, jobs.c.id)  # ids settle what happened at once
    query = select(jobs).where(jobs.c.owner == owner)
    if after is not None:
        behind = (await _created_at(connection, after, owner), after)
        query = query.where(place < behind if order == "desc" else place > behind)
    columns = [column.desc() if order == "desc" else column.asc() for column in (jobs.c.created_at, jobs.c.id)]
    rows = (await connection.execute(query.order_by(*columns).limit(limit + 1))).all()
    return Page([job_of(row) for row in rows[:limit]], len(rows) > limit)


async def _created_at(connection: AsyncConnection, after: str, owner: str) -> float:
    found = [select(t.c.created_at).where(t.c.id == after, t.c.owner == owner) for t in (jobs, removed)]
    created_at: float | None = None if "\0" in after else await connection.scalar(union_all(*found))
    if created_at is None:
        raise JobNotFound(f"after {after!r:.100}: there is no video of this id; list from the start", param="after")
    return created_at
