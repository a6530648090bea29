"""What /openapi.json and /docs say of each endpoint: its body, its answers and its errors.

All of it follows from declared types: the request's in the table of endpoints, the answers' in the return type of the
handler.  Bodies are pydantic models and answers are msgspec structs; FastAPI sees neither, because endpoints read and
write bytes.
"""

import functools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
from fastapi import FastAPI, Response
from pydantic.json_schema import models_json_schema

from persimmon.server.http.endpoints.endpoint import Endpoint, Handler
from persimmon.server.http.errors import ErrorBody
from persimmon.server.http.transport.json_response import JsonResponse
from persimmon.server.http.transport.sse import EventStream

Schema = dict[str, Any]

_PARAMETER = re.compile(r"{(\w+)")
_BODY = "#/components/schemas/request.{model}"
_ANSWER = "#/components/schemas/answer.{name}"
_ERRORS = {
    HTTPStatus.BAD_REQUEST: "The request is invalid; the error names the field and the reason.",
    HTTPStatus.UNAUTHORIZED: "The server requires an API key, and the request has no valid one.",
    HTTPStatus.FORBIDDEN: "The request comes from a web page whose origin is not allowed.",
    HTTPStatus.NOT_FOUND: "The request names a model that this server does not serve.",
    HTTPStatus.REQUEST_TIMEOUT: "The body arrived too slowly.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body is too long.",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "The Content-Type is not JSON, or the Content-Encoding is not gzip.",
    HTTPStatus.TOO_MANY_REQUESTS: "The server is full, or the key has reached a limit; retry after the time in "
    "Retry-After.",
    HTTPStatus.INTERNAL_SERVER_ERROR: "The generation failed, or the server has a bug.",
    HTTPStatus.SERVICE_UNAVAILABLE: "The model is still loading, the engine has ended, or the server is stopping.",
}


def route_arguments(endpoint: Endpoint[Any]) -> dict[str, Any]:
    """The arguments with which FastAPI's route of an endpoint is documented."""
    declared = _Declared.of(endpoint.handler)
    responses: dict[int, Schema] = {}
    for status in sorted({*endpoint.statuses, *_errors(endpoint)}):
        answer = declared.answer if status in endpoint.statuses else ErrorBody
        if answer is not None:
            responses[status] = _response(status, answer)
    if declared.chunk is not None:
        responses[HTTPStatus.OK]["content"]["text/event-stream"] = {"itemSchema": _event(declared.chunk)}
    extra: Schema = {}
    if endpoint.request is not None:
        schema = {"$ref": _BODY.format(model=endpoint.request.__name__)}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if parameters := _PARAMETER.findall(endpoint.path):
        extra["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "title": name.capitalize()}}
            for name in parameters
        ]
    return {
        "name": endpoint.name,
        "description": endpoint.description,
        "status_code": endpoint.statuses[0],
        "response_class": declared.response_class,
        "responses": responses,
        "openapi_extra": extra,
    }


def install(app: FastAPI, endpoints: Sequence[Endpoint[Any]]) -> None:
    """Makes the app's document hold the schemas that the endpoints' routes refer to."""
    describe = app.openapi

    @functools.cache
    def openapi() -> Schema:
        document = describe()
        document["components"] = {"schemas": _components(endpoints)}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's way to extend the document


@dataclass(frozen=True, slots=True)
class _Declared:
    """What a handler declares that it returns.

    Attributes:
        answer: its JSON; None where it returns something else.
        chunk: what each event of a stream holds; None where it streams nothing.
        response_class: of what is neither.
    """

    answer: type[msgspec.Struct] | None = None
    chunk: type[msgspec.Struct] | None = None
    response_class: type[Response] = Response

    @classmethod
    def of(cls, handler: Handler[Any]) -> "_Declared":
        """Reads a handler's return type."""
        returned = get_type_hints(handler)["return"]
        found = cls()
        for each in get_args(returned) if get_origin(returned) in (Union, UnionType) else (returned,):
            kind = get_origin(each)
            if kind is JsonResponse:
                found = replace(found, answer=get_args(each)[0])
            elif kind is EventStream:
                found = replace(found, chunk=get_args(each)[0])
            else:
                found = replace(found, response_class=each)
        return found


def _errors(endpoint: Endpoint[Any]) -> Collection[int]:
    if endpoint.request is not None:
        return _ERRORS
    errors = []
    if not endpoint.open_without_key:
        errors.append(HTTPStatus.UNAUTHORIZED)
    if "{" in endpoint.path:
        errors.append(HTTPStatus.NOT_FOUND)
    return errors


def _response(status: int, answer: type[msgspec.Struct]) -> Schema:
    description = _ERRORS.get(HTTPStatus(status)) if answer is ErrorBody else None
    return {
        "description": description or HTTPStatus(status).phrase,
        "content": {"application/json": {"schema": _reference(answer)}},
    }


def _event(chunk: type[msgspec.Struct]) -> Schema:
    """One event of a stream; an error may come as the last one, in place of [DONE]."""
    payload = {"anyOf": [_reference(chunk), _reference(ErrorBody)]}
    return {
        "type": "object",
        "properties": {
            "data": {
                "anyOf": [
                    {"const": "[DONE]"},
                    {"type": "string", "contentMediaType": "application/json", "contentSchema": payload},
                ]
            }
        },
        "required": ["data"],
    }


def _reference(answer: type[msgspec.Struct]) -> Schema:
    return {"$ref": _ANSWER.format(name=answer.__name__)}


def _components(endpoints: Sequence[Endpoint[Any]]) -> Schema:
    # Two namespaces: a message of a request is not a message of an answer.
    requests = dict.fromkeys(endpoint.request for endpoint in endpoints if endpoint.request is not None)
    declared = [_Declared.of(endpoint.handler) for endpoint in endpoints]
    structs = [struct for each in declared for struct in (each.answer, each.chunk) if struct is not None]
    _, bodies = models_json_schema([(request, "validation") for request in requests], ref_template=_BODY)
    _, answers = msgspec.json.schema_components([*structs, ErrorBody], ref_template=_ANSWER)
    return {f"request.{name}": schema for name, schema in bodies.get("$defs", {}).items()} | {
        f"answer.{name}": schema for name, schema in answers.items()
    }
