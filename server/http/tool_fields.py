"""The fields about tools, under OpenAI's names: which functions there are, which must be called, which were.

Knows what is well-formed; nothing of how a model is told of functions.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, field_validator

from model.tool_calls import Function
from server.http.other_fields import REFUSED_IN_TOOLS, WITHOUT_EFFECT_IN_CALLS, WITHOUT_EFFECT_IN_TOOLS
from server.http.request_object import NAME_PATTERN, RequestObject

MAX_TOOLS = 128
"""As many as OpenAI allows."""


class FunctionDefinition(RequestObject):
    """A function that the model may call."""

    refused = REFUSED_IN_TOOLS
    without_effect = WITHOUT_EFFECT_IN_TOOLS

    name: str = Field(pattern=NAME_PATTERN)
    description: str | None = Field(None, description="What it is good for; the model reads this.")
    parameters: dict[str, Any] | None = Field(
        None, description="A JSON Schema of the arguments, which are an object. Without it there are none."
    )
    strict: bool = Field(False, description="Whether calls always follow the parameters, as forced ones do.")

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


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def _tool_choice(value: object) -> ToolChoice:
    match value:
        case "none" | "auto" | "required":
            return value
        case {"type": "function", "function": {"name": str(name), **others}, **rest} if not others and not rest:
            return NamedTool(name)
    raise ValueError(
        'it must be "none", "auto", "required" or the choice of a function like '
        '{"type": "function", "function": {"name": "..."}}'
    )


ToolChoiceField = Annotated[
    ToolChoice,
    PlainValidator(_tool_choice),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required"]},
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "function"},
                        "function": {
                            "type": "object",
                            "properties": {"name": {"type": "string"}},
                            "required": ["name"],
                            "additionalProperties": False,
                        },
                    },
                    "required": ["type", "function"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]


class CalledFunction(RequestObject):
    """Which function was called, and with what."""

    name: str = Field(pattern=NAME_PATTERN)
    arguments: str = Field(description="A JSON object, as the answer had it.")
    parsed_arguments: Any = Field(None, description="What OpenAI's client makes of them; not read.")


class MessageToolCall(RequestObject):
    """A call that an earlier answer made."""

    without_effect = WITHOUT_EFFECT_IN_CALLS

    index: int | None = Field(None, description="As a stream has it; the call's place in the list is what counts.")
    id: str = Field(min_length=1)
    type: Literal["function"] = "function"
    function: CalledFunction
