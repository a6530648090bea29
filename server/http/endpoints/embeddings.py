"""POST /v1/embeddings: final hidden states of the served network, as OpenAI writes embeddings.

The final hidden state is the output of the last LayerNorm, which Transformers' PersimmonModel calls last_hidden_state.
"""

import base64

import numpy as np

from persimmon.server.http.endpoints.endpoint import Call
from persimmon.server.http.endpoints.pooling import Inputs, pooled, prepare, written
from persimmon.server.http.endpoints.service import Service
from persimmon.server.http.errors import bad_request
from persimmon.server.http.generation.conversation import chat_prompt
from persimmon.server.http.schemas.embeddings import Embedding, EmbeddingRequest, Embeddings, EmbeddingUsage
from persimmon.server.http.transport.disconnect import until_disconnect
from persimmon.server.http.transport.json_response import JsonResponse


async def create_embeddings(service: Service, call: Call[EmbeddingRequest]) -> JsonResponse[Embeddings]:
    """The model's final hidden states of one or more inputs."""
    request = call.request
    width = service.config.hidden_size
    if request.dimensions not in (None, width):
        raise bad_request(
            f"dimensions is {request.dimensions}, but this model's embeddings have {width} and cannot be shortened; "
            f"leave it out or send {width}.",
            "dimensions",
        )
    inputs = await _inputs(service, call)
    return JsonResponse(await until_disconnect(call.receive, _whole(service, request, inputs)))


async def _inputs(service: Service, call: Call[EmbeddingRequest]) -> Inputs:
    """A function of its own, which forgets the images' pixels when the engine has them."""
    request = call.request
    if not request.messages:
        return await prepare(service, request, call.record)
    service.check_model(request.model)
    images = await service.load_images(request.messages, call.receive)
    conversation = await chat_prompt(
        service.chat,
        request.messages,
        options=request.chat_template_kwargs,
        images=images,
        begin_answer=request.add_generation_prompt,
    )
    return await prepare(service, request, call.record, conversation)


async def _whole(service: Service, request: EmbeddingRequest, inputs: Inputs) -> Embeddings:
    mean = request.pooling == "mean"

    def entry(index: int, rows: np.ndarray) -> Embedding:
        count = len(inputs.prompts[index]) if mean else 1
        embedding = _embedding(rows, count, normalize=request.normalizes)
        return Embedding(index, _base64(embedding) if request.encoding_format == "base64" else embedding.tolist())

    states = pooled(
        service.engine,
        inputs.prompts,
        "sum" if mean else "last",
        service.config.hidden_size,
        inputs.record,
        images=inputs.images,
    )
    data = await written(states, entry)
    usage = EmbeddingUsage(inputs.num_tokens, inputs.num_tokens)
    return Embeddings(data, service.served_model_name, usage)


def _embedding(rows: np.ndarray, count: int, *, normalize: bool) -> np.ndarray:
    """[width] float32 of [rows, width] that sum up `count` states."""
    embedding = rows.sum(axis=0, dtype=np.float64) / count
    length = np.linalg.norm(embedding)
    if normalize and length > 0:
        embedding /= length
    result: np.ndarray = embedding.astype(np.float32)
    return result


def _base64(embedding: np.ndarray) -> str:
    return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
