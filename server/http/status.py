"""What the server says of itself: the model it serves, whether it can, its metrics, its version.

No endpoint here sends anything to the engine: asking a busy server how it is must not make it busier.
"""

from importlib.metadata import version

import msgspec
from fastapi import APIRouter, Response
from msgspec import UNSET

from server.engine.client import EngineDeadError, EngineNotReadyError
from server.http.responses import Model, ModelList
from server.http.service import Service
from server.metrics import CONTENT_TYPE


def router(service: Service) -> APIRouter:
    """The routes, for one worker's service."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> Response:
        """Lists the one model that is served."""
        return _json(ModelList([_model(service)]))

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """Describes the served model."""
        service.check_model(name)
        return _json(_model(service))

    @routes.get("/livez")
    async def live() -> Response:
        """200 whenever this process answers."""
        return _json({"status": "alive"})

    @routes.get("/health")
    @routes.get("/readyz")
    async def ready() -> Response:
        """200 while the engine serves, 503 while it loads and after its end."""
        try:
            service.max_model_len  # noqa: B018 - raises where there is no engine to serve
        except EngineNotReadyError as error:
            return _json({"status": "loading", "reason": str(error)}, 503)
        except EngineDeadError as error:
            return _json({"status": "dead", "reason": str(error)}, 503)
        return _json({"status": "ready"})

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE)

    @routes.get("/version")
    async def server_version() -> Response:
        """The server's version."""
        return _json({"version": version("persimmon-server")})

    return routes


def _model(service: Service) -> Model:
    info = service.engine.info
    return Model(service.served_model_name, service.created, UNSET if info is None else info.max_model_len)


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
