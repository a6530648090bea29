"""Every Prometheus metric of the server, by name, in one place.

Knows what is measured, not when: the engine's figures are read from its last report at scrape time.  Each API worker
counts for itself; its counts travel as a snapshot and become sums over the workers when Prometheus asks.  What gateways
and autoscalers know under vLLM's names is told under these too.
"""

import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import Protocol

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.messages import STEP_SECONDS, EngineStats, Ready

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_SECONDS = (0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100)
_INTER_TOKEN_SECONDS = (0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 10)
_QUEUE_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.3, 1, 2, 5, 10, 20, 40, 80, 160)
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
    "persimmon_graph_replays": ("graph_replays", "Decode steps that were CUDA graphs."),
}
"""Metric name without the _total that Prometheus adds -> the field of EngineStats, and the help text."""

VLLM_NAMES = {
    "persimmon_requests_running": "vllm:num_requests_running",
    "persimmon_requests_waiting": "vllm:num_requests_waiting",
    "persimmon_kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "persimmon_kv_cache_config": "vllm:cache_config_info",
    "persimmon_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "persimmon_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "persimmon_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "persimmon_request_queue_time_seconds": "vllm:request_queue_time_seconds",
    "persimmon_prompt_tokens": "vllm:prompt_tokens",
    "persimmon_generated_tokens": "vllm:generation_tokens",
    "persimmon_preemptions": "vllm:num_preemptions",
    "persimmon_prefix_cache_queried_tokens": "vllm:prefix_cache_queries",
    "persimmon_prefix_cache_hit_tokens": "vllm:prefix_cache_hits",
    "persimmon_sequences_finished": "vllm:request_success",
}
"""Our name of a metric -> vLLM's name of the same one, both without _total.

A metric is kept once and told twice, so a token costs no more for it.  vLLM's have the label model_name, and mean what
vLLM's documentation says: usage_perc is a share from 0 to 1, request_success counts sequences, aborted ones too, and
the prefix cache counts tokens.
"""


class EngineView(Protocol):
    """What the metrics read of the engine client."""

    @property
    def ready(self) -> bool:
        """Whether the engine serves now."""

    @property
    def stats(self) -> EngineStats | None:
        """The engine's last report; None before the first."""

    @property
    def info(self) -> Ready | None:
        """What the engine has said of itself; None before that."""

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
        model_name: the served model's name in the API.

    Attributes:
        http_requests: requests answered, by endpoint and status.
        time_to_first_token: from a request's arrival to each of its sequences' first token.
        inter_token_latency: between one output of a sequence and its next; a slow client's reader may get several
            tokens as one output.
        request_latency: from arrival to the last byte, of generation requests that were answered with 200.
        queue_time: from a sequence's arrival at the engine to the first step that computes a part of it.
        sequences_finished: sequences that ended, by their reason: stop, length, abort (nobody waits any more) or error.
    """

    def __init__(self, engine: EngineView, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector(engine)
        self._model_name = model_name
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
        self.queue_time = self._histogram(
            "persimmon_request_queue_time_seconds",
            "Time that a sequence waited before the first step that computed a part of it.",
            _QUEUE_SECONDS,
        )
        self.sequences_finished = Counter(
            "persimmon_sequences_finished",
            "Sequences that ended, by their reason.",
            ("finished_reason",),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self.sequences_finished.labels(reason)  # a series that begins at its first count has no rate until its next

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help, registry=self._registry, buckets=buckets)

    def families(self) -> Iterator[Metric]:
        """All metrics of ours, those of this worker as it has counted alone."""
        return itertools.chain(self._engine.collect(), self._registry.collect())

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
        sums = _Sums(list(itertools.chain.from_iterable(map(_decode, snapshots))))
        for told in (self._engine, sums):
            registry.register(told)
            registry.register(_UnderVllmNames(told, self._model_name))
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


class _UnderVllmNames(Collector):
    """The metrics of another collector that vLLM has a name for, under that."""

    def __init__(self, told: Collector, model_name: str) -> None:
        self._told = told
        self._model = {"model_name": model_name}

    def collect(self) -> Iterator[Metric]:
        for metric in self._told.collect():
            name = VLLM_NAMES.get(metric.name)
            if name is None:
                continue
            renamed = Metric(name, metric.documentation, metric.type)
            for sample in metric.samples:
                own_name = name + sample.name.removeprefix(metric.name)
                renamed.add_sample(own_name, self._model | sample.labels, sample.value)
            yield renamed


class _EngineCollector(Collector):
    """Turns the engine's last report into metrics when Prometheus asks, so that a step costs nothing."""

    def __init__(self, engine: EngineView) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        yield _gauge("persimmon_engine_ready", "1 while the engine serves, else 0.", self._engine.ready)
        info = self._engine.info
        if info is not None:
            config = {"block_size": str(info.block_size), "num_gpu_blocks": str(info.total_blocks)}
            told = GaugeMetricFamily(
                "persimmon_kv_cache_config", "Always 1; its labels tell the KV cache.", labels=list(config)
            )
            told.add_metric(list(config.values()), 1.0)
            yield told
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
        steps = itertools.accumulate(stats.step_counts)
        bounds = [*(str(float(bound)) for bound in STEP_SECONDS), "+Inf"]
        buckets = [(bound, float(count)) for bound, count in zip(bounds, steps, strict=True)]
        yield HistogramMetricFamily("persimmon_step_seconds", "Time of an engine step.", buckets, stats.step_seconds)


def _gauge(name: str, help: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help, value=float(value))


class _ExampleEngine:
    """An engine that has just begun, of which every metric can be told."""

    ready = True
    stats = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    info = Ready(0, 0, 0, "", "", stats)
    open_streams = 0


def metrics_table() -> str:
    """Every metric as a Markdown table, for the README."""
    lines = ["| Metric | vLLM's name | Type | |", "| --- | --- | --- | --- |"]
    for family in Metrics(_ExampleEngine(), "").families():
        total = "_total" if family.type == "counter" else ""
        other = VLLM_NAMES.get(family.name)
        shown = f"`{other}{total}`" if other else ""
        lines.append(f"| `{family.name}{total}` | {shown} | {family.type} | {family.documentation} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(metrics_table())
