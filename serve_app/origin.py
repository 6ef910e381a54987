"""Where a job comes from: the HTTP request and the trace that made it.

Kept with the job, so that logs and spans of every attempt at it go on from there, in whatever process, however later.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from ray.serve import context as serve_context

from serve_app.jobs import Job, Origin

_TRACEPARENT = "traceparent"


def origin() -> Origin:
    """Of what is asked for right now: Serve's id of the request, and W3C's traceparent where it is traced."""
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    request = serve_context._get_serve_request_context()
    return Origin(request.request_id or None, carrier.get(_TRACEPARENT))


@contextmanager
def going_on(job: Job) -> Iterator[None]:
    """For an attempt at the job, in a task of its own: lines and calls have the request's id, and a span of its trace.

    Without a trace the span is nobody's, and costs nothing.
    """
    if job.request_id is not None:
        serve_context._set_request_context(request_id=job.request_id)
    carrier = {} if job.traceparent is None else {_TRACEPARENT: job.traceparent}
    parent = TraceContextTextMapPropagator().extract(carrier)
    with trace.get_tracer(__name__).start_as_current_span("attempt", parent):
        yield
