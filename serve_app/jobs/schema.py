"""The tables of jobs, and the clock that all their times are by."""

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
    inspect,
)
from sqlalchemy.engine import Connection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", Text, nullable=False),
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
    Column("webhook_url", Text),
    Column("request_id", Text),
    Column("traceparent", Text),
    UniqueConstraint("owner", "idempotency_key"),
    Index("jobs_by_due", "status", "due_at", "id"),
    Index("jobs_by_owner", "owner", "created_at", "id"),
    Index("jobs_by_claim", "claimed_by", "status"),
    Index("jobs_by_completion", "status", "completed_at"),
    Index("jobs_by_expiry", "expires_at"),
)

# Written with the change that it tells of, so that neither is without the other, and kept for a while when delivered:
# it says who was told of what. `next_at` is when the next attempt is due; null, there is none, or none any more.
outbox = Table(
    "outbox",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("job_id", String(64), nullable=False),
    Column("event", String(32), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("owner", Text),
    Column("url", Text),
    Column("body", Text),
    Column("next_at", Float(53)),
    Column("attempts", Integer),
    Column("delivered_at", Float(53)),
    Index("outbox_by_next", "next_at"),
)

# Removed jobs, for a while: where they stood in their owner's list, for who is at a page that ended there, and how they
# had ended, for who watched and is told a moment later.
removed = Table(
    "removed",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", Text, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("status", String(16), nullable=False),
    Column("completed_at", Float(53), nullable=False),
    Column("removed_at", Float(53), nullable=False),
    Index("removed_by_time", "removed_at"),
)


def add_missing_columns(connection: Connection) -> None:
    """Bring tables of an earlier version up to date: what came later may be null."""
    inspector = inspect(connection)
    for table in metadata.sorted_tables:
        present = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in present:
                kind = column.type.compile(connection.dialect)
                connection.exec_driver_sql(f'ALTER TABLE {table.name} ADD COLUMN "{column.name}" {kind}')
        for index in table.indexes:
            index.create(connection, checkfirst=True)


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
