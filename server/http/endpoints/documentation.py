"""What /openapi.json and /docs say of each endpoint: its body, its answers and its errors.

Knows no endpoint.  Bodies are pydantic models and answers are msgspec structs, of which FastAPI knows neither here,
because the endpoints read and write bytes.
"""

import functools
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from persimmon.server.http.errors import ErrorBody

Schema = dict[str, Any]

_BODY = "#/components/schemas/request.{model}"
_ANSWER = "#/components/schemas/answer.{name}"
_ERRORS = {
    HTTPStatus.BAD_REQUEST: "The request is wrong; the error says what and where.",
    HTTPStatus.UNAUTHORIZED: "The server asks for an API key, and the request brings none that it knows.",
    HTTPStatus.FORBIDDEN: "The request comes from a web page whose origin is not allowed.",
    HTTPStatus.NOT_FOUND: "The request names a model that this server does not serve.",
    HTTPStatus.REQUEST_TIMEOUT: "The body did not come in time.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body is too long.",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "The body is not said to be JSON, or is packed with something else than gzip.",
    HTTPStatus.TOO_MANY_REQUESTS: "The server is full, or the key is at a limit; Retry-After says when to come again.",
    HTTPStatus.INTERNAL_SERVER_ERROR: "The generation failed, or the server has a fault.",
    HTTPStatus.SERVICE_UNAVAILABLE: "The model is still loading, the engine has ended, or the server is stopping.",
}


class Documentation:
    """Collects what endpoints read and write while they are added, and puts it into the app's OpenAPI document."""

    def __init__(self) -> None:
        self._bodies: list[type[BaseModel]] = []
        self._answers: list[type[msgspec.Struct]] = []

    def endpoint(
        self,
        answers: Mapping[int, type[msgspec.Struct]],
        body: type[BaseModel] | None = None,
        chunk: type[msgspec.Struct] | None = None,
    ) -> dict[str, Any]:
        """The arguments of a route's decorator that document it.

        Args:
            answers: what it answers as JSON, by status.
            body: the JSON it reads; an endpoint with a body answers with errors too, in OpenAI's shape.
            chunk: what each event of a stream holds; None for an endpoint that streams nothing.
        """
        if body is not None:
            answers = dict.fromkeys(_ERRORS, ErrorBody) | dict(answers)
        responses: dict[int, Schema] = {status: self._response(status, answers[status]) for status in sorted(answers)}
        if chunk is not None:
            responses[HTTPStatus.OK]["content"]["text/event-stream"] = {"itemSchema": self._event(chunk)}
        extra: Schema = {}
        if body is not None:
            self._bodies.append(body)
            schema = {"$ref": _BODY.format(model=body.__name__)}
            extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        return {"response_class": Response, "responses": responses, "openapi_extra": extra}

    def install(self, app: FastAPI) -> None:
        """Makes the app's document describe everything that endpoints were given."""
        describe = app.openapi

        @functools.cache
        def openapi() -> Schema:
            document = describe()
            for path in document["paths"].values():
                for operation in path.values():
                    # FastAPI's own validation, which no endpoint uses.
                    operation["responses"].pop("422", None)
            document["components"] = {"schemas": self._components()}
            return document

        app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's way to extend the document

    def _response(self, status: int, answer: type[msgspec.Struct]) -> Schema:
        description = _ERRORS.get(HTTPStatus(status)) if answer is ErrorBody else None
        return {
            "description": description or HTTPStatus(status).phrase,
            "content": {"application/json": {"schema": self._reference(answer)}},
        }

    def _event(self, chunk: type[msgspec.Struct]) -> Schema:
        """One event of a stream; an error may come as the last one, in place of [DONE]."""
        payload = {"anyOf": [self._reference(chunk), self._reference(ErrorBody)]}
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

    def _reference(self, answer: type[msgspec.Struct]) -> Schema:
        self._answers.append(answer)
        return {"$ref": _ANSWER.format(name=answer.__name__)}

    def _components(self) -> Schema:
        # Two namespaces: a message of a request is not a message of an answer.
        _, bodies = models_json_schema([(body, "validation") for body in self._bodies], ref_template=_BODY)
        _, answers = msgspec.json.schema_components(self._answers, ref_template=_ANSWER)
        return {f"request.{name}": schema for name, schema in bodies.get("$defs", {}).items()} | {
            f"answer.{name}": schema for name, schema in answers.items()
        }
