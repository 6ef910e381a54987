"""The tables of jobs, and how SQLite and PostgreSQL are opened alike."""

from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    event,
)
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from t2v_core.errors import InvalidRequest

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("model", Text, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("params", JSON, nullable=False),
    Column("priority", String(16), nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("remixed_from", String(64)),
    Column("input_path", Text),
    Column("idempotency_key", String(255)),
    Column("body_hash", String(64)),
    Column("status", String(16), nullable=False),
    Column("step", Integer, nullable=False, default=0),
    Column("num_steps", Integer, nullable=False),
    Column("eta_s", Float),
    Column("created_at", Float(53), nullable=False),
    Column("due_at", Float(53), nullable=False),  # whom a claim takes first
    Column("started_at", Float(53)),
    Column("completed_at", Float(53)),
    Column("expires_at", Float(53)),
    Column("fence", Integer, nullable=False, default=0),
    Column("claimed_by", Text),
    Column("lease_until", Float(53)),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("resumes", Integer, nullable=False, default=0),
    Column("steps_repeated", Integer, nullable=False, default=0),
    Column("checkpoint_path", Text),
    Column("checkpoint_step", Integer, nullable=False, default=0),
    Column("claimed_step", Integer, nullable=False, default=0),  # where this attempt began
    Column("preview_path", Text),
    Column("preview_step", Integer, nullable=False, default=0),
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("artifacts", JSON, nullable=False, default=dict),
    UniqueConstraint("owner", "idempotency_key"),
    Index("jobs_by_due", "status", "due_at", "id"),
    Index("jobs_by_owner", "owner", "created_at", "id"),
    Index("jobs_by_claim", "claimed_by", "status"),
)

# Written with the change that it tells of, so that neither is without the other.
outbox = Table(
    "outbox",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("job_id", String(64), nullable=False),
    Column("event", String(32), nullable=False),
    Column("created_at", Float(53), nullable=False),
)


class now_s(FunctionElement[float]):
    """Unix seconds by the database's own clock, at this moment and not when the transaction began."""

    type = Float(53)
    inherit_cache = True


@compiles(now_s, "sqlite")
def _sqlite_now(element: now_s, compiler: SQLCompiler, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now_s, "postgresql")
def _postgresql_now(element: now_s, compiler: SQLCompiler, **_: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


def open_engine(url: str) -> AsyncEngine:
    """An engine for "sqlite:///PATH" or "postgresql://...". Raises InvalidRequest for any other."""
    scheme, separator, rest = url.partition("://")
    if scheme == "sqlite" and separator:
        engine = create_async_engine(f"sqlite+aiosqlite://{rest}")
        event.listen(engine.sync_engine, "connect", _set_up_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
        return engine
    if scheme in ("postgresql", "postgres") and separator:
        return create_async_engine(f"postgresql+psycopg://{rest}", pool_pre_ping=True)
    raise InvalidRequest(
        f"database {scheme}: must be sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME", param="database"
    )


def _set_up_sqlite(connection: Any, _: object) -> None:  # Any: the driver's
    connection.isolation_level = None  # transactions begin where we say so
    cursor = connection.cursor()
    for pragma in ("busy_timeout=20000", "journal_mode=WAL", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """A transaction that reads and then writes must have the lock from the start, or it fails when it wants it."""
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")
