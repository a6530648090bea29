"""From a request's body to the request, or to a 400 that says what is wrong with it and where.

Knows pydantic's errors and no field by name.
"""

from collections.abc import Sequence
from typing import TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.http.errors import ApiError, bad_request
from server.http.request_object import Refusal

_Request = TypeVar("_Request", bound=BaseModel)


def parse(body: bytes, kind: type[_Request]) -> _Request:
    """The request in a JSON body.

    Raises:
        ApiError: a 400 with the first thing that is wrong, and the field it is in.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _bad_request(error.errors(include_url=False)[0]) from None


def _bad_request(error: ErrorDetails) -> ApiError:
    context = error.get("ctx", {})
    path = _path((*error["loc"], *context.get("path", ())))
    match error["type"]:
        case "json_invalid":
            return bad_request(f"The body is not valid JSON: {context['error']}.", None, "invalid_json")
        case "model_type" if not path:
            return bad_request("The body must be a JSON object.", None)
        case "missing" | "missing_field":
            return bad_request(f"Missing required parameter: '{path}'.", path, "missing_required_parameter")
        case "extra_forbidden" | "unknown_field":
            return bad_request(f"Unknown parameter: '{path}'.", path, "unknown_parameter")
        case "unsupported":
            refusal = context["refusal"]
            message = f"'{path}' is not supported by this server: {refusal.reason}; {_remedy(refusal)}."
            return bad_request(message, path, "unsupported_parameter")
        case "invalid_field":
            return bad_request(f"Invalid '{path}': {context['reason']}.", path)
        case "value_error" if not path:
            return bad_request(f"Invalid request: {context['error']}.", None)
        case "value_error":
            return bad_request(f"Invalid '{path}': {context['error']}.", path)
        case _:
            requirement, quotation = error["msg"][0].lower() + error["msg"][1:], _quotation(error["input"])
            # A text may be a prompt, sent in the wrong place.
            private = quotation if isinstance(error["input"], str) else ""
            return bad_request(f"Invalid '{path}': {requirement}{quotation}.", path, quotation=private)


def _remedy(refusal: Refusal) -> str:
    if refusal.instead is not None:
        return refusal.instead
    allowed = " or ".join(msgspec.json.encode(value).decode() for value in refusal.allowed)
    return f"leave it out or send {allowed}" if allowed else "leave it out"


def _quotation(value: object) -> str:
    """The end of a sentence that says what was given, where that is short."""
    if isinstance(value, str | int | float) and len(given := repr(value)) <= 40:
        return f", not {given}"
    return ""


def _path(location: Sequence[str | int]) -> str:
    """A place in the body as OpenAI writes it: messages[0].content."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
