"""The HTTP application of an API worker: its routes, and what happens to every request on the way in and out.

Knows no endpoint's insides.
"""

import itertools
import time
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.config import PersimmonConfig
from model.tokenizer import Tokenizer
from model.vocabulary import VocabularyMap
from server.config import Settings
from server.engine.client import EngineClient
from server.http import adept_api, classify, embeddings, errors, status, tokens
from server.http.adept_protocol import AdeptRequest
from server.http.chat import create_chat_completion
from server.http.completions import create_completion
from server.http.documentation import Documentation
from server.http.parsing import parse
from server.http.pooling_protocol import ClassifyRequest, EmbeddingRequest
from server.http.protocol import ChatCompletionRequest, CompletionRequest
from server.http.responses import ChatCompletion, ChatCompletionChunk, Completion
from server.http.service import Service, endless_seeds
from server.http.siblings import Siblings, WorkerPlace
from server.http.token_protocol import DetokenizeRequest, TokenizeRequest
from server.metrics import Metrics

COMPLETIONS = "/v1/completions"
CHAT_COMPLETIONS = "/v1/chat/completions"
ADEPT = "/api"
EMBEDDINGS = "/v1/embeddings"
CLASSIFY = "/classify"
CLASSIFY_TOKENS = "/classify/tokens"
TOKENIZE = "/tokenize"
DETOKENIZE = "/detokenize"

MAX_BODY_BYTES = 32 * 2**20
"""The longest request body: a text of 16,384 tokens is some 100 KB, and a request may bring many."""


def application(
    settings: Settings,
    folder: Path,
    served_model_name: str,
    engine_address: str,
    place: WorkerPlace | None = None,
) -> tuple[FastAPI, EngineClient]:
    """The application for a checkpoint, and its connection to the engine, which the caller starts and closes.

    Args:
        settings: of the server.
        folder: the checkpoint, of which config.json and the tokenizer are read.
        served_model_name: the model's name in the API.
        engine_address: the engine's ZeroMQ endpoint.
        place: the worker's among others; None for one alone.

    Raises:
        CheckpointError: config.json or the tokenizer cannot be used.
    """
    config = PersimmonConfig.from_folder(folder)
    vocabulary = VocabularyMap.from_folder(folder, config)
    if vocabulary is not None:
        config = vocabulary.original(config)
    tokenizer = Tokenizer.from_folder(folder, settings.add_bos_token)
    engine = EngineClient(engine_address, vocabulary)
    return create_app(engine, tokenizer, config, served_model_name, settings.seed, vocabulary, place), engine


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    config: PersimmonConfig,
    served_model_name: str,
    seed: int = 0,
    vocabulary: VocabularyMap | None = None,
    place: WorkerPlace | None = None,
) -> FastAPI:
    """The application of one API worker.

    Args:
        engine: the connection to the engine, which the caller starts and closes.
        tokenizer: the served model's.
        config: the served model's, its token ids those of the tokenizer.
        served_model_name: its name in the API.
        seed: of the seeds that requests without one get.
        vocabulary: of a trimmed checkpoint, else None.
        place: the worker's among others; None for one alone.
    """
    place = place or WorkerPlace()
    metrics = Metrics(engine)
    siblings = Siblings(place, metrics.snapshot)
    # Every worker takes its own part of one sequence, so that no two give requests the same seed.
    seeds = itertools.islice(endless_seeds(seed), place.index, None, place.count)
    service = Service(
        engine, tokenizer, config, served_model_name, metrics, seeds, siblings, vocabulary, created=place.started
    )
    app = FastAPI(
        title="Persimmon server",
        version=version("persimmon-server"),
        description="OpenAI-style completions, chat, embeddings and classification for Adept's Persimmon models, and "
        "the API of Adept's own server.",
        lifespan=lambda _: siblings.listening(),
    )
    documentation = Documentation()
    documentation.install(app)
    errors.install(app)
    app.add_middleware(_Measured, metrics=metrics)
    app.include_router(status.router(service, documentation))

    @app.post(COMPLETIONS, **documentation.endpoint({200: Completion}, CompletionRequest, chunk=Completion))
    async def completions(request: Request) -> Response:
        """Continues one or more prompts."""
        arrival = time.perf_counter()
        body = parse(await _body(request), CompletionRequest)
        return await create_completion(service, body, request.receive, arrival)

    @app.post(
        CHAT_COMPLETIONS,
        **documentation.endpoint({200: ChatCompletion}, ChatCompletionRequest, chunk=ChatCompletionChunk),
    )
    async def chat_completions(request: Request) -> Response:
        """Answers the last message of a conversation."""
        arrival = time.perf_counter()
        body = parse(await _body(request), ChatCompletionRequest)
        return await create_chat_completion(service, body, request.receive, arrival)

    @app.put(ADEPT, **documentation.endpoint({200: adept_api.AdeptAnswer}, AdeptRequest))
    async def adept(request: Request) -> Response:
        """Continues one or more prompts, as Adept's own server does."""
        arrival = time.perf_counter()
        body = parse(await _body(request), AdeptRequest)
        return await adept_api.generate(service, body, request.receive, arrival)

    @app.post(EMBEDDINGS, **documentation.endpoint({200: embeddings.Embeddings}, EmbeddingRequest))
    async def create_embeddings(request: Request) -> Response:
        """The model's final hidden states of one or more inputs."""
        body = parse(await _body(request), EmbeddingRequest)
        return await embeddings.create_embeddings(service, body, request.receive)

    @app.post(CLASSIFY, **documentation.endpoint({200: classify.Classifications}, ClassifyRequest))
    async def classify_texts(request: Request) -> Response:
        """What a model that classifies texts says of one or more inputs."""
        return await classify.classify(service, parse(await _body(request), ClassifyRequest), request.receive)

    @app.post(CLASSIFY_TOKENS, **documentation.endpoint({200: classify.TokenClassifications}, ClassifyRequest))
    async def classify_tokens(request: Request) -> Response:
        """What a model that classifies tokens says of each token of one or more inputs."""
        return await classify.classify_tokens(service, parse(await _body(request), ClassifyRequest), request.receive)

    @app.post(TOKENIZE, **documentation.endpoint({200: tokens.Tokens}, TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text or of a conversation."""
        return await tokens.tokenize(service, parse(await _body(request), TokenizeRequest))

    @app.post(DETOKENIZE, **documentation.endpoint({200: tokens.Text}, DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        return await tokens.detokenize(service, parse(await _body(request), DetokenizeRequest))

    return app


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise errors.ApiError(413, f"The body is longer than {MAX_BODY_BYTES} bytes.", code="request_too_large")
    return bytes(body)


class _Measured:
    """Counts every request by endpoint and status, and times those that were generated to their end."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status_code = errors.CLIENT_CLOSED_REQUEST
        complete = False
        started = time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status_code, complete
            if message["type"] == "http.response.start":
                status_code = message["status"]
            elif not message.get("more_body", False):
                complete = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status_code = 500
            raise
        finally:
            # The route's own path, not the client's: a label's values must be few.
            endpoint = getattr(scope.get("route"), "path", "unknown")
            self._metrics.http_requests.labels(endpoint, status_code).inc()
            if complete and status_code == 200 and endpoint in (COMPLETIONS, CHAT_COMPLETIONS, ADEPT):
                self._metrics.request_latency.observe(time.perf_counter() - started)
