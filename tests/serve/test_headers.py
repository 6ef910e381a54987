"""Whatever stands in headers, paths and uploads: no crash, no failure of ours, no hang. Ranges give just their bytes.

Straight into the ASGI app, past a server that would refuse the worst of it.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from api_service import Files, Service, running
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve_app.api import Limits

pytestmark = [pytest.mark.anyio]

WITHIN_S = 20.0  # a hang, whatever else the machine does
FEW = settings(max_examples=60)

# What may stand in a header as bytes: all but the line's end, which no server lets through.
HEADER = st.binary(max_size=80).filter(lambda value: not set(value) & set(b"\r\n\0"))
HEADER_NAMES = st.sampled_from(
    [
        "range",
        "if-range",
        "if-none-match",
        "idempotency-key",
        "last-event-id",
        "content-type",
        "content-length",
        "accept",
        "authorization",
        "x-request-id",
        "traceparent",
        "expect",
        "transfer-encoding",
        "origin",
    ]
)
NUMBER = st.one_of(st.just(""), st.integers(-2, 3_000).map(str), st.integers(0, 10**40).map(str))
RANGES = st.one_of(
    st.builds("bytes={}-{}".format, NUMBER, NUMBER),
    st.builds(
        "{}={}-{},{}-{}".format, st.sampled_from(["bytes", "Bytes", "items", ""]), NUMBER, NUMBER, NUMBER, NUMBER
    ),
    st.text(max_size=30).map(lambda text: f"bytes={text}"),
)
IDS = st.one_of(
    st.text(max_size=60),
    st.from_regex(r"video_[0-9a-f]{32}", fullmatch=True),
    st.sampled_from(["sync", "edits", "..", "%00", "\0"]),
)


METHODS = st.sampled_from(["GET", "HEAD", "POST", "DELETE", "PUT", "get", "X"])
PLACES = st.sampled_from(
    [
        ("POST", "/v1/videos"),
        ("POST", "/v1/videos/sync"),
        ("POST", "/v1/videos/edits"),
        ("POST", "/v1/videos/{}/remix"),
        ("GET", "/v1/videos/{}/content"),
        ("HEAD", "/v1/videos/{}/content"),
        ("GET", "/v1/videos/{}/events"),
        ("GET", "/v1/videos/{}"),
        ("GET", "/v1/videos"),
        ("GET", "/healthz"),
    ]
)
PARTS = st.one_of(
    st.builds(
        lambda name, extra, data: b'Content-Disposition: form-data; name="%s"%s\r\n\r\n%s' % (name, extra, data),
        st.sampled_from([b"prompt", b"video", b"seed", b"strength", b"metadata[k]", b"metadata"]) | HEADER,
        st.sampled_from([b"", b'; filename="a.mp4"', b'; filename="\xff"', b"\r\nContent-Type: video/mp4"]) | HEADER,
        st.binary(max_size=100),
    ),
    st.binary(max_size=200),
)
Headers = list[tuple[bytes, bytes]]


class App:
    """A service with one completed video, called without a server between."""

    def __init__(self, service: Service, video: dict[str, Any]) -> None:
        self.video_id, self.file = str(video["id"]), service.files.video
        self._app, self._loop = service.app, asyncio.get_running_loop()

    async def call(
        self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes = b""
    ) -> tuple[int, dict[str, str], bytes]:
        """The status, the headers and the body of the answer; the app raises nothing."""
        sent: list[dict[str, Any]] = []
        received = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if received:
                return received.pop()
            await asyncio.sleep(3600)
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(message)

        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode("utf-8", "surrogatepass"),
            "query_string": query.encode("utf-8", "surrogatepass"),
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        async with asyncio.timeout(WITHIN_S):
            await self._app(scope, receive, send)
        start, *chunks = sent
        answer_headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
        return start["status"], answer_headers, b"".join(chunk.get("body", b"") for chunk in chunks)


@pytest.fixture(scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory, files: Files) -> AsyncIterator[App]:
    limits = Limits(max_queued=None, max_queued_per_owner=None, max_body_bytes=20_000, max_upload_bytes=40_000)
    async with running(tmp_path_factory.mktemp("app"), files, limits=limits) as service:
        service.gpu.may_finish.set()
        yield App(service, await service.completed())


def named(*headers: tuple[str, str | bytes]) -> Headers:
    """As a server hands them on."""
    encoded = []
    for name, value in headers:
        encoded.append((name.encode(), value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")))
    return encoded


@FEW
@given(first=st.integers(0, 3_000), last=st.integers(0, 3_000), form=st.sampled_from(["both", "from", "last"]))
@example(first=0, last=0, form="both")
async def test_a_range_that_can_be_satisfied_gives_exactly_these_bytes(
    app: App, first: int, last: int, form: str
) -> None:
    header = {"both": f"bytes={first}-{last}", "from": f"bytes={first}-", "last": f"bytes=-{last}"}[form]
    file, size = app.file, len(app.file)
    expected = {"both": file[first : last + 1], "from": file[first:], "last": file[-last:] if last else b""}[form]
    path = f"/v1/videos/{app.video_id}/content"
    status, headers, body = await app.call("GET", path, named(("range", header)))
    if form == "both" and last < first:  # no range at all
        assert (status, body) == (200, file)
    elif not expected:
        assert (status, headers["content-range"]) == (416, f"bytes */{size}")
    else:
        assert (status, body) == (206, expected)
        assert headers["content-length"] == str(len(expected))
        start = size - len(expected) if form == "last" else first
        assert headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/{size}"


@FEW
@given(header=RANGES, method=st.sampled_from(["GET", "HEAD"]), if_range=st.none() | HEADER)
async def test_any_range_is_answered_with_bytes_of_the_file_or_refused(
    app: App, header: str, method: str, if_range: bytes | None
) -> None:
    conditions = [] if if_range is None else [("if-range", if_range)]
    path = f"/v1/videos/{app.video_id}/content"
    status, headers, body = await app.call(method, path, named(("range", header), *conditions))
    assert status in (200, 206, 416)
    if method == "GET" and status != 416:
        assert body in app.file
        assert headers["content-length"] == str(len(body))
    assert status != 200 or headers["content-length"] == str(len(app.file))


@FEW
@given(headers=st.lists(st.tuples(HEADER_NAMES, HEADER), max_size=4), place=PLACES)
async def test_no_header_makes_it_fail(app: App, headers: list[tuple[str, bytes]], place: tuple[str, str]) -> None:
    method, path = place
    body = b'{"prompt": "a"}' if method == "POST" else b""
    sent = named(("content-type", "application/json"), *headers)
    status, _, _ = await app.call(method, path.format(app.video_id), sent, body)
    assert status < 500


@FEW
@given(key=HEADER, other=st.booleans())
@example(key=b"\xff\xfe", other=False)
async def test_the_same_idempotency_key_gives_the_same_job_whatever_it_is(app: App, key: bytes, other: bool) -> None:
    key = b"only here: " + key  # jobs of other tests have keys too
    sent = named(("content-type", "application/json"), ("idempotency-key", key))
    first, again = b'{"prompt": "a"}', b'{"prompt": "another"}' if other else b'{"prompt": "a"}'
    status, _, answer = await app.call("POST", "/v1/videos", sent, first)
    assert status == 200
    status, _, second = await app.call("POST", "/v1/videos", sent, again)
    assert status == (422 if other else 200)
    assert other or json.loads(second)["id"] == json.loads(answer)["id"]


@FEW
@given(video_id=IDS, place=st.sampled_from(["", "/content", "/cancel", "/remix", "/events"]), method=METHODS)
async def test_no_id_makes_it_fail(app: App, video_id: str, place: str, method: str) -> None:
    sent = named(("content-type", "application/json"))
    status, _, _ = await app.call(method, f"/v1/videos/{video_id}{place}", sent, b'{"prompt": "a"}')
    assert 200 <= status < 500


@FEW
@given(parts=st.lists(PARTS, max_size=4), boundary=st.sampled_from(["b", "B-1", ""]), cut=st.integers(0, 60))
@example(parts=[b'Content-Disposition: form-data; name="video"; filename="\xff"\r\n\r\nno'], boundary="b", cut=0)
async def test_no_upload_makes_it_fail(app: App, parts: list[bytes], boundary: str, cut: int) -> None:
    mark = boundary.encode()
    body = b"".join(b"--" + mark + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + mark + b"--\r\n"
    sent = named(("content-type", f"multipart/form-data; boundary={boundary}"))
    for path in ("/v1/videos/edits", "/v1/videos"):
        for data in (body, body[: len(body) - cut]):
            status, _, _ = await app.call("POST", path, sent, data)
            assert status in (200, 400, 413)
