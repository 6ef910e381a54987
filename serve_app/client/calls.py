"""What both clients share: each call as data, how its answer is read, and when it is made again."""

import errno
import random
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, TypedDict, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from serve_app.client.errors import ApiError, BadRequest, ConnectionFailed, not_understood
from serve_app.client.models import Event, Variant, VideoSettings, event_of

Order = Literal["asc", "desc"]

FIRST_PAUSE_S = 0.25  # before the second try; each further pause is twice as long
_LONGEST_PAUSE_S = 8.0
_LONGEST_RETRY_AFTER_S = 60.0  # who is told to wait longer is told so, and decides
_MAX_RECONNECTS = 8  # in a row: half a minute, in which a service starts anew
_STAYED_OPEN_S = 15.0  # a stream that lasts so long works, whatever it tells of: a video may wait for hours
_SILENCE_S = 45.0  # the service says something every 15 seconds
_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=20)  # each stream of events holds a connection

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the API. Repeatable: making it twice is as good as once, so a lost answer may be asked for again."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    params: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, object] | None = None
    file: bytes | None = None  # the body's "video", which makes it a form
    is_repeatable: bool = True
    silence_s: float | None = None  # how long an answer may pause; None is the client's own timeout

    def request(self, client: httpx2.Client | httpx2.AsyncClient, timeout_s: float) -> httpx2.Request:
        """The request of this call. Raises BadRequest for what no request can hold."""
        timeout = httpx2.Timeout(timeout_s, read=self.silence_s or timeout_s)
        url, params, headers = self.path, dict(self.params), dict(self.headers)
        try:
            if self.file is not None:
                form = _form(self.body or {})
                files = {"video": ("video", self.file)}
                return client.build_request(
                    self.method, url, params=params, headers=headers, data=form, files=files, timeout=timeout
                )
            body = None if self.body is None else dict(self.body)
            return client.build_request(self.method, url, params=params, headers=headers, json=body, timeout=timeout)
        except (ValueError, httpx2.InvalidURL) as error:
            raise BadRequest(
                f"{self.method} {url}: cannot be sent ({error}); numbers must be finite, and text must be Unicode"
            ) from error


def create_call(prompt: str, settings: VideoSettings, idempotency_key: str | None) -> Call:
    body = {"prompt": prompt, **{name: value for name, value in settings.items() if value is not None}}
    return Call("POST", "/v1/videos", headers=_idempotent(idempotency_key), body=body)


def edit_call(
    prompt: str, video: str | Path | bytes, strength: float | None, settings: VideoSettings, idempotency_key: str | None
) -> Call:
    body: dict[str, object] = {"prompt": prompt}
    body |= {name: value for name, value in {**settings, "strength": strength}.items() if value is not None}
    headers = _idempotent(idempotency_key)
    if isinstance(video, str):
        return Call("POST", "/v1/videos/edits", headers=headers, body={**body, "video": {"id": video}})
    file = video if isinstance(video, bytes) else _content_of(video)
    return Call("POST", "/v1/videos/edits", headers=headers, body=body, file=file)


def remix_call(video_id: str, prompt: str, idempotency_key: str | None) -> Call:
    return Call("POST", f"{_path(video_id)}/remix", headers=_idempotent(idempotency_key), body={"prompt": prompt})


def retrieve_call(video_id: str) -> Call:
    return Call("GET", _path(video_id))


def list_call(after: str | None, order: Order, page_size: int) -> Call:
    params: dict[str, str | int] = {"order": order, "limit": page_size}
    return Call("GET", "/v1/videos", params=params if after is None else {**params, "after": after})


def cancel_call(video_id: str) -> Call:
    return Call("POST", f"{_path(video_id)}/cancel", is_repeatable=False)


def delete_call(video_id: str) -> Call:
    return Call("DELETE", _path(video_id), is_repeatable=False)


def content_call(video_id: str, variant: Variant) -> Call:
    return Call("GET", f"{_path(video_id)}/content", params={"variant": variant})


def events_call(video_id: str, last_event_id: str | None) -> Call:
    headers = {"accept": "text/event-stream"}
    if last_event_id:
        headers["last-event-id"] = _checked(last_event_id, "last_event_id")
    return Call("GET", f"{_path(video_id)}/events", headers=headers, silence_s=_SILENCE_S)


def _form(body: Mapping[str, object]) -> dict[str, str]:
    """A body's values as text, and those of a mapping one by one."""
    form: dict[str, str] = {}
    for name, value in body.items():
        if isinstance(value, Mapping):
            form |= {f"{name}[{key}]": str(inner) for key, inner in value.items()}
        else:
            form[name] = str(value)
    return form


