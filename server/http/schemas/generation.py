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

    include_usage: bool = Field(False, description="Send a final chunk with the usage and no choices.")
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

    model: str | None = Field(None, description="The served model's name. Default: that name.")
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the most probable token.")
    top_p: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Sample from the most probable tokens with this total probability; 0 takes the most probable one.",
    )
    top_k: int = Field(0, ge=-1, description="Sample from this number of most probable tokens; 0 or -1 means all.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Drop tokens less probable than this share of the most probable one."
    )
    seed: int | None = Field(None, description="The same seed, prompt and parameters give the same tokens.")
    stop: StopStrings = Field(
        default=[],
        description="Strings that end the answer and are not part of it. Ignored inside enforced JSON, choices and "
        "calls.",
    )
    stop_token_ids: StopTokens = Field(
        default=[],
        description="Tokens that end the answer and are not part of its text, even with ignore_eos. Ignored inside "
        "enforced JSON, choices and calls.",
    )
    ignore_eos: bool = Field(
        False,
        description="Continue past the answer's end: end-of-text, and in chat the next human turn. Ignored if the "
        "answer follows a grammar.",
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Subtracted from the logit of each token that is already in the answer."
    )
    frequency_penalty: float = Field(
        0.0,
        ge=-2,
        le=2,
        description="Subtracted from a token's logit once for each time that the answer already contains it.",
    )
    repetition_penalty: float = Field(
        1.0, gt=0, le=10, description="Divides positive logits of tokens seen before, and multiplies negative ones."
    )
    logit_bias: LogitBias = Field(
        default={}, description="Added to the logits of these token ids, before the penalties."
    )
    min_tokens: int = Field(
        0,
        ge=0,
        description="Minimum number of tokens in the answer. Ignored if it follows a grammar; calls end it too.",
    )
    response_format: ResponseFormat | None = Field(
        None, description='The required form of the answer. Every answer has it unless its finish_reason is "length".'
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="Another way to set the form of the answer; with response_format only if that is any text."
    )
    n: int = Field(1, ge=1, le=MAX_SAMPLES, description="Number of answers to each prompt.")
    priority: int = Field(
        0,
        ge=-(2**31),
        lt=2**31,
        description="Requests with lower numbers run first and are preempted last. The server limits how far below 0 "
        "it may be.",
    )
    speculate: bool = Field(
        True,
        description="Whether next tokens may be guessed, if the server does so (--speculative-config). The tokens are "
        "the same either way.",
    )
    stream: bool = Field(False, description="Stream the answer as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only allowed with stream.")
    return_token_ids: bool = Field(False, description="Add the token ids of prompts and answers.")
    max_tokens: int | None = Field(None, ge=0, description="Maximum number of new tokens.")
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
            raise invalid("structured_outputs", "response_format already sets the form of the answer")
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
        """Number of most probable tokens to report with each token; None reports no tokens."""
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
