"""Metrics and logs: what is declared is valid and documented, and what happens is told once."""

import asyncio
import json
import logging
import re
import subprocess
import sys
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import torch
from job_processes import new_job, video_of
from ray._common.formatters import JSONFormatter

from serve_app import metrics
from serve_app.engine_metrics import EngineMetrics
from serve_app.job_logs import fields, log_through_serve, name_job
from serve_app.job_metrics import count_change, tell_census
from serve_app.jobs import Change, Ended, JobStore, Requeued
from serve_app.jobs.transitions import give_up_attempt
from serve_app.memory import gpu_memory, tell_memory
from serve_app.metrics import METRICS, MetricSpec, table
from t2v_core.engine import Cancelled, Preview, Stepped
from t2v_core.engine.counters import Counters
from t2v_core.shapes import VideoShape

pytestmark = pytest.mark.anyio

GUIDE = Path(__file__).parents[2] / "docs" / "service.md"


class Told:
    """Stands in for Metrics: what was told last, or in all, by name and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}

    def count(self, spec: MetricSpec, by: float = 1, **labels: str) -> None:
        assert spec.kind == "counter"
        if by:
            self.values[key(spec, labels)] = self.values.get(key(spec, labels), 0) + by

    def set(self, spec: MetricSpec, value: float, **labels: str) -> None:
        assert spec.kind == "gauge"
        self.values[key(spec, labels)] = value

    def observe(self, spec: MetricSpec, value: float, **labels: str) -> None:
        assert spec.kind == "histogram"
        self.values[key(spec, labels)] = value


def key(spec: MetricSpec, labels: dict[str, str]) -> tuple[str, ...]:
    assert tuple(labels) == spec.labels
    return (spec.name, *labels.values())


@pytest.mark.parametrize("spec", METRICS, ids=lambda spec: spec.name)
def test_a_metric_is_named_as_prometheus_recommends(spec: MetricSpec):
    assert re.fullmatch("t2v(_[a-z]+)+", spec.name)
    assert (spec.kind == "counter") == spec.name.endswith("_total")
    assert not re.search("_(ms|milliseconds|mb|percent)(_|$)", spec.name)
    assert spec.help.endswith(".")
    assert "|" not in spec.help
    assert set(spec.labels) <= {"status", "priority", "stage"}
    assert list(spec.boundaries) == sorted(set(spec.boundaries))
    assert bool(spec.boundaries) == (spec.kind == "histogram")


def test_all_metrics_are_listed_once():
    declared = [value for value in vars(metrics).values() if isinstance(value, MetricSpec)]
    assert sorted(declared, key=METRICS.index) == list(METRICS)
    assert len({spec.name for spec in METRICS}) == len(METRICS)


def test_the_guide_has_the_table_of_what_is_declared():
    assert table() in GUIDE.read_text()


def test_the_declarations_can_be_read_without_starting_ray():
    code = "from serve_app.metrics import METRICS; import ray, sys; sys.exit(ray.is_initialized() or len(METRICS) < 10)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_metric_refuses_labels_that_it_does_not_declare():
    told = metrics.Metrics()
    told.count(metrics.JOBS_ENDED, status="completed")
    with pytest.raises(ValueError, match="Missing value for tag"):
        told.count(metrics.JOBS_ENDED)


@pytest.fixture
async def told_store(database_url: str):
    changes: list[Change] = []
    store = await JobStore.open(database_url, max_attempts=2, on_change=changes.append)
    yield store, changes
    await store.close()


async def test_each_end_of_a_job_is_told_once(told_store):
    store, changes = told_store
    jobs = [new_job() for _ in range(4)]
    for job in jobs:
        await store.create(job)
    await store.cancel(jobs[3].id, jobs[3].owner)
    completed, failed, cancelled = [job.id for job in await store.claim("a", limit=4, lease_s=30)]
    assert changes == [Ended("cancelled")]
    assert await store.complete(completed, 1, video_of(completed, 1), expires_in_s=60)
    assert not await store.complete(completed, 1, video_of(completed, 1), expires_in_s=60)
    assert await store.fail(failed, 1, "generation_failed", "no")
    assert await store.cancelled(cancelled, 1)
    assert changes[1:] == [Ended("completed"), Ended("failed"), Ended("cancelled")]


async def test_a_retry_a_resume_and_a_release_are_told_apart(told_store):
    store, changes = told_store
    job = new_job()
    await store.create(job)
    (claimed,) = await store.claim("a", limit=1, lease_s=30)
    await store.release(job.id, claimed.fence)
    (claimed,) = await store.claim("a", limit=1, lease_s=30)
    await store.save_checkpoint(job.id, claimed.fence, "somewhere", 4)
    await store.retry(job.id, claimed.fence, "its denoiser died")
    for _ in range(2):
        (claimed,) = await store.claim("a", limit=1, lease_s=30)
        await store.retry(job.id, claimed.fence, "its denoiser died")
    assert changes == [
        Requeued(is_retry=False, is_resume=False, steps_repeated=0),
        Requeued(is_retry=True, is_resume=True, steps_repeated=0),
        Requeued(is_retry=True, is_resume=True, steps_repeated=0),
        Ended("failed"),
    ]


async def test_a_change_that_is_rolled_back_is_not_told(told_store, monkeypatch):
    store, changes = told_store
    job = new_job()
    await store.create(job)
    (claimed,) = await store.claim("a", limit=1, lease_s=30)

    async def broken(*arguments: Any) -> None:
        await give_up_attempt(*arguments)
        raise RuntimeError("after the end was written")

    with monkeypatch.context() as patch:
        patch.setattr("serve_app.jobs.store.give_up_attempt", broken)
        with pytest.raises(RuntimeError):
            await store.retry(job.id, claimed.fence, "its denoiser died")
    assert changes == []
    await store.fail(job.id, claimed.fence, "generation_failed", "no")
    assert changes == [Ended("failed")]


async def test_the_census_counts_by_status_and_by_priority(told_store):
    store, _ = told_store
    told = Told()
    await tell_census(told, store)  # type: ignore[arg-type]
    assert set(told.values.values()) == {0}
    for priority in ("normal", "urgent", "low", "low"):
        await store.create(new_job(priority=priority))
    await store.claim("a", limit=1, lease_s=30)
    await tell_census(told, store)  # type: ignore[arg-type]
    oldest_s = told.values.pop(("t2v_queue_oldest_age_seconds",))
    assert 0 < oldest_s < 60
    assert {name: value for name, value in told.values.items() if value} == {
        ("t2v_jobs", "queued"): 3,
        ("t2v_jobs", "in_progress"): 1,
        ("t2v_queue_depth", "normal"): 1,
        ("t2v_queue_depth", "low"): 2,
    }


def test_changes_of_jobs_are_counted():
    told = Told()
    for change in (Ended("completed"), Ended("completed"), Requeued(True, True, 3), Requeued(False, True, 2)):
        count_change(told, change)  # type: ignore[arg-type]
    assert told.values == {
        ("t2v_jobs_ended_total", "completed"): 2,
        ("t2v_retries_total",): 1,
        ("t2v_resumes_total",): 2,
        ("t2v_steps_repeated_total",): 5,
    }


def test_the_engine_is_told_as_sums_over_shapes_and_each_step_once():
    told = Told()
    small, large = VideoShape(16, 128, 128).latents(), VideoShape(24, 256, 256).latents()
    counters = {small: Counters(steps=1, step_s=0.25, rows=4, budget_rows=8)}
    engine = EngineMetrics(told, counters)  # type: ignore[arg-type]
    for _ in range(2):  # a step has an event of each of its requests
        engine.tell(Stepped("a", 1, 5))
    assert told.values[("t2v_step_seconds",)] == 0.25
    counters[large] = Counters(steps=1, step_s=0.75, rows=2, budget_rows=2, cancelled=1, out_of_memory=2)
    engine.tell(Preview("a", 2, torch.zeros(1)))
    engine.tell(Cancelled("b"))
    assert told.values == {
        ("t2v_steps_total",): 2,
        ("t2v_step_seconds",): 0.75,
        ("t2v_rows_total",): 6,
        ("t2v_row_budget_total",): 10,
        ("t2v_cancels_total",): 1,
        ("t2v_previews_total",): 1,
        ("t2v_out_of_memory_total",): 2,
    }


def test_the_memory_of_a_gpu_is_told_as_torch_counts_it(monkeypatch):
    """There is no GPU here: torch.cuda's two counters are replaced, and nothing of ours."""
    told, bytes_of = Told(), {"memory_allocated": 3 << 30, "memory_reserved": 5 << 30}
    device = torch.device("cuda", 1)
    for name, value in bytes_of.items():
        monkeypatch.setattr(torch.cuda, name, lambda asked, value=value: value if asked == device else 0)
    tell_memory(told, gpu_memory(device))  # type: ignore[arg-type]
    assert told.values == {
        ("t2v_gpu_memory_allocated_bytes",): 3 << 30,
        ("t2v_gpu_memory_reserved_bytes",): 5 << 30,
    }


