"""The fields about tools, under OpenAI's names: which functions there are, which must be called, which were.

Knows what is well-formed; nothing about how functions are described to the model.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, field_validator

from persimmon.model.tool_calls import Function
from persimmon.server.http.schemas.other_fields import (
    REFUSED_IN_TOOLS,
    WITHOUT_EFFECT_IN_CALLS,
    WITHOUT_EFFECT_IN_TOOLS,
)
from persimmon.server.http.schemas.request_object import NAME_PATTERN, RequestObject

MAX_TOOLS = 128
"""As many as OpenAI allows."""


class FunctionDefinition(RequestObject):
    """A function that the model may call."""

    refused = REFUSED_IN_TOOLS
    without_effect = WITHOUT_EFFECT_IN_TOOLS

    name: str = Field(pattern=NAME_PATTERN)
    description: str | None = Field(None, description="What the function does; the model reads this.")
    parameters: dict[str, Any] | None = Field(
        None,
        description="A JSON Schema of the arguments, which are an object. Without it the function has no arguments.",
    )
    strict: bool = Field(
        False,
        description="Whether calls the model chooses to make must match the parameters too, as forced calls always do.",
    )

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and "type" in value and "object" not in (value["type"], *_items(value["type"])):
            raise ValueError('its type must be "object", since arguments have names')
        return value

    @property
    def function(self) -> Function:
        """The same for the model."""
        return Function(self.name, self.description, self.parameters)


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


class Tool(RequestObject):
    """A tool that the model may use: a function."""

    refused = REFUSED_IN_TOOLS
    without_effect = WITHOUT_EFFECT_IN_TOOLS

    type: Literal["function"]
    function: FunctionDefinition


@dataclass(frozen=True)
class NamedTool:
    """The choice of one function."""

    name: str


@dataclass(frozen=True)
class AllowedTools:
    """The choice among some of the functions.

    Attributes:
        names: of the functions, one at least.
        required: whether one of them must be called.
    """

    names: tuple[str, ...]
    required: bool


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


def _tool_choice(value: object) -> ToolChoice:
    match _without_nulls(value):
        case "none" | "auto" | "required" as word:
            return word
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [_, *_] as tools, **others},
            **rest,
        } if not others and not rest and len(tools) <= MAX_TOOLS:
            names = [_function_name(tool) for tool in tools]
            if None not in names:
                return AllowedTools(tuple(name for name in names if name is not None), mode == "required")
        case chosen if (name := _function_name(chosen)) is not None:
            return NamedTool(name)
    raise ValueError(
        'it must be "none", "auto", "required", the choice of a function like '
        '{"type": "function", "function": {"name": "..."}}, or of several like {"type": "allowed_tools", '
        '"allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "..."}}]}}'
    )


def _function_name(value: object) -> str | None:
    """The function that a choice names."""
    match _without_nulls(value):
        case {"type": "function", "function": {"name": str(name), **others}, **rest} if not others and not rest:
            return name
    return None


def _without_nulls(value: object) -> object:
    """The same without the keys of objects that are null, which mean what absent ones do."""
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}


_NAMED_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
            "additionalProperties": {"type": "null"},
        },
    },
    "required": ["type", "function"],
    "additionalProperties": {"type": "null"},
}
_ALLOWED_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "allowed_tools"},
        "allowed_tools": {
            "type": "object",
            "properties": {
                "mode": {"enum": ["auto", "required"]},
                "tools": {"type": "array", "items": _NAMED_SCHEMA, "minItems": 1, "maxItems": MAX_TOOLS},
            },
            "required": ["mode", "tools"],
            "additionalProperties": {"type": "null"},
        },
    },
    "required": ["type", "allowed_tools"],
    "additionalProperties": {"type": "null"},
}

ToolChoiceField = Annotated[
    ToolChoice,
    PlainValidator(_tool_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED_SCHEMA, _ALLOWED_SCHEMA]}),
]


class CalledFunction(RequestObject):
    """Which function was called, and with what."""

    name: str = Field(pattern=NAME_PATTERN)
    arguments: str = Field(description="The arguments as a JSON object, unchanged from the answer.")
    parsed_arguments: Any = Field(None, description="Added by OpenAI's client; ignored.")


class MessageToolCall(RequestObject):
    """A call that an earlier answer made."""

    without_effect = WITHOUT_EFFECT_IN_CALLS

    index: int | None = Field(None, description="Its index in a stream; ignored, because the order of the list counts.")
    id: str = Field(min_length=1)
    type: Literal["function"] = "function"
    function: CalledFunction
