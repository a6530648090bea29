"""POST /classify and /classify/tokens: what a classifier says of whole texts, or of each of their tokens.

The answer of /classify is vLLM's; that of /classify/tokens, which vLLM lacks, looks like it.
"""

import time
import uuid
from collections.abc import Iterator, Sequence

import numpy as np

from persimmon.model.config import Architecture, ScoreFunction
from persimmon.model.tokenizer import Tokenizer
from persimmon.server.http.endpoints.endpoint import Call
from persimmon.server.http.endpoints.pooling import Inputs, pooled, prepare, written
from persimmon.server.http.endpoints.service import Service
from persimmon.server.http.generation.token_report import read_prompt, token_text
from persimmon.server.http.schemas.classify import (
    Classification,
    Classifications,
    ClassificationUsage,
    ClassifyRequest,
    InputClassification,
    TokenClassification,
    TokenClassifications,
)
from persimmon.server.http.transport.disconnect import until_disconnect
from persimmon.server.http.transport.json_response import JsonResponse


async def classify_texts(service: Service, call: Call[ClassifyRequest]) -> JsonResponse[Classifications]:
    """What a model that classifies texts says of one or more inputs.

    As in Transformers, padding at an input's end is ignored.
    """
    service.check_use(Architecture.SEQUENCE_CLASSIFICATION)
    inputs = await prepare(service, call.request, call.record)
    return JsonResponse(await until_disconnect(call.receive, _of_texts(service, call.request, inputs)))


async def classify_tokens(service: Service, call: Call[ClassifyRequest]) -> JsonResponse[TokenClassifications]:
    """What a model that classifies tokens says of each token of one or more inputs."""
    service.check_use(Architecture.TOKEN_CLASSIFICATION)
    inputs = await prepare(service, call.request, call.record)
    return JsonResponse(await until_disconnect(call.receive, _of_tokens(service, call.request, inputs)))


async def _of_texts(service: Service, request: ClassifyRequest, inputs: Inputs) -> Classifications:
    config = service.config
    function = config.score_function if request.use_activation else "none"

    def entry(index: int, rows: np.ndarray) -> Classification:
        probabilities = activated(rows[-1], function)
        label = config.labels[int(probabilities.argmax())]
        return Classification(index=index, label=label, probs=probabilities.tolist(), num_classes=config.num_labels)

    # What comes after the token whose scores count changes nothing.
    prompts = (token_ids[: config.pooled_token(token_ids) + 1] for token_ids in inputs.prompts)
    data = await written(pooled(service.engine, prompts, "last", config.num_labels, inputs.record, scores=True), entry)
    return Classifications(*_identity(service), _usage(inputs), data)


async def _of_tokens(service: Service, request: ClassifyRequest, inputs: Inputs) -> TokenClassifications:
    config = service.config
    function = config.score_function if request.use_activation else "none"

    def entry(index: int, rows: np.ndarray) -> InputClassification:
        probabilities = activated(rows, function)
        texts = _texts(service.tokenizer, inputs.prompts[index])
        tokens = [
            TokenClassification(token_id=token_id, token=text, text_offset=offset, label=config.labels[best], probs=own)
            for (token_id, text, offset), best, own in zip(
                texts, probabilities.argmax(-1).tolist(), probabilities.tolist(), strict=True
            )
        ]
        return InputClassification(index, tokens, config.num_labels)

    results = pooled(service.engine, inputs.prompts, "all", config.num_labels, inputs.record, scores=True)
    return TokenClassifications(*_identity(service), _usage(inputs), await written(results, entry))


def activated(scores: np.ndarray, function: ScoreFunction) -> np.ndarray:
    """What is reported of a classifier's scores.

    Args:
        scores: [..., num_labels] float32.
        function: as `PersimmonConfig.score_function` says.

    Returns:
        [..., num_labels] float64.
    """
    result: np.ndarray = scores.astype(np.float64)
    match function:
        case "softmax":
            result = np.exp(result - result.max(-1, keepdims=True))
            result /= result.sum(-1, keepdims=True)
        case "sigmoid":
            result = (1 + np.tanh(result / 2)) / 2  # a form that cannot overflow
        case "none":
            pass
    return result


def _texts(tokenizer: Tokenizer, token_ids: Sequence[int]) -> Iterator[tuple[int, str, int]]:
    """Each token with its name and how many characters of the text come before it."""
    offset = 0
    for token_id, text, prefix in read_prompt(tokenizer, tokenizer.detokenizer(), token_ids):
        yield token_id, token_text(tokenizer, token_id).without_prefix(prefix).name, offset
        offset += len(text)


def _identity(service: Service) -> tuple[str, int, str]:
    return f"classify-{uuid.uuid4().hex}", int(time.time()), service.served_model_name


def _usage(inputs: Inputs) -> ClassificationUsage:
    return ClassificationUsage(inputs.num_tokens, inputs.num_tokens)
