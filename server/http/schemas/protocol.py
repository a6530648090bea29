"""The requests of the endpoints with a body: fields, types and limits, under OpenAI's own names.

Knows what a well-formed request is; nothing of what the served model can do with it.
"""

from typing import Annotated, ClassVar, Self

from pydantic import FailFast, Field, ValidationInfo, field_validator, model_validator

from persimmon.server.http.generation.grammars import Constraint
from persimmon.server.http.schemas.chat_message import Messages
from persimmon.server.http.schemas.field_types import CacheSalt, LogitBias, Prompts, StopStrings, StopTokens
from persimmon.server.http.schemas.format_fields import ResponseFormat, StructuredOutputs
from persimmon.server.http.schemas.other_fields import (
    REFUSED,
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    REFUSED_STREAM_OPTIONS,
    WITHOUT_EFFECT,
    WITHOUT_EFFECT_IN_CHAT,
)
from persimmon.server.http.schemas.request_object import RequestObject, invalid
from persimmon.server.http.schemas.tool_fields import MAX_TOOLS, AllowedTools, NamedTool, Tool, ToolChoiceField
from persimmon.server.http.schemas.truncation import TruncatingRequest

MAX_SAMPLES = 128


class StreamOptions(RequestObject):
    """Options of a streamed answer."""

    refused = REFUSED_STREAM_OPTIONS

    include_usage: bool = Field(False, description="Send a last chunk with the usage and no choices.")
    continuous_usage_stats: bool = Field(False, description="Add the usage so far to each chunk.")


