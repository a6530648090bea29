"""The request and the answers of POST /v1/chat/completions, under OpenAI's names."""

from typing import Annotated, Self

from msgspec import UNSET, Struct, UnsetType
from pydantic import FailFast, Field, ValidationInfo, field_validator, model_validator

from persimmon.server.http.schemas.chat_message import Messages
from persimmon.server.http.schemas.field_types import ChatTemplateOptions
from persimmon.server.http.schemas.generation import GenerationRequest
from persimmon.server.http.schemas.other_fields import (
    REFUSED_IN_CHAT,
    WITHOUT_EFFECT_IN_CHAT,
)
from persimmon.server.http.schemas.request_object import invalid
from persimmon.server.http.schemas.tool_fields import MAX_TOOLS, AllowedTools, NamedTool, Tool, ToolChoiceField
from persimmon.server.http.schemas.usage import Usage


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    refused = REFUSED_IN_CHAT
    without_effect = WITHOUT_EFFECT_IN_CHAT
    is_chat = True
    prompt_field = "messages"
    default_max_tokens = None

    messages: Messages = Field(
        min_length=1, description="The conversation; it must end with a user message or a tool result."
    )
    max_tokens: int | None = Field(None, ge=0, description="The older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(
        None,
        ge=0,
        description="Maximum number of new tokens. Default: what the context leaves. 0 only computes the prompt.",
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), FailFast()] = Field(
        default=[],
        description="Functions that the model may call; docs/guides/tools.md describes how the model sees them.",
    )
    tool_choice: ToolChoiceField | None = Field(
        None,
        description='Whether the answer consists of calls: never ("none"), if the model decides so ("auto"), always '
        '("required"), or one call of the named function; or only calls of the allowed functions. Default: "auto" if '
        "there are tools.",
    )
    chat_template_kwargs: ChatTemplateOptions = None
    parallel_tool_calls: bool = Field(True, description="Whether an answer may make several calls.")
    service_tier: str | None = Field(None, description='There is only one tier; answers always report "default".')

    logprobs: bool = Field(
        False,
        description="Report the log-probability of each token of the answer: the model's own, before temperature, "
        "penalties and biases.",
    )
    top_logprobs: int = Field(
        0,
        ge=0,
        le=20,
        description="Number of most probable tokens to report at each position. Only allowed with logprobs.",
    )

    @model_validator(mode="after")
    def _top_of_what_is_reported(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "it is only allowed when logprobs is true")
        return self

    @field_validator("tools")
    @classmethod
    def _different_names(cls, value: list[Tool]) -> list[Tool]:
        names = [tool.function.name for tool in value]
        twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
        if twice is not None:
            raise ValueError(f"two functions have the name {twice!r}")
        return value

    @model_validator(mode="after")
    def _a_choice_that_there_is(self) -> Self:
        chosen: tuple[str, ...] = ()
        match self.tool_choice:
            case NamedTool(name):
                chosen = (name,)
            case AllowedTools(names):
                chosen = names
            case "required" if not self.tools:
                raise invalid("tool_choice", "it is 'required', but there are no tools to call")
        given = {tool.function.name for tool in self.tools}
        for name in chosen:
            if name not in given:
                raise invalid("tool_choice", f"no function in tools has the name {name[:100]!r}")
        if self.callable_tools and self.structured_outputs is not None:
            raise invalid("structured_outputs", "with tools it is only allowed when tool_choice is 'none'")
        return self

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        match self.tool_choice:
            case "none":
                return []
            case NamedTool(name):
                return [tool for tool in self.tools if tool.function.name == name]
            case AllowedTools(names):
                return [tool for tool in self.tools if tool.function.name in names]
        return self.tools

    @property
    def must_call(self) -> bool:
        """Whether the answer is nothing but calls."""
        match self.tool_choice:
            case "required" | NamedTool() | AllowedTools(required=True):
                return True
        return False

    @property
    def reported_logprobs(self) -> int | None:
        """Number of most probable tokens to report with each token; None reports no tokens."""
        return self.top_logprobs if self.logprobs else None

    @field_validator("max_completion_tokens")
    @classmethod
    def _same_as_max_tokens(cls, value: int | None, info: ValidationInfo) -> int | None:
        older = info.data.get("max_tokens")
        if value is not None and older is not None and value != older:
            raise ValueError(f"it is {value} but max_tokens is {older}; give one of the two")
        return value

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits the answer's tokens, and what it says."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().token_limit


class TopLogprob(Struct, frozen=True):
    """A token that might have come, and its natural log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(Struct, frozen=True):
    """A token of an answer, its natural log-probability under the network's own logits, and what might have come."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """The tokens of a chat's answer, or of the next piece of it."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CalledFunction(Struct, frozen=True):
    """The function that is called, and its arguments: a JSON object, as the model wrote it."""

    name: str
    arguments: str


class ChatToolCall(Struct, frozen=True, tag_field="type", tag="function"):
    """A call that an answer makes; the message with its result names the id."""

    id: str
    function: CalledFunction


class ChatMessage(Struct, frozen=True):
    """A whole answer: its content, or calls of tools."""

    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[ChatToolCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True):
    """One answer of a chat completion."""

    index: int
    message: ChatMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, frozen=True, tag_field="object", tag="chat.completion"):
    """The answer of POST /v1/chat/completions."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: str | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class FunctionDelta(Struct, frozen=True):
    """What a chunk adds to a call's function: its name once, then its arguments in pieces."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCallDelta(Struct, frozen=True, kw_only=True):
    """What a chunk adds to a call; which one, says its index.  Its id and type come with the function's name."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta


class ChatDelta(Struct, frozen=True):
    """What a chunk adds to an answer."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True):
    """The next piece of one answer of a chat completion."""

    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(Struct, frozen=True, tag_field="object", tag="chat.completion.chunk"):
    """A chunk of a streamed chat completion."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    service_tier: str | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
