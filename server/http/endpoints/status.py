"""What the server says of itself: the model it serves, whether it can, its metrics, its version.

No endpoint here sends anything to the engine: asking a busy server how it is must not make it busier.
"""

import asyncio
from importlib.metadata import version
from typing import Literal

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from msgspec import UNSET, Struct, UnsetType

from persimmon.server.engine.client import EngineDeadError, EngineNotReadyError
from persimmon.server.http.endpoints.adept_api import AdeptHealth
from persimmon.server.http.endpoints.documentation import Documentation
from persimmon.server.http.endpoints.model_use import USES
from persimmon.server.http.endpoints.service import Service
from persimmon.server.http.errors import ErrorBody
from persimmon.server.http.request_record import record_of
from persimmon.server.http.schemas.responses import Model, ModelList
from persimmon.server.metrics import CONTENT_TYPE
from persimmon.server.step_watch import step_limit

METRICS = "/metrics"
MODELS = "/v1/models"

OPEN_PATHS = ("/health", "/livez", "/readyz", "/healthz", "/version")
"""What everybody is told, whatever the server asks of others: load balancers have no keys."""

PATHS = (*OPEN_PATHS, METRICS, MODELS)
"""All that is answered here."""

PROBED_PATHS = ("/health", "/livez", "/readyz", "/healthz", METRICS)
"""What is asked every few seconds."""


class Health(Struct, frozen=True):
    """The answer of the probes."""

    status: Literal["alive", "ready", "loading", "dead", "hung", "draining"]
    reason: str | UnsetType = UNSET

    @property
    def ready(self) -> bool:
        """Whether requests are served."""
        return self.status == "ready"


class Version(Struct, frozen=True):
    """The answer of GET /version."""

    version: str


def router(service: Service, documentation: Documentation) -> APIRouter:
    """The routes, for one worker's service."""
    routes = APIRouter()

    @routes.get(MODELS, **documentation.endpoint({200: ModelList}))
    async def models() -> Response:
        """Lists the one model that is served."""
        return _json(ModelList([_model(service)]))

    @routes.get(MODELS + "/{name:path}", **documentation.endpoint({200: Model, 404: ErrorBody}))
    async def model(name: str) -> Response:
        """Describes the served model."""
        service.check_model(name)
        return _json(_model(service))

    @routes.get("/livez", **documentation.endpoint({200: Health}))
    async def live() -> Response:
        """200 whenever this process answers."""
        return _json(Health("alive"))

    @routes.get("/health", **documentation.endpoint({200: Health, 503: Health}))
    @routes.get("/readyz", **documentation.endpoint({200: Health, 503: Health}))
    async def ready(request: Request) -> Response:
        """200 while the server serves; 503 while it loads or stops, and while its engine is dead or hung."""
        health = _noted(_health(service), request)
        return _json(health, 200 if health.ready else 503)

    @routes.get("/healthz", **documentation.endpoint({200: AdeptHealth, 503: AdeptHealth}))
    async def healthy(request: Request) -> Response:
        """What /health says, as Adept's own server says it."""
        ready = _noted(_health(service), request).ready
        return _json(AdeptHealth(ready), 200 if ready else 503)

    @routes.get(METRICS, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics of the server, whichever worker answers."""
        snapshots = await service.siblings.snapshots()
        # A thousand lines take some milliseconds, which streams need not wait for.
        text = await asyncio.to_thread(service.metrics.exposition, snapshots)
        return Response(text, media_type=CONTENT_TYPE)

    @routes.get("/version", **documentation.endpoint({200: Version}))
    async def server_version() -> Response:
        """The server's version."""
        return _json(Version(version("persimmon-server")))

    return routes


def _health(service: Service) -> Health:
    gate = service.gate
    if gate.draining:
        return Health("draining", "the server is shutting down")
    try:
        engine = service.engine.check_ready()
    except EngineNotReadyError as error:
        return Health("loading", str(error))
    except EngineDeadError as error:
        return Health("dead", str(error))
    overdue = gate.load.overdue_seconds
    if overdue > step_limit(gate.limits.step_timeout, engine.device):
        return Health("hung", f"the engine has work, but has ended no step for {overdue:.0f} s")
    return Health("ready")


def _noted(health: Health, request: Request) -> Health:
    """Leaves the state in the request's record, where it is not good: the access log shows when it changes."""
    if not health.ready:
        record_of(request.scope).error = health.status
    return health


def _model(service: Service) -> Model:
    info, config = service.engine.info, service.config
    return Model(
        service.served_model_name,
        service.created,
        USES[config.architecture].task,
        max_model_len=UNSET if info is None else info.max_model_len,
        labels=list(config.labels) or UNSET,
    )


def _json(content: Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
