"""A job's life in any order of events: it always ends, once, and only the owner of its newest claim has a say in it."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from job_processes import new_job, video_of
from sqlalchemy import delete, select

from serve_app.errors import JobEnded, JobLive, JobNotFound
from serve_app.jobs import ENDED, JobStatus, JobStore, Progress
from serve_app.jobs.database import Database
from serve_app.jobs.schema import jobs as table
from serve_app.jobs.schema import outbox
from t2v_core.engine import Priority

MAX_ATTEMPTS = 2
NUM_STEPS = 5
LEASE_S = 600.0
OVER = -1.0  # a lease that has run out when it is given

MAX_LIVE = 3  # with more, hardly two events would be of the same job
RECENT = st.integers(0, 3)  # how many newer ones there are

_Result = TypeVar("_Result")
_Thing = TypeVar("_Thing")


def recently(things: list[_Thing], recent: int) -> _Thing:
    return things[-1 - min(recent, len(things) - 1)]


@dataclass(frozen=True)
class Claim:
    job_id: str
    fence: int
    claimer: str


@dataclass
class Expected:
    """A job as it should be."""

    status: JobStatus = "queued"
    fence: int = 0
    attempts: int = 0
    cancel_requested: bool = False
    is_late: bool = False
    step: int = 0
    checkpoint_step: int = 0
    claimed_step: int = 0
    steps_repeated: int = 0
    resumes: int = 0

    def owns(self, claim: Claim) -> bool:
        return self.status == "in_progress" and self.fence == claim.fence

    def give_back(self, *, failed: bool) -> None:
        attempts = self.attempts + (failed and self.checkpoint_step <= self.claimed_step)
        if self.cancel_requested:
            self.status = "cancelled"
        elif attempts >= MAX_ATTEMPTS:
            self.status, self.attempts = "failed", attempts
        else:
            self.status, self.attempts = "queued", attempts
            self.steps_repeated += max(0, self.step - self.checkpoint_step)
            self.resumes += self.checkpoint_step > 0
            self.step = self.checkpoint_step


class JobsLife(RuleBasedStateMachine):
    """The store beside a few lines that say what it should hold; `kept` are its jobs, `gone` those deleted."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.runner = asyncio.Runner()
        self.kept: dict[str, Expected] = {}
        self.gone: dict[str, Expected] = {}
        self.accepted: list[str] = []
        self.claims: list[Claim] = []

    def run(self, call: Coroutine[Any, Any, _Result]) -> _Result:
        return self.runner.run(call)

    @initialize()
    def begin(self) -> None:
        self.database = Database(self.url)
        self.store = self.run(JobStore.open(self.url, max_attempts=MAX_ATTEMPTS))
        self.run(self.empty())

    async def empty(self) -> None:
        async with self.database.writing() as connection:
            await connection.execute(delete(table))
            await connection.execute(delete(outbox))

    async def told(self) -> list[tuple[str, str]]:
        async with self.database.reading() as connection:
            rows = await connection.execute(select(outbox.c.job_id, outbox.c.event))
            return sorted((row.job_id, row.event) for row in rows)

    @precondition(lambda self: sum(job.status not in ENDED for job in self.kept.values()) < MAX_LIVE)
    @rule(priority=st.sampled_from(["urgent", "normal", "low"]))
    def accept(self, priority: Priority) -> None:
        params = {"num_inference_steps": NUM_STEPS}
        job, _ = self.run(self.store.create(new_job(priority=priority, params=params)))
        self.kept[job.id] = Expected()
        self.accepted.append(job.id)

    @rule(claimer=st.sampled_from(["a", "b"]), limit=st.integers(1, 3))
    def claim(self, claimer: str, limit: int) -> None:
        waiting = [job for job in self.kept.values() if job.status == "queued"]
        taken = self.run(self.store.claim(claimer, limit=limit, lease_s=LEASE_S))
        assert len(taken) == min(limit, len(waiting))
        for job in taken:
            expected = self.kept[job.id]
            assert expected.status == "queued"
            expected.status, expected.is_late = "in_progress", False
            expected.fence += 1
            expected.claimed_step = expected.checkpoint_step
            self.claims.append(Claim(job.id, job.fence, claimer))

    @precondition(lambda self: self.claims)
    @rule(recent=RECENT, step=st.integers(0, NUM_STEPS), dies=st.booleans())
    def heartbeat(self, recent: int, step: int, dies: bool) -> None:
        """The last one before its process dies, or one of many."""
        claim = recently(self.claims, recent)
        progress = Progress(claim.job_id, claim.fence, step, NUM_STEPS, None)
        beat = self.run(self.store.heartbeat(claim.claimer, [progress], lease_s=OVER if dies else LEASE_S))
        expected = self.held(claim)
        assert (claim.job_id in beat.lost) == (expected is None)
        if expected is not None:
            assert (claim.job_id in beat.cancel_requested) == expected.cancel_requested
            expected.step, expected.is_late = step, dies

    @precondition(lambda self: self.claims)
    @rule(recent=RECENT, step=st.integers(1, NUM_STEPS))
    def save_checkpoint(self, recent: int, step: int) -> None:
        claim = recently(self.claims, recent)
        path = f"{claim.job_id}/{claim.fence}/trajectory"
        is_ours = self.run(self.store.save_checkpoint(claim.job_id, claim.fence, path, step))
        expected = self.held(claim)
        assert is_ours == (expected is not None)
        if expected is not None:
            expected.checkpoint_step = step

    @precondition(lambda self: self.claims)
    @rule(recent=RECENT)
    def complete(self, recent: int) -> None:
        claim = recently(self.claims, recent)
        files = video_of(claim.job_id, claim.fence)
        is_ours = self.run(self.store.complete(claim.job_id, claim.fence, files, expires_in_s=60))
        expected = self.held(claim)
        assert is_ours == (expected is not None and not expected.cancel_requested)
        if expected is not None:
            expected.status = "cancelled" if expected.cancel_requested else "completed"
            expected.step = expected.step if expected.cancel_requested else NUM_STEPS

    @precondition(lambda self: self.claims)
    @rule(recent=RECENT)
    def fail(self, recent: int) -> None:
        claim = recently(self.claims, recent)
        is_ours = self.run(self.store.fail(claim.job_id, claim.fence, "generation_failed", "not finite"))
        expected = self.held(claim)
        assert is_ours == (expected is not None)
        if expected is not None:
            expected.status = "failed"

    @precondition(lambda self: self.claims)
    @rule(recent=RECENT)
    def stop(self, recent: int) -> None:
        claim = recently(self.claims, recent)
        is_ours = self.run(self.store.cancelled(claim.job_id, claim.fence))
        expected = self.held(claim)
        assert is_ours == (expected is not None)
        if expected is not None:
            expected.status = "cancelled"

    @precondition(lambda self: self.claims)
    @rule(recent=RECENT)
    def release(self, recent: int) -> None:
        claim = recently(self.claims, recent)
        is_ours = self.run(self.store.release(claim.job_id, claim.fence))
        expected = self.held(claim)
        assert is_ours == (expected is not None)
        if expected is not None:
            expected.give_back(failed=False)

    @precondition(lambda self: self.claims)
    @rule(recent=RECENT)
    def retry(self, recent: int) -> None:
        claim = recently(self.claims, recent)
        is_ours = self.run(self.store.retry(claim.job_id, claim.fence, "unlucky"))
        expected = self.held(claim)
        assert is_ours == (expected is not None)
        if expected is not None:
            expected.give_back(failed=True)
        if claim.job_id in self.kept:
            assert self.run(self.store.get(claim.job_id)).status == self.kept[claim.job_id].status

    @rule()
    def reap(self) -> None:
        late = {job_id for job_id, job in self.kept.items() if job.status == "in_progress" and job.is_late}
        assert set(self.run(self.store.reap())) == late
        for job_id in late:
            self.kept[job_id].give_back(failed=True)

    @precondition(lambda self: self.accepted)
    @rule(recent=RECENT)
    def cancel(self, recent: int) -> None:
        job_id = recently(self.accepted, recent)
        expected = self.kept.get(job_id)
        if expected is None or expected.status in ENDED:
            with pytest.raises(JobNotFound if expected is None else JobEnded):
                self.run(self.store.cancel(job_id, "ann"))
            return
        self.run(self.store.cancel(job_id, "ann"))
        if expected.status == "queued":
            expected.status = "cancelled"
        else:
            expected.cancel_requested = True

    @precondition(lambda self: self.accepted)
    @rule(recent=RECENT)
    def delete(self, recent: int) -> None:
        job_id = recently(self.accepted, recent)
        expected = self.kept.get(job_id)
        if expected is None or expected.status not in ENDED:
            with pytest.raises(JobNotFound if expected is None else JobLive):
                self.run(self.store.delete(job_id, "ann"))
            return
        self.run(self.store.delete(job_id, "ann"))
        self.gone[job_id] = self.kept.pop(job_id)

    @rule()
    def restart(self) -> None:
        self.run(self.store.close())
        self.store = self.run(JobStore.open(self.url, max_attempts=MAX_ATTEMPTS))

    @invariant()
    def every_job_is_as_it_should_be(self) -> None:
        found = self.run(self.store.get_many([*self.kept, *self.gone]))
        assert found.keys() == self.kept.keys()
        for job_id, expected in self.kept.items():
            job = found[job_id]
            for name in ("status", "fence", "attempts", "cancel_requested", "step", "checkpoint_step"):
                assert getattr(job, name) == getattr(expected, name), name
            assert (job.steps_repeated, job.resumes) == (expected.steps_repeated, expected.resumes)
            assert (job.lease_until is not None) == (job.claimed_by is not None) == (job.status == "in_progress")
            assert bool(job.artifacts) == (job.status == "completed")

    @invariant()
    def every_end_is_told_once(self) -> None:
        ended = {job_id: job for job_id, job in (self.kept | self.gone).items() if job.status in ENDED}
        assert self.run(self.told()) == sorted((job_id, f"video.{job.status}") for job_id, job in ended.items())

    def held(self, claim: Claim) -> Expected | None:
        """The job, if this claim is still the one that counts."""
        expected = self.kept.get(claim.job_id)
        return expected if expected is not None and expected.owns(claim) else None

    def teardown(self) -> None:
        """From wherever it was left, every job ends, though from here on every worker dies at once."""
        if not hasattr(self, "store"):
            self.runner.close()
            return
        for job_id, expected in self.kept.items():
            if expected.status == "in_progress":
                claim = Progress(job_id, expected.fence, expected.step, NUM_STEPS, None)
                for claimer in ("a", "b"):
                    self.run(self.store.heartbeat(claimer, [claim], lease_s=OVER))
        self.run(self.store.reap())
        for _ in range(MAX_ATTEMPTS):
            self.run(self.store.claim("a", limit=1000, lease_s=OVER))
            self.run(self.store.reap())
        left = self.run(self.store.get_many(list(self.kept)))
        assert {job.status for job in left.values()} <= ENDED
        assert len(self.run(self.told())) == len(self.kept) + len(self.gone)
        self.run(self.store.close())
        self.run(self.database.close())
        self.runner.close()


def test_in_any_order_of_events_every_job_ends_once(database_url: str) -> None:
    run_state_machine_as_test(
        lambda: JobsLife(database_url), settings=settings(max_examples=60, stateful_step_count=40)
    )
