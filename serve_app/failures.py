"""Errors as HTTP answers: OpenAI's envelope for whatever goes wrong, with nothing of our insides in it."""

import logging
from collections.abc import Mapping, Sequence
from typing import cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import HTTPAnswer, JobNotFound, QueueFull, Unauthorized, http_answer
from serve_app.requests import invalid_request
from serve_app.schemas import ErrorDetail, ErrorEnvelope
from t2v_core.errors import InvalidRequest, T2VError

logger = logging.getLogger(__name__)

_INTERNAL = HTTPAnswer(500, "server_error", "internal_error")
_INTERNAL_MESSAGE = "the service failed; its log says why: try again"
_NOT_AN_ERROR_OF_OURS: Mapping[int, HTTPAnswer] = {
    404: HTTPAnswer(404, "invalid_request_error", "unknown_url"),
    405: HTTPAnswer(405, "invalid_request_error", "method_not_allowed"),
}


def answer_errors(app: FastAPI) -> None:
    """Make the app answer every error with the envelope."""
    app.add_exception_handler(T2VError, _answer)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_starlette)
    app.add_exception_handler(ClientDisconnect, _answer_disconnect)
    app.add_middleware(_AnswerUnexpected)


def error_response(
    answer: HTTPAnswer, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The envelope. Of a final error, OpenAI's clients are told not to try again."""
    detail = ErrorDetail(message=message, type=answer.type, param=param, code=answer.code)
    retry = {"x-should-retry": "false"} if answer.is_final else {}
    return JSONResponse(ErrorEnvelope(error=detail).model_dump(), answer.status, {**retry, **(headers or {})})


async def _answer(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, T2VError)
    answer = http_answer(error)
    if answer is None:
        _log(request.scope, error)
        return error_response(_INTERNAL, _INTERNAL_MESSAGE)
    if answer.status >= 500:
        logger.warning("request refused path=%s error=%s", request.url.path, error)
    headers = {}
    if isinstance(error, QueueFull):
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    param = error.param if isinstance(error, InvalidRequest | JobNotFound) else None
    return error_response(answer, str(error), param, headers)


async def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    """Of the query and the headers: bodies are read by `requests.parse`."""
    assert isinstance(error, RequestValidationError)
    details = cast(Sequence[ErrorDetails], error.errors())
    for detail in details:
        detail["loc"] = detail["loc"][1:]  # the first says "query" or "header"
    return await _answer(request, invalid_request(details))


async def _answer_starlette(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    usual = HTTPAnswer(error.status_code, "invalid_request_error", "invalid_request")
    answer = _NOT_AN_ERROR_OF_OURS.get(error.status_code, usual)
    message = f"{request.method} {request.url.path:.200}: {error.detail}; see /openapi.json for what there is"
    return error_response(answer, message, headers=error.headers)


async def _answer_disconnect(request: Request, error: Exception) -> JSONResponse:
    """Nobody reads it."""
    return error_response(HTTPAnswer(400, "invalid_request_error", "disconnected"), "the body was cut short")


class _AnswerUnexpected:
    """Answers what nobody foresaw. Starlette's own handler for it raises the error once more behind its answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_answered = False

        async def noting_send(message: Message) -> None:
            nonlocal is_answered
            is_answered = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Exception as error:
            # Where an answer has begun, only a cut connection tells the client that it is not whole.
            if scope["type"] != "http" or is_answered:
                raise
            _log(scope, error)
            await error_response(_INTERNAL, _INTERNAL_MESSAGE)(scope, receive, send)


def _log(scope: Scope, error: Exception) -> None:
    logger.error("request failed method=%s path=%s", scope["method"], scope["path"], exc_info=error)
