"""Reading the body of a request: at most so many bytes, JSON or multipart, into plain values by name."""

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from serve_app.errors import UnknownBody, UploadTooLarge
from t2v_core.errors import InvalidRequest

_MAX_PARTS = 256
_WITHIN_S = 120.0
_MEMBER = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")  # metadata[k], as the openai client spells nested values


@dataclass(frozen=True, slots=True)
class Upload:
    """A file in a multipart body."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Body:
    """The values by name, unchecked. Where they are text only, as in multipart, numbers come as text."""

    values: dict[str, Any]  # Any: what the caller sent
    is_text_only: bool


async def read_body(
    request: Request, max_bytes: int, *, multipart: bool = True, max_upload_bytes: int | None = None
) -> Body:
    """The body of a request as JSON or, where allowed, multipart, which may have `max_upload_bytes` instead.

    Raises UnknownBody for another type, UploadTooLarge, and InvalidRequest for one that is damaged, cut short or slow.
    """
    media_type, options = parse_options_header(request.headers.get("content-type"))
    if media_type == b"application/json":
        return Body(_parse_json(await _read(request, max_bytes)), is_text_only=False)
    if media_type == b"multipart/form-data" and multipart:
        data = await _read(request, max_upload_bytes or max_bytes)
        # In a thread: of a large body that is made to be slow to parse, it takes seconds.
        return Body(await asyncio.to_thread(_parse_multipart, data, options.get(b"boundary")), is_text_only=True)
    allowed = "application/json or multipart/form-data" if multipart else "application/json"
    sent = request.headers.get("content-type")
    raise UnknownBody(f"content-type {sent!r:.100}: send {allowed}" if sent else f"no content-type: send {allowed}")


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = UploadTooLarge(f"the body has more than {max_bytes} bytes, the most allowed: send less")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large  # before any of it is taken in
    data = bytearray()
    try:
        async with asyncio.timeout(_WITHIN_S):
            async for chunk in request.stream():
                if len(data) + len(chunk) > max_bytes:
                    raise too_large
                data += chunk
    except TimeoutError as error:
        raise InvalidRequest(f"the body has not come within {_WITHIN_S:.0f} s: send less, or faster") from error
    return bytes(data)


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        # Unlike json, it refuses NaN, lone surrogates and deep nesting.
        values = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise InvalidRequest(f"the body is a JSON {type(values).__name__}: send an object with a prompt")
    return values


@dataclass(slots=True)
class _Part:
    header_name: bytes = b""
    header_value: bytes = b""
    disposition: bytes = b""
    data: bytearray = field(default_factory=bytearray)


def _parse_multipart(data: bytes, boundary: bytes | None) -> dict[str, Any]:
    if not boundary:
        raise InvalidRequest("the content-type names no boundary: send multipart/form-data; boundary=...")
    parts: list[_Part] = []
    is_complete = False

    def begin() -> None:
        if len(parts) == _MAX_PARTS:
            raise InvalidRequest(f"the body has more than {_MAX_PARTS} parts: send fewer")
        parts.append(_Part())

    def header_name(chunk: bytes, start: int, end: int) -> None:
        parts[-1].header_name += chunk[start:end]

    def header_value(chunk: bytes, start: int, end: int) -> None:
        parts[-1].header_value += chunk[start:end]

    def header_end() -> None:
        part = parts[-1]
        if part.header_name.lower() == b"content-disposition":
            part.disposition = part.header_value
        part.header_name = part.header_value = b""

    def part_data(chunk: bytes, start: int, end: int) -> None:
        parts[-1].data += chunk[start:end]

    def end() -> None:
        nonlocal is_complete
        is_complete = True

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_header_field": header_name,
                "on_header_value": header_value,
                "on_header_end": header_end,
                "on_part_data": part_data,
                "on_end": end,
            },
        )
        parser.write(data)
    except FormParserError as error:
        raise InvalidRequest(f"the body is not valid multipart/form-data: {error}") from error
    if not is_complete:  # the parser itself accepts a body that is cut short
        raise InvalidRequest("the multipart body ends before its last boundary: send all of it")
    return _by_name(parts)


def _by_name(parts: list[_Part]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in parts:
        _, options = parse_options_header(part.disposition)
        if b"name" not in options:
            raise InvalidRequest("a part of the multipart body has no name: give each one")
        name = _text("a part's name", options[b"name"])
        value = Upload(bytes(part.data)) if b"filename" in options else _text(name, part.data)
        target, key = values, name
        if member := _MEMBER.fullmatch(name):
            name, key = member.groups()
            target = values.setdefault(name, {})
            if not isinstance(target, dict):
                raise InvalidRequest(f"{name} is given both whole and in parts: give one", param=name)
        if key in target:
            raise InvalidRequest(f"{name} is given twice: give it once", param=name)
        target[key] = value
    return values


def _text(name: str, data: bytes | bytearray) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name} is not UTF-8 text: {error}", param=name) from error
