"""Denoisers come and go with the jobs that wait, and a restart finds them all.

On several nodes, with PostgreSQL and S3, and while another version is deployed: tests/cluster.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import yaml
from running import Running, config, kill_tree, ray_started, running, wait_for

from cluster.ray_nodes import free_port

pytestmark = pytest.mark.service


@pytest.fixture(scope="module", autouse=True)
def _ray():
    with ray_started():
        yield


def test_denoisers_scale_from_zero_to_several_and_back_and_all_are_used(tmp_path):
    scaling = {
        "min_replicas": 0, "max_replicas": 3, "max_ongoing": 1, "urgent_reserve": 0, "num_threads": 1,
        "upscale_delay_s": 0.5, "downscale_delay_s": 3.0,
    }  # fmt: skip
    with running(config(tmp_path, denoiser=scaling)) as service:
        assert service.replicas("Denoiser") == []
        assert service.client.get("/readyz").json()["ready"]
        videos = [service.create(seed=seed, num_inference_steps=20) for seed in range(5)]
        wait_for(lambda: len(service.replicas("Denoiser")) == 3)
        wait_for(_three_denoisers_compute, 60)
        assert [service.ended(video, 180)["status"] for video in videos] == ["completed"] * 5
        wait_for(lambda: service.replicas("Denoiser") == [], 60)


def test_after_a_restart_of_everything_queued_jobs_are_there_and_running_ones_are_made_again(tmp_path):
    app_config = config(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(app_config.model_dump(mode="json")))
    with _served(file) as (service, process):
        service.config = app_config
        videos = [service.create(seed=seed, num_inference_steps=10) for seed in range(3)]
        service.at_step(videos[0], 3)
        kill_tree(process.pid)
    with _served(file) as (service, _):
        service.config = app_config
        assert [service.ended(video)["status"] for video in videos] == ["completed"] * 3
        assert sorted(service.completions()) == sorted(videos)


def _three_denoisers_compute() -> bool:
    """By the time that the kernel has given them: a replica that idles takes less than a hundredth of a core."""
    before = _denoiser_cpu_s()
    time.sleep(2.0)
    used = [now - before.get(pid, now) for pid, now in _denoiser_cpu_s().items()]
    return sum(seconds > 0.3 for seconds in used) == 3


def _denoiser_cpu_s() -> dict[int, float]:
    used = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"ServeReplica:t2v:Denoiser" in (folder / "cmdline").read_bytes():
                user, system = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
                used[int(folder.name)] = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        except OSError:
            continue
    return used


@contextmanager
def _served(file: Path):
    """`t2v serve` in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "serve_app.cli", "serve", "--port", str(port), "--config", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            wait_for(lambda: client.get("/readyz").json()["ready"], 90)
            yield Running(f"http://127.0.0.1:{port}", config(file.parent), client), process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
