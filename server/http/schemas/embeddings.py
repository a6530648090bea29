"""The request and the answer of POST /v1/embeddings, under OpenAI's names."""

from typing import Literal, Self

from msgspec import Struct
from pydantic import Field, model_validator

from persimmon.server.http.schemas.chat_message import Messages
from persimmon.server.http.schemas.field_types import ChatTemplateOptions, Prompts
from persimmon.server.http.schemas.other_fields import (
    REFUSED_IN_EMBEDDINGS,
)
from persimmon.server.http.schemas.pooling import PoolingRequest
from persimmon.server.http.schemas.request_object import invalid, missing


class EmbeddingRequest(PoolingRequest):
    """The body of POST /v1/embeddings."""

    refused = REFUSED_IN_EMBEDDINGS

    input: Prompts = Field(default=[], description="One or more texts, or lists of token ids.")
    messages: Messages = Field(default=[], description="A conversation, instead of input; it may hold images.")
    add_generation_prompt: bool = Field(
        False, description="End the conversation with the beginning of an answer. Only with messages."
    )
    chat_template_kwargs: ChatTemplateOptions = None
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="A list of numbers, or little-endian float32 numbers in base64."
    )
    dimensions: int | None = Field(
        None,
        ge=1,
        description="Only the model's hidden size is allowed: embeddings cannot be shortened.",
    )
    pooling: Literal["last", "mean"] = Field(
        "last", description="Whether an embedding is the final hidden state of the last token, or the mean of all."
    )
    normalize: bool = Field(
        True, description="Scale each embedding to length 1; false returns it as the model computed it."
    )
    use_activation: bool | None = Field(None, description="vLLM's name for normalize.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if not self.input and not self.messages:
            raise missing("input")
        if self.input and self.messages:
            raise invalid("messages", "it takes the place of input; give one of the two")
        for field in ("add_generation_prompt", "chat_template_kwargs"):
            if getattr(self, field) and not self.messages:
                raise invalid(field, "it is only allowed with messages")
        return self

    @model_validator(mode="after")
    def _one_wish(self) -> Self:
        if "normalize" in self.model_fields_set and self.use_activation not in (None, self.normalize):
            raise invalid("use_activation", "it is another name for normalize, which has a different value")
        return self

    @property
    def normalizes(self) -> bool:
        """Whether embeddings have length 1."""
        return self.normalize if self.use_activation is None else self.use_activation


class EmbeddingUsage(Struct, frozen=True):
    """The tokens of all inputs; nothing is generated, so both are the same."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Struct, frozen=True, tag_field="object", tag="embedding"):
    """The embedding of one input: numbers, or the base64 of little-endian float32 numbers."""

    index: int
    embedding: list[float] | str


class Embeddings(Struct, frozen=True, tag_field="object", tag="list"):
    """The answer of POST /v1/embeddings; an embedding for each input, in their order."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