class Options(TypedDict):
    """What both kinds of an httpx2 client are made with."""

    base_url: str
    headers: dict[str, str]
    limits: httpx2.Limits


def options_of(base_url: str, api_key: str | None) -> Options:
    """How to reach the service. Raises ApiError for an address or a key that cannot be one."""
    try:
        url = httpx2.URL(base_url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ApiError(f"base_url {base_url!r}: is no address ({error})", param="base_url") from error
    if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > 65535:
        raise ApiError(f"base_url {base_url!r}: must be like http://127.0.0.1:8000", param="base_url")
    return {
        "base_url": base_url,
        "headers": {"authorization": f"Bearer {_checked(api_key, 'api_key')}"} if api_key else {},
        "limits": _LIMITS,
    }


def model_of(response: httpx2.Response, model: type[_Model]) -> _Model:
    """The answer, read whole, as this model. Raises ApiError."""
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        raise not_understood(response) from error


def check_is_stream(response: httpx2.Response) -> None:
    """Raise ApiError for an answer that is no stream of events."""
    if response.headers.get("content-type", "").partition(";")[0].strip().lower() != "text/event-stream":
        raise not_understood(response)


def received(response: httpx2.Response, sent: httpx2.ServerSentEvent) -> Event | None:
    """An event of a stream, or None for one that says nothing to this client. Raises ApiError."""
    try:
        return event_of(sent.event, sent.data, sent.id)
    except (ValueError, TypeError) as error:
        raise not_understood(response) from error


def stream_ended(base_url: str) -> ConnectionFailed:
    """For events that stop before the last one."""
    return ConnectionFailed(f"{base_url}: the events stopped before the video has ended", was_sent=True)


class Retries:
    """The tries that one call has left."""

    def __init__(self, max_retries: int, *, is_repeatable: bool = True) -> None:
        self._num_at_first = self._num_left = max_retries
        self._is_repeatable = is_repeatable
        self._pause_s = FIRST_PAUSE_S
        self._opened_s: float | None = None

    def opened(self) -> None:
        """A stream of events has begun."""
        self._opened_s = time.monotonic()

    def renew(self) -> None:
        """Those of a stream that has worked: it is worth more than one that never did."""
        self._num_left = max(self._num_at_first, _MAX_RECONNECTS)
        self._pause_s = FIRST_PAUSE_S

    def pause_s(self, error: ApiError) -> float:
        """How long to wait before the next try. Raises the error where there is none."""
        if self._stayed_open(error):
            self.renew()
        self._opened_s = None
        wait_s = error.retry_after_s or 0.0
        if self._num_left <= 0 or not self._may_pass(error) or wait_s > _LONGEST_RETRY_AFTER_S:
            raise error
        self._num_left -= 1
        pause_s = self._pause_s * random.uniform(0.75, 1.25)  # so that many clients do not come back together
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return max(wait_s, pause_s)

    def _stayed_open(self, error: ApiError) -> bool:
        was_silent = isinstance(error.__cause__, httpx2.TimeoutException)  # open, but nobody spoke
        return self._opened_s is not None and not was_silent and time.monotonic() - self._opened_s >= _STAYED_OPEN_S

    def _may_pass(self, error: ApiError) -> bool:
        if isinstance(error, ConnectionFailed):
            return self._is_repeatable or not error.was_sent
        return error.status in (429, 503)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that has this name once it is written, and leaves nothing where that fails."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file in it", str(path))
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            yield file
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _path(video_id: str) -> str:
    # What is no id must not become another path.
    if not video_id or not all(letter.isalnum() or letter in "_-" for letter in video_id) or not video_id.isascii():
        raise ApiError(f"id {video_id!r:.100}: has letters, digits, _ and - only, as `list` shows it", param="video_id")
    return f"/v1/videos/{video_id}"


def _idempotent(key: str | None) -> dict[str, str]:
    return {"idempotency-key": _checked(key, "idempotency_key") if key else secrets.token_hex(16)}


def _checked(value: str, name: str) -> str:
    """The value, which a header can hold, and which may be a secret. Raises ApiError."""
    if not (value.isascii() and value.isprintable() and value.strip() == value):
        raise ApiError(f"{name}: must be printable ASCII without spaces around it; look for a line break", param=name)
    return value


def _content_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in its name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ApiError(f"video {str(file)!r}: cannot be read ({reason}); name a file", param="video") from error
