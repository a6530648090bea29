"""The metrics under vLLM's names, which its dashboards, inference-perf, gateways and autoscalers read.

Knows vLLM's names, labels and buckets, and which metric of ours each one is.  Nothing is counted twice: a metric is
translated when it is scraped.  vLLM's own have the labels model_name and engine; what our API workers count for several
engines together has no engine's number.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

# The bounds of vLLM's histograms (vllm/v1/metrics/buckets.py), in seconds, tokens and samples.
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
INTER_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
SAMPLES = (1, 2, 5, 10, 20)
REQUEST_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
"""vLLM ends them at the longest sequence that it serves."""
HTTP_SECONDS = (0.1, 0.5, 1)

ENGINE_LABEL = "engine"

ALL_ENGINES = "all"
"""The label of what API workers count for several engines together."""

COMPUTED, CACHED = "local_compute", "local_cache_hit"
"""Where a prompt's tokens came from, in vLLM's words."""


def _as_they_are(samples: Iterable[Sample]) -> Iterable[Sample]:
    return samples


def _cached_only(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        if sample.labels.get("source") == CACHED:
            yield sample._replace(labels={})


def _by_reason(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        yield sample._replace(labels={**sample.labels, "reason": "capacity"})
        # What vLLM defers waits for adapters or for a transfer of keys and values; there is neither here.
        yield sample._replace(labels={**sample.labels, "reason": "deferred"}, value=0.0)


def _awake(samples: Iterable[Sample]) -> Iterator[Sample]:
    # An engine that does not serve has no state, as a vLLM that is down has none.
    for sample in samples:
        if sample.value:
            for state, value in (("awake", 1.0), ("weights_offloaded", 0.0), ("discard_all", 0.0)):
                yield sample._replace(labels={**sample.labels, "sleep_state": state}, value=value)


def _by_class(samples: Iterable[Sample]) -> Iterator[Sample]:
    counts: dict[tuple[str, str], float] = defaultdict(float)
    for sample in samples:
        if sample.name.endswith("_total"):
            counts[sample.labels["endpoint"], f"{sample.labels['status'][0]}xx"] += sample.value
    for (handler, status), count in counts.items():
        yield Sample("persimmon_http_requests_total", {"handler": handler, "status": status}, count)


def _by_handler(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        others = {name: value for name, value in sample.labels.items() if name != "endpoint"}
        yield sample._replace(labels={"handler": sample.labels["endpoint"], **others})


@dataclass(frozen=True, slots=True)
class Translation:
    """One of our metrics under one of vLLM's names.

    Attributes:
        own: our name, without _total.
        name: vLLM's, without _total where it is a counter.
        bounds: of vLLM's histogram; ours has more.  Empty for all that ours has.
        samples: makes vLLM's samples of ours.
        of_model: whether it has the labels of a model.
        without_open: whether vLLM's leaves out endpoints that need no key.
    """

    own: str
    name: str
    bounds: tuple[float, ...] = ()
    samples: Callable[[Iterable[Sample]], Iterable[Sample]] = _as_they_are
    of_model: bool = True
    without_open: bool = False


TRANSLATIONS = (
    Translation("persimmon_engine_ready", "vllm:engine_sleep_state", samples=_awake),
    Translation("persimmon_kv_cache_config", "vllm:cache_config_info"),
    Translation("persimmon_requests_running", "vllm:num_requests_running"),
    Translation("persimmon_requests_waiting", "vllm:num_requests_waiting"),
    Translation("persimmon_requests_waiting", "vllm:num_requests_waiting_by_reason", samples=_by_reason),
    Translation("persimmon_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc"),
    # Its name until vLLM 0.10, which dashboards made then still ask for.
    Translation("persimmon_kv_cache_usage_ratio", "vllm:gpu_cache_usage_perc"),
    Translation("persimmon_prompt_tokens", "vllm:prompt_tokens"),
    Translation("persimmon_prompt_tokens_by_source", "vllm:prompt_tokens_by_source"),
    Translation("persimmon_prompt_tokens_by_source", "vllm:prompt_tokens_cached", samples=_cached_only),
    Translation("persimmon_generated_tokens", "vllm:generation_tokens"),
    Translation("persimmon_preemptions", "vllm:num_preemptions"),
    Translation("persimmon_prefix_cache_queried_tokens", "vllm:prefix_cache_queries"),
    Translation("persimmon_prefix_cache_hit_tokens", "vllm:prefix_cache_hits"),
    Translation("persimmon_spec_decode_drafts", "vllm:spec_decode_num_drafts"),
    Translation("persimmon_spec_decode_draft_tokens", "vllm:spec_decode_num_draft_tokens"),
    Translation("persimmon_spec_decode_accepted_tokens", "vllm:spec_decode_num_accepted_tokens"),
    Translation("persimmon_step_tokens", "vllm:iteration_tokens_total"),
    Translation("persimmon_sequences_finished", "vllm:request_success"),
    Translation("persimmon_time_to_first_token_seconds", "vllm:time_to_first_token_seconds", FIRST_TOKEN_SECONDS),
    Translation("persimmon_inter_token_latency_seconds", "vllm:inter_token_latency_seconds", INTER_TOKEN_SECONDS),
    # Its name until vLLM 0.10.
    Translation("persimmon_inter_token_latency_seconds", "vllm:time_per_output_token_seconds", INTER_TOKEN_SECONDS),
    Translation(
        "persimmon_request_time_per_output_token_seconds",
        "vllm:request_time_per_output_token_seconds",
        INTER_TOKEN_SECONDS,
    ),
    Translation("persimmon_e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds", REQUEST_SECONDS),
    Translation("persimmon_request_queue_time_seconds", "vllm:request_queue_time_seconds", REQUEST_SECONDS),
    Translation("persimmon_request_prefill_time_seconds", "vllm:request_prefill_time_seconds", REQUEST_SECONDS),
    Translation("persimmon_request_decode_time_seconds", "vllm:request_decode_time_seconds", REQUEST_SECONDS),
    Translation("persimmon_request_inference_time_seconds", "vllm:request_inference_time_seconds", REQUEST_SECONDS),
    Translation("persimmon_request_prompt_tokens", "vllm:request_prompt_tokens", REQUEST_TOKENS),
    Translation("persimmon_request_computed_prompt_tokens", "vllm:request_prefill_kv_computed_tokens", REQUEST_TOKENS),
    Translation("persimmon_request_generated_tokens", "vllm:request_generation_tokens", REQUEST_TOKENS),
    Translation("persimmon_request_max_generated_tokens", "vllm:request_max_num_generation_tokens", REQUEST_TOKENS),
    Translation("persimmon_request_max_tokens", "vllm:request_params_max_tokens", REQUEST_TOKENS),
    Translation("persimmon_request_n", "vllm:request_params_n", SAMPLES),
    # Not vLLM's own, but of the instrumentation that it uses; its dashboards read them.
    Translation("persimmon_http_requests", "http_requests", samples=_by_class, of_model=False, without_open=True),
    Translation(
        "persimmon_http_request_duration_seconds",
        "http_request_duration_seconds",
        HTTP_SECONDS,
        samples=_by_handler,
        of_model=False,
    ),
)


class UnderVllmNames(Collector):
    """The metrics of another collector that vLLM has a name for, under that name.

    Args:
        source: the other collector.
        model_name: the served model's name.
        max_model_len: the longest sequence, where vLLM's buckets of token counts end; None where it is not known yet.
        open_paths: of the endpoints that need no key.
        num_engines: how many engines the server has.
    """

    def __init__(
        self,
        source: Collector,
        model_name: str,
        max_model_len: int | None,
        open_paths: Collection[str],
        num_engines: int = 1,
    ) -> None:
        self._source = source
        self._model = {"model_name": model_name, ENGINE_LABEL: "0" if num_engines == 1 else ALL_ENGINES}
        self._max_model_len = max_model_len
        self._open_paths = open_paths

    def collect(self) -> Iterator[Metric]:
        """Translates what the other collector has now."""
        for metric in self._source.collect():
            for translation in TRANSLATIONS:
                if translation.own == metric.name:
                    yield self._translated(metric, translation)

    def _translated(self, metric: Metric, to: Translation) -> Metric:
        bounds = self._bounds(to)
        translated = Metric(to.name, metric.documentation, metric.type)
        samples: Iterable[Sample] = metric.samples
        if to.without_open:
            samples = (sample for sample in samples if sample.labels["endpoint"] not in self._open_paths)
        for sample in to.samples(samples):
            if bounds and sample.name.endswith("_bucket") and sample.labels["le"] not in bounds:
                continue
            labels = {**self._model, **sample.labels} if to.of_model else sample.labels
            translated.add_sample(to.name + sample.name.removeprefix(metric.name), labels, sample.value)
        return translated

    def _bounds(self, to: Translation) -> frozenset[str]:
        """The labels of the buckets to show; empty for all."""
        if not to.bounds:
            return frozenset()
        end = self._max_model_len if to.bounds is REQUEST_TOKENS and self._max_model_len is not None else to.bounds[-1]
        return frozenset([*(str(float(bound)) for bound in to.bounds if bound <= end), "+Inf"])


def names_of(own: str) -> list[str]:
    """The names that vLLM has for one of our metrics, without _total."""
    return [each.name for each in TRANSLATIONS if each.own == own]
