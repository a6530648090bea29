"""Every Prometheus metric of the server, by name, in one place.

Knows what is measured, not when: the engine's figures are read from its last report at scrape time.  Each API worker
counts for itself; its counts travel as a snapshot and become sums over the workers when Prometheus asks.  vLLM's names
of them are in `vllm_metrics`.
"""

import itertools
import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from persimmon.server import vllm_metrics
from persimmon.server.engine.messages import STEP_SECONDS, STEP_TOKENS, EngineStats, Ready
from persimmon.server.histogram import LocalHistogram, histogram_family, merged
from persimmon.server.sequence_metrics import INTER_TOKEN_SECONDS, FinishedHistograms, FinishedSequence
from persimmon.server.vllm_metrics import ENGINE_LABEL, UnderVllmNames

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Finer than vLLM's, because small models are fast.
_FIRST_TOKEN_SECONDS = merged(
    (0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100), vllm_metrics.FIRST_TOKEN_SECONDS
)
_QUEUE_SECONDS = merged((0.001, 0.005, 0.02, 0.1, 0.3, 1, 2, 5, 10, 20, 40, 80, 160), vllm_metrics.REQUEST_SECONDS)
_REQUEST_SECONDS = merged((0.1, 0.2, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600), vllm_metrics.REQUEST_SECONDS)

_IMAGE_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)

