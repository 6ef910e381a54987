"""What a call of the client can raise, and how an answer becomes one of these.

ApiError
├── BadRequest           400, or not sent: a setting, or a combination of them, is not allowed
├── Unauthorized         401: no key, or one that is not known
├── NotFound             404: no such video, another key's, or its file is gone
├── Conflict             409: not in this state of the video
├── IdempotencyConflict  422: the idempotency key was used with another body
├── RateLimited          429: too many videos wait; `retry_after_s` says when to try again
├── ServerError          5xx: the service failed, or a part of it is away
└── ConnectionFailed     no whole answer came
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx2


class ApiError(Exception):
    """Base of what the client raises. `status`, `code` and `param` are the answer's, None where it had none."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


class BadRequest(ApiError):
    """A setting, or a combination of settings, is not allowed: `param` names it where the service was asked."""


class Unauthorized(ApiError):
    """No API key, or one that is not known."""


class NotFound(ApiError):
    """No such video, another key's, or its file is gone."""


class Conflict(ApiError):
    """The video is in a state where this cannot be done."""


class IdempotencyConflict(ApiError):
    """The same idempotency key came with another body."""


class RateLimited(ApiError):
    """Too many videos wait already."""


class ServerError(ApiError):
    """The service failed, or a part of it cannot be reached."""


class ConnectionFailed(ApiError):
    """No whole answer came. `was_sent` is False where the service cannot have seen the request."""

    def __init__(self, message: str, *, was_sent: bool) -> None:
        super().__init__(message)
        self.was_sent = was_sent


_ERRORS: Mapping[int, type[ApiError]] = {
    400: BadRequest,
    401: Unauthorized,
    404: NotFound,
    409: Conflict,
    422: IdempotencyConflict,
    429: RateLimited,
}
_BEFORE_SENDING = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)


def error_of(response: httpx2.Response) -> ApiError:
    """The error that an answer, read whole, tells of."""
    status = response.status_code
    cls = ServerError if status >= 500 else _ERRORS.get(status, ApiError)
    try:
        error = json.loads(response.content)["error"]
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, LookupError, TypeError, AttributeError):
        message = f"{response.url.copy_with(query=None)}: answered {status} without saying why; is the service there?"
        code = param = None
    return cls(message, status=status, code=code, param=param, retry_after_s=_retry_after_s(response))


def not_understood(response: httpx2.Response) -> ApiError:
    """For an answer that is not what the service sends."""
    url = response.url.copy_with(query=None)
    return ApiError(
        f"{url}: the answer is not one of this service's; check the address and the versions",
        status=response.status_code,
    )


@contextmanager
def transport_explained(base_url: str) -> Iterator[None]:
    """Raise ConnectionFailed for whatever goes wrong on the wire inside, BadRequest for what is not fit for it."""
    try:
        yield
    except httpx2.LocalProtocolError as error:
        raise BadRequest(f"{base_url}: the request cannot be sent ({error}); its headers must be plain text") from error
    except httpx2.RequestError as error:
        reason = str(error) or type(error).__name__
        was_sent = not isinstance(error, _BEFORE_SENDING)
        what = "the connection broke" if was_sent else "cannot be reached"
        raise ConnectionFailed(f"{base_url}: {what} ({reason}); is the service running?", was_sent=was_sent) from error


def _retry_after_s(response: httpx2.Response) -> float | None:
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None  # a date, or nothing
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
