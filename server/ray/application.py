"""The Ray Serve application: `serve run persimmon.server.ray.application:app`.

Knows Ray Serve's deployments; what a replica answers is the embedded server's affair.
"""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import click
import ray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, RequestRouterConfig
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from persimmon.model.errors import CheckpointError
from persimmon.server.config import EMBEDDED_GROUPS, Settings, listed, read_settings
from persimmon.server.embedded import EmbeddedServer, EngineFailedError
from persimmon.server.http.middleware.gate import BATCHES_IN_FLIGHT, MAX_RETRY_SECONDS
from persimmon.server.http.request_record import REQUEST_ID_HEADER
from persimmon.server.ray import proxy
from persimmon.server.ray.autoscaling import KV_CACHE_USAGE, wanted_replicas
from persimmon.server.ray.environment import ENVIRONMENT
from persimmon.server.ray.exporter import RayMetrics
from persimmon.server.ray.prefixes import BYTES_PER_TOKEN, RecentPrefixes
from persimmon.server.ray.request_router import PREFIXES, PrefixRouter
from persimmon.server.settings.section import SettingsError

HEALTH_SECONDS = 1.0
"""Time between two health checks of a replica."""

REPORT_SECONDS = 2.0
"""Time between two reports of a replica to the routers."""

METRICS_SECONDS = 5.0
"""Time between two updates of the metrics that Ray exports."""

REPORTED_KEYS = 2000
"""Of prompts' beginnings, in a report; Ray's controller passes 34 KB on to every proxy then."""

MAX_CHUNKS_PER_SECOND = 1000
"""Of a replica, in all its streams: each chunk takes processor time of replica and proxy, whatever its size."""

DRAIN_SECONDS = 120.0
"""For open requests of a replica that ends, as in deploy/kubernetes."""

CONSTRUCTOR_RETRIES = 2
"""Of a replica that cannot start, for a reason that another attempt seldom changes."""


class Placement(BaseModel):
    """The arguments of `app` that are not settings of the server.

    Attributes:
        num_replicas: of the server; the minimum with autoscaling.
        max_replicas: the maximum with autoscaling; None for a fixed number.
        num_cpus: cores of a replica, and threads of its engine on a CPU; None for one for each rank.
        num_gpus: of a replica.
    """

    model_config = ConfigDict(frozen=True)

    num_replicas: int = Field(2, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    num_cpus: float | None = Field(None, gt=0)
    num_gpus: float = Field(0, ge=0)

    @model_validator(mode="after")
    def _bounds(self) -> "Placement":
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}; expected num_replicas or more, {self.num_replicas}")
        return self


class InvalidArgumentsError(click.ClickException):
    """The application cannot be built; `serve run` shows the message in one line and exits with code 2."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        """Writes the message as `persimmon` does."""
        click.echo(f"persimmon: error: {self.format_message()}", file=file, err=True)


class Replica:
    """One engine, and the server's application in this process.

    Args:
        settings: of the `EmbeddedServer`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._server = EmbeddedServer(**settings)
        self._prefixes = RecentPrefixes(0)
        self._exporting: asyncio.Task[None] | None = None
        self._failed_checks = 0

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Ray Serve: what answers, when the model is loaded."""
        await self._server.start()
        await self._server.ready()
        self._prefixes = RecentPrefixes(self._server.kv_cache_tokens * BYTES_PER_TOKEN)
        self._exporting = asyncio.create_task(self._export())

        # Not a method: uvicorn, which runs the lifespan, takes one for an application of ASGI 2.
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and (keys := Headers(scope=scope).get(proxy.SESSION_HEADER)):
                self._prefixes.add(keys.split(","))
            await self._server.app(scope, receive, _without_request_id(send))

        return app

    async def check_health(self) -> None:
        """Ray Serve: raises the reason why the replica must be replaced."""
        try:
            self._server.check_health()
        except EngineFailedError:
            # Ray drains a replica before it ends it, but the streams of a hung engine do not end by themselves.  One
            # failure may also mean that the whole machine was paused.
            self._failed_checks += 1
            if self._failed_checks > 1:
                await self._server.stop()
            raise
        self._failed_checks = 0

    async def record_routing_stats(self) -> dict[str, str]:
        """Ray Serve: what the routers get to know."""
        return {PREFIXES: " ".join(self._prefixes.latest(REPORTED_KEYS))}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray Serve: what the autoscaler gets to know."""
        families = {family.name: family for family in self._server.metrics()}
        return {sample.name: sample.value for sample in families[KV_CACHE_USAGE].samples}

    async def __del__(self) -> None:
        """Ray Serve: the replica ends; its requests have been answered, or have had the time for it."""
        if self._exporting is not None:
            self._exporting.cancel()
        await self._server.stop()

    async def _export(self) -> None:
        exporter = RayMetrics()
        while True:
            exporter.export(self._server.metrics())
            await asyncio.sleep(METRICS_SECONDS)


