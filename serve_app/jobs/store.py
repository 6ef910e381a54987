"""Jobs in SQLite or PostgreSQL: accepted once, claimed by one owner at a time, ended once.

A claim gives a lease and a fence number. The lease is renewed by heartbeats; when it runs out, the job goes back to the
queue. The fence grows with every claim and is part of every write, so that an owner that was thought dead cannot write.
"""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, fields
from typing import Any, Literal

from sqlalchemy import ColumnElement, Row, and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from serve_app.errors import IdempotencyConflict, JobEnded, JobLive, JobNotFound, QueueFull, Unavailable
from serve_app.jobs.model import ENDED, Artifact, Heartbeat, Job, JobStatus, NewJob, Page, Progress
from serve_app.jobs.schema import jobs, metadata, now_s, open_engine, outbox
from t2v_core.engine.batching import PATIENCE_S

_SETUP_LOCK = 7_282_014  # any number that nobody else uses
_RATE_OVER_S = 300.0
_MAX_RETRY_AFTER_S = 120.0
_LIVE: tuple[JobStatus, ...] = ("queued", "in_progress")
_Jobs = list[Job]  # inside the class, `list` is its method


class JobStore:
    """All jobs. Safe for any number of stores, in any number of processes, on one database."""

    def __init__(self, engine: AsyncEngine, *, max_attempts: int, keep_ended_s: float) -> None:
        self._engine, self._max_attempts, self._keep_ended_s = engine, max_attempts, keep_ended_s

    @classmethod
    async def open(cls, url: str, *, max_attempts: int = 3, keep_ended_s: float = 86_400.0) -> "JobStore":
        """The store at "sqlite:///PATH" or "postgresql://...", with its tables made if they are not there.

        A job fails for good after `max_attempts` attempts without progress. Raises InvalidRequest, Unavailable.
        """
        store = cls(open_engine(url), max_attempts=max_attempts, keep_ended_s=keep_ended_s)
        async with store._writing() as connection:
            if connection.dialect.name == "postgresql":
                await connection.execute(select(func.pg_advisory_xact_lock(_SETUP_LOCK)))
            await connection.run_sync(metadata.create_all)
        return store

    async def close(self) -> None:
        await self._engine.dispose()

    async def now(self) -> float:
        """The database's clock, in unix seconds."""
        async with self._reading() as connection:
            return float((await connection.execute(select(now_s()))).scalar_one())

    # What callers of the service do

    async def create(
        self, new: NewJob, *, max_queued: int | None = None, max_queued_per_owner: int | None = None
    ) -> tuple[Job, bool]:
        """The job, and whether it is new: the same key with the same body gives the job that is there already.

        Raises IdempotencyConflict for the same key with another body, QueueFull where so many wait already.
        """
        try:
            async with self._writing() as connection:
                earlier = await self._earlier(connection, new)
                if earlier is None:
                    await self._check_queue(connection, max_queued, None)
                    await self._check_queue(connection, max_queued_per_owner, new.owner)
                    await connection.execute(
                        insert(jobs).values(
                            **asdict(new),
                            status="queued",
                            num_steps=int(new.params.get("num_inference_steps") or 0),
                            created_at=now_s(),
                            due_at=now_s() + PATIENCE_S[new.priority],
                        )
                    )
                    return await self._read(connection, new.id), True
        except IntegrityError:  # another one with this key came in between
            async with self._reading() as connection:
                earlier = await self._earlier(connection, new)
            if earlier is None:
                raise
        if earlier.body_hash != new.body_hash:
            raise IdempotencyConflict(
                f"Idempotency-Key {new.idempotency_key!r:.100}: was used for {earlier.id} with another body; "
                "use a new key for a new request"
            )
        return earlier, False

    async def get(self, job_id: str, owner: str | None = None) -> Job:
        """One job. Raises JobNotFound, also where it is another owner's."""
        async with self._reading() as connection:
            return await self._read(connection, job_id, owner)

    async def get_many(self, job_ids: Collection[str]) -> dict[str, Job]:
        """Those of the jobs that there are."""
        if not job_ids:
            return {}
        async with self._reading() as connection:
            rows = await connection.execute(select(jobs).where(jobs.c.id.in_(list(job_ids))))
            return {row.id: _job(row) for row in rows}

    async def list(
        self, owner: str, *, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> Page:
        """An owner's jobs by their creation, those behind `after`. Raises JobNotFound for an unknown `after`."""
        time, job_id = jobs.c.created_at, jobs.c.id
        query = select(jobs).where(jobs.c.owner == owner)
        async with self._reading() as connection:
            if after is not None:
                last = await self._read(connection, after, owner)
                if order == "desc":
                    query = query.where(or_(time < last.created_at, and_(time == last.created_at, job_id < after)))
                else:
                    query = query.where(or_(time > last.created_at, and_(time == last.created_at, job_id > after)))
            ordering = (time.desc(), job_id.desc()) if order == "desc" else (time.asc(), job_id.asc())
            rows = (await connection.execute(query.order_by(*ordering).limit(limit + 1))).all()
        return Page([_job(row) for row in rows[:limit]], len(rows) > limit)

    async def cancel(self, job_id: str, owner: str) -> Job:
        """Cancel a job: at once while it waits, else by its owner, who is told. Raises JobNotFound, JobEnded."""
        async with self._writing() as connection:
            if await self._change(
                connection,
                _one(job_id, jobs.c.owner == owner, jobs.c.status == "queued"),
                event="cancelled",
                **self._ending("cancelled"),
            ):
                return await self._read(connection, job_id)
            where = _one(job_id, jobs.c.owner == owner, jobs.c.status == "in_progress")
            if await self._change(connection, where, cancel_requested=True):
                return await self._read(connection, job_id)
            job = await self._read(connection, job_id, owner)
        raise JobEnded(
            f"video {job_id} is {job.status}: only one that has not ended can be cancelled; delete it instead"
        )

    async def delete(self, job_id: str, owner: str) -> Job:
        """Remove a job that has ended, and say what it was. Raises JobNotFound, JobLive."""
        async with self._writing() as connection:
            job = await self._read(connection, job_id, owner)
            if not job.is_ended:
                raise JobLive(f"video {job_id} is {job.status}: cancel it first")
            await connection.execute(delete(jobs).where(jobs.c.id == job_id))
            return job

    # What the owners of claims do

    async def claim(self, claimer: str, *, limit: int, lease_s: float, urgent_only: bool = False) -> _Jobs:
        """Up to `limit` queued jobs, those due first, now the claimer's for `lease_s` seconds."""
        if limit < 1:
            return []
        waiting: ColumnElement[bool] = jobs.c.status == "queued"
        if urgent_only:
            waiting = and_(waiting, jobs.c.priority == "urgent")
        candidates = select(jobs.c.id, jobs.c.fence).where(waiting).order_by(jobs.c.due_at, jobs.c.id).limit(limit)
        claimed = []
        async with self._writing() as connection:
            for row in (await connection.execute(candidates.with_for_update(skip_locked=True))).all():
                is_ours = await self._change(
                    connection,
                    _one(row.id, jobs.c.fence == row.fence, jobs.c.status == "queued"),
                    status="in_progress",
                    fence=row.fence + 1,
                    claimed_by=claimer,
                    claimed_step=jobs.c.checkpoint_step,
                    lease_until=now_s() + lease_s,
                    started_at=func.coalesce(jobs.c.started_at, now_s()),
                )
                if is_ours:
                    claimed.append(await self._read(connection, row.id))
        return claimed

    async def heartbeat(self, claimer: str, progress: Sequence[Progress], *, lease_s: float) -> Heartbeat:
        """Report progress and renew the leases, all at once."""
        lost: set[str] = set()
        async with self._writing() as connection:
            for report in progress:
                previewed: dict[str, Any] = (
                    {"preview_path": report.preview_path, "preview_step": report.preview_step}
                    if report.preview_path
                    else {}
                )
                is_ours = await self._change(
                    connection,
                    and_(_held(report.job_id, report.fence), jobs.c.claimed_by == claimer),
                    step=report.step,
                    num_steps=report.num_steps,
                    eta_s=report.eta_s,
                    lease_until=now_s() + lease_s,
                    **previewed,
                )
                if not is_ours:
                    lost.add(report.job_id)
            return Heartbeat(lost, await self._to_cancel(connection, claimer) - lost)

    async def cancel_requests(self, claimer: str) -> set[str]:
        """The claimer's jobs that are to be cancelled."""
        async with self._reading() as connection:
            return await self._to_cancel(connection, claimer)

    async def save_checkpoint(self, job_id: str, fence: int, path: str | None, step: int) -> bool:
        """Name the newest trajectory; None forgets it. False where the job is not this owner's any more."""
        async with self._writing() as connection:
            return await self._change(connection, _held(job_id, fence), checkpoint_path=path, checkpoint_step=step)

    async def complete(
        self, job_id: str, fence: int, artifacts: Mapping[str, Artifact], *, expires_in_s: float
    ) -> bool:
        """End a job with its files. False where it is not this owner's any more, or was to be cancelled: it is then."""
        files = {variant: asdict(artifact) for variant, artifact in artifacts.items()}
        async with self._writing() as connection:
            done = self._ending("completed") | {"expires_at": now_s() + expires_in_s, "step": jobs.c.num_steps}
            where = and_(_held(job_id, fence), jobs.c.cancel_requested.is_(False))
            if await self._change(connection, where, event="completed", artifacts=files, **done):
                return True
            await self._change(connection, _held(job_id, fence), event="cancelled", **self._ending("cancelled"))
        return False

    async def fail(self, job_id: str, fence: int, code: str, message: str) -> bool:
        """End a job that cannot be made. False where it is not this owner's any more."""
        async with self._writing() as connection:
            return await self._fail(connection, job_id, fence, code, message)

    async def cancelled(self, job_id: str, fence: int) -> bool:
        """End a job whose work has stopped. False where it is not this owner's any more."""
        async with self._writing() as connection:
            return await self._change(connection, _held(job_id, fence), event="cancelled", **self._ending("cancelled"))

    async def release(self, job_id: str, fence: int) -> bool:
        """Give a job back, to be gone on with by another. It counts as no attempt."""
        async with self._writing() as connection:
            job = await self._held_job(connection, job_id, fence)
            if job is not None:
                await self._requeue(connection, job, attempts=job.attempts)
            return job is not None

    async def retry(self, job_id: str, fence: int, reason: str) -> Job:
        """Give a job back after a failed attempt. It counts unless it gained a checkpoint; after too many it failed.

        Raises JobNotFound.
        """
        async with self._writing() as connection:
            job = await self._held_job(connection, job_id, fence)
            if job is not None:
                await self._after_failure(connection, job, reason)
            return await self._read(connection, job_id)

    async def reap(self) -> Collection[str]:
        """Take the jobs back whose leases have run out. Returns their ids."""
        async with self._writing() as connection:
            late = select(jobs).where(jobs.c.status == "in_progress", jobs.c.lease_until < now_s())
            rows = (await connection.execute(late.with_for_update(skip_locked=True))).all()
            for row in rows:
                await self._after_failure(connection, _job(row), "its worker was lost")
        return [row.id for row in rows]

    # What keeps the house in order

    async def expired(self, limit: int = 100) -> _Jobs:
        """Ended jobs past their time."""
        async with self._reading() as connection:
            rows = await connection.execute(select(jobs).where(jobs.c.expires_at < now_s()).limit(limit))
            return [_job(row) for row in rows]

    async def forget(self, job_id: str) -> None:
        """Remove the row of an ended job."""
        async with self._writing() as connection:
            await connection.execute(delete(jobs).where(jobs.c.id == job_id, jobs.c.status.in_(ENDED)))

    async def names_prefix(self, prefix: str) -> bool:
        """Whether a job needs what is under "{job}/{fence}": it is being made there, or names a file there."""
        job_id, _, fence = prefix.strip("/").partition("/")
        try:
            job = await self.get(job_id)
        except JobNotFound:
            return False
        if job.status == "in_progress" and fence == str(job.fence):
            return True
        paths = [job.input_path, job.checkpoint_path, job.preview_path, *(a.path for a in job.artifacts.values())]
        return any(path is not None and path.startswith(f"{job_id}/{fence}/") for path in paths)

    async def queue_position(self, job_id: str) -> int | None:
        """How many jobs are to be claimed before this one; None if it does not wait."""
        async with self._reading() as connection:
            me = (await connection.execute(select(jobs.c.due_at, jobs.c.status).where(jobs.c.id == job_id))).first()
            if me is None or me.status != "queued":
                return None
            before = or_(jobs.c.due_at < me.due_at, and_(jobs.c.due_at == me.due_at, jobs.c.id < job_id))
            return await self._count(connection, jobs.c.status == "queued", before)

    async def num_queued(self, owner: str | None = None) -> int:
        """How many jobs wait, of all owners or of one."""
        async with self._reading() as connection:
            mine = [] if owner is None else [jobs.c.owner == owner]
            return await self._count(connection, jobs.c.status == "queued", *mine)

    async def counts(self) -> dict[JobStatus, int]:
        """How many jobs there are of each status."""
        async with self._reading() as connection:
            rows = await connection.execute(select(jobs.c.status, func.count()).group_by(jobs.c.status))
            found = {row[0]: row[1] for row in rows}
        return {status: found.get(status, 0) for status in (*_LIVE, *sorted(ENDED))}

    # Transactions, and their parts

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[AsyncConnection]:
        async with _explained(), self._engine.connect() as connection:
            yield connection

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[AsyncConnection]:
        async with _explained(), self._engine.execution_options(writes=True).begin() as connection:
            yield connection

    async def _read(self, connection: AsyncConnection, job_id: str, owner: str | None = None) -> Job:
        row = (await connection.execute(select(jobs).where(jobs.c.id == job_id))).first()
        if row is None or owner not in (None, row.owner):
            raise JobNotFound(f"video {job_id!r:.100}: there is none of this id; it may have expired")
        return _job(row)

    async def _held_job(self, connection: AsyncConnection, job_id: str, fence: int) -> Job | None:
        row = (await connection.execute(select(jobs).where(_held(job_id, fence)).with_for_update())).first()
        return None if row is None else _job(row)

    async def _earlier(self, connection: AsyncConnection, new: NewJob) -> Job | None:
        if new.idempotency_key is None:
            return None
        same = select(jobs).where(jobs.c.owner == new.owner, jobs.c.idempotency_key == new.idempotency_key)
        row = (await connection.execute(same)).first()
        return None if row is None else _job(row)

    async def _check_queue(self, connection: AsyncConnection, bound: int | None, owner: str | None) -> None:
        if bound is None:
            return
        mine = [] if owner is None else [jobs.c.owner == owner]
        waiting = await self._count(connection, jobs.c.status == "queued", *mine)
        if waiting < bound:
            return
        recent = await self._count(
            connection, jobs.c.status == "completed", jobs.c.completed_at > now_s() - _RATE_OVER_S
        )
        retry_after_s = min(_MAX_RETRY_AFTER_S, max(1.0, (waiting - bound + 1) * _RATE_OVER_S / max(1, recent)))
        whose = "of this key" if owner is not None else "in all"
        raise QueueFull(
            f"{waiting} videos {whose} wait already: at most {bound} may; try again in {retry_after_s:.0f} s",
            retry_after_s,
        )

    async def _count(self, connection: AsyncConnection, *where: ColumnElement[bool]) -> int:
        return (await connection.execute(select(func.count()).select_from(jobs).where(*where))).scalar_one()

    async def _to_cancel(self, connection: AsyncConnection, claimer: str) -> set[str]:
        mine = and_(jobs.c.claimed_by == claimer, jobs.c.status == "in_progress")
        return set((await connection.execute(select(jobs.c.id).where(mine, jobs.c.cancel_requested))).scalars())

    async def _change(
        self,
        connection: AsyncConnection,
        where: ColumnElement[bool],
        *,
        event: str | None = None,
        **values: Any,  # of columns, or SQL for them
    ) -> bool:
        """Whether the one row was as it should be; it is changed then, and the outbox tells of an ending."""
        changed = (await connection.execute(update(jobs).where(where).values(**values).returning(jobs.c.id))).first()
        if changed is not None and event is not None:
            await connection.execute(
                insert(outbox).values(job_id=changed.id, event=f"video.{event}", created_at=now_s())
            )
        return changed is not None

    async def _fail(self, connection: AsyncConnection, job_id: str, fence: int, code: str, message: str) -> bool:
        return await self._change(
            connection,
            _held(job_id, fence),
            event="failed",
            error_code=code,
            error_message=message,
            **self._ending("failed"),
        )

    def _ending(self, status: JobStatus) -> dict[str, Any]:  # Any: SQL
        return {
            "status": status,
            "completed_at": now_s(),
            "expires_at": now_s() + self._keep_ended_s,
            "claimed_by": None,
            "lease_until": None,
            "eta_s": None,
        }

    async def _after_failure(self, connection: AsyncConnection, job: Job, reason: str) -> None:
        if job.cancel_requested:
            where = _held(job.id, job.fence)
            await self._change(connection, where, event="cancelled", **self._ending("cancelled"))
            return
        claimed_step = (await connection.execute(select(jobs.c.claimed_step).where(jobs.c.id == job.id))).scalar_one()
        attempts = job.attempts + (job.checkpoint_step <= claimed_step)
        if attempts >= self._max_attempts:
            message = f"{attempts} attempts ended without progress, the last since {reason}: try again later"
            await self._fail(connection, job.id, job.fence, "attempts_exhausted", message)
            return
        await self._requeue(connection, job, attempts=attempts)

    async def _requeue(self, connection: AsyncConnection, job: Job, *, attempts: int) -> None:
        await self._change(
            connection,
            _held(job.id, job.fence),
            status="queued",
            attempts=attempts,
            claimed_by=None,
            lease_until=None,
            eta_s=None,
            step=job.checkpoint_step,
            resumes=job.resumes + (job.checkpoint_path is not None),
            steps_repeated=job.steps_repeated + max(0, job.step - job.checkpoint_step),
        )


@asynccontextmanager
async def _explained() -> AsyncIterator[None]:
    """A database that is away is a part of the service that cannot be reached."""
    try:
        yield
    except IntegrityError:
        raise
    except (DBAPIError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
        raise Unavailable(f"the job store cannot be reached ({reason}): try again in a few seconds") from error


def _one(job_id: str, *where: ColumnElement[bool]) -> ColumnElement[bool]:
    return and_(jobs.c.id == job_id, *where)


def _held(job_id: str, fence: int) -> ColumnElement[bool]:
    """The job, if the claim with this fence is still the one that counts."""
    return _one(job_id, jobs.c.fence == fence, jobs.c.status == "in_progress")


def _job(row: Row[Any]) -> Job:
    values = {field.name: getattr(row, field.name) for field in fields(Job)}
    values["artifacts"] = {variant: Artifact(**artifact) for variant, artifact in row.artifacts.items()}
    return Job(**values)
