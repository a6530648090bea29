import subprocess
import sys
import time

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from persimmon.server.http.middleware import tracing
from persimmon.server.http.middleware.tracing import FinishedRequest, Tracing, check_installed
from persimmon.server.http.request_record import RequestRecord
from persimmon.server.settings.section import SettingsError

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def spans(request: FinishedRequest) -> dict[str, ReadableSpan]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traced = Tracing(provider, "demo")
    traced.add(request)
    traced.close()
    return {span.name: span for span in exporter.get_finished_spans()}


def finished(record: RequestRecord, status: int = 200, **headers: str) -> FinishedRequest:
    return FinishedRequest(
        record=record,
        method="POST",
        endpoint="/v1/completions",
        status=status,
        headers=headers,
        ended=record.arrival + 2.0,
    )


def generated() -> RequestRecord:
    record = RequestRecord("an-id", prompt_tokens=5, cached_tokens=3, output_tokens=7, queue_seconds=0.25)
    record.first_token = record.arrival + 0.75
    record.finish_reasons["stop"] += 1
    return record


def seconds(span: ReadableSpan) -> float:
    assert span.end_time is not None
    assert span.start_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_a_request_is_a_span_with_the_times_it_queued_read_and_generated():
    before = time.time_ns()
    reported = spans(finished(generated()))
    whole = reported.pop("POST /v1/completions")
    assert whole.kind is SpanKind.SERVER
    assert whole.start_time is not None
    assert abs(whole.start_time - before) < 60e9
    assert {name: round(seconds(span), 3) for name, span in reported.items()} == {
        "queue": 0.25,
        "prefill": 0.5,
        "decode": 1.25,
    }
    assert all(span.parent is not None and span.parent == whole.context for span in reported.values())
    assert whole.attributes is not None
    assert dict(whole.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "http.request.header.x-request-id": ("an-id",),
        "gen_ai.request.model": "demo",
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.server.time_to_first_token": pytest.approx(0.75),
    }


def test_a_request_belongs_to_the_trace_of_its_traceparent():
    (span,) = spans(finished(RequestRecord(), traceparent=f"00-{TRACE}-{PARENT}-01")).values()
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT


def test_a_traceparent_that_cannot_be_read_begins_a_trace():
    (span,) = spans(finished(RequestRecord(), traceparent="nonsense")).values()
    assert span.parent is None


def test_a_failure_of_the_server_is_an_error_and_a_clients_is_not():
    (span,) = spans(finished(RequestRecord(), 503)).values()
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "503"
    (span,) = spans(finished(RequestRecord(), 400)).values()
    assert span.status.status_code is StatusCode.UNSET
    assert "error.type" not in (span.attributes or {})


def test_without_its_packages_tracing_is_refused_with_what_to_install(monkeypatch):
    check_installed()
    monkeypatch.setattr(tracing, "_NEEDED", ("opentelemetry.sdk", "no_such_package.inside"))
    with pytest.raises(SettingsError, match=r"no_such_package.inside.*persimmon-server\[tracing\]"):
        check_installed()


def test_the_sdk_and_its_exporter_are_not_imported_before_tracing_begins():
    # FastAPI brings OpenTelemetry's API, which does nothing by itself.
    program = """
import sys, persimmon.server.http.worker
sys.exit(any(name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")) for name in sys.modules))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
