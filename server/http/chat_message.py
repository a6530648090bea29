"""A message of a conversation as requests have it: whose, what, and the calls of tools that belong to it.

Knows what a well-formed message is; nothing of how a conversation reads.
"""

from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from server.http.request_object import Neutral, RequestObject, invalid, missing
from server.http.tool_fields import MessageToolCall

_NEUTRAL: Neutral = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
}


def _message_text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        parts = [
            part["text"]
            for part in value
            if isinstance(part, dict)
            and part.keys() == {"type", "text"}
            and part["type"] == "text"
            and isinstance(part["text"], str)
        ]
        if len(parts) == len(value):
            return "\n".join(parts)
    raise ValueError('it must be a string or a list of parts like {"type": "text", "text": "..."}; only text is read')


_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "additionalProperties": False,
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
            },
            "required": ["content"],
        },
        {
            "properties": {"role": {"const": "assistant"}, "tool_call_id": {"type": "null"}},
            "anyOf": [
                {"required": ["content"]},
                {"required": ["tool_calls"], "properties": {"tool_calls": {"minItems": 1}}},
            ],
        },
        {
            "properties": {
                "role": {"const": "tool"},
                "tool_calls": {"maxItems": 0},
                "tool_call_id": {"type": "string"},
            },
            "required": ["content", "tool_call_id"],
        },
    ]
}


class ChatMessage(RequestObject):
    """One message of a conversation."""

    model_config = ConfigDict(json_schema_extra=_MESSAGE_SCHEMA)
    neutral = _NEUTRAL

    role: str = Field(description='"system" (or "developer"), "user", "assistant" or "tool".')
    content: Annotated[str | None, PlainValidator(_message_text), WithJsonSchema(_CONTENT_SCHEMA)] = Field(
        None, description="A text, or text parts, which become one text with a line for each."
    )
    tool_calls: list[MessageToolCall] = Field(default=[], description="Of an assistant: the calls of its answer.")
    tool_call_id: str | None = Field(None, description="Of a tool: the call whose result this is.")
    parsed: Any = Field(None, description="What OpenAI's client makes of an answer's content; not read.")

    @model_validator(mode="after")
    def _what_its_role_needs(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise invalid(
                "tool_calls", f"only an assistant's message may have calls, and this role is {self.role[:40]!r}"
            )
        if self.tool_call_id is not None and self.role != "tool":
            raise invalid("tool_call_id", f"only a tool's message may have one, and this role is {self.role[:40]!r}")
        if self.role == "tool" and self.tool_call_id is None:
            raise missing("tool_call_id")
        if self.content is None and not self.tool_calls:
            raise missing("content")
        return self
