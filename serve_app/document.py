"""What /openapi.json says beyond the types of the routes: bodies that are read by hand, errors, files, streams."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serve_app.schemas import ErrorEnvelope

# Any: parts of a JSON document, as FastAPI takes them.
Responses = dict[int | str, dict[str, Any]]

_MEANINGS = {
    400: "A value is not allowed, or the body is damaged",
    401: "No API key, or one that is not known",
    403: "A page of another site asks, and the service has no keys",
    404: "No such video of this key, or no such file",
    409: "Not in the state for this",
    413: "The body is too large",
    415: "The body is of another type",
    416: "The file has none of these bytes",
    422: "The idempotency key came with another body before",
    429: "Too many jobs, callers, uploads or streams are there; Retry-After says when to try again",
    500: "The service failed",
    503: "The service is starting, or a part of it cannot be reached",
}
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    416: {"Content-Range": "The size of the file, as `bytes */1234`"},
    429: {"Retry-After": "Seconds"},
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_VIDEO_TYPES = ("video/mp4", "video/webm", "image/gif")
_PICTURE_TYPES = ("image/webp",)


def errors(*statuses: int) -> Responses:
    """The envelope for these statuses and for those that any route may answer with."""
    return {
        status: {
            "model": ErrorEnvelope,
            "description": _MEANINGS[status],
            **_headers(**_HEADERS.get(status, {})),
        }
        for status in sorted({*statuses, 401, 500, 503})
    }


def polled() -> Responses:
    """A job, and how long to wait before looking again."""
    return {200: {"description": "The job", **_headers(**{"openai-poll-after-ms": "Milliseconds"})}}


def made_now() -> Responses:
    """A video in the answer itself."""
    names = ("x-t2v-seed", "x-t2v-model", "x-t2v-size", "x-t2v-num-frames", "x-t2v-fps")
    what = dict.fromkeys(names, "What the video was made with")
    headers = _headers(**what | {"x-t2v-model": "Its id in /v1/models, percent-encoded"})
    return {200: {"description": "The video", "content": dict.fromkeys(_VIDEO_TYPES, _BINARY), **headers}}


def files(*, with_body: bool) -> Responses:
    """A stored file, a range of it, or that the caller has it."""
    whole = {"ETag": "Changes with the file", "Accept-Ranges": "bytes", "Content-Disposition": "A name for the file"}
    content = {"content": dict.fromkeys(_VIDEO_TYPES + _PICTURE_TYPES, _BINARY)} if with_body else {}
    responses: Responses = {
        200: {"description": "The file", **content, **_headers(**whole)},
        304: {"description": "The file is the one that If-None-Match names"},
    }
    if with_body:
        headers = _headers(**whole, **{"Content-Range": "As `bytes 0-99/1234`"})
        responses[206] = {"description": "The bytes that Range asks for", **content, **headers}
    return responses


def event_stream() -> Responses:
    """Server-Sent Events."""
    return {
        200: {"description": "Events", "content": {"text/event-stream": {"schema": {"type": "string"}}}},
        204: {"description": "The last event was received already: there will be no more"},
    }


def body(schema: type[BaseModel], *, multipart: bool = True, file: str | None = None) -> dict[str, Any]:
    """The request body of a route that reads it by hand. In multipart, the field `file` is one."""
    content: dict[str, Any] = {"application/json": {"schema": _reference(schema)}}
    if multipart:
        encoding = {"metadata": {"style": "deepObject", "explode": True}} if "metadata" in schema.model_fields else {}
        form: dict[str, Any] = _reference(schema)
        if file is not None:
            form = {"allOf": [form, {"type": "object", "properties": {file: {"format": "binary"}}}]}
        content["multipart/form-data"] = {"schema": form, **({"encoding": encoding} if encoding else {})}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI, *bodies: type[BaseModel]) -> None:
    """Make the app's document exact: with the bodies' types, and without FastAPI's own form of a bad request."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            schemas = document["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for schema in bodies:
                definition = schema.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(definition.pop("$defs", {}))
                schemas[schema.__name__] = definition
            for operations in document["paths"].values():
                for operation in operations.values():
                    unprocessable = operation["responses"].get("422", {})
                    if "HTTPValidationError" in str(unprocessable):
                        del operation["responses"]["422"]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def _reference(schema: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{schema.__name__}"}


def _headers(**descriptions: str) -> dict[str, Any]:
    if not descriptions:
        return {}
    return {
        "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in descriptions.items()}
    }
