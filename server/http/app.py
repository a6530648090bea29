"""The HTTP application of an API worker: its routes, and what happens to every request on the way in and out.

Knows no endpoint's insides.
"""

import itertools
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.middleware.cors import CORSMiddleware

from persimmon.model.chat import Chat, chat_format
from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.tokenizer import Tokenizer
from persimmon.model.vocabulary import VocabularyMap
from persimmon.server.config import Settings
from persimmon.server.engine.client import CLASSIFIES, GENERATES, EngineClient
from persimmon.server.http import errors
from persimmon.server.http.endpoints import adept_api, classify, embeddings, status, tokens
from persimmon.server.http.endpoints.chat import create_chat_completion
from persimmon.server.http.endpoints.completions import create_completion
from persimmon.server.http.endpoints.documentation import Documentation
from persimmon.server.http.endpoints.service import Service, endless_seeds
from persimmon.server.http.middleware.access import Access
from persimmon.server.http.middleware.addresses import Addresses
from persimmon.server.http.middleware.authentication import Authentication, KeyCheck
from persimmon.server.http.middleware.gate import Gate, GateKeeper
from persimmon.server.http.middleware.observer import Observer
from persimmon.server.http.middleware.origins import OriginCheck
from persimmon.server.http.middleware.pace import Pace
from persimmon.server.http.request_record import REQUEST_ID_HEADER, record_of
from persimmon.server.http.schemas.adept_protocol import AdeptRequest
from persimmon.server.http.schemas.parsing import parse
from persimmon.server.http.schemas.pooling_protocol import ClassifyRequest, EmbeddingRequest
from persimmon.server.http.schemas.protocol import ChatCompletionRequest, CompletionRequest
from persimmon.server.http.schemas.responses import ChatCompletion, ChatCompletionChunk, Completion
from persimmon.server.http.schemas.token_protocol import DetokenizeRequest, TokenizeRequest
from persimmon.server.http.transport.body import BodyReader
from persimmon.server.http.transport.siblings import Siblings, WorkerPlace
from persimmon.server.metrics import Metrics
from persimmon.server.tracing import Tracing

COMPLETIONS = "/v1/completions"
CHAT_COMPLETIONS = "/v1/chat/completions"
ADEPT = "/api"
EMBEDDINGS = "/v1/embeddings"
CLASSIFY = "/classify"
CLASSIFY_TOKENS = "/classify/tokens"
TOKENIZE = "/tokenize"
DETOKENIZE = "/detokenize"

ENGINE_PATHS = (COMPLETIONS, CHAT_COMPLETIONS, ADEPT, EMBEDDINGS, CLASSIFY, CLASSIFY_TOKENS)
"""The endpoints that ask something of the engine."""

GENERATING_PATHS = (COMPLETIONS, CHAT_COMPLETIONS, ADEPT)
"""Of these the ones whose answers are generated."""

PATHS = (*ENGINE_PATHS, TOKENIZE, DETOKENIZE, *status.PATHS)
"""All endpoints."""


