"""What a served model is for: which endpoints can use which architecture, and an example. Knows only names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from persimmon.model.config import Architecture, PersimmonConfig


@dataclass(frozen=True, slots=True)
class ModelUse:
    """What can be done with a model, in addition to embeddings, which all give.

    Attributes:
        task: a word for programs, as vLLM calls it.
        does: what the model does, for a sentence.
        endpoints: where to ask for it, for a sentence.
        example: a request: the endpoint, and the JSON of its body.
    """

    task: str
    does: str
    endpoints: str
    example: tuple[str, str]


USES: Mapping[Architecture, ModelUse] = {
    Architecture.CAUSAL_LM: ModelUse(
        task="generate",
        does="generates text",
        endpoints="/v1/completions or /v1/chat/completions",
        example=("/v1/chat/completions", '{"messages": [{"role": "user", "content": "What is a persimmon?"}]}'),
    ),
    Architecture.SEQUENCE_CLASSIFICATION: ModelUse(
        task="classify",
        does="classifies texts",
        endpoints="/classify",
        example=("/classify", '{"input": "A persimmon is sweet."}'),
    ),
    Architecture.TOKEN_CLASSIFICATION: ModelUse(
        task="token_classify",
        does="classifies tokens",
        endpoints="/classify/tokens",
        example=("/classify/tokens", '{"input": "A persimmon is sweet."}'),
    ),
}

_RED_SQUARE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAADwAAAA8AQMAAAAAMksxAAAABlBMVEX/////AADrWueTAAAAG0lEQVR4"
    "2mNgGCSA8f///z8YGJhg/JHMGCQAAHIKBDHcGlAxAAAAAElFTkSuQmCC"
)


def use_of(config: PersimmonConfig) -> ModelUse:
    """What can be done with a model; the example for one that reads images has an image."""
    use = USES[config.architecture]
    if config.vision is None:
        return use
    content = [{"type": "image_url", "image_url": {"url": _RED_SQUARE}}]
    endpoint, _ = use.example
    return replace(use, example=(endpoint, json.dumps({"messages": [{"role": "user", "content": content}]})))