def _without_request_id(send: Send) -> Send:
    """Leaves the header that Ray's proxy adds to the proxy."""

    async def send_without(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [header for header in message["headers"] if header[0] != REQUEST_ID_HEADER.encode()]
            message = {**message, "headers": headers}
        await send(message)

    return send_without


def app(arguments: dict[str, Any]) -> Application:
    """Ray Serve's application builder.

    Args:
        arguments: those of `Placement`, and settings of `EmbeddedServer`; numbers or texts.

    Raises:
        InvalidArgumentsError: one of them is invalid, or the checkpoint is here and cannot be served.
    """
    if not ray.is_initialized():
        for name, value in ENVIRONMENT.items():  # of the cluster that this process starts next
            os.environ.setdefault(name, value)
    try:
        placement, settings = _checked(arguments)
    except (SettingsError, CheckpointError) as error:
        raise InvalidArgumentsError(str(error)) from None
    requests = BATCHES_IN_FLIGHT * settings.max_num_seqs
    return (
        serve.deployment(
            serve.ingress()(Replica),
            name="persimmon",
            ray_actor_options={
                "num_cpus": placement.num_cpus or settings.tensor_parallel_size,
                "num_gpus": placement.num_gpus,
            },
            max_ongoing_requests=requests,
            max_queued_requests=requests,
            backpressure_config=BackpressureConfig(status_code=429, retry_after_s=MAX_RETRY_SECONDS),
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_timeout_s=DRAIN_SECONDS,
            max_constructor_retry_count=CONSTRUCTOR_RETRIES,
            request_router_config=RequestRouterConfig(
                request_router_class=PrefixRouter, request_routing_stats_period_s=REPORT_SECONDS
            ),
            **_number(placement, settings),
        )
    ).bind(_of_server(arguments))


def _of_server(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the `EmbeddedServer`."""
    own = {name: value for name, value in arguments.items() if name not in Placement.model_fields}
    return {"max_chunks_per_second": MAX_CHUNKS_PER_SECOND, **own}


def _checked(arguments: Mapping[str, Any]) -> tuple[Placement, Settings]:
    """The arguments as they were read.

    Raises:
        SettingsError: one of them is invalid.
        CheckpointError: the checkpoint is on this machine and cannot be served.  Another one is left to the replicas:
            the machine that builds an application need not have it.
    """
    allowed = [*Placement.model_fields, *(name for name, _ in listed(EMBEDDED_GROUPS))]
    for name in arguments:
        if name not in allowed:
            raise SettingsError(f"{name} is not an argument of the application; expected one of {', '.join(allowed)}")
    try:
        placement = Placement.model_validate(
            {name: value for name, value in arguments.items() if name in Placement.model_fields}
        )
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        place = f"{first['loc'][0]} is {first['input']}: " if first["loc"] else ""
        raise SettingsError(place + message[0].lower() + message[1:]) from None
    settings = read_settings(_of_server(arguments))
    ranks = settings.tensor_parallel_size
    if placement.num_gpus and placement.num_gpus < ranks > 1:
        raise SettingsError(
            f"num_gpus is {placement.num_gpus:g}, but tensor_parallel_size is {ranks}: give each rank a GPU"
        )
    if settings.model is None or Path(settings.model).exists():
        EmbeddedServer(**_of_server(arguments))
    return placement, settings


def _number(placement: Placement, settings: Settings) -> dict[str, Any]:
    """How many replicas there are, as Ray has it."""
    if placement.max_replicas is None:
        return {"num_replicas": placement.num_replicas}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=placement.num_replicas,
            max_replicas=placement.max_replicas,
            # Each replica has as many as it runs at once.
            target_ongoing_requests=settings.max_num_seqs,
            policy=AutoscalingPolicy(policy_function=wanted_replicas),
        )
    }
