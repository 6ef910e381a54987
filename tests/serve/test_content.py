"""Ranges, and files over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serve_app.content import Span, parse_range

pytestmark = pytest.mark.anyio
DIGITS = st.text("0123456789", max_size=25)


@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 60))
def test_a_range_means_what_slicing_means(size: int, first: int, last: int) -> None:
    data = bytes(range(size))
    span = parse_range(f"bytes={first}-{last}", size)
    if last < first:
        assert span is None
        return
    assert span is not None
    assert data[span.start : span.end] == data[first : last + 1]
    assert 0 <= span.start <= span.end <= size


@given(st.integers(0, 50), st.integers(0, 60))
def test_open_ranges_mean_the_rest_and_the_last_bytes(size: int, count: int) -> None:
    data = bytes(range(size))
    rest, tail = parse_range(f"bytes={count}-", size), parse_range(f"bytes=-{count}", size)
    assert rest is not None
    assert tail is not None
    assert data[rest.start : rest.end] == data[count:]
    assert data[tail.start : tail.end] == (data[-count:] if count else b"")


@given(st.integers(0, 10**12), DIGITS, DIGITS)
@example(100, "0" * 5000 + "7", "9" * 5000)
def test_any_digits_give_bytes_of_the_file_or_none(size: int, first: str, last: str) -> None:
    span = parse_range(f"bytes={first}-{last}", size)
    if span is not None:
        assert 0 <= span.start <= span.end <= size


@given(st.text(max_size=30) | st.text("bytes=-,0123456789 ", max_size=30))
def test_no_header_breaks_the_parser(header: str) -> None:
    span = parse_range(header, 100)
    assert span is None or 0 <= span.start <= span.end <= 100


@pytest.mark.parametrize(
    "header",
    [None, "", "bytes=", "bytes=-", "bytes=a-b", "bytes=5-2", "bytes=0-1,3-4", "items=0-1", "bytes=1-2-3", "bytes=٣-٤"],
)
def test_other_headers_ask_for_all_of_it(header: str | None) -> None:
    assert parse_range(header, 100) is None


def test_leading_zeros_count_for_nothing() -> None:
    assert parse_range("bytes=" + "0" * 30 + "5-6", 100) == Span(5, 7)


@pytest.fixture(scope="module")
async def content(shared_service: Any) -> AsyncIterator[Any]:
    """GET of the content of a completed video."""
    video = await shared_service.completed()

    async def get(variant: str | None = None, method: str = "GET", **headers: str) -> Any:
        return await shared_service.client.request(
            method,
            f"/v1/videos/{video['id']}/content",
            params={"variant": variant} if variant else {},
            headers={name.replace("_", "-"): value for name, value in headers.items()},
        )

    return get


@pytest.mark.parametrize(
    ("variant", "media_type"),
    [(None, "video/mp4"), ("video", "video/mp4"), ("thumbnail", "image/webp"), ("spritesheet", "image/webp")],
)
async def test_each_variant_is_its_file(
    shared_service: Any, content: Any, variant: str | None, media_type: str
) -> None:
    response = await content(variant)
    assert response.status_code == 200
    assert response.content == getattr(shared_service.files, variant or "video")
    assert response.headers["content-type"] == media_type
    assert response.headers["content-length"] == str(len(response.content))
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "filename=" in response.headers["content-disposition"]


async def test_variants_have_their_own_names_and_etags(content: Any) -> None:
    answers = [await content(variant) for variant in ("video", "thumbnail", "spritesheet")]
    assert len({answer.headers["etag"] for answer in answers}) == 3
    names = [answer.headers["content-disposition"].split('"')[1] for answer in answers]
    assert [name.rpartition(".")[2] for name in names] == ["mp4", "webp", "webp"]
    assert len(set(names)) == 3


async def test_a_range_is_answered_with_206_and_its_place(shared_service: Any, content: Any) -> None:
    size = len(shared_service.files.video)
    for header, start, end in [
        ("bytes=0-9", 0, 10),
        (f"bytes={size - 5}-", size - 5, size),
        ("bytes=-7", size - 7, size),
    ]:
        response = await content(range=header)
        assert response.status_code == 206
        assert response.content == shared_service.files.video[start:end]
        assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert response.headers["content-length"] == str(end - start)


async def test_several_ranges_are_answered_with_all_of_it(shared_service: Any, content: Any) -> None:
    response = await content(range="bytes=0-1,5-6")
    assert response.status_code == 200
    assert response.content == shared_service.files.video


async def test_a_range_behind_the_end_is_416_and_tells_the_size(shared_service: Any, content: Any) -> None:
    size = len(shared_service.files.video)
    response = await content(range=f"bytes={size}-")
    assert response.status_code == 416
    assert response.headers["content-range"] == f"bytes */{size}"
    assert response.json()["error"]["code"] == "range_not_satisfiable"


async def test_who_has_the_file_gets_304(content: Any) -> None:
    etag = (await content()).headers["etag"]
    for header in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        response = await content(if_none_match=header, range="bytes=0-9")
        assert response.status_code == 304
        assert response.content == b""
        assert response.headers["etag"] == etag
    assert (await content(if_none_match='"other"')).status_code == 200


async def test_if_range_with_another_file_gives_all_of_it(content: Any) -> None:
    etag = (await content()).headers["etag"]
    assert (await content(range="bytes=0-9", if_range=etag)).status_code == 206
    for other in ('"other"', f"W/{etag}", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert (await content(range="bytes=0-9", if_range=other)).status_code == 200


async def test_head_has_the_headers_of_get_and_no_body(shared_service: Any, content: Any) -> None:
    get, head = await content(), await content(method="HEAD")
    assert head.status_code == 200
    assert head.content == b""
    for name in ("content-length", "content-type", "etag", "accept-ranges", "content-disposition"):
        assert head.headers[name] == get.headers[name]
    assert (await content(method="HEAD", range="bytes=0-9")).headers["content-length"] == get.headers["content-length"]


async def test_an_unknown_variant_is_400(content: Any) -> None:
    response = await content("audio")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "variant"
    assert "audio" in response.json()["error"]["message"]


async def test_content_before_the_end_is_409_and_not_worth_a_retry(service: Any) -> None:
    video = await service.create()
    queued = await service.client.get(f"/v1/videos/{video['id']}/content")
    work = await service.claim()
    in_progress = await service.client.get(f"/v1/videos/{video['id']}/content")
    await work.fail()
    failed = await service.client.get(f"/v1/videos/{video['id']}/content")
    for response, status in [(queued, "queued"), (in_progress, "in_progress"), (failed, "failed")]:
        assert response.status_code == 409
        assert response.json()["error"]["code"] == "video_not_ready"
        assert f"is {status}" in response.json()["error"]["message"]
        assert response.headers["x-should-retry"] == "false"


async def test_a_file_that_is_gone_is_404_before_any_byte(service: Any) -> None:
    video = await service.completed()
    await service.artifacts.delete_prefix(f"{video['id']}/")
    response = await service.client.get(f"/v1/videos/{video['id']}/content")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "content_gone"


async def test_many_may_fetch_at_once(shared_service: Any, content: Any) -> None:
    answers = await asyncio.gather(*(content() for _ in range(20)))
    assert {answer.content for answer in answers} == {shared_service.files.video}
