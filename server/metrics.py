"""Every Prometheus metric of the server, by name, in one place.

Knows what is measured, not when: the engine's figures are read from its last report at scrape time.  Each API worker
counts for itself; its counts travel as a snapshot and become sums over the workers when Prometheus asks.
"""

import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import Protocol

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.messages import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_SECONDS = (0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100)
_INTER_TOKEN_SECONDS = (0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 10)
_REQUEST_SECONDS = (0.1, 0.2, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)

_COUNTERS = {
    "persimmon_steps": ("steps", "Engine steps run."),
    "persimmon_prompt_tokens": (
        "prompt_tokens",
        "Prompt tokens of admitted sequences, prefix hits included.",
    ),
    "persimmon_generated_tokens": ("generated_tokens", "Tokens generated."),
    "persimmon_prefix_cache_queried_tokens": (
        "queried_tokens",
        "Prompt tokens looked up in the prefix cache.",
    ),
    "persimmon_prefix_cache_hit_tokens": ("cached_tokens", "Prompt tokens taken from the prefix cache."),
    "persimmon_preemptions": ("preemptions", "Times a sequence lost its KV blocks to older ones."),
    "persimmon_recomputed_tokens": ("recomputed_tokens", "Computed tokens that preemptions threw away."),
}
"""Metric name without the _total that Prometheus adds -> the field of EngineStats, and the help text."""


class EngineView(Protocol):
    """What the metrics read of the engine client."""

    @property
    def ready(self) -> bool:
        """Whether the engine serves now."""

    @property
    def stats(self) -> EngineStats | None:
        """The engine's last report; None before the first."""

    @property
    def open_streams(self) -> int:
        """This API worker's unfinished sequences."""


_Labels = tuple[tuple[str, str], ...]


class _Family(msgspec.Struct, frozen=True, array_like=True):
    """A metric of one worker: the values of its series, by their names and labels."""

    name: str
    help: str
    type: str
    series: dict[tuple[str, _Labels], float]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[_Family]).decode


class Metrics:
    """The metrics of one API worker, in a registry of their own.

    Args:
        engine: read at each scrape.

    Attributes:
        http_requests: requests answered, by endpoint and status.
        time_to_first_token: from a request's arrival to each of its sequences' first token.
        inter_token_latency: between one output of a sequence and its next; a slow client's reader may get several
            tokens as one output.
        request_latency: from arrival to the last byte, of generation requests that were answered with 200.
    """

    def __init__(self, engine: EngineView) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector(engine)
        Gauge(
            "persimmon_open_streams",
            "Unfinished sequences of the API workers.",
            registry=self._registry,
        ).set_function(lambda: engine.open_streams)
        self.http_requests = Counter(
            "persimmon_http_requests",
            "HTTP requests answered; status 499 is a client that left before its answer.",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self.time_to_first_token = self._histogram(
            "persimmon_time_to_first_token_seconds",
            "Time from a request's arrival to a sequence's first token.",
            _FIRST_TOKEN_SECONDS,
        )
        self.inter_token_latency = self._histogram(
            "persimmon_inter_token_latency_seconds",
            "Time between two outputs of a sequence.",
            _INTER_TOKEN_SECONDS,
        )
        self.request_latency = self._histogram(
            "persimmon_e2e_request_latency_seconds",
            "Time from a generation request's arrival to the end of its answer.",
            _REQUEST_SECONDS,
        )

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help, registry=self._registry, buckets=buckets)

    def snapshot(self) -> bytes:
        """What this worker has counted until now, for `exposition` of any worker."""
        return _encode(
            [
                _Family(
                    family.name,
                    family.documentation,
                    family.type,
                    {(sample.name, tuple(sample.labels.items())): sample.value for sample in family.samples},
                )
                for family in self._registry.collect()
            ]
        )

    def exposition(self, snapshots: Iterable[bytes]) -> bytes:
        """All metrics in Prometheus' text format.

        Args:
            snapshots: one of each API worker, this one included.
        """
        registry = CollectorRegistry()
        registry.register(self._engine)
        registry.register(_Sums(list(itertools.chain.from_iterable(map(_decode, snapshots)))))
        return generate_latest(registry)


class _Sums(Collector):
    """The workers' metrics, added up."""

    def __init__(self, families: Iterable[_Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        sums: dict[str, _Family] = {}
        for family in self._families:
            series = sums.setdefault(family.name, msgspec.structs.replace(family, series={})).series
            for (name, labels), value in family.series.items():
                add = min if name.endswith("_created") else operator.add  # that is when counting began
                series[name, labels] = add(series[name, labels], value) if (name, labels) in series else value
        for family in sums.values():
            metric = Metric(family.name, family.help, family.type)
            for (name, labels), value in family.series.items():
                metric.add_sample(name, dict(labels), value)
            yield metric


class _EngineCollector(Collector):
    """Turns the engine's last report into metrics when Prometheus asks, so that a step costs nothing."""

    def __init__(self, engine: EngineView) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        yield _gauge("persimmon_engine_ready", "1 while the engine serves, else 0.", self._engine.ready)
        stats = self._engine.stats
        if stats is None:
            return
        used = stats.total_blocks - stats.free_blocks
        yield _gauge("persimmon_requests_running", "Sequences that hold KV blocks.", stats.running)
        yield _gauge("persimmon_requests_waiting", "Sequences queued for admission.", stats.waiting)
        yield _gauge("persimmon_kv_blocks_free", "KV blocks that no sequence holds.", stats.free_blocks)
        yield _gauge("persimmon_kv_blocks_total", "KV blocks in the pool.", stats.total_blocks)
        yield _gauge(
            "persimmon_kv_cache_usage_ratio",
            "Share of the KV blocks that sequences hold, 0 to 1.",
            used / stats.total_blocks if stats.total_blocks else 0.0,
        )
        for name, (field, help) in _COUNTERS.items():
            yield CounterMetricFamily(name, help, value=getattr(stats, field))


def _gauge(name: str, help: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help, value=float(value))
