"""Metrics as Prometheus sees them and logs as Serve writes them, of a service at work on a real Ray."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from running import PROMPT, Running, config, ray_started, running, wait_for

from cluster.ray_nodes import free_port
from serve_app.engine_metrics import EngineMetrics
from serve_app.memory import GpuMemory, tell_memory
from serve_app.metrics import METRICS, Metrics
from t2v_core.engine import Stepped
from t2v_core.engine.counters import Counters
from t2v_core.shapes import VideoShape

pytestmark = pytest.mark.service

STEPS = 6
NEED_A_GPU = {"t2v_out_of_memory_total", "t2v_gpu_memory_allocated_bytes", "t2v_gpu_memory_reserved_bytes"}
EVERYWHERE = {"application", "deployment", "replica"}

JOB_LINES = [
    ("Ingress", "job accepted"),
    ("Generator", "job claimed"),
    ("TextEncoder", "text encoded"),
    ("Denoiser", "denoising"),
    ("Denoiser", "denoised"),
    ("Decoder", "video decoded"),
    ("Generator", "job completed"),
]


class Watched:
    """A running service, its metrics and its logs."""

    def __init__(self, service: Running, metrics_port: int, logs: Path) -> None:
        self.service = service
        self._url, self.logs = f"http://127.0.0.1:{metrics_port}/metrics", logs

    def families(self) -> dict[str, Any]:
        """By the names in which they are declared."""
        text = httpx2.get(self._url, timeout=10).text
        families = {family.name.removeprefix("ray_"): family for family in text_string_to_metric_families(text)}
        return {f"{name}_total" if f.type == "counter" else name: f for name, f in families.items()}

    def values(self) -> dict[str, float]:
        """The sums of samples, by names with the values of our labels; of the database's gauges the one value."""
        found: defaultdict[str, float] = defaultdict(float)
        ours = {label for spec in METRICS for label in spec.labels}
        for family in self.families().values():
            for sample in family.samples:
                if sample.name.startswith("ray_t2v_") and not sample.name.endswith("_bucket"):
                    labels = [value for label, value in sample.labels.items() if label in ours]
                    found[":".join((sample.name.removeprefix("ray_"), *labels))] += sample.value
        return found

    def lines(self, field: str, value: str) -> list[dict[str, Any]]:
        """The lines of all replicas with this value, in order."""
        lines = [line for log in self.logs.glob("replica_*.log") for line in map(json.loads, log.open())]
        return sorted((line for line in lines if line.get(field) == value), key=lambda line: line["timestamp_ns"])

    def told(self, is_told: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """The metrics, once they have come so far: replicas hand them to Ray every few seconds."""
        values: dict[str, float] = {}

        def come() -> bool:
            nonlocal values
            values = self.values()
            return is_told(values)

        try:
            wait_for(come, 40, every_s=1)
        except AssertionError as error:
            raise AssertionError(f"{error}: {values}") from error
        return values


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    port, folder = free_port(), tmp_path_factory.mktemp("watched")
    settings = config(folder, denoiser={"checkpoint_every_s": 2.0})
    with ray_started(metrics_port=port), running(settings, encoding="JSON") as service:
        yield Watched(service, port, Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve")


def test_jobs_move_every_metric_that_needs_no_gpu(watched: Watched):
    service = watched.service
    for _ in range(2):
        assert service.ended(service.create(num_inference_steps=STEPS))["status"] == "completed"
    assert service.ended(service.create(prompt="red " * 700))["status"] == "failed"

    running_id = service.create(num_inference_steps=900)
    service.at_step(running_id, 8)
    waiting = [service.create(num_inference_steps=900, priority="low") for _ in range(3)]
    busy = watched.told(lambda values: values["t2v_queue_depth:low"] == 2)  # two at once are denoised
    assert busy["t2v_jobs:queued"] == 2
    assert busy["t2v_jobs:in_progress"] == 2
    assert busy["t2v_jobs:completed"] == 2
    assert busy["t2v_queue_oldest_age_seconds"] > 0

    wait_for(lambda: (job := service.job(running_id)).step >= job.checkpoint_step + 2 > 2)
    service.kill("Denoiser")
    wait_for(lambda: service.job(running_id).resumes == 1)
    service.at_step(running_id, service.job(running_id).checkpoint_step + 1)
    for video_id in (running_id, *waiting):
        assert service.client.post(f"/v1/videos/{video_id}/cancel").status_code == 200
        service.ended(video_id)
    assert service.ended(service.create(num_inference_steps=STEPS))["status"] == "completed"

    def have_all_told(values: dict[str, float]) -> bool:  # each part hands its metrics on in its own time
        return (
            values["t2v_jobs_ended_total:completed"] == values["t2v_jobs:completed"] == 3
            and values["t2v_stage_seconds_count:decode"] == 3
            and values["t2v_stage_seconds_count:denoise"] == 3
            and values["t2v_jobs_ended_total:cancelled"] == 4
            and values["t2v_cancels_total"] >= 1
        )

    values = watched.told(have_all_told)
    assert values["t2v_jobs_ended_total:cancelled"] == values["t2v_jobs:cancelled"] == 4
    assert values["t2v_jobs_ended_total:failed"] == values["t2v_jobs:failed"] == 1
    assert values["t2v_queue_oldest_age_seconds"] == 0
    assert values["t2v_retries_total"] >= values["t2v_resumes_total"] >= 1
    assert values["t2v_attempts_total"] >= 7
    repeated = sum(service.job(video_id).steps_repeated for video_id in (running_id, *waiting))
    assert values["t2v_steps_repeated_total"] == repeated > 0
    assert values["t2v_steps_total"] == values["t2v_step_seconds_count"] > 3 * STEPS
    assert values["t2v_steps_total"] * 2 <= values["t2v_rows_total"] <= values["t2v_row_budget_total"]
    assert values["t2v_step_seconds_sum"] > 0
    assert values["t2v_previews_total"] >= 3
    for stage in ("denoise", "decode", "encode", "store"):
        assert values[f"t2v_stage_seconds_count:{stage}"] == 3
    for stage in ("queue", "text"):
        assert values[f"t2v_stage_seconds_count:{stage}"] >= 3

    families = watched.families()
    for spec in METRICS:
        if spec.name not in NEED_A_GPU:
            family = families[spec.name]
            assert (family.type, family.documentation) == (spec.kind, spec.help)
            for sample in family.samples:
                assert EVERYWHERE | set(spec.labels) <= set(sample.labels)
                assert not any(value.startswith("video_") for value in sample.labels.values())
    assert NEED_A_GPU.isdisjoint(families)
    assert {"serve_num_http_requests_total", "serve_http_request_latency_ms"} <= families.keys()  # as the guide says


@serve.deployment
class OnGpu:
    """Tells what a Denoiser would on a GPU, in a replica of its own: the metrics that no CPU can move."""

    def tell(self) -> None:
        told = Metrics()
        counters = {VideoShape(16, 128, 128).latents(): Counters(steps=1, step_s=0.5, rows=2, out_of_memory=3)}
        EngineMetrics(told, counters).tell(Stepped("a", 1, 5))
        tell_memory(told, GpuMemory(allocated=3 << 30, reserved=5 << 30))


def test_the_metrics_of_a_gpu_reach_prometheus(watched: Watched):
    handle = serve.run(OnGpu.bind(), name="gpu", route_prefix="/gpu", logging_config={"encoding": "JSON"})
    handle.tell.remote().result(timeout_s=30)
    values = watched.told(lambda values: values.keys() >= NEED_A_GPU)
    assert values["t2v_out_of_memory_total"] == 3
    assert values["t2v_gpu_memory_allocated_bytes"] == 3 << 30
    assert values["t2v_gpu_memory_reserved_bytes"] == 5 << 30
    families = watched.families()
    for spec in METRICS:
        if spec.name in NEED_A_GPU:
            family = families[spec.name]
            assert (family.type, family.documentation) == (spec.kind, spec.help)
            assert all(sample.labels.keys() >= EVERYWHERE for sample in family.samples)
    serve.delete("gpu")


def test_a_job_is_followed_by_its_id_from_http_to_the_file(watched: Watched):
    video_id = watched.service.create(num_inference_steps=STEPS)
    watched.service.ended(video_id)
    lines = wait_for(
        lambda: (found := watched.lines("job", video_id)) and "job completed" in found[-1]["message"] and found
    )
    told = [(line["deployment"].removeprefix("t2v_"), line["message"].partition(":")[0]) for line in lines]
    assert told == JOB_LINES
    assert [line.get("fence") for line in lines] == [None, 1, 1, 1, 1, 1, 1]
    assert len({line["request_id"] for line in lines}) == 1


def test_a_job_is_followed_by_its_requests_id_from_http_to_the_file(watched: Watched):
    headers = {"x-request-id": "of-a-job"}
    body = {"prompt": PROMPT, "num_inference_steps": STEPS}
    response = watched.service.client.post("/v1/videos", json=body, headers=headers)
    video_id = response.json()["id"]
    watched.service.ended(video_id)
    lines = wait_for(
        lambda: (
            (found := watched.lines("request_id", "of-a-job"))
            and "job completed" in found[-1]["message"]
            and [line for line in found if "job" in line]
        )
    )
    assert {line["job"] for line in lines} == {video_id}
    told = [(line["deployment"].removeprefix("t2v_"), line["message"].partition(":")[0]) for line in lines]
    assert told == JOB_LINES
    assert watched.service.job(video_id).request_id == "of-a-job"
    assert sum("request=of-a-job" in line["message"] for line in lines) == 2  # when accepted, and when claimed


def test_a_call_that_waits_is_followed_by_its_request_id(watched: Watched):
    headers = {"x-request-id": "followed-by-this"}
    body = {"prompt": PROMPT, "num_inference_steps": STEPS}
    assert watched.service.client.post("/v1/videos/sync", json=body, headers=headers).status_code == 200
    parts = {"Ingress", "Generator", "TextEncoder", "Denoiser", "Decoder"}

    def all_told() -> list[dict[str, Any]] | None:  # the Ingress when it has answered
        lines = watched.lines("request_id", "followed-by-this")
        return lines if {line["deployment"].removeprefix("t2v_") for line in lines} == parts else None

    lines = wait_for(all_told)
    assert len({line["job"] for line in lines if "job" in line}) == 1


def test_no_line_holds_a_prompt(watched: Watched):
    assert PROMPT not in "".join(file.read_text() for file in watched.logs.glob("*"))
