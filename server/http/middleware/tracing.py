"""OpenTelemetry traces: one span for each request, with the times that it queued, read its prompt and generated.

Knows spans and their exporter, which OpenTelemetry's own variables (OTEL_*) configure.  Its SDK is an extra, off by
default, and is imported when tracing begins and not before.
"""

import importlib.util
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from persimmon.server.http.request_record import RequestRecord
from persimmon.server.settings.section import SettingsError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

SERVICE_NAME = "persimmon"
_NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A request that has been answered.

    Attributes:
        record: what is known of it.
        method: HTTP's.
        endpoint: the path of its route.
        status: HTTP's.
        headers: of the request; `traceparent` and `tracestate` are read.
        ended: when its last byte went, on time.perf_counter's clock.
    """

    record: RequestRecord
    method: str
    endpoint: str
    status: int
    headers: Mapping[str, str]
    ended: float


def check_installed() -> None:
    """Raises the SettingsError of a server that is to trace without OpenTelemetry's packages."""
    for name in _NEEDED:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # a package above it is missing
            found = False
        if not found:
            raise SettingsError(
                f"--tracing needs the Python package {name}, which is not installed: pip install "
                f"'persimmon-server[tracing]'"
            )


class Tracing:
    """Turns finished requests into spans.

    Names of attributes are those of OpenTelemetry's semantic conventions for HTTP and generative AI.

    Args:
        provider: makes and exports spans; closed by `close`.
        model: the served model's name.
    """

    def __init__(self, provider: "TracerProvider", model: str) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("persimmon")
        self._model = model
        self._kind = SpanKind.SERVER
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def from_environment(cls, model: str) -> "Tracing":
        """Spans go to where OTEL_EXPORTER_OTLP_ENDPOINT says, over HTTP, from a thread of their own."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        provider = TracerProvider(resource=Resource.create({} if named else {"service.name": SERVICE_NAME}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider, model)

    def add(self, request: FinishedRequest) -> None:
        """Records a request, as a part of the trace that its `traceparent` names, if it has one."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        record = request.record
        # Spans have wall-clock times, records those of a clock that never jumps.
        offset = time.time_ns() - round(time.perf_counter() * 1e9)

        def nanoseconds(seconds: float) -> int:
            return offset + round(seconds * 1e9)

        attributes: dict[str, str | int | float | list[str]] = {
            "http.request.method": request.method,
            "http.route": request.endpoint,
            "http.response.status_code": request.status,
            "http.request.header.x-request-id": [record.request_id],
        }
        if request.status >= 500:
            attributes["error.type"] = str(request.status)
        if record.prompt_tokens:
            attributes |= {
                "gen_ai.request.model": self._model,
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
                "gen_ai.usage.output_tokens": record.output_tokens,
                "gen_ai.response.finish_reasons": sorted(record.finish_reasons),
            }
        if record.time_to_first_token is not None:
            attributes["gen_ai.server.time_to_first_token"] = record.time_to_first_token
        span = self._tracer.start_span(
            f"{request.method} {request.endpoint}",
            self._propagator.extract(request.headers),
            self._kind,
            attributes,
            start_time=nanoseconds(record.arrival),
        )
        if request.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        for name, (start, end) in _parts(record, request.ended).items():
            self._part(name, inside, nanoseconds(start), nanoseconds(end))
        span.end(nanoseconds(request.ended))

    def close(self) -> None:
        """Sends what has not been sent yet; OTEL_BSP_EXPORT_TIMEOUT says how long that may take."""
        self._provider.shutdown()

    def _part(self, name: str, inside: "Context", start: int, end: int) -> None:
        self._tracer.start_span(name, inside, start_time=start).end(end)


def _parts(record: RequestRecord, ended: float) -> dict[str, tuple[float, float]]:
    """When a request queued, read its prompt and generated, as far as it came."""
    parts: dict[str, tuple[float, float]] = {}
    if record.queue_seconds is None:
        return parts
    scheduled = record.arrival + record.queue_seconds
    parts["queue"] = (record.arrival, scheduled)
    parts["prefill"] = (scheduled, ended if record.first_token is None else max(scheduled, record.first_token))
    if record.first_token is not None:
        parts["decode"] = (record.first_token, ended)
    return parts
