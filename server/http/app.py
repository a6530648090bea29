"""The HTTP application of an API worker: its routes, and what happens to every request on the way in and out.

Knows no endpoint's insides.
"""

import itertools
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from persimmon.model.chat import Chat, chat_format
from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.images import ImageLimits, ImageReader, ImageSettings
from persimmon.model.tokenizer import Tokenizer
from persimmon.model.vocabulary import VocabularyMap
from persimmon.server.config import Settings
from persimmon.server.engine.client import CLASSIFIES, GENERATES
from persimmon.server.engine.engines import EngineAccess, connected
from persimmon.server.engine.load import Load
from persimmon.server.http import errors
from persimmon.server.http.endpoints import documentation
from persimmon.server.http.endpoints.endpoint import Call, Endpoint
from persimmon.server.http.endpoints.service import Service, endless_seeds
from persimmon.server.http.endpoints.table import ENDPOINTS, METRICS, addresses
from persimmon.server.http.generation.image_loader import ImageLoader
from persimmon.server.http.middleware.access import Access
from persimmon.server.http.middleware.addresses import Addresses
from persimmon.server.http.middleware.authentication import Authentication, KeyCheck
from persimmon.server.http.middleware.gate import Gate, GateKeeper
from persimmon.server.http.middleware.observer import Observer
from persimmon.server.http.middleware.origins import OriginCheck
from persimmon.server.http.middleware.pace import Pace
from persimmon.server.http.middleware.tracing import Tracing
from persimmon.server.http.request_record import REQUEST_ID_HEADER, record_of
from persimmon.server.http.schemas.parsing import parse
from persimmon.server.http.transport.body import BodyReader
from persimmon.server.http.transport.siblings import Siblings, WorkerPlace
from persimmon.server.metrics import Metrics
from persimmon.server.vitals import Vitals


