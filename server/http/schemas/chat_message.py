"""A message of a conversation as requests have it: its role, its text, and the tool calls that belong to it.

Knows what a well-formed message is; nothing of how a conversation reads.
"""

from typing import Annotated, Any, Self

from pydantic import ConfigDict, FailFast, Field, PlainValidator, WithJsonSchema, model_validator

from persimmon.server.http.schemas.other_fields import (
    REFUSED_IN_MESSAGES,
    REFUSED_PARTS,
    WITHOUT_EFFECT_IN_MESSAGES,
    WITHOUT_EFFECT_IN_PARTS,
)
from persimmon.server.http.schemas.request_object import RequestObject, invalid, missing, unknown, unsupported
from persimmon.server.http.schemas.tool_fields import MessageToolCall

MAX_MESSAGES = 16384
"""Each takes several tokens, so that a longer conversation does not fit into a context of 64k tokens."""

MAX_CALLS_OF_A_MESSAGE = 1024

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""The types of parts that hold text, and the field that it is in."""

_CONTENT_FORMS = 'it must be a string or a list of parts like {"type": "text", "text": "..."}'


def _message_text(value: object) -> str:
    """The text of a message's content; of several parts, a line for each."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        return "\n".join(_part_text(number, part) for number, part in enumerate(value))
    raise ValueError(_CONTENT_FORMS)


def _part_text(number: int, part: object) -> str:
    if not isinstance(part, dict):
        raise ValueError(_CONTENT_FORMS)
    kind = part.get("type")
    if not isinstance(kind, str):
        raise missing((number, "type")) if kind is None else invalid((number, "type"), "it must be a string")
    if kind in REFUSED_PARTS:
        raise unsupported((number, "type"), REFUSED_PARTS[kind])
    if kind not in _TEXT_PARTS:
        raise invalid((number, "type"), f"{kind[:40]!r} is not a supported content type; send 'text'")
    field = _TEXT_PARTS[kind]
    for name, given in part.items():
        if given is not None and name not in ("type", field) and name not in WITHOUT_EFFECT_IN_PARTS:
            raise unknown((number, name))
    text = part.get(field)
    if not isinstance(text, str):
        raise missing((number, field)) if text is None else invalid((number, field), "it must be a string")
    return text


_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "properties": {
                    "type": {"enum": ["text", "input_text", "output_text"]},
                    "text": {"type": "string"},
                    **{
                        name: {"description": f"Accepted without effect: {reason}."}
                        for name, reason in WITHOUT_EFFECT_IN_PARTS.items()
                    },
                },
                "additionalProperties": {"type": "null"},
            },
        },
    ]
}


# The rules of ChatMessage that hold between fields.
_MESSAGE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "properties": {
                "role": {"enum": ["system", "developer", "user"]},
                "tool_calls": {"maxItems": 0},
                "tool_call_id": {"type": "null"},
                "refusal": {"type": "null"},
            },
            "required": ["content"],
        },
        {"properties": {"role": {"const": "assistant"}, "tool_call_id": {"type": "null"}}},
        {
            "properties": {
                "role": {"const": "tool"},
                "tool_calls": {"maxItems": 0},
                "tool_call_id": {"type": "string"},
                "refusal": {"type": "null"},
            },
            "required": ["content", "tool_call_id"],
        },
    ]
}


class ChatMessage(RequestObject):
    """One message of a conversation.

    An assistant's may be as any server has answered: its content may be null, its refusal not.
    """

    model_config = ConfigDict(json_schema_extra=_MESSAGE_SCHEMA)
    refused = REFUSED_IN_MESSAGES
    without_effect = WITHOUT_EFFECT_IN_MESSAGES

    role: str = Field(description='"system" (or "developer"), "user", "assistant" or "tool".')
    content: Annotated[str | None, PlainValidator(_message_text), WithJsonSchema(_CONTENT_SCHEMA)] = Field(
        None, description="A string, or text parts, which are joined with newlines."
    )
    refusal: str | None = Field(None, description="Assistant only: the refusal that stands in place of an answer.")
    name: str | None = Field(None, description="Name of the speaker or the function; the chat format does not use it.")
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_CALLS_OF_A_MESSAGE), FailFast()] = Field(
        default=[], description="Assistant only: the calls of its answer."
    )
    tool_call_id: str | None = Field(None, description="Tool only: the id of the call whose result this is.")

    @model_validator(mode="after")
    def _what_its_role_needs(self) -> Self:
        for field in ("tool_calls", "refusal"):
            if getattr(self, field) and self.role != "assistant":
                raise invalid(field, f"only assistant messages may have it; this message's role is {self.role[:40]!r}")
        if self.tool_call_id is not None and self.role != "tool":
            raise invalid("tool_call_id", f"only tool messages may have it; this message's role is {self.role[:40]!r}")
        if self.role == "tool" and self.tool_call_id is None:
            raise missing("tool_call_id")
        if self.content is None and self.role != "assistant":
            raise missing("content")
        return self

    @property
    def text(self) -> str:
        """What the message says: its content, or an assistant's refusal, or nothing."""
        return self.content or self.refusal or ""


Messages = Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES), FailFast()]
"""A conversation."""
