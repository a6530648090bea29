"""The request and the answers of POST /classify and POST /classify/tokens, under vLLM's names."""

from msgspec import Struct
from pydantic import Field

from persimmon.server.http.schemas.pooling import PoolingRequest


class ClassifyRequest(PoolingRequest):
    """The body of POST /classify and POST /classify/tokens."""

    use_activation: bool = Field(
        True, description="Return probabilities (a regression: its values); false returns the model's logits."
    )


class ClassificationUsage(Struct, frozen=True):
    """The tokens of all inputs; nothing is generated."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class Classification(Struct, frozen=True):
    """What one input is: its most probable label, and each label's probability in the order of the model's labels.

    Without an activation, and of a regression, `probs` are the logits.
    """

    index: int
    label: str
    probs: list[float]
    num_classes: int


class _Answer(Struct, frozen=True, tag_field="object", tag="list"):
    id: str
    created: int
    model: str
    usage: ClassificationUsage


class Classifications(_Answer, frozen=True, tag="list"):
    """The answer of POST /classify; a classification for each input, in their order."""

    data: list[Classification]


class TokenClassification(Struct, frozen=True):
    r"""What one token is: its most probable label, and each label's probability in the order of the model's labels.

    A token that is not whole characters has a name like "bytes:\xe2".  `text_offset` counts characters of the input's
    text before it.
    """

    token_id: int
    token: str
    text_offset: int
    label: str
    probs: list[float]


class InputClassification(Struct, frozen=True):
    """What the tokens of one input are, all of them in order; a beginning-of-sequence token is among them."""

    index: int
    tokens: list[TokenClassification]
    num_classes: int


class TokenClassifications(_Answer, frozen=True, tag="list"):
    """The answer of POST /classify/tokens; the tokens of each input, in their order."""

    data: list[InputClassification]
