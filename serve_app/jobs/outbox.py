"""What others are told of jobs: written with the change itself, delivered at least once."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, case, delete, func, insert, literal, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from serve_app.jobs.database import Database, finished
from serve_app.jobs.schema import now_s, outbox


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message on its way. `attempts` counts this one; `id` and `body` are the same at every attempt."""

    number: int
    job_id: str
    owner: str
    url: str
    body: str
    attempts: int

    @property
    def id(self) -> str:
        return f"evt_{self.job_id}_{self.number}"


async def post(connection: AsyncConnection, ended: Row[Any]) -> None:
    """In the transaction in which the job ended."""
    event = f"video.{ended.status}"
    told: dict[str, Any] = {"job_id": ended.id, "event": event, "created_at": now_s()}
    if ended.webhook_url is not None:
        error = None if ended.error_code is None else {"code": ended.error_code, "message": ended.error_message}
        data = {"id": ended.id, "status": ended.status, "metadata": ended.metadata, "error": error}
        told |= {
            "owner": ended.owner,
            "url": ended.webhook_url,
            "body": json.dumps({"type": event, "created_at": int(ended.completed_at), "data": data}),
            "next_at": now_s(),
            "attempts": 0,
        }
    await connection.execute(insert(outbox).values(told))


class Outbox:
    """The messages of all jobs. Its methods raise Unavailable where the database cannot be reached."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @finished
    async def claim(
        self,
        *,
        limit: int,
        lease_s: float,
        in_flight: Mapping[str, int] | None = None,
        max_per_owner: int | None = None,
    ) -> list[Delivery]:
        """Messages that are due, each for one caller: it is due again after `lease_s`, unless that one says more.

        With those that are `in_flight`, an owner has at most `max_per_owner`.
        """
        if limit < 1:
            return []
        mine = outbox.c.next_at <= now_s()
        due = select(outbox).where(mine).order_by(outbox.c.next_at, outbox.c.id).limit(limit)
        if max_per_owner is not None:
            place = func.row_number().over(partition_by=outbox.c.owner, order_by=(outbox.c.next_at, outbox.c.id))
            line = select(outbox.c.id, outbox.c.owner, place.label("place")).where(mine).subquery()
            under_way = case(in_flight, value=line.c.owner, else_=0) if in_flight else literal(0)
            admitted = select(line.c.id).where(line.c.place + under_way <= max_per_owner)
            due = due.where(outbox.c.id.in_(admitted))
        async with self.database.reading() as connection:  # mostly there is none, and a writer would hold up others
            if (await connection.execute(due.limit(1))).first() is None:
                return []
        claimed = []
        async with self.database.writing() as connection:
            for row in (await connection.execute(due.with_for_update(skip_locked=True))).all():
                attempts = row.attempts + 1
                await _change(connection, row.id, next_at=now_s() + lease_s, attempts=attempts)
                claimed.append(Delivery(row.id, row.job_id, row.owner, row.url, row.body, attempts))
        return claimed

    @finished
    async def delivered(self, delivery: Delivery) -> None:
        """It has arrived."""
        async with self.database.writing() as connection:
            await _change(connection, delivery.number, next_at=None, delivered_at=now_s())

    @finished
    async def put_off(self, delivery: Delivery, delay_s: float | None) -> None:
        """It has not: again after so long, or never."""
        async with self.database.writing() as connection:
            await _change(connection, delivery.number, next_at=None if delay_s is None else now_s() + delay_s)

    @finished
    async def forget(self, older_than_s: float) -> None:
        """Remove what is settled, after a while."""
        settled = outbox.c.next_at.is_(None) & (outbox.c.created_at < now_s() - older_than_s)
        async with self.database.writing() as connection:
            await connection.execute(delete(outbox).where(settled))


async def _change(connection: AsyncConnection, number: int, **values: Any) -> None:  # of columns, or SQL for them
    await connection.execute(update(outbox).where(outbox.c.id == number).values(**values))
