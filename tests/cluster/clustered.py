"""The service on several Ray nodes of this machine, deployed as on any cluster: a file, and `serve deploy`."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import fsspec
import httpx2
import psycopg
import yaml
from moto.server import ThreadedMotoServer
from running import APP, PROMPT, Running, wait_for

from cluster.ray_nodes import SERVE, RayNode, RayNodes, free_port
from serve_app.config import AppConfig

Storage = dict[str, Any]

LONG_S = 240.0  # a wait is for as long as a machine takes that has other work as well
# Ray's workers are nice to its own processes, and to all others on the machine, which here would halt them.
NOT_NICE = {"RAY_worker_niceness": "0"}
CALLING_JOB = Path(__file__).with_name("calling_job.py")
FOLLOWING_JOB = Path(__file__).with_name("following_job.py")


@contextmanager
def bucket() -> Iterator[Storage]:
    """An S3 endpoint, as the options of an artifact store in it."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {"endpoint_url": f"http://{host}:{port}", "key": "test-key", "secret": "test-secret"}
        name = f"t2v-{uuid.uuid4().hex}"  # all servers of a process share their buckets
        fsspec.filesystem("s3", **options).mkdir(name)
        yield {"artifacts": f"s3://{name}/store", "artifact_options": options}
    finally:
        server.stop()


@dataclass(frozen=True)
class Replica:
    """A replica, as Serve tells of it."""

    deployment: str
    id: str
    state: str
    ip: str | None


@dataclass
class Clustered(Running):
    """The running service, and the nodes it runs on."""

    nodes: RayNodes
    proxy_location: Literal["HeadOnly", "EveryNode"] = "HeadOnly"

    def deploy(self, config: AppConfig | dict[str, Any]) -> None:
        """`serve deploy`. Serve has taken the file when this returns, and nothing more."""
        args = config.model_dump(mode="json", exclude_unset=True) if isinstance(config, AppConfig) else config
        app = {"name": APP, "import_path": "serve_app.app:build", "route_prefix": "/", "args": args}
        port = int(self.url.rpartition(":")[2])
        http = {"host": "127.0.0.1", "port": port}
        file = self.nodes.folder / "serve.yaml"
        file.write_text(
            yaml.safe_dump({"proxy_location": self.proxy_location, "http_options": http, "applications": [app]})
        )
        self.nodes.run(SERVE, "deploy", str(file))

    def application(self) -> dict[str, Any]:
        """What Ray's dashboard says of the application."""
        token = Path(self.nodes.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        response = httpx2.get(
            f"{self.nodes.dashboard}/api/serve/applications/", headers={"authorization": f"Bearer {token}"}, timeout=10
        )
        return dict(response.raise_for_status().json()["applications"][APP])

    def all_replicas(self, deployment: str, state: str = "RUNNING") -> list[Replica]:
        listed = self.application()["deployments"][deployment]["replicas"]
        replicas = [Replica(deployment, r["replica_id"], r["state"], r.get("node_ip")) for r in listed]
        return [replica for replica in replicas if replica.state == state]

    def node_of(self, replica: Replica) -> RayNode:
        (node,) = [node for node in self.nodes.nodes if node.ip == replica.ip and node.process.poll() is None]
        return node

    def await_ready(self, within_s: float = LONG_S) -> None:
        """All that the newest file asks for runs."""
        wait_for(lambda: self.application()["status"] == "RUNNING", within_s, every_s=0.2)
        wait_for(lambda: self.client.get("/readyz").json()["ready"], within_s, every_s=0.2)

    def files(self) -> set[str]:
        storage = self.config.storage
        root = f"{storage.artifacts.removeprefix('s3://')}/"
        store = fsspec.filesystem("s3", **storage.artifact_options, skip_instance_cache=True)
        return {path.removeprefix(root) for path in store.find(root)}

    def completions(self) -> list[str]:
        with psycopg.connect(self.config.storage.database) as connection:
            rows = connection.execute("SELECT job_id FROM outbox WHERE event = 'video.completed'")
            return [job_id for (job_id,) in rows]


@contextmanager
def clustered(
    nodes: RayNodes, config: AppConfig, proxy_location: Literal["HeadOnly", "EveryNode"] = "HeadOnly"
) -> Iterator[Clustered]:
    """The service on these nodes with this configuration; it ends with the nodes."""
    url = f"http://127.0.0.1:{free_port()}"
    with httpx2.Client(base_url=url, timeout=30) as client:
        service = Clustered(url, config, client, nodes, proxy_location)
        service.deploy(config)
        service.await_ready()
        yield service


@contextmanager
def _ray_job(nodes: RayNodes, node: RayNode, script: Path, *arguments: str) -> Iterator[tuple[Any, Path]]:
    """Another Ray job, on that node, and the file of what it prints. It ends with the block."""
    file = nodes.folder / f"{script.stem}-{uuid.uuid4().hex}"
    with file.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(script), nodes.address, node.ip, PROMPT, *arguments],
            env={**os.environ, **nodes.env},
            stdout=output,
            stderr=subprocess.DEVNULL,
        )
    try:
        yield process, file
    finally:
        process.kill()
        process.wait()