_HTTP_SECONDS = merged((0.01, 5, 30, 120), vllm_metrics.HTTP_SECONDS)

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
    "persimmon_preemptions": ("preemptions", "Times a sequence lost its KV blocks to others and was queued again."),
    "persimmon_recomputed_tokens": ("recomputed_tokens", "Computed tokens discarded by preemptions."),
    "persimmon_spec_decode_drafts": ("drafts", "Times a step computed guesses at the next tokens of a sequence."),
    "persimmon_spec_decode_draft_tokens": ("draft_tokens", "Guessed tokens computed."),
    "persimmon_spec_decode_accepted_tokens": ("accepted_tokens", "Guessed tokens that were right."),
    "persimmon_graph_replays": ("graph_replays", "Steps run as CUDA graphs."),
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
        engines: read at each scrape, in the order of their numbers.
        model_name: the served model's name in the API.
        open_paths: of the endpoints that need no key, for which vLLM has no counters.

    Attributes:
        http_requests: requests answered, by endpoint and status.
        time_to_first_token: from a request's arrival to each of its sequences' first token.
        inter_token_latency: between one output of a sequence and its next; a slow client's reader may get several
            tokens as one output.
        request_latency: from arrival to the last byte, of generation requests that were answered with 200.
        queue_time: from a sequence's arrival at the engine to the first step that computes a part of it.
        sequences_finished: sequences that ended, by their reason: stop, length, abort (the client is gone) or error.
        request_duration: from arrival to the last byte, of every request except probes, by endpoint.
    """

    def __init__(self, engines: Sequence[EngineView], model_name: str, open_paths: Collection[str] = ()) -> None:
        self._registry = CollectorRegistry()
        self._engines = _EngineCollector(engines)
        self._model_name = model_name
        self._open_paths = open_paths
        Gauge(
            "persimmon_open_streams",
            "Unfinished sequences of the API workers.",
            registry=self._registry,
        ).set_function(lambda: sum(engine.open_streams for engine in engines))
        self.http_requests = Counter(
            "persimmon_http_requests",
            "HTTP requests answered; status 499 means that the client disconnected before the answer.",
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
            INTER_TOKEN_SECONDS,
        )
        self.request_latency = self._histogram(
            "persimmon_e2e_request_latency_seconds",
            "Time from a generation request's arrival to the end of its answer.",
            _REQUEST_SECONDS,
        )
        self.queue_time = self._histogram(
            "persimmon_request_queue_time_seconds",
            "Time from a sequence's arrival to the first step that computed a part of it.",
            _QUEUE_SECONDS,
        )
        self.sequences_finished = Counter(
            "persimmon_sequences_finished",
            "Sequences that ended, by reason.",
            ("finished_reason",),
            registry=self._registry,
        )
        self.request_duration = Histogram(
            "persimmon_http_request_duration_seconds",
            "Time from an HTTP request's arrival to the end of its answer, without health probes and scrapes.",
            ("endpoint",),
            registry=self._registry,
            buckets=_HTTP_SECONDS,
        )
        self._prompt_tokens = Counter(
            "persimmon_prompt_tokens_by_source",
            "Prompt tokens by source: computed, or taken from the prefix cache.",
            ("source",),
            registry=self._registry,
        )
        self._computed = self._prompt_tokens.labels(vllm_metrics.COMPUTED)
        self._cached = self._prompt_tokens.labels(vllm_metrics.CACHED)
        self._images = Counter("persimmon_images", "Images read from requests.", registry=self._registry)
        self._image_tokens = Counter(
            "persimmon_image_tokens",
            "Tokens of the images read: one for each patch, and one for each row of patches.",
            registry=self._registry,
        )
        self._image_seconds = self._histogram(
            "persimmon_image_load_seconds",
            "Time to fetch and decode all images of a request.",
            _IMAGE_SECONDS,
        )
        self._finished = FinishedHistograms(self._histogram)
        for reason in ("stop", "length", "abort", "error"):
            self.sequences_finished.labels(reason)  # a series that begins at its first count has no rate until its next

    def _histogram(self, name: str, help: str, bounds: tuple[float, ...]) -> LocalHistogram:
        histogram = LocalHistogram(name, help, bounds)
        self._registry.register(histogram)
        return histogram

    def count_prompt(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Counts a prompt that has been computed.

        Args:
            prompt_tokens: its tokens.
            cached_tokens: of these, found in the prefix cache.
        """
        self._computed.inc(prompt_tokens - cached_tokens)
        self._cached.inc(cached_tokens)

    def observe_images(self, count: int, num_tokens: int, seconds: float) -> None:
        """Records the images of a request.

        Args:
            count: how many it has.
            num_tokens: of all of them.
            seconds: from the first one's beginning to the last one's end.
        """
        self._images.inc(count)
        self._image_tokens.inc(num_tokens)
        self._image_seconds.observe(seconds)

    def observe_sequence(self, sequence: FinishedSequence) -> None:
        """Records the sizes and times of a sequence that ended by itself."""
        self._finished.observe_sequence(sequence)

    def observe_samples(self, count: int, max_generated: int) -> None:
        """Records a prompt whose samples have all ended by themselves.

        Args:
            count: how many samples it had.
            max_generated: the tokens of the longest one.
        """
        self._finished.n.observe(count)
        self._finished.max_generated_tokens.observe(max_generated)

    def families(self) -> Iterator[Metric]:
        """All metrics under our names, with only this worker's own counts."""
        return itertools.chain(self._engines.collect(), self._registry.collect())

    def snapshot(self) -> bytes:
        """What this worker has counted until now, for `exposition` of any worker."""
        return _encode(
            [
                _Family(
                    name=family.name,
                    help=family.documentation,
                    type=family.type,
                    series={(sample.name, tuple(sample.labels.items())): sample.value for sample in family.samples},
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
        for source in (self._engines, sums):
            registry.register(source)
            registry.register(
                UnderVllmNames(
                    source=source,
                    model_name=self._model_name,
                    max_model_len=self._engines.max_model_len,
                    num_engines=self._engines.count,
                    open_paths=self._open_paths,
                )
            )
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
    """Turns the engines' last reports into metrics when Prometheus asks, so that a step costs nothing.

    Each series has the number of its engine as a label, as vLLM's have, also where there is only one engine.
    """

    def __init__(self, engines: Sequence[EngineView]) -> None:
        self._engines = engines

    @property
    def count(self) -> int:
        """How many engines there are."""
        return len(self._engines)

    @property
    def max_model_len(self) -> int | None:
        """The longest sequence that all engines serve; None while none has said."""
        described = [engine.info for engine in self._engines]  # once: a scrape has a thread of its own
        return min((info.max_model_len for info in described if info is not None), default=None)

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for number, engine in enumerate(self._engines):
            for family in _engine_families(engine):
                merged_family = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = {ENGINE_LABEL: str(number), **sample.labels}
                    merged_family.add_sample(sample.name, labels, sample.value)
        yield from families.values()


def _engine_families(engine: EngineView) -> Iterator[Metric]:
    """What is known of one engine."""
    yield _gauge("persimmon_engine_ready", "1 while the engine serves, else 0.", engine.ready)
    info = engine.info
    if info is not None:
        config = {
            "block_size": str(info.block_size),
            "cache_dtype": info.cache_dtype,
            "num_gpu_blocks": str(info.total_blocks),
        }
        described = GaugeMetricFamily(
            "persimmon_kv_cache_config", "Always 1; its labels describe the KV cache.", labels=list(config)
        )
        described.add_metric(list(config.values()), 1.0)
        yield described
    stats = engine.stats
    if stats is None:
        return
    used = stats.total_blocks - stats.free_blocks
    yield _gauge("persimmon_requests_running", "Sequences that hold KV blocks.", stats.running)
    yield _gauge("persimmon_requests_waiting", "Sequences queued for admission.", stats.waiting)
    yield _gauge("persimmon_kv_blocks", "KV blocks in the pool.", stats.total_blocks)
    yield _gauge("persimmon_kv_blocks_free", "KV blocks that no sequence holds.", stats.free_blocks)
    yield _gauge(
        "persimmon_kv_cache_usage_ratio",
        "Share of the KV blocks that sequences hold, 0 to 1.",
        used / stats.total_blocks if stats.total_blocks else 0.0,
    )
    for name, (field, help) in _COUNTERS.items():
        yield CounterMetricFamily(name, help, value=getattr(stats, field))
    for name, help, bounds, counts, total in (
        ("persimmon_step_seconds", "Time of an engine step.", STEP_SECONDS, stats.step_counts, stats.step_seconds),
        (
            "persimmon_step_tokens",
            "Tokens that an engine step computes.",
            STEP_TOKENS,
            stats.step_token_counts,
            stats.step_tokens,
        ),
    ):
        yield histogram_family(name, help, bounds, counts, total)


def _gauge(name: str, help: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help, value=float(value))


class _ExampleEngine:
    """A newly started engine, for which every metric has a value."""

    ready = True
    stats = EngineStats(
        running=0,
        waiting=0,
        free_blocks=0,
        total_blocks=0,
        steps=0,
        prompt_tokens=0,
        generated_tokens=0,
        cached_tokens=0,
        queried_tokens=0,
        preemptions=0,
        recomputed_tokens=0,
    )
    info = Ready(max_model_len=0, block_size=0, total_blocks=0, device="", dtype="", stats=stats)
    open_streams = 0


def metrics_table() -> str:
    """Every metric as a Markdown table, for docs/reference/metrics.md."""
    lines = ["| Metric | vLLM's name | Type | |", "| --- | --- | --- | --- |"]
    for family in Metrics([_ExampleEngine()], "").families():
        total = "_total" if family.type == "counter" else ""
        shown = ", ".join(f"`{name}{total}`" for name in vllm_metrics.names_of(family.name))
        lines.append(f"| `{family.name}{total}` | {shown} | {family.type} | {family.documentation} |")
    return "\n".join(lines)
