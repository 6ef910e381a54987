"""Errors of calls to other deployments, as what they are here: our own, or a part that cannot be reached."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentResponseGenerator

from serve_app.errors import Unavailable
from t2v_core.errors import T2VError

logger = logging.getLogger(__name__)


@contextmanager
def plain_errors(part: str) -> Iterator[None]:
    """Raise our own errors as they were raised there, and Unavailable for a replica that died or is not there."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        while isinstance(cause, RayTaskError):  # it came through several deployments
            cause = cause.cause
        if isinstance(cause, T2VError):
            raise cause from None
        logger.warning("the %s failed: %s", part, _last_line(error))
        raise Unavailable(f"the {part} failed: try again") from error
    except (RayError, RayServeException) as error:
        logger.warning("the %s was lost: %r", part, error)
        raise Unavailable(f"the {part} was lost: try again") from error


async def result_of(response: Any) -> Any:  # Any: what the method called gives
    """The response's value. Cancelled, it cancels the call: awaiting a response alone would leave that to run on."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


def stop(stream: "DeploymentResponseGenerator[Any]") -> None:
    """Cancel a call. Of one that never began, Serve would raise why once more, in place of our own error."""
    with suppress(RayError, RayServeException):
        stream.cancel()  # type: ignore[no-untyped-call]


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
