"""What requests for generated text have in common: fields, types and limits, under OpenAI's own names.

Knows what a well-formed request is; nothing of what the served model can do with it.
"""

from typing import ClassVar, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from persimmon.server.http.schemas.constraint import Constraint
from persimmon.server.http.schemas.field_types import CacheSalt, LogitBias, StopStrings, StopTokens
from persimmon.server.http.schemas.format_fields import ResponseFormat, StructuredOutputs
from persimmon.server.http.schemas.other_fields import (
    REFUSED,
    REFUSED_STREAM_OPTIONS,
    WITHOUT_EFFECT,
)
from persimmon.server.http.schemas.request_object import RequestObject, invalid
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
