"""Answering with a stored file: whole, a range of it, or that the caller has it already (RFC 9110, 13 and 14)."""

import re
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import NamedTuple

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from serve_app.artifacts import ArtifactStore
from serve_app.errors import ArtifactGone, HTTPAnswer, NotReady
from serve_app.failures import error_response
from serve_app.jobs.model import Artifact, Job
from serve_app.schemas import Variant

_RANGE = re.compile(r"bytes=[ \t]*([0-9]*)-([0-9]*)[ \t]*", re.IGNORECASE)
_UNSATISFIABLE = HTTPAnswer(416, "invalid_request_error", "range_not_satisfiable")


class Span(NamedTuple):
    """Bytes from `start` up to and without `end`. Empty: the file has none of what was asked for."""

    start: int
    end: int


def parse_range(header: str | None, size_bytes: int) -> Span | None:
    """The bytes of a file that a Range header asks for, or None for all of it.

    None too where the header is malformed, of another unit, or of several ranges: a server may ignore those.
    """
    match = _RANGE.fullmatch(header.strip()) if header is not None else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return Span(max(0, size_bytes - _number(last)), size_bytes)
    if last and _number(last) < _number(first):
        return None
    end = min(_number(last) + 1, size_bytes) if last else size_bytes
    return Span(min(_number(first), end), end)


async def content_response(request: Request, artifacts: ArtifactStore, job: Job, variant: Variant) -> Response:
    """The file of a completed job, streamed. Raises NotReady, or ArtifactGone where it has no such file."""
    artifact = _artifact(job, variant)
    etag = f'"{artifact.etag}"'
    headers = {
        "etag": etag,
        "accept-ranges": "bytes",
        # Kept by the caller alone, and asked about each time: a job can be removed at any moment.
        "cache-control": "private, no-cache",
        "content-disposition": f'inline; filename="{_filename(job, variant, artifact)}"',
        "x-content-type-options": "nosniff",
    }
    if _names_etag(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    size = artifact.size_bytes
    span = None
    if request.method == "GET" and request.headers.get("if-range", etag).strip() == etag:
        span = parse_range(request.headers.get("range"), size)
    if span is not None and span.start >= span.end:
        message = f"range {request.headers['range']!r:.100}: the file has {size} bytes; ask for some of them"
        return error_response(_UNSATISFIABLE, message, headers={"content-range": f"bytes */{size}"})
    if span is not None:
        headers["content-range"] = f"bytes {span.start}-{span.end - 1}/{size}"
    start, end = span or Span(0, size)
    headers["content-length"] = str(end - start)
    status = 200 if span is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=artifact.media_type)
    chunks = artifacts.stream(artifact.path, start, end)
    # A file that is gone must be known before the status is sent.
    head = await anext(chunks, b"")
    return StreamingResponse(_after(head, chunks), status, headers, media_type=artifact.media_type)


def _artifact(job: Job, variant: Variant) -> Artifact:
    if job.status != "completed":
        remedy = "make it again" if job.is_ended else "wait until it is completed"
        raise NotReady(f"video {job.id} is {job.status}: only a completed video has content; {remedy}")
    if variant not in job.artifacts:
        there = ", ".join(job.artifacts) or "none"
        raise ArtifactGone(f"variant {variant}: video {job.id} has {there}; ask for one of these")
    return job.artifacts[variant]


def _filename(job: Job, variant: Variant, artifact: Artifact) -> str:
    stem = job.id if variant == "video" else f"{job.id}_{variant}"
    return f"{stem}.{artifact.media_type.partition('/')[2]}"


def _names_etag(header: str | None, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in (header or "").split(",")]
    return "*" in tags or etag in tags


def _number(digits: str) -> int:
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) < 19 else sys.maxsize  # int() refuses thousands of digits


async def _after(head: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async with aclosing(chunks):  # type: ignore[type-var]
        yield head
        async for chunk in chunks:
            yield chunk