def test_without_a_gpu_its_memory_is_not_told():
    told = Told()
    assert gpu_memory(torch.device("cpu")) is None
    tell_memory(told, None)  # type: ignore[arg-type]
    assert told.values == {}


@pytest.fixture
def serve_log(monkeypatch):
    """What Serve's logger is given, with its handlers and level as they were afterwards."""
    records: list[logging.LogRecord] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    serve = logging.getLogger("ray.serve")
    monkeypatch.setattr(serve, "handlers", [Kept()])
    level = serve.level
    yield records
    serve.setLevel(level)


async def test_the_lines_of_a_job_carry_it_and_those_of_others_do_not(serve_log):
    logging.getLogger("ray.serve").setLevel(logging.INFO)
    log_through_serve()
    log_through_serve()  # a line is not to come twice
    logger = logging.getLogger("serve_app.somewhere")

    async def work(job_id: str) -> None:
        name_job(job_id, 2)
        await asyncio.sleep(0)
        await asyncio.to_thread(logger.info, "something happened")
        logger.debug("not at this level")

    await asyncio.gather(asyncio.create_task(work("a")), asyncio.create_task(work("b")))
    logger.info("on no job's behalf")
    name_job("c", 1)
    logger.info("on another's behalf", extra=fields("d", 4))
    named = [(vars(record).get("job"), vars(record).get("fence")) for record in serve_log]
    assert sorted(named, key=str) == [("a", 2), ("b", 2), ("d", 4), (None, None)]


def test_a_line_of_a_job_is_json_with_its_job(serve_log):
    logging.getLogger("ray.serve").setLevel(logging.INFO)
    log_through_serve()
    context = copy_context()
    context.run(name_job, "video_1", 3)
    context.run(logging.getLogger("t2v_core.somewhere").warning, "it is %s", "late")
    line = json.loads(JSONFormatter().format(serve_log[0]))
    assert (line["job"], line["fence"], line["message"], line["levelname"]) == ("video_1", 3, "it is late", "WARNING")
