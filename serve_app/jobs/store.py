"""Jobs in SQLite or PostgreSQL: accepted once, claimed by one owner at a time, ended once.

A claim gives a lease and a fence number. The lease is renewed by heartbeats; when it runs out, the job goes back to the
queue. The fence grows with every claim and is part of every write, so that an owner that was thought dead cannot write.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Literal

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from serve_app.errors import IdempotencyConflict, JobEnded, JobLive, JobNotFound, Unavailable
from serve_app.jobs.database import Database, finished, lock, why_away
from serve_app.jobs.leases import lease, renew, run_out, still_run_out, to_cancel
from serve_app.jobs.listing import page_of
from serve_app.jobs.model import (
    ENDED,
    Artifact,
    Census,
    Change,
    Heartbeat,
    Job,
    NewJob,
    Page,
    Progress,
    Removed,
)
from serve_app.jobs.queue import accepted_before, candidates, census, check_bound, enqueue, num_queued, positions
from serve_app.jobs.schema import add_missing_columns, jobs, metadata, now_s, removed
from serve_app.jobs.transitions import (
    Rules,
    change,
    end,
    give_up_attempt,
    held,
    held_row,
    job_of,
    one,
    read,
    remove,
    requeue,
)
from t2v_core.errors import InvalidRequest

_PAUSE_S = 2.0
# Inside the class, `list` is its method.
_Jobs = list[Job]
_Ids = list[str]


class JobStore:
    """All jobs. Safe for any number of stores, in any number of processes, on one database.

    Every method raises Unavailable where the database cannot be reached.
    """

    def __init__(self, database: Database, rules: Rules) -> None:
        self.database, self._rules = database, rules

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        max_attempts: int = 3,
        keep_ended_s: float = 86_400.0,
        patience_s: float = 0.0,
        on_change: Callable[[Change], None] = lambda _: None,
    ) -> "JobStore":
        """The store at "sqlite:///PATH" or "postgresql://...", with its tables made if they are not there.

        A job fails for good after `max_attempts` attempts without progress; one that failed or was cancelled is kept
        for `keep_ended_s`. A database that cannot be reached is waited for, `patience_s` long. `on_change` is
        told what becomes of jobs here. Raises InvalidRequest for another kind of URL.
        """
        store = cls(Database(url, on_change), Rules(max_attempts, keep_ended_s))
        deadline = time.monotonic() + patience_s
        try:
            while True:
                try:
                    await store._make_tables()
                    return store
                except Unavailable as error:
                    if time.monotonic() > deadline:
                        raise Unavailable(f"the job store cannot be reached ({why_away(error.__cause__)})") from error
                    await asyncio.sleep(_PAUSE_S)
        except BaseException:
            await store.close()
            raise

    async def close(self) -> None:
        await self.database.close()

    @finished
    async def now(self) -> float:
        """The database's clock, in unix seconds."""
        async with self.database.reading() as connection:
            return float((await connection.execute(select(now_s()))).scalar_one())

    # What callers of the service do

    @finished
    async def create(
        self, new: NewJob, *, max_queued: int | None = None, max_queued_per_owner: int | None = None
    ) -> tuple[Job, bool]:
        """The job, and whether it is new: the same key with the same body gives the job that is there already.

        Raises IdempotencyConflict for the same key with another body, QueueFull where so many wait already.
        """
        if "\0" in new.prompt:
            raise InvalidRequest("prompt: holds the character U+0000; leave it out", param="prompt")
        try:
            async with self.database.writing() as connection:
                if max_queued is not None or max_queued_per_owner is not None:
                    await lock(connection, "queue")  # two that count at once would both find the last place
                earlier = await accepted_before(connection, new)
                if earlier is None:
                    await check_bound(connection, max_queued, None)
                    await check_bound(connection, max_queued_per_owner, new.owner)
                    await enqueue(connection, new)
                    return await read(connection, new.id), True
        except IntegrityError:  # another one with this key came in between
            async with self.database.reading() as connection:
                earlier = await accepted_before(connection, new)
            if earlier is None:
                raise
        if earlier.body_hash != new.body_hash:
            raise IdempotencyConflict(
                f"Idempotency-Key {new.idempotency_key!r:.100}: was used for {earlier.id} with another body; "
                "use a new key for a new request"
            )
        return earlier, False

    @finished
    async def get(self, job_id: str, owner: str | None = None) -> Job:
        """One job. Raises JobNotFound, also where it is another owner's."""
        async with self.database.reading() as connection:
            return await read(connection, job_id, owner)

    @finished
    async def get_many(self, job_ids: Collection[str]) -> dict[str, Job]:
        """Those of the jobs that there are."""
        if not job_ids:
            return {}
        async with self.database.reading() as connection:
            rows = await connection.execute(select(jobs).where(jobs.c.id.in_(sorted(job_ids))))
            return {row.id: job_of(row) for row in rows}

    @finished
    async def removed(self, job_ids: Collection[str]) -> dict[str, Removed]:
        """Those of the jobs that were removed not long ago."""
        if not job_ids:
            return {}
        async with self.database.reading() as connection:
            rows = await connection.execute(select(removed).where(removed.c.id.in_(sorted(job_ids))))
            return {row.id: Removed(row.status, row.completed_at) for row in rows}

    @finished
    async def list(
        self, owner: str, *, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> Page:
        """An owner's jobs by their creation, those behind `after`, which may have been removed not long ago.

        Raises JobNotFound for an unknown `after`.
        """
        async with self.database.reading() as connection:
            return await page_of(connection, owner, after, limit, order)

    @finished
    async def cancel(self, job_id: str, owner: str) -> Job:
        """Cancel a job: at once while it waits, else by its owner, who is told. Raises JobNotFound, JobEnded."""
        async with self.database.writing() as connection:
            job = await read(connection, job_id, owner, lock=True)
            if job.is_ended:
                raise JobEnded(
                    f"video {job_id} is {job.status}: only one that has not ended can be cancelled; delete it instead"
                )
            if job.status == "queued":
                await end(
                    connection, one(job_id, jobs.c.status == "queued"), "cancelled", keep_s=self._rules.keep_ended_s
                )
            else:
                await change(connection, held(job_id, job.fence), cancel_requested=True)
            return await read(connection, job_id)

    @finished
    async def delete(self, job_id: str, owner: str) -> Job:
        """Remove a job that has ended, and say what it was. Raises JobNotFound, JobLive."""
        async with self.database.writing() as connection:
            job = await read(connection, job_id, owner, lock=True)
            if not job.is_ended:
                raise JobLive(f"video {job_id} is {job.status}: cancel it first")
            await remove(connection, one(job_id))
            return job

    # What the owners of claims do

    @finished
    async def claim(
        self,
        claimer: str,
        *,
        limit: int,
        lease_s: float,
        urgent_only: bool = False,
        model: str | None = None,
        since: float = 0.0,
    ) -> _Jobs:
        """Up to `limit` queued jobs, those whose turn it is, now the claimer's for `lease_s` seconds.

        Each with the priority that counts now: urgent for the first of an owner while another has several in hand.
        With the `model` that the claimer has `since` then, none that came later for another: its successor has that.
        """
        if limit < 1:
            return []
        async with self.database.writing() as connection:
            found = await candidates(connection, limit, urgent_only=urgent_only, model=model, since=since)
            claimed = [await lease(connection, candidate, claimer, lease_s) for candidate in found]
        return [job for job in claimed if job is not None]

    @finished
    async def heartbeat(self, claimer: str, progress: Sequence[Progress], *, lease_s: float) -> Heartbeat:
        """Report progress and renew the leases, all at once."""
        async with self.database.writing() as connection:
            return await renew(connection, claimer, progress, lease_s)

    @finished
    async def cancel_requests(self, claimer: str) -> set[str]:
        """The claimer's jobs that are to be cancelled."""
        async with self.database.reading() as connection:
            return await to_cancel(connection, claimer)

    @finished
    async def save_checkpoint(self, job_id: str, fence: int, path: str | None, step: int) -> bool:
        """Name the newest trajectory; None forgets it. False where the job is not this owner's any more."""
        async with self.database.writing() as connection:
            saved = await change(connection, held(job_id, fence), checkpoint_path=path, checkpoint_step=step)
            return saved is not None

    @finished
    async def complete(
        self, job_id: str, fence: int, artifacts: Mapping[str, Artifact], *, expires_in_s: float
    ) -> bool:
        """End a job with its files. False where it is not this owner's any more, or was to be cancelled: it is then."""
        files = {variant: asdict(artifact) for variant, artifact in artifacts.items()}
        async with self.database.writing() as connection:
            row = await held_row(connection, job_id, fence)
            if row is None:
                return False
            if row.cancel_requested:
                await end(connection, held(job_id, fence), "cancelled", keep_s=self._rules.keep_ended_s)
                return False
            return await end(
                connection,
                held(job_id, fence),
                "completed",
                keep_s=expires_in_s,
                artifacts=files,
                step=jobs.c.num_steps,
            )

    @finished
    async def fail(self, job_id: str, fence: int, code: str, message: str) -> bool:
        """End a job that cannot be made. False where it is not this owner's any more."""
        why = {"error_code": code, "error_message": message}
        async with self.database.writing() as connection:
            return await end(connection, held(job_id, fence), "failed", keep_s=self._rules.keep_ended_s, **why)

    @finished
    async def cancelled(self, job_id: str, fence: int) -> bool:
        """End a job whose work has stopped. False where it is not this owner's any more."""
        async with self.database.writing() as connection:
            return await end(connection, held(job_id, fence), "cancelled", keep_s=self._rules.keep_ended_s)

    @finished
    async def release(self, job_id: str, fence: int) -> bool:
        """Give a job back, to be gone on with by another. It counts as no attempt.

        False where it is not this owner's any more.
        """
        async with self.database.writing() as connection:
            row = await held_row(connection, job_id, fence)
            if row is not None:
                await requeue(connection, row, self._rules, attempts=row.attempts, is_retry=False)
            return row is not None

    @finished
    async def retry(self, job_id: str, fence: int, reason: str) -> bool:
        """Give a job back after a failed attempt. It counts unless it gained a checkpoint; after too many it failed.

        False where it is not this owner's any more.
        """
        async with self.database.writing() as connection:
            row = await held_row(connection, job_id, fence)
            if row is not None:
                await give_up_attempt(connection, row, self._rules, reason)
            return row is not None

    @finished
    async def reap(self, *, calm_s: float = 0.0, pause_s: float = 0.0) -> _Ids:
        """Take the jobs back whose leases have run out, and are not renewed within `pause_s`. Returns their ids.

        When a database goes on that stood still, all leases have run out, and heartbeats are only on their way.
        None where it was away in the last `calm_s`: others may not have had the time to renew theirs.
        """
        async with self.database.reading() as connection:
            seen = await run_out(connection)
        if not seen:
            return []
        await asyncio.sleep(pause_s)
        if self.database.calm_s < calm_s:
            return []
        async with self.database.writing() as connection:
            rows = await still_run_out(connection, seen)
            for row in rows:
                await give_up_attempt(connection, row, self._rules, "its worker was lost")
        return [row.id for row in rows]

    # What keeps the house in order

    @finished
    async def expired(self, limit: int = 100) -> _Jobs:
        """Ended jobs past their time."""
        async with self.database.reading() as connection:
            rows = await connection.execute(select(jobs).where(jobs.c.expires_at < now_s()).limit(limit))
            return [job_of(row) for row in rows]

    @finished
    async def forget(self, job_id: str) -> None:
        """Remove the row of an ended job."""
        async with self.database.writing() as connection:
            await remove(connection, one(job_id, jobs.c.status.in_(ENDED)))

    @finished
    async def forget_removed(self, older_than_s: float) -> None:
        """Forget where removed jobs stood, after a while."""
        async with self.database.writing() as connection:
            await connection.execute(delete(removed).where(removed.c.removed_at < now_s() - older_than_s))

    @finished
    async def names_prefix(self, prefix: str) -> bool:
        """Whether a job needs what is under "{job}/{fence}": it is being made there, or names a file there."""
        job_id, _, fence = prefix.strip("/").partition("/")
        try:
            job = await self.get(job_id)
        except JobNotFound:
            return False
        return job.needs(fence)

    @finished
    async def queue_positions(self) -> dict[str, int]:
        """How many jobs are to be claimed before each that waits."""
        async with self.database.reading() as connection:
            return await positions(connection)

    @finished
    async def num_queued(self, owner: str | None = None) -> int:
        """How many jobs wait, of all owners or of one."""
        async with self.database.reading() as connection:
            return await num_queued(connection, owner)

    @finished
    async def census(self) -> Census:
        """What there is, for those who watch the service."""
        async with self.database.reading() as connection:
            return await census(connection)

    @finished
    async def _make_tables(self) -> None:
        async with self.database.writing() as connection:
            await lock(connection, "setup")
            await connection.run_sync(metadata.create_all)
            await connection.run_sync(add_missing_columns)
