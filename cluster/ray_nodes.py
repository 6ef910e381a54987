"""Ray nodes on one machine, each begun with `ray start` on a loopback address of its own.

Every node of it is a session of the operating system, by whose id all that belongs to it is found: so a node can be
killed as a power cut would, and nothing of another Ray on the machine is touched. Linux alone gives every program all
of 127.0.0.0/8.
"""

import itertools
import os
import random
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

RAY = str(Path(sys.executable).with_name("ray"))
SERVE = str(Path(sys.executable).with_name("serve"))

_HTTP_PORT = "RAY_SERVE_WORKER_PROXY_HTTP_PORT"  # Ray's own, for nodes of one machine; the head's is in Serve's file
# Below those that Linux gives to connections, of which one could have it before it is used. None twice.
_PORTS = itertools.cycle(random.sample(range(20_000, 32_768), 12_768))
# A raylet dies if its agents take more than 15 s to start: https://github.com/ray-project/ray/issues/65983
_START_TRIES, _START_WITHIN_S = 3, 60.0
_STOP_WITHIN_S = 10.0
_OBJECT_STORE_BYTES = 100 << 20


@dataclass
class RayNode:
    """One node: `ray start --block` and its children. Its proxy, if Serve starts one there, has a port of its own."""

    ip: str
    http_port: int
    agent_port: int
    process: "subprocess.Popen[bytes]"
    folder: Path

    def is_up(self) -> bool:
        """Whether its raylet works and the cluster knows of it, as KubeRay's probes ask."""
        return http_status(f"http://{self.ip}:{self.agent_port}/api/local_raylet_healthz") == 200

    def terminate(self) -> None:
        """Tell the node to go, as Kubernetes does: Ray drains it first, for as long as its environment says."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all of the node at once."""
        _kill_session(self.process.pid)
        self.process.wait(_STOP_WITHIN_S)

    def logs(self) -> str:
        """What Serve's replicas on this node have logged so far."""
        files = sorted(self.folder.glob("session_2*/logs/serve/*.log"))
        return "\n".join(file.read_text(errors="replace") for file in files)


@dataclass
class RayNodes:
    """A cluster in a folder, whose name should be short: sockets are in there, and their paths have 107 characters.

    `environment` is what each node has besides this process's own. Its state outlives the head, and only those
    who have its token may use it.
    """

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    nodes: list[RayNode] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network = f"127.{secrets.randbelow(250) + 2}.{secrets.randbelow(256)}"
        self._port, self._dashboard_port = free_port(), free_port()
        self.address = f"{self.network}.1:{self._port}"
        self.dashboard = f"http://127.0.0.1:{self._dashboard_port}"
        self._num_nodes = 1
        state, token = self.folder / "state", self.folder / "token"
        state.mkdir()
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(state),
            "RAY_USAGE_STATS_ENABLED": "0",
            **self.environment,
        }

    def start_head(self, *options: str) -> RayNode:
        """The head, or the one that comes after it was lost. It is up, and its dashboard answers, when this returns.

        One that does not come up is started again, as Kubernetes does. Raises RuntimeError if that does not help.
        """
        own = ("--head", f"--port={self._port}", f"--dashboard-port={self._dashboard_port}")
        for _ in range(_START_TRIES):
            (self.folder / "n1" / "ray_current_cluster").unlink(missing_ok=True)  # of the last one, which is gone
            head = self._start(f"{self.network}.1", *own, *options)
            if self._comes_up(head):
                return head
            head.kill()
            self.nodes.remove(head)
        log = (head.folder / "log").read_text()[-2_000:]
        raise RuntimeError(f"the Ray head at {head.ip} did not start in {_START_TRIES} tries: {log}")

    def start_worker(self, *options: str) -> RayNode:
        """One more node. Ray knows of it some seconds later."""
        self._num_nodes += 1
        return self._start(f"{self.network}.{self._num_nodes}", f"--address={self.address}", *options)

    def run(self, *command: str) -> str:
        """What a command that speaks to this cluster says. Raises RuntimeError, with what it said, if it fails."""
        env = {**os.environ, **self._client_env}
        done = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}: {done.stdout[-2_000:]}")
        return done.stdout

    def exports(self) -> str:
        """For a shell: what `ray`, `serve` and drivers on this machine need to reach the cluster."""
        return " ".join(f"{name}={shlex.quote(value)}" for name, value in self._client_env.items())

    @property
    def _client_env(self) -> dict[str, str]:
        token = {name: self.env[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
        return {**token, "RAY_ADDRESS": self.address, "RAY_DASHBOARD_ADDRESS": self.dashboard}

    def close(self) -> None:
        """End every node, those as well that an autoscaler has started."""
        for node in self.nodes:
            node.kill()
        for file in self.folder.glob("n*/session"):
            _kill_session(int(file.read_text()))

    def _start(self, ip: str, *options: str) -> RayNode:
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        node = start_node(self.folder, ip, {**env, **self.env}, *options)
        self.nodes.append(node)
        return node

    def _comes_up(self, head: RayNode) -> bool:
        deadline = time.monotonic() + _START_WITHIN_S
        while head.process.poll() is None and time.monotonic() < deadline:
            if http_status(f"{self.dashboard}/api/version") and head.is_up():  # without the token, the first says 401
                return True
            time.sleep(0.1)
        return False


def start_node(folder: Path, ip: str, env: Mapping[str, str], *options: str) -> RayNode:
    """`ray start` with these options, in a session of its own. What it writes is in a folder in `folder`."""
    own = folder / f"n{ip.rpartition('.')[2]}"
    own.mkdir(exist_ok=True)
    http_port, agent_port = free_port(), free_port()
    command = [
        RAY, "start", "--block", f"--node-ip-address={ip}", f"--temp-dir={own}", "--min-worker-port=0",
        "--max-worker-port=0", f"--dashboard-agent-listen-port={agent_port}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}", *options,
    ]  # fmt: skip
    with (own / "log").open("ab") as log:
        process = subprocess.Popen(
            command,
            env={**env, _HTTP_PORT: str(http_port)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (own / "session").write_text(str(process.pid))
    return RayNode(ip, http_port, agent_port, process, own)


def free_port() -> int:
    """A port that nobody has, on any address."""
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            break
    return port


def http_status(url: str) -> int | None:
    """What a GET is answered with; None without an answer."""
    try:
        with urlopen(url, timeout=5) as response:
            return int(response.status)
    except HTTPError as error:
        return error.code
    except (URLError, OSError):
        return None


def _kill_session(session: int) -> None:
    # The first process of a session is the first to go: it would start anew what it sees ending.
    for pid in sorted(_members(session), key=lambda pid: pid != session):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _members(session: int) -> list[int]:
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):
            if os.getsid(int(folder.name)) == session:
                members.append(int(folder.name))
    return members
