"""What the server says of itself: the model it serves, whether it can, its metrics, its version.

No endpoint here sends anything to the engine: asking a busy server how it is must not make it busier.
"""

import asyncio
from importlib.metadata import version

from fastapi.responses import PlainTextResponse
from msgspec import UNSET

from persimmon.server.engine.client import EngineClient, EngineDeadError, EngineNotReadyError
from persimmon.server.http.endpoints.endpoint import Call
from persimmon.server.http.endpoints.model_use import USES
from persimmon.server.http.endpoints.service import Service
from persimmon.server.http.middleware.gate import Gate
from persimmon.server.http.request_record import RequestRecord
from persimmon.server.http.schemas.adept import AdeptHealth
from persimmon.server.http.schemas.status import Health, Model, ModelList, Version
from persimmon.server.http.transport.json_response import JsonResponse
from persimmon.server.metrics import CONTENT_TYPE
from persimmon.server.step_watch import step_limit


async def models(service: Service, call: Call[None]) -> JsonResponse[ModelList]:
    """Lists the one model that is served."""
    return JsonResponse(ModelList([_model(service)]))


async def model(service: Service, call: Call[None]) -> JsonResponse[Model]:
    """Describes the served model."""
    service.check_model(call.path_params["name"])
    return JsonResponse(_model(service))


async def live(service: Service, call: Call[None]) -> JsonResponse[Health]:
    """200 whenever this process answers."""
    return JsonResponse(Health("alive"))


async def ready(service: Service, call: Call[None]) -> JsonResponse[Health]:
    """200 while an engine serves; 503 while the server loads or stops, and while all engines are dead or hung."""
    health = _noted(_health(service), call.record)
    return JsonResponse(health, 200 if health.ready else 503)


async def healthy(service: Service, call: Call[None]) -> JsonResponse[AdeptHealth]:
    """What /health says, as Adept's own server says it."""
    ready = _noted(_health(service), call.record).ready
    return JsonResponse(AdeptHealth(ready), 200 if ready else 503)


async def metrics(service: Service, call: Call[None]) -> PlainTextResponse:
    """Prometheus metrics of the server, whichever worker answers."""
    snapshots = await service.siblings.snapshots()
    # A thousand lines take some milliseconds, which streams need not wait for.
    text = await asyncio.to_thread(service.metrics.exposition, snapshots)
    return PlainTextResponse(text, media_type=CONTENT_TYPE)


async def server_version(service: Service, call: Call[None]) -> JsonResponse[Version]:
    """The server's version."""
    return JsonResponse(Version(version("persimmon-server")))


def _health(service: Service) -> Health:
    gate = service.gate
    if gate.draining:
        return Health("draining", "the server is shutting down")
    engines = service.engine.engines
    each = [_engine_health(engine, gate, number) for number, engine in enumerate(engines)]
    serving = sum(health.ready for health in each)
    if serving in (0, len(each)):
        return each[0]
    reasons = [f"engine {number}: {health.reason}" for number, health in enumerate(each) if not health.ready]
    verb = "serves" if serving == 1 else "serve"
    return Health("degraded", f"{serving} of {len(each)} engines {verb}; {', '.join(reasons)}")


def _engine_health(engine: EngineClient, gate: Gate, number: int) -> Health:
    """Of one engine: "ready", "loading", "dead" or "hung"."""
    try:
        info = engine.check_ready()
    except EngineNotReadyError as error:
        return Health("loading", str(error))
    except EngineDeadError as error:
        return Health("dead", str(error))
    overdue = gate.load.overdue_seconds(number)
    if overdue > step_limit(gate.limits.step_timeout, info.device):
        return Health("hung", f"the engine has work but has not finished a step for {overdue:.0f} s")
    return Health("ready")


def _noted(health: Health, record: RequestRecord) -> Health:
    """Leaves the state in the request's record, where it is not good: the access log shows when it changes."""
    if health.status != "ready":
        record.error = health.status
    return health


def _model(service: Service) -> Model:
    info, config = service.engine.info, service.config
    return Model(
        service.served_model_name,
        service.created,
        USES[config.architecture].task,
        max_model_len=UNSET if info is None else info.max_model_len,
        labels=list(config.labels) or UNSET,
        input_modalities=("text",) if config.vision is None else ("text", "image"),
    )
