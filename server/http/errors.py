"""Every error a client can get, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

Knows which exception is which status.  A traceback goes to the log, never to the client.
"""

import difflib
from collections.abc import Collection, Mapping
from http import HTTPStatus

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from persimmon.server.engine.client import EngineDeadError, EngineNotReadyError
from persimmon.server.http.request_record import attached_record

CLIENT_CLOSED_REQUEST = 499
"""The status of a request whose client left before the answer, for metrics and logs."""

_RETRY_AFTER_LOADING = 5
_RETRY_AFTER_DEATH = 5
# The queue is longer than its timeout, and this is the longest Retry-After.
_RETRY_AFTER_EXPIRY = 30
# A load balancer that retries takes another server, and a single server takes some seconds to restart.
_RETRY_AFTER_SHUTDOWN = 5
# What a client sent may be megabytes, and an error that quotes all of it helps no one.
_MAX_ERROR_CHARACTERS = 1000


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong, under OpenAI's names.

    Attributes:
        message: a sentence for a person.
        type: "invalid_request_error" where the request is at fault, else "server_error".
        param: the field of the request that is at fault, like "messages[0].content".
        code: a word for programs.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The JSON body of an error, and the SSE frame of one that comes after a stream's first byte."""

    error: ErrorDetail


class ApiError(Exception):
    """An error with the status and the body that the client gets.

    Args:
        status: HTTP's.
        message, type, param, code: as `ErrorDetail` has them.
        retry_after: seconds, for the header Retry-After; None sends none.
        headers: further headers of the answer.
        quotation: the part of the message that quotes the request's content; the access log leaves it out unless
            prompts are logged.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
        quotation: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.headers = headers or {}
        self.body = ErrorBody(
            ErrorDetail(message=_shortened(message), type=type, param=param and _shortened(param), code=code)
        )
        self._without_quotation = message.replace(quotation, "") if quotation else message

    def response(self) -> Response:
        """The error as a whole answer."""
        retry = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return _ErrorResponse(self, {**retry, **self.headers})

    def note(self, scope: Scope) -> None:
        """Leaves the reason in the record of a request, for the access log; does nothing where there is no record."""
        record = attached_record(scope)
        if record is not None:
            message = str(self) if record.prompts is not None else self._without_quotation
            record.error, record.error_param = message, self.body.error.param


class _ErrorResponse(Response):
    """An error as a whole answer, which leaves its reason in the request's record."""

    def __init__(self, error: ApiError, headers: Mapping[str, str]) -> None:
        super().__init__(msgspec.json.encode(error.body), error.status, headers, "application/json")
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._error.note(scope)
        await super().__call__(scope, receive, send)


class FetchError(ValueError):
    """A URL that is not fetched, or that gives nothing.  The message goes on after "Invalid 'field': "."""


EXPECTED = (ApiError, EngineNotReadyError, EngineDeadError)
"""Exceptions that happen to a healthy server; every other one is a bug and is logged with its traceback."""


def bad_request(message: str, param: str | None, code: str | None = None, *, quotation: str = "") -> ApiError:
    """A 400 that names the field at fault; `quotation` is as in `ApiError`."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code, quotation=quotation)


def model_not_found(name: str, served: str) -> ApiError:
    """A 404 for a model that is not the one served."""
    return ApiError(
        HTTPStatus.NOT_FOUND,
        f"The model {name!r} does not exist; this server serves {served!r}.",
        param="model",
        code="model_not_found",
    )


def context_length_exceeded(
    prompt_tokens: int, max_tokens: int, limit: int, param: str, image_tokens: int = 0
) -> ApiError:
    """A 400 for a prompt and an answer that together are longer than the model reads."""
    images = f", of which {image_tokens} are of images" if image_tokens else ""
    return bad_request(
        f"This model's maximum context length is {limit} tokens. However, you requested "
        f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the prompt{images}, {max_tokens} for the completion)."
        " Please shorten the prompt or ask for fewer tokens.",
        param,
        "context_length_exceeded",
    )


def given_up(finish_reason: str | None, reason: str | None) -> ApiError:
    """The error for one sequence that the engine has ended without an answer.

    Args:
        finish_reason: "error", or "expired" for one that has waited too long.
        reason: a sentence.
    """
    if finish_reason != "expired":
        return generation_failed(reason)
    return _server_error(
        HTTPStatus.TOO_MANY_REQUESTS,
        reason or "The request waited in the queue for too long.",
        "queue_timeout",
        _RETRY_AFTER_EXPIRY,
    )


def generation_failed(reason: str | None) -> ApiError:
    """A 500 for one sequence that the engine gave up."""
    return _server_error(HTTPStatus.INTERNAL_SERVER_ERROR, reason or "The generation failed.", "generation_failed")


def overloaded(reason: str, retry_after: int) -> ApiError:
    """A 429 for work that the server has no room for now."""
    return _server_error(
        HTTPStatus.TOO_MANY_REQUESTS,
        f"{reason}. Please try again in {retry_after} s.",
        "overloaded",
        retry_after,
    )


def shutting_down() -> ApiError:
    """A 503 for work that comes when the server stops."""
    return _server_error(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "The server is shutting down and does not accept new requests.",
        "shutting_down",
        _RETRY_AFTER_SHUTDOWN,
    )


def as_api_error(error: Exception) -> ApiError:
    """The client's error for an exception; an unexpected one becomes a bare 500."""
    match error:
        case ApiError():
            return error
        case EngineNotReadyError():
            return _server_error(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "The model is still loading. Please try again shortly.",
                "engine_not_ready",
                _RETRY_AFTER_LOADING,
            )
        case EngineDeadError():
            return _server_error(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"The server cannot answer: {error}.",
                "engine_dead",
                _RETRY_AFTER_DEATH,
            )
        case _:
            return _server_error(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "Internal server error; see the server's log for details.",
                "internal_error",
            )


def _shortened(text: str) -> str:
    """A text without its middle, where it is too long for an error."""
    half = _MAX_ERROR_CHARACTERS // 2
    return text if len(text) <= _MAX_ERROR_CHARACTERS else f"{text[:half]}…{text[-half:]}"


def _server_error(status: int, message: str, code: str, retry_after: int | None = None) -> ApiError:
    return ApiError(status, message, type="server_error", code=code, retry_after=retry_after)


def install(app: FastAPI, paths: Collection[str] = ()) -> None:
    """Makes the app answer every exception that is expected in OpenAI's shape; the others are `Observer`'s.

    Args:
        app: the application.
        paths: of its endpoints, one of which a wrong address may be meant for.
    """

    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    for known in EXPECTED:
        app.add_exception_handler(known, answer)

    @app.exception_handler(HTTPException)
    async def wrong_address(request: Request, error: HTTPException) -> Response:
        method, path = request.method, request.url.path
        if error.status_code == HTTPStatus.NOT_FOUND:
            near = _nearest(path, paths)
            remedy = f"Did you mean {near}?" if near else "GET /docs lists all URLs."
            message, code = f"Unknown URL: {method} {path}. {remedy}", "unknown_url"
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "").replace("GET", "GET, HEAD")
            error.headers = {"Allow": allowed}
            methods = allowed.replace(", ", " or ")
            message, code = f"{method} is not allowed on {path}; use {methods}.", "method_not_allowed"
        else:
            message, code = str(error.detail), None
        response = ApiError(error.status_code, message, code=code).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientDisconnect)
    async def client_left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


def _nearest(path: str, paths: Collection[str]) -> str | None:
    """The endpoint whose address is most like this one, if any is like it."""
    return next(iter(difflib.get_close_matches(path[:100], paths, 1, 0.75)), None)