def application(
    settings: Settings,
    folder: Path,
    served_model_name: str,
    engine_addresses: Sequence[str],
    place: WorkerPlace | None = None,
    gate: Gate | None = None,
    access: Access | None = None,
    tracing: Tracing | None = None,
    key_check: KeyCheck | None = None,
) -> tuple[FastAPI, EngineAccess]:
    """The application for a checkpoint, and its access to the engines, which the caller starts and closes.

    Args:
        settings: of the server.
        folder: the checkpoint, of which config.json and the tokenizer are read.
        served_model_name: the model's name in the API.
        engine_addresses: the ZeroMQ endpoints of the engines.
        place: the worker's among others; None for a single one.
        gate: which requests are admitted; None for all.
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
    engine = connected(
        engine_addresses,
        vocabulary,
        Load(Vitals.private(engines=len(engine_addresses))) if gate is None else gate.load,
        warm_up,
        block_size=settings.block_size,
        prefix_caching=settings.enable_prefix_caching,
        worker=0 if place is None else place.index,
        max_chunks_per_second=settings.max_chunks_per_second,
    )
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
        images=_image_loader(settings, folder, config),
    )
    return app, engine


def _image_loader(settings: Settings, folder: Path, config: PersimmonConfig) -> ImageLoader | None:
    """Reads the images of requests as the checkpoint wants them; None for a model that reads none."""
    if config.vision is None:
        return None
    limits = ImageLimits()
    fetcher = None
    if settings.allowed_media_domains:
        from persimmon.server.http.transport.media_fetcher import MediaFetcher  # brings an HTTP client

        fetcher = MediaFetcher(settings.allowed_media_domains, limits.max_bytes)
    return ImageLoader(
        ImageReader(ImageSettings.from_folder(folder, config.vision), limits),
        limits.max_bytes,
        max_images=None if settings.limit_mm_per_prompt is None else settings.limit_mm_per_prompt.image,
        fetcher=fetcher,
        max_body_bytes=settings.max_body_size,
    )


def create_app(
    engine: EngineAccess,
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
    images: ImageLoader | None = None,
    endpoints: Sequence[Endpoint[Any]] = ENDPOINTS,
) -> FastAPI:
    """The application of one API worker.

    Args:
        engine: the connection to the engine, or to all engines, which the caller starts and closes.
        tokenizer: the served model's.
        config: the served model's, its token ids those of the tokenizer.
        served_model_name: its name in the API.
        seed: of the seeds that requests without one get.
        vocabulary: of a trimmed checkpoint, else None.
        place: the worker's among others; None for a single one.
        gate: which requests are admitted; None for all.
        access: what is asked of clients; None for nothing.
        tracing: where requests become spans; None for nowhere.
        key_check: the keys, if they may change; None for those of `access`.
        chat: the served model's chat format; None for Adept's.
        additional_properties: whether objects of JSON schemas are open where neither schema nor request says.
        images: reads the images of requests; None where the model reads none.
        endpoints: what is served.
    """
    place = place or WorkerPlace()
    access = access or Access()
    key_check = key_check or access.key_check(place)
    gate = gate or Gate(engine.load)
    open_paths = frozenset(each.path for each in endpoints if each.open_without_key)
    metrics = Metrics(engine.engines, served_model_name, open_paths)
    siblings = Siblings(place, metrics.snapshot)
    # Every worker takes its own part of one sequence, so that no two give requests the same seed.
    seeds = itertools.islice(endless_seeds(seed), place.index, None, place.count)
    service = Service(
        engine=engine,
        tokenizer=tokenizer,
        config=config,
        served_model_name=served_model_name,
        metrics=metrics,
        seeds=seeds,
        siblings=siblings,
        gate=gate,
        chat=chat or Chat.adepts(tokenizer),
        vocabulary=vocabulary,
        created=place.started,
        max_priority=access.max_priority,
        additional_properties=additional_properties,
        images=images,
    )
    app = FastAPI(
        title="Persimmon server",
        version=version("persimmon-server"),
        description="OpenAI-style completions, chat, embeddings and classification for Adept's Persimmon models, and "
        "the API of Adept's own server.",
        lifespan=lambda _: siblings.listening(),
        redirect_slashes=False,  # see `Addresses`
    )
    app.state.metrics = metrics  # for a program around it
    bodies = BodyReader(access.max_body_bytes, access.read_timeout)
    for endpoint in endpoints:
        served = _served(endpoint, service, bodies)
        described = documentation.route_arguments(endpoint)
        app.add_api_route(endpoint.path, served, methods=[endpoint.method], **described)
    documentation.install(app, endpoints)
    routes = {route.path: route for route in app.routes if isinstance(route, APIRoute)}
    known = addresses(endpoints)
    errors.install(app, known)
    app.add_middleware(
        GateKeeper, gate=gate, engine_routes={each.path: routes[each.path] for each in endpoints if each.uses_engine}
    )
    app.add_middleware(
        Authentication,
        check=key_check,
        open_paths=open_paths - {METRICS} if access.metrics_need_key else open_paths,
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
    app.add_middleware(Addresses, paths=known)
    app.add_middleware(Pace, at_once=[each.path for each in endpoints if each.answered_at_once])
    app.add_middleware(
        Observer,
        metrics=metrics,
        generating=[each.path for each in endpoints if each.generates],
        probes=[each.path for each in endpoints if each.polled],
        tracing=tracing,
        log_prompts=access.log_prompts,
    )
    return app


def _served(endpoint: Endpoint[Any], service: Service, bodies: BodyReader) -> Callable[[Request], Awaitable[Response]]:
    """What FastAPI calls for an endpoint: reads and parses the body, if there is one, and calls the handler."""
    handler, kind = endpoint.handler, endpoint.request

    async def answer(request: Request) -> Response:
        body = None if kind is None else await bodies.read(request, partial(parse, kind=kind))
        return await handler(
            service,
            Call(
                request=body, receive=request.receive, record=record_of(request.scope), path_params=request.path_params
            ),
        )

    return answer
