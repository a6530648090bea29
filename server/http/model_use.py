"""What a served model is for: which endpoints can use which architecture.  Knows names alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from model.config import Architecture


@dataclass(frozen=True, slots=True)
class ModelUse:
    """What can be done with a model, beside embeddings, which all give.

    Attributes:
        task: a word for programs, as vLLM calls it.
        does: what the model does, for a sentence.
        endpoints: where to ask for it, for a sentence.
    """

    task: str
    does: str
    endpoints: str


USES: Mapping[Architecture, ModelUse] = {
    Architecture.CAUSAL_LM: ModelUse("generate", "generates text", "/v1/completions or /v1/chat/completions"),
    Architecture.SEQUENCE_CLASSIFICATION: ModelUse("classify", "classifies texts", "/classify"),
    Architecture.TOKEN_CLASSIFICATION: ModelUse("token_classify", "classifies tokens", "/classify/tokens"),
}