@contextmanager
def calling_job(nodes: RayNodes, node: RayNode) -> Iterator["CallingJob"]:
    """One that calls the service by its handle again and again."""
    with _ray_job(nodes, node, CALLING_JOB) as (process, file):
        yield CallingJob(process, file)


@contextmanager
def following_job(nodes: RayNodes, node: RayNode, num_steps: int) -> Iterator["FollowingJob"]:
    """One that makes a video by the service's handle, and follows its steps."""
    with _ray_job(nodes, node, FOLLOWING_JOB, str(num_steps)) as (_, file):
        yield FollowingJob(file)


@dataclass(frozen=True)
class CallingJob:
    """A driver of its own. Each line of the file is a call of it that has ended."""

    process: "subprocess.Popen[bytes]"
    file: Path

    def calls(self) -> list[dict[str, Any]]:
        return _printed(self.file)

    def num_made(self) -> int:
        assert self.process.poll() is None, "the calling job has ended"
        return sum(call["error"] is None for call in self.calls())

    def await_more(self, num_videos: int, within_s: float = LONG_S) -> None:
        """Until it has got so many more videos."""
        wanted = self.num_made() + num_videos
        wait_for(lambda: self.num_made() >= wanted, within_s, every_s=0.2)


@dataclass(frozen=True)
class FollowingJob:
    """A driver of its own. Each line of the file is a step of its video, but for the last, which is the video."""

    file: Path

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in _printed(self.file) if "step" in line]

    @property
    def has_video(self) -> bool:
        return any(line.get("video_bytes", 0) > 0 for line in _printed(self.file))


def _printed(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines(keepends=True)
    # Ray says there as well what nodes have died, and the last line may be only begun.
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]


@dataclass
class Asking:
    """A client that asks all the time, tries nothing twice, and notes what failed."""

    url: str
    num_asked: int = 0
    failures: list[str] = field(default_factory=list)
    created: list[str] = field(default_factory=list)


@contextmanager
def asking(service: Running, every_s: float = 0.1, create_every: int = 150, num_steps: int = 4) -> Iterator[Asking]:
    """Lists videos, and makes one now and then, until the block ends."""
    notes, is_over = Asking(service.url), threading.Event()

    def ask() -> None:
        with httpx2.Client(base_url=service.url, timeout=30) as client:
            while not is_over.wait(every_s):
                try:
                    if notes.num_asked % create_every:
                        response = client.get("/v1/videos", params={"limit": 1})
                    else:
                        body = {"prompt": PROMPT, "seed": notes.num_asked, "num_inference_steps": num_steps}
                        response = client.post("/v1/videos", json=body)
                        notes.created.append(response.json()["id"])
                    response.raise_for_status()
                except (httpx2.HTTPError, KeyError, ValueError) as error:
                    notes.failures.append(repr(error))
                notes.num_asked += 1

    with closing(_Thread(ask, is_over)):
        yield notes


class _Thread:
    def __init__(self, target: Any, is_over: threading.Event) -> None:
        self._is_over, self._thread = is_over, threading.Thread(target=target)
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()


def all_ended(service: Running, videos: list[str], within_s: float = LONG_S) -> list[str]:
    """How they ended."""
    deadline = time.monotonic() + within_s
    return [service.ended(video, max(1.0, deadline - time.monotonic()))["status"] for video in videos]
