"""What requests for numbers have in common: embeddings and classification.

Knows what a well-formed request is; nothing of what the served model can do with it.
"""

from pydantic import Field

from persimmon.server.http.schemas.field_types import CacheSalt, Prompts
from persimmon.server.http.schemas.other_fields import (
    REFUSED_IN_POOLING,
    WITHOUT_EFFECT_IN_POOLING,
)
from persimmon.server.http.schemas.truncation import TruncatingRequest


class PoolingRequest(TruncatingRequest):
    """What embeddings and classification have in common."""

    refused = REFUSED_IN_POOLING
    without_effect = WITHOUT_EFFECT_IN_POOLING

    model: str | None = Field(None, description="The served model's name. Default: that name.")
    input: Prompts = Field(description="One or more texts, or lists of token ids.")
    add_special_tokens: bool = Field(
        True, description="Begin texts with the beginning-of-sequence token if completions do; false never adds it."
    )
    cache_salt: CacheSalt = None

    @property
    def add_bos(self) -> bool | None:
        """Whether texts begin with BOS; None does what the checkpoint says."""
        return None if self.add_special_tokens else False
