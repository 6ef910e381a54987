"""Programs that a benchmark runs one after the other: until the time is over, and all that they say kept."""

import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2

ROOT = Path(__file__).resolve().parent.parent
_RAY_LOGS = Path("/tmp/ray/session_latest/logs")
_STOPPING_S = 30.0
_POLL_S = 0.5


class TimeIsOver(Exception):
    """What runs is stopped, and nothing more begins."""


class Programs:
    """Runs programs of Python in the project's root. What those of one name say is in NAME.log of the folder."""

    def __init__(self, out: Path, stop_after_s: float) -> None:
        self.out = out
        self._stop_s = time.monotonic() + stop_after_s

    def left_s(self) -> float:
        """Raises TimeIsOver."""
        left_s = self._stop_s - time.monotonic()
        if left_s <= 0:
            raise TimeIsOver
        return left_s

    def run(self, name: str, *command: object) -> None:
        """One to its end, whatever that is. Raises TimeIsOver."""
        with self.started(name, *command) as process:
            self.wait(process)

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Until one has ended. Raises TimeIsOver."""
        try:
            process.wait(self.left_s())
        except subprocess.TimeoutExpired as error:
            raise TimeIsOver from error

    @contextmanager
    def started(self, name: str, *command: object) -> Iterator[subprocess.Popen[bytes]]:
        """One while it runs. It is stopped in the end, with all that it started."""
        words, began = [str(word) for word in command], time.monotonic()
        with (self.out / f"{name}.log").open("ab") as log:
            log.write(f"\n$ python {' '.join(words)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, *words], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )
            try:
                yield process
            finally:
                _stop(process)
                log.write(f"[exit status {process.returncode} after {time.monotonic() - began:.0f} s]\n".encode())

    @contextmanager
    def serving(self, name: str, config: Path) -> Iterator[str]:
        """The URL of a service that is ready. It is stopped in the end, and its logs are in NAME-CONFIG.tar.gz.

        Raises TimeIsOver, and RuntimeError where it does not start.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url, began = f"http://127.0.0.1:{port}", time.monotonic()
        try:
            with self.started(name, "-m", "serve_app.cli", "serve", "--config", config, "--port", port) as process:
                while not _is_ready(url):
                    if process.poll() is not None:
                        raise RuntimeError(f"{config}: the service did not start; {name}.log says why")
                    self.left_s()
                    time.sleep(_POLL_S)
                self.note(name, f"{config.stem}: ready after {time.monotonic() - began:.0f} s")
                yield url
        finally:
            if _RAY_LOGS.exists():  # else Ray was not even started
                with tarfile.open(self.out / f"{name}-{config.stem}.tar.gz", "w:gz") as archive:
                    archive.add(_RAY_LOGS.resolve(), "logs")

    def note(self, name: str, line: str) -> None:
        """Into the log."""
        with (self.out / f"{name}.log").open("a") as log:
            log.write(f"{line}\n")


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", timeout=10).status_code == 200
    except httpx2.HTTPError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOPPING_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
