"""What a pod of the dev overlay does, from KubeRay's start of Ray to a video. Says what it saw, as JSON, on stdout.

Run by test_confined.py in a confinement; the first argument is a file with the Serve configuration.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2

BIN = Path(sys.executable).parent
PATIENCE_S = 180.0


def main() -> None:
    seen: dict[str, object] = {"uid": os.getuid(), "root": writable("/x"), "tmp": writable("/tmp/x")}
    start = ["start", "--head", "--num-cpus=4", "--node-ip-address=127.0.0.1", "--dashboard-host=0.0.0.0"]
    start += ["--metrics-export-port=8080", "--object-store-memory=200000000", "--block"]
    with Path("/tmp/ray.log").open("w") as log:
        subprocess.Popen([BIN / "ray", *start], stdout=log, stderr=log)
    wait_for(lambda: "success" in get("http://localhost:8265/api/gcs_healthz"))
    seen["without the token"] = call("serve", "deploy", sys.argv[1], RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
    seen["deployed"] = call("serve", "deploy", sys.argv[1])
    seen["worker's probe"] = wait_for(lambda: get("http://localhost:8000/-/healthz"))
    seen["head's probe"] = get("http://localhost:52365/api/healthz")
    wait_for(lambda: get("http://localhost:8000/readyz"))
    prompt = "A red circle moving right on a white background."
    seen["video"] = call("t2v", "submit", prompt, "--num-inference-steps", "4", "--output", "/tmp/red.mp4")
    seen["bytes"] = Path("/tmp/red.mp4").stat().st_size
    seen["metrics"] = bool(wait_for(lambda: "ray_t2v_queue_depth" in get("http://localhost:8080/metrics")))
    sys.stdout.write(json.dumps(seen))


def writable(path: str) -> bool:
    try:
        Path(path).touch()
    except OSError:
        return False
    return True


def call(*command: str, **environment: str) -> int:
    """The exit code."""
    return subprocess.run(
        [BIN / command[0], *command[1:]], env={**os.environ, **environment}, stdout=sys.stderr, timeout=PATIENCE_S
    ).returncode


def get(url: str) -> str:
    """The answer's text, or nothing if it is no success."""
    try:
        answer = httpx2.get(url, timeout=20)
    except httpx2.HTTPError:
        return ""
    return answer.text if answer.status_code == 200 else ""


def wait_for(condition: Callable[[], object]) -> object:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(1)
    log = Path("/tmp/ray.log").read_text()
    raise SystemExit(f"not within {PATIENCE_S} s; Ray says: {log}")


if __name__ == "__main__":
    main()