def application(
    settings: Settings,
    folder: Path,
    served_model_name: str,
    engine_address: str,
    place: WorkerPlace | None = None,
    gate: Gate | None = None,
    access: Access | None = None,
    tracing: Tracing | None = None,
    key_check: KeyCheck | None = None,
) -> tuple[FastAPI, EngineClient]:
    """The application for a checkpoint, and its connection to the engine, which the caller starts and closes.

    Args:
        settings: of the server.
        folder: the checkpoint, of which config.json and the tokenizer are read.
        served_model_name: the model's name in the API.
        engine_address: the engine's ZeroMQ endpoint.
        place: the worker's among others; None for one alone.
        gate: who is let in; None for everybody.
        access: what is asked of clients; None for nothing.
        tracing: where requests become spans; None for nowhere.
        key_check: the keys, if they may change; None for those of `access`.

    Raises:
        CheckpointError: config.json or the tokenizer cannot be used.
    """
    config = PersimmonConfig.from_folder(folder)
    vocabulary = VocabularyMap.from_folder(folder, config)
    if vocabulary is not None:
        config = vocabulary.original(config)
    tokenizer = Tokenizer.from_folder(folder, settings.add_bos_token)
    warm_up = GENERATES if config.architecture is Architecture.CAUSAL_LM else CLASSIFIES
    engine = EngineClient(engine_address, vocabulary, None if gate is None else gate.load, warm_up)
    app = create_app(
        engine,
        tokenizer,
        config,
        served_model_name,
        settings.seed,
        vocabulary,
        place,
        gate,
        access,
        tracing,
        key_check,
        chat_format(folder, config, tokenizer, settings.add_bos_token),
        settings.additional_properties,
    )
    return app, engine


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    config: PersimmonConfig,
    served_model_name: str,
    seed: int = 0,
    vocabulary: VocabularyMap | None = None,
    place: WorkerPlace | None = None,
    gate: Gate | None = None,
    access: Access | None = None,
    tracing: Tracing | None = None,
    key_check: KeyCheck | None = None,
    chat: Chat | None = None,
    additional_properties: bool = False,
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
        gate: who is let in; None for everybody.
        access: what is asked of clients; None for nothing.
        tracing: where requests become spans; None for nowhere.
        key_check: the keys, if they may change; None for those of `access`.
        chat: the served model's chat format; None for Adept's.
        additional_properties: whether objects of JSON schemas are open where neither schema nor request says.
    """
    place = place or WorkerPlace()
    access = access or Access()
    key_check = key_check or access.key_check(place)
    gate = gate or Gate(engine.load)
    metrics = Metrics(engine, served_model_name)
    siblings = Siblings(place, metrics.snapshot)
    # Every worker takes its own part of one sequence, so that no two give requests the same seed.
    seeds = itertools.islice(endless_seeds(seed), place.index, None, place.count)
    service = Service(
        engine,
        tokenizer,
        config,
        served_model_name,
        metrics,
        seeds,
        siblings,
        gate,
        chat or Chat.adepts(tokenizer),
        vocabulary,
        created=place.started,
        max_priority=access.max_priority,
        additional_properties=additional_properties,
    )
    app = FastAPI(
        title="Persimmon server",
        version=version("persimmon-server"),
        description="OpenAI-style completions, chat, embeddings and classification for Adept's Persimmon models, and "
        "the API of Adept's own server.",
        lifespan=lambda _: siblings.listening(),
        redirect_slashes=False,  # see `Addresses`
    )
    documentation = Documentation()
    documentation.install(app)
    errors.install(app, PATHS)
    app.add_middleware(GateKeeper, gate=gate, engine_paths=ENGINE_PATHS)
    app.add_middleware(
        Authentication,
        check=key_check,
        open_paths=status.OPEN_PATHS if access.metrics_need_key else (*status.OPEN_PATHS, status.METRICS),
    )
    if access.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, "retry-after"],
        )
    app.add_middleware(OriginCheck, allowed=access.allowed_origins, has_keys=bool(access.keys.keys))
    app.add_middleware(Addresses, paths=PATHS)
    app.add_middleware(Pace, at_once=status.OPEN_PATHS)
    app.add_middleware(
        Observer,
        metrics=metrics,
        generating=GENERATING_PATHS,
        probes=status.PROBED_PATHS,
        tracing=tracing,
        log_prompts=access.log_prompts,
    )
    bodies = BodyReader(access.max_body_bytes, access.read_timeout)
    app.include_router(status.router(service, documentation))

    @app.post(COMPLETIONS, **documentation.endpoint({200: Completion}, CompletionRequest, chunk=Completion))
    async def completions(request: Request) -> Response:
        """Continues one or more prompts."""
        body = parse(await bodies.read(request), CompletionRequest)
        return await create_completion(service, body, request.receive, record_of(request.scope))

    @app.post(
        CHAT_COMPLETIONS,
        **documentation.endpoint({200: ChatCompletion}, ChatCompletionRequest, chunk=ChatCompletionChunk),
    )
    async def chat_completions(request: Request) -> Response:
        """Answers the last message of a conversation."""
        body = parse(await bodies.read(request), ChatCompletionRequest)
        return await create_chat_completion(service, body, request.receive, record_of(request.scope))

    @app.put(ADEPT, **documentation.endpoint({200: adept_api.AdeptAnswer}, AdeptRequest))
    async def adept(request: Request) -> Response:
        """Continues one or more prompts, as Adept's own server does."""
        body = parse(await bodies.read(request), AdeptRequest)
        return await adept_api.generate(service, body, request.receive, record_of(request.scope))

    @app.post(EMBEDDINGS, **documentation.endpoint({200: embeddings.Embeddings}, EmbeddingRequest))
    async def create_embeddings(request: Request) -> Response:
        """The model's final hidden states of one or more inputs."""
        body = parse(await bodies.read(request), EmbeddingRequest)
        return await embeddings.create_embeddings(service, body, request.receive, record_of(request.scope))

    @app.post(CLASSIFY, **documentation.endpoint({200: classify.Classifications}, ClassifyRequest))
    async def classify_texts(request: Request) -> Response:
        """What a model that classifies texts says of one or more inputs."""
        body = parse(await bodies.read(request), ClassifyRequest)
        return await classify.classify(service, body, request.receive, record_of(request.scope))

    @app.post(CLASSIFY_TOKENS, **documentation.endpoint({200: classify.TokenClassifications}, ClassifyRequest))
    async def classify_tokens(request: Request) -> Response:
        """What a model that classifies tokens says of each token of one or more inputs."""
        body = parse(await bodies.read(request), ClassifyRequest)
        return await classify.classify_tokens(service, body, request.receive, record_of(request.scope))

    @app.post(TOKENIZE, **documentation.endpoint({200: tokens.Tokens}, TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text or of a conversation."""
        return await tokens.tokenize(service, parse(await bodies.read(request), TokenizeRequest))

    @app.post(DETOKENIZE, **documentation.endpoint({200: tokens.Text}, DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        return await tokens.detokenize(service, parse(await bodies.read(request), DetokenizeRequest))

    return app
