"""Logs that tell of which job a line is, in the files that Serve writes.

With Serve's JSON encoding each line is an object. Its field is `job` and not `job_id`: that is Ray's own, which Serve
leaves out. `request_id` is there as well, by Serve: of the HTTP request, also of the attempts at its job.
"""

import logging
from contextvars import ContextVar

from opentelemetry import trace

OURS = ("serve_app", "t2v_core")
_SERVE = "ray.serve"

_FIELDS: ContextVar[dict[str, str | int] | None] = ContextVar("fields", default=None)


def name_job(job_id: str, fence: int | None = None) -> None:
    """Have the lines of this task, and of what it starts from here on, tell of the job and of the attempt at it.

    The span that is open tells of them too, where the request is traced.
    A line on behalf of another job says so itself: `extra=fields(job_id, fence)`.
    """
    named = fields(job_id, fence)
    _FIELDS.set(named)
    trace.get_current_span().set_attributes({f"t2v.{field}": value for field, value in named.items()})


def fields(job_id: str, fence: int | None) -> dict[str, str | int]:
    """What a line has of its job."""
    return {"job": job_id} if fence is None else {"job": job_id, "fence": fence}


def log_through_serve() -> None:
    """Give our lines to Serve's logger, whose files and level hold for them then. For each replica, as it starts.

    Serve sets up its own logger alone: ours would reach nobody below WARNING, and nobody in JSON.
    """
    for name in OURS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)  # Serve's level decides
        logger.propagate = False
        logger.handlers = [_ToServe()]


class _ToServe(logging.Handler):
    """Looks for Serve's handlers at each line, since a new logging configuration replaces them."""

    def emit(self, record: logging.LogRecord) -> None:
        serve = logging.getLogger(_SERVE)
        if serve.isEnabledFor(record.levelno):
            for field, value in (_FIELDS.get() or {}).items():
                record.__dict__.setdefault(field, value)
            serve.handle(record)
