"""The requests of the endpoints that answer with numbers: embeddings under OpenAI's names, classification under vLLM's.

Knows what a well-formed request is; nothing of what the served model can do with it.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from persimmon.server.http.schemas.field_types import CacheSalt, Prompts
from persimmon.server.http.schemas.other_fields import (
    REFUSED_IN_EMBEDDINGS,
    REFUSED_IN_POOLING,
    WITHOUT_EFFECT_IN_POOLING,
)
from persimmon.server.http.schemas.request_object import invalid
from persimmon.server.http.schemas.truncation import TruncatingRequest


class PoolingRequest(TruncatingRequest):
    """What embeddings and classification have in common."""

    refused = REFUSED_IN_POOLING
    without_effect = WITHOUT_EFFECT_IN_POOLING

    model: str | None = Field(None, description="The served model's name, which is also the default.")
    input: Prompts = Field(description="One or more texts, or lists of token ids.")
    add_special_tokens: bool = Field(
        True, description="Begin texts with the beginning-of-sequence token where completions do; false never does."
    )
    cache_salt: CacheSalt = None

    @property
    def add_bos(self) -> bool | None:
        """Whether texts begin with BOS; None does what the checkpoint says."""
        return None if self.add_special_tokens else False


class EmbeddingRequest(PoolingRequest):
    """The body of POST /v1/embeddings."""

    refused = REFUSED_IN_EMBEDDINGS

    encoding_format: Literal["float", "base64"] = Field(
        "float", description="Numbers, or the base64 of little-endian float32 numbers."
    )
    dimensions: int | None = Field(
        None,
        ge=1,
        description="The model's hidden size or nothing: a part of a final hidden state stands for nothing.",
    )
    pooling: Literal["last", "mean"] = Field(
        "last", description="Whether an embedding is the final hidden state of the last token, or the mean of all."
    )
    normalize: bool = Field(True, description="Scale each embedding to length 1; false leaves it as the model made it.")
    use_activation: bool | None = Field(None, description="vLLM's name for normalize.")

    @model_validator(mode="after")
    def _one_wish(self) -> Self:
        if "normalize" in self.model_fields_set and self.use_activation not in (None, self.normalize):
            raise invalid("use_activation", "it is another name for normalize, which says otherwise")
        return self

    @property
    def normalizes(self) -> bool:
        """Whether embeddings have length 1."""
        return self.normalize if self.use_activation is None else self.use_activation


class ClassifyRequest(PoolingRequest):
    """The body of POST /classify and POST /classify/tokens."""

    use_activation: bool = Field(
        True, description="Give probabilities, or a regression's values; false gives the model's own logits."
    )
