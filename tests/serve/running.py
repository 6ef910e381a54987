"""The whole service on real Ray processes, for tests that break parts of it."""

import asyncio
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import ray
import torch
from ray import serve
from ray.serve.schema import TracingConfig

from cluster.ray_nodes import free_port
from serve_app.app import build
from serve_app.calls import DenoiserStatus
from serve_app.config import AppConfig
from serve_app.jobs import Job, JobStore
from t2v_core.video_input import read_video

APP = "t2v"
PROMPT = "A red circle moving right on a white background."


def config(folder: Path, **sections: Any) -> AppConfig:
    """The embedded service with short leases, and a checkpoint every half second."""
    values: dict[str, Any] = {
        "storage": {"database": f"sqlite:///{folder / 'jobs.db'}", "artifacts": str(folder / "store")},
        "denoiser": {"checkpoint_every_s": 0.4, "max_ongoing": 2},
        "generator": {"lease_s": 3.0, "heartbeat_s": 0.2, "poll_s": 0.5},
        "health_check_s": 1.0,
        "longest_generation_s": 60.0,
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return AppConfig.model_validate(values)


@dataclass
class Running:
    """A running service: its API, its store, and its replicas."""

    url: str
    config: AppConfig
    client: httpx2.Client

    def create(self, **settings: Any) -> str:
        response = self.client.post("/v1/videos", json={"prompt": PROMPT, "seed": 7, **settings})
        assert response.status_code == 200, response.text
        return str(response.json()["id"])

    def video(self, video_id: str) -> dict[str, Any]:
        return dict(self.client.get(f"/v1/videos/{video_id}").json())

    def ended(self, video_id: str, within_s: float = 90.0) -> dict[str, Any]:
        return wait_for(lambda: (v := self.video(video_id))["status"] in ENDED and v, within_s)

    def at_step(self, video_id: str, step: int, within_s: float = 60.0) -> dict[str, Any]:
        return wait_for(lambda: (v := self.video(video_id))["step"] >= step and v, within_s)

    def frames(self, video_id: str) -> torch.Tensor:
        content = self.client.get(f"/v1/videos/{video_id}/content")
        assert content.status_code == 200, content.text
        return read_video(content.content, width=128, height=128, fps=8, num_frames=16)

    def job(self, video_id: str) -> Job:
        async def read() -> Job:
            store = await JobStore.open(self.config.storage.database)
            try:
                return await store.get(video_id)
            finally:
                await store.close()

        return asyncio.run(read())

    def completions(self) -> list[str]:
        """The job of each completion that the outbox tells of."""
        path = self.config.storage.database.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path)) as connection:
            rows = connection.execute("SELECT job_id FROM outbox WHERE event = 'video.completed'")
            return [job_id for (job_id,) in rows]

    def denoiser(self) -> DenoiserStatus:
        """Of any one replica."""
        status = serve.get_deployment_handle("Denoiser", APP).status.remote().result(timeout_s=30)
        assert isinstance(status, DenoiserStatus)
        return status

    def replicas(self, deployment: str) -> list[str]:
        """The names of the actors of a deployment's living replicas."""
        actors = ray.util.list_named_actors(all_namespaces=True)
        return [a["name"] for a in actors if a["name"].startswith(f"SERVE_REPLICA::{APP}#{deployment}#")]

    def kill(self, deployment: str) -> str:
        """Kill one replica, as a crash would."""
        name = self.replicas(deployment)[0]
        ray.kill(ray.get_actor(name, namespace="serve"))
        return name

    def files(self) -> set[str]:
        root = Path(self.config.storage.artifacts)
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


ENDED = ("completed", "failed", "cancelled")


def wait_for(condition: Callable[[], Any], within_s: float = 60.0, every_s: float = 0.05) -> Any:
    """What the condition gives, once that is true. A part that is just being replaced may not answer meanwhile."""
    deadline = time.monotonic() + within_s
    problem: object = "it stayed false"
    while time.monotonic() < deadline:
        try:
            if result := condition():
                return result
        except (httpx2.HTTPError, KeyError, ValueError, ray.exceptions.RayError) as error:
            problem = error
        time.sleep(every_s)
    raise AssertionError(f"not within {within_s} s: {problem!r}")


@contextmanager
def ray_started(num_cpus: int = 16, metrics_port: int | None = None) -> Iterator[None]:
    """A Ray of our own, on ports of its own, ended by the pids of what it started."""
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=200 << 20,
        logging_level="ERROR",
        log_to_driver=False,
        _metrics_export_port=metrics_port,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def running(config: AppConfig, tracing: TracingConfig | None = None, **logging_config: str) -> Iterator[Running]:
    """The service with this configuration, until the end of the block."""
    port = free_port()
    serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        logging_config={"log_level": "WARNING"},
        tracing_config=tracing,
    )
    try:
        serve.run(build(config), name=APP, logging_config=logging_config or None)
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield Running(f"http://127.0.0.1:{port}", config, client)
    finally:
        serve.shutdown()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """In dB, of uint8 frames."""
    error = ((a.float() - b.float()) / 255).square().mean().item()
    return float("inf") if error == 0 else -10 * torch.log10(torch.tensor(error)).item()


def kill_tree(pid: int) -> None:
    """Kill a process with all that it has started, at once, as a power cut would."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    tree = [pid]
    for parent in tree:
        tree += [child for child, of in parents.items() if of == parent]
    for member in tree:
        os.kill(member, signal.SIGKILL)
