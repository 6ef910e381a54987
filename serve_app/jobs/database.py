"""SQLite and PostgreSQL, opened alike: transactions that are finished once begun, and locks."""

import asyncio
import logging
import math
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

import aiosqlite
from sqlalchemy import event, func, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as NoConnectionInTime
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from serve_app.errors import Unavailable
from serve_app.jobs.model import Change
from t2v_core.errors import InvalidRequest

logger = logging.getLogger(__name__)

# PostgreSQL names the locks of applications by numbers; these are any that nobody else uses.
_LOCKS = {"setup": 7_282_014, "queue": 7_282_015, "claim": 7_282_016}

# A server that vanishes without a word must not hold its clients for hours.
_PATIENCE = {
    "connect_timeout": 5,
    "tcp_user_timeout": 10_000,  # ms
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    # Nor must one that has become a standby, to which connections would stay in the pool.
    "target_session_attrs": "read-write",
}

# Nor must a client that does keep others from its locks: the server ends its session, and who waits is told.
_POSTGRESQL_SESSION = {
    "idle_in_transaction_session_timeout": "15s",
    "lock_timeout": "10s",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
}

_SQLITE_PATIENCE_S = 20.0

_CHANGES = "changes"

_Owner = TypeVar("_Owner", bound="_OnDatabase")
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class Database:
    """The database at "sqlite:///PATH" or "postgresql://...". Raises InvalidRequest for any other URL.

    `on_change` is called with what became of jobs, as soon as it is committed.
    Transactions raise Unavailable where it cannot be reached.
    """

    def __init__(self, url: str, on_change: Callable[[Change], None] = lambda _: None) -> None:
        self._engine, self._on_change = _engine(url), on_change
        self._calls: set[asyncio.Task[Any]] = set()
        self._away_s = -math.inf  # when it was last found to be

    @property
    def calm_s(self) -> float:
        """For how long it was not found to be away."""
        return time.monotonic() - self._away_s

    async def close(self) -> None:
        if self._calls:
            await asyncio.wait(self._calls)
        await self._engine.dispose()

    async def finish(self, call: Coroutine[Any, Any, _Result]) -> _Result:
        """The call's result. The call goes on to its end when its caller is cancelled."""
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return await asyncio.shield(task)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        with self._explained():
            async with self._engine.connect() as connection:
                yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that is committed at the end, and rolled back by an error."""
        with self._explained():
            async with self._engine.execution_options(writes=True).begin() as connection:
                changes = connection.info[_CHANGES] = list[Change]()
                yield connection
        for change in changes:
            self._on_change(change)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A database that is away is a part of the service that cannot be reached."""
        try:
            yield
        except (DataError, IntegrityError, ProgrammingError):  # it is there, and was asked for what cannot be
            raise
        except (DBAPIError, NoConnectionInTime, OSError) as error:
            self._away_s = time.monotonic()
            logger.warning("the job store cannot be reached: %s", why_away(error))
            raise Unavailable("the job store cannot be reached: try again in a few seconds") from error


class _OnDatabase(Protocol):
    @property
    def database(self) -> Database: ...


def finished(
    method: Callable[Concatenate[_Owner, _Arguments], Coroutine[Any, Any, _Result]],
) -> Callable[Concatenate[_Owner, _Arguments], Coroutine[Any, Any, _Result]]:
    """The method, finished once begun though its caller is cancelled.

    For aiosqlite, stopped in the middle of a statement, keeps the lock of its transaction, and all others wait for it.
    """

    @wraps(method)
    async def call(owner: _Owner, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        return await owner.database.finish(method(owner, *args, **kwargs))

    return call


def tell(connection: AsyncConnection, change: Change) -> None:
    """Have the transaction tell of a change when it is committed."""
    connection.info[_CHANGES].append(change)


async def lock(connection: AsyncConnection, what: Literal["setup", "queue", "claim"]) -> None:
    """Be the only transaction that does this. In SQLite, one that writes is the only one anyway."""
    if connection.dialect.name == "postgresql":
        await connection.execute(select(func.pg_advisory_xact_lock(_LOCKS[what])))


def why_away(error: BaseException | None) -> str:
    """What the driver says. It names hosts and users: for logs and operators alone."""
    return str(getattr(error, "orig", None) or error).partition("\n")[0]


def _engine(url: str) -> AsyncEngine:
    scheme, separator, rest = url.partition("://")
    if scheme == "sqlite" and separator:
        engine = create_async_engine(f"sqlite+aiosqlite://{rest}")
        event.listen(engine.sync_engine, "connect", _set_up_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
        return engine
    if scheme in ("postgresql", "postgres") and separator:
        engine = create_async_engine(
            f"postgresql+psycopg://{rest}", pool_pre_ping=True, pool_timeout=10, connect_args=_PATIENCE
        )
        event.listen(engine.sync_engine, "connect", _set_up_postgresql)
        return engine
    raise InvalidRequest(
        f"database {scheme}: must be sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME", param="database"
    )


def _set_up_postgresql(connection: Any, _: object) -> None:  # Any: the driver's
    cursor = connection.cursor()
    for name, value in _POSTGRESQL_SESSION.items():
        cursor.execute(f"SET SESSION {name} = '{value}'")
    cursor.close()
    connection.commit()


def _set_up_sqlite(connection: Any, _: object) -> None:  # Any: SQLAlchemy's, around aiosqlite's
    connection.isolation_level = None  # transactions begin where we say so
    connection.run_async(_set_up_aiosqlite)


async def _set_up_aiosqlite(connection: aiosqlite.Connection) -> None:
    """Wait for locks, log ahead, and lose nothing when the machine does.

    SQLite waits for no lock to turn a new database into one that logs ahead, so of two that open it at once one fails.
    """
    await connection.execute(f"PRAGMA busy_timeout={_SQLITE_PATIENCE_S * 1000:.0f}")
    await connection.execute("PRAGMA synchronous=FULL")
    deadline = time.monotonic() + _SQLITE_PATIENCE_S
    while True:
        try:
            await connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    """A transaction that reads and then writes must have the lock from the start, or it fails when it wants it."""
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")
