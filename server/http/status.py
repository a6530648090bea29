"""What the server says of itself: the model it serves, whether it can, its metrics, its version.

No endpoint here sends anything to the engine: asking a busy server how it is must not make it busier.
"""

from importlib.metadata import version

import msgspec
from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from msgspec import UNSET, Struct, UnsetType

from server.engine.client import EngineDeadError, EngineNotReadyError
from server.http.adept_api import AdeptHealth
from server.http.documentation import Documentation
from server.http.errors import ErrorBody
from server.http.model_use import USES
from server.http.responses import Model, ModelList
from server.http.service import Service
from server.metrics import CONTENT_TYPE


class Health(Struct, frozen=True):
    """The answer of the probes."""

    status: str
    reason: str | UnsetType = UNSET


class Version(Struct, frozen=True):
    """The answer of GET /version."""

    version: str


def router(service: Service, documentation: Documentation) -> APIRouter:
    """The routes, for one worker's service."""
    routes = APIRouter()

    @routes.get("/v1/models", **documentation.endpoint({200: ModelList}))
    async def models() -> Response:
        """Lists the one model that is served."""
        return _json(ModelList([_model(service)]))

    @routes.get("/v1/models/{name:path}", **documentation.endpoint({200: Model, 404: ErrorBody}))
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
    async def ready() -> Response:
        """200 while the engine serves, 503 while it loads and after its end."""
        try:
            service.max_model_len  # noqa: B018 - raises where there is no engine to serve
        except EngineNotReadyError as error:
            return _json(Health("loading", str(error)), 503)
        except EngineDeadError as error:
            return _json(Health("dead", str(error)), 503)
        return _json(Health("ready"))

    @routes.get("/healthz", **documentation.endpoint({200: AdeptHealth, 503: AdeptHealth}))
    async def healthy() -> Response:
        """What /health says, as Adept's own server says it."""
        return _json(AdeptHealth(True)) if service.engine.ready else _json(AdeptHealth(False), 503)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics of the server, whichever worker answers."""
        return Response(service.metrics.exposition(await service.siblings.snapshots()), media_type=CONTENT_TYPE)

    @routes.get("/version", **documentation.endpoint({200: Version}))
    async def server_version() -> Response:
        """The server's version."""
        return _json(Version(version("persimmon-server")))

    return routes


def _model(service: Service) -> Model:
    info, config = service.engine.info, service.config
    return Model(
        service.served_model_name,
        service.created,
        UNSET if info is None else info.max_model_len,
        USES[config.architecture].task,
        list(config.labels) or UNSET,
    )


def _json(content: Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