class GenerationRequest(TruncatingRequest):
    """What completions and chat have in common.

    Attributes:
        is_chat: whether the answer is a turn of a conversation.
        prompt_field: the field that holds the prompt.
        default_max_tokens: the limit of a request that gives none; None is what the context leaves.
    """

    is_chat: ClassVar[bool]
    prompt_field: ClassVar[str]
    default_max_tokens: ClassVar[int | None]
    refused = REFUSED
    without_effect = WITHOUT_EFFECT

    model: str | None = Field(None, description="The served model's name, which is also the default.")
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the most probable token.")
    top_p: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Draw from the most probable tokens of this total share; 0 takes the most probable one.",
    )
    top_k: int = Field(0, ge=-1, description="Draw from this many most probable tokens; 0 or -1: from all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Drop tokens below this share of the best one's probability.")
    seed: int | None = Field(None, description="The same seed, prompt and parameters draw the same tokens.")
    stop: StopStrings = Field(
        default=[],
        description="Strings that end the answer and are not part of it. Ignored inside JSON, choices and calls that "
        "are enforced.",
    )
    stop_token_ids: StopTokens = Field(
        default=[],
        description="Tokens that end the answer and are not part of its text, with ignore_eos too. Ignored where JSON, "
        "choices or calls are enforced.",
    )
    ignore_eos: bool = Field(
        False,
        description="Go on past the answer's own end: end-of-text, and in chat the next human turn. Ignored where the "
        "answer follows a grammar.",
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Taken off the logit of each token that is in the answer already."
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="Taken off a token's logit for each time that it is in the answer already."
    )
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, description="Divides the positive, multiplies the negative logits of tokens seen before."
    )
    logit_bias: LogitBias = Field(
        default={}, description="Added to the logits of these token ids, before the penalties."
    )
    min_tokens: int = Field(
        0,
        ge=0,
        description="The answer has at least this many tokens. Ignored where it follows a grammar; calls end it too.",
    )
    response_format: ResponseFormat | None = Field(
        None, description='What an answer must look like. One whose finish_reason is not "length" does.'
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="The same in other words; together with response_format only where that is any text."
    )
    n: int = Field(1, ge=1, le=MAX_SAMPLES, description="Answers to each prompt.")
    priority: int = Field(
        0,
        ge=-(2**31),
        lt=2**31,
        description="Requests of a lower one go first, and are the last to be put off. Below 0 only as far as the "
        "server allows.",
    )
    stream: bool = Field(False, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    return_token_ids: bool = Field(False, description="Add the token ids of prompts and answers.")
    max_tokens: int | None = Field(None, ge=0, description="At most this many new tokens.")
    cache_salt: CacheSalt = None

    @field_validator("stream_options")
    @classmethod
    def _only_in_a_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream", True):
            raise ValueError("it is only allowed when stream is true")
        return value

    @model_validator(mode="after")
    def _min_before_max(self) -> Self:
        field, limit = self.token_limit
        if limit is not None and self.min_tokens > limit:
            raise invalid("min_tokens", f"it is {self.min_tokens} but {field} is {limit}")
        return self

    @model_validator(mode="after")
    def _one_grammar(self) -> Self:
        if self.format_constraint is not None and self.structured_outputs is not None:
            raise invalid("structured_outputs", "response_format already says what the answer must look like")
        return self

    @property
    def format_constraint(self) -> Constraint | None:
        """What response_format says an answer must look like; None for any text."""
        return None if self.response_format is None else self.response_format.constraint

    @property
    def constraint(self) -> Constraint | None:
        """What an answer must look like; None for any text."""
        return self.format_constraint if self.structured_outputs is None else self.structured_outputs.constraint

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that limits the answer's tokens, and what it says."""
        return "max_tokens", self.max_tokens

    @property
    def samples(self) -> tuple[str, int]:
        """The field that says how many samples each prompt gets, and what it says."""
        return "n", self.n

    @property
    def echoes(self) -> bool:
        """Whether an answer begins with its prompt."""
        return False

    @property
    def reported_logprobs(self) -> int | None:
        """How many of the most probable tokens to report beside each; None reports no tokens."""
        return None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk of a stream has the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def add_bos(self) -> bool | None:
        """Whether texts begin with BOS; None does what the checkpoint says."""
        return None


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    refused = REFUSED_IN_COMPLETIONS
    is_chat = False
    prompt_field = "prompt"
    default_max_tokens = 16

    prompt: Prompts = Field(description="One or more texts, or lists of token ids, to continue.")
    max_tokens: int | None = Field(
        None,
        ge=0,
        description="At most this many tokens. Default: 16, or what the context leaves if that is less. "
        "0 only computes the prompt.",
    )
    add_special_tokens: bool = Field(
        True,
        description="Begin texts with the beginning-of-sequence token where the checkpoint does; false never does.",
    )
    echo: bool = Field(False, description="Begin the answer's text with the prompt's.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=5,
        description="Report the log-probability of each token, the prompt's too with echo, and of so many most "
        "probable ones in its place: the network's own, before temperature, penalties and biases.",
    )
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_SAMPLES,
        description="Make so many answers and return the n whose tokens have the highest mean log-probability. "
        "Not in a stream.",
    )

    @model_validator(mode="after")
    def _best_of_more_than_n(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise invalid("best_of", f"it is {self.best_of} but n is {self.n}; it must be at least n")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise invalid("best_of", "in a stream it must equal n: the best answers are known at the end")
        return self

    @property
    def samples(self) -> tuple[str, int]:
        """The field that says how many samples each prompt gets, and what it says."""
        return super().samples if self.best_of is None else ("best_of", self.best_of)

    @property
    def add_bos(self) -> bool | None:
        """Whether texts begin with BOS; None does what the checkpoint says."""
        return None if self.add_special_tokens else False

    @property
    def echoes(self) -> bool:
        """Whether an answer begins with its prompt."""
        return self.echo

    @property
    def reported_logprobs(self) -> int | None:
        """How many of the most probable tokens to report beside each; None reports no tokens."""
        return self.logprobs


class ChatCompletionRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    refused = REFUSED_IN_CHAT
    without_effect = WITHOUT_EFFECT_IN_CHAT
    is_chat = True
    prompt_field = "messages"
    default_max_tokens = None

    messages: Messages = Field(min_length=1, description="The conversation; a user message or a tool's result ends it.")
    max_tokens: int | None = Field(None, ge=0, description="The older name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(
        None,
        ge=0,
        description="At most this many tokens. Default: what the context leaves. 0 only computes the prompt.",
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), FailFast()] = Field(
        default=[], description="Functions that the model may call; docs/guides/tools.md says how it learns of them."
    )
    tool_choice: ToolChoiceField | None = Field(
        None,
        description="Whether the answer is calls: never, if the model writes some, always, or one of this function; or "
        'of these functions only. Default: "auto" where there are tools.',
    )
    parallel_tool_calls: bool = Field(True, description="Whether an answer may make several calls.")
    service_tier: str | None = Field(None, description='There is one tier; the answer to any names "default".')

    logprobs: bool = Field(
        False,
        description="Report the log-probability of each token of the answer: the network's own, before temperature, "
        "penalties and biases.",
    )
    top_logprobs: int = Field(
        0, ge=0, le=20, description="Report so many most probable tokens in each one's place. Only with logprobs."
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
        """How many of the most probable tokens to report beside each; None reports no tokens."""
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
