"""What a caller of the service can meet beside the model's own errors, and the one table from errors to HTTP.

T2VError
├── JobNotFound          no such job, or another key's
├── JobEnded             it has ended, so it cannot be cancelled
├── JobLive              it has not ended, so it cannot be removed
├── IdempotencyConflict  the key was used with another body
├── QueueFull            too many jobs or callers wait
├── Unauthorized         no key, or one that is not known
├── CrossSite            a page of another site asks, and there are no keys
├── NotReady             the video is not made, so there is nothing to fetch
├── ArtifactGone         the file has expired or was removed
├── UnknownBody          a body that is neither JSON nor multipart
├── UploadTooLarge       a body of more bytes than allowed
├── Unavailable          a part of the service cannot be reached now
└── Superseded           this attempt is not wanted any more: another one is, or nobody waits
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from t2v_core.errors import EngineBroken, GenerationFailed, InvalidRequest, OutOfMemory, T2VError, UnreadableVideo


class JobNotFound(T2VError):
    """No such job, or it is another key's. `param` is what named it."""

    def __init__(self, message: str, param: str = "video_id") -> None:
        super().__init__(message)
        self.param = param


class JobEnded(T2VError):
    """The job has ended, so there is nothing to cancel."""


class JobLive(T2VError):
    """The job has not ended."""


class IdempotencyConflict(T2VError):
    """The same idempotency key came with another body."""


class QueueFull(T2VError):
    """Too many jobs or callers wait already. `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> "tuple[type[QueueFull], tuple[str, float]]":
        return type(self), (str(self), self.retry_after_s)  # it goes to callers by handle


class Unauthorized(T2VError):
    """No API key, or one that is not known."""


class CrossSite(T2VError):
    """A page of another site asks, where nobody needs a key."""


class NotReady(T2VError):
    """The job has made no video: it still runs, or it ended without one."""


class ArtifactGone(T2VError):
    """The file is not there: it has expired, or was removed."""


class UnknownBody(T2VError):
    """A body of a type that this service does not read."""


class UploadTooLarge(T2VError):
    """A body of more bytes than this service takes."""


class Unavailable(T2VError):
    """A part of the service cannot be reached now. What was accepted is kept."""


class Superseded(T2VError):
    """This attempt at a request is not wanted any more. Only the service's own parts meet it."""


ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]


@dataclass(frozen=True, slots=True)
class HTTPAnswer:
    """How an error is told over HTTP: the status, and OpenAI's type and code. Final: the same call again is in vain."""

    status: int
    type: ErrorType
    code: str
    is_final: bool = False


# The nearest class counts. What is not here is our own fault, and answered without its message.
HTTP_ANSWERS: Mapping[type[T2VError], HTTPAnswer] = {
    InvalidRequest: HTTPAnswer(400, "invalid_request_error", "invalid_value"),
    UnreadableVideo: HTTPAnswer(400, "invalid_request_error", "unreadable_video"),
    OutOfMemory: HTTPAnswer(400, "invalid_request_error", "out_of_memory"),
    Unauthorized: HTTPAnswer(401, "authentication_error", "invalid_api_key"),
    CrossSite: HTTPAnswer(403, "invalid_request_error", "cross_site_request"),
    JobNotFound: HTTPAnswer(404, "invalid_request_error", "video_not_found"),
    ArtifactGone: HTTPAnswer(404, "invalid_request_error", "content_gone"),
    NotReady: HTTPAnswer(409, "invalid_request_error", "video_not_ready", is_final=True),
    JobEnded: HTTPAnswer(409, "invalid_request_error", "video_ended", is_final=True),
    JobLive: HTTPAnswer(409, "invalid_request_error", "video_not_ended"),
    UploadTooLarge: HTTPAnswer(413, "invalid_request_error", "request_too_large"),
    UnknownBody: HTTPAnswer(415, "invalid_request_error", "unsupported_content_type"),
    IdempotencyConflict: HTTPAnswer(422, "invalid_request_error", "idempotency_conflict"),
    QueueFull: HTTPAnswer(429, "rate_limit_error", "queue_full"),
    GenerationFailed: HTTPAnswer(500, "server_error", "generation_failed", is_final=True),
    EngineBroken: HTTPAnswer(503, "server_error", "unavailable"),
    Unavailable: HTTPAnswer(503, "server_error", "unavailable"),
}


def http_answer(error: T2VError) -> HTTPAnswer | None:
    """The table's row for this error, or None for one that is our own fault."""
    for cls in type(error).__mro__:
        if issubclass(cls, T2VError) and cls in HTTP_ANSWERS:
            return HTTP_ANSWERS[cls]
    return None
