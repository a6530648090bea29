"""The metrics under vLLM's names: what its dashboards, inference-perf, gateways and autoscalers read."""

from dataclasses import dataclass

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from persimmon.server.engine.messages import EngineStats, Ready
from persimmon.server.metrics import Metrics
from persimmon.server.sequence_metrics import FinishedSequence
from persimmon.server.vllm_metrics import TRANSLATIONS
from tests.server.http.fake_engine import MAX_MODEL_LEN, STATS

READY = Ready(
    MAX_MODEL_LEN,
    block_size=32,
    total_blocks=100,
    device="cpu",
    dtype="float32",
    stats=STATS,
    cache_dtype="int8",
)
MODEL = {"model_name": "demo", "engine": "0"}
SEQUENCE = FinishedSequence(
    prompt_tokens=64,
    cached_tokens=32,
    generated_tokens=9,
    max_tokens=100,
    scheduled=10.0,
    first_token=10.25,
    last_token=11.05,
)

# Name -> type, and for histograms the first bounds and the last one, as a server of vLLM 0.32 shows them.
GAUGES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:engine_sleep_state",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:cache_config_info",
}
COUNTERS = {
    "vllm:prompt_tokens",
    "vllm:prompt_tokens_by_source",
    "vllm:prompt_tokens_cached",
    "vllm:generation_tokens",
    "vllm:num_preemptions",
    "vllm:spec_decode_num_drafts",
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:request_success",
    "http_requests",
}
REQUEST_SECONDS = ["0.3", "0.5", "0.8", "1.0", "1.5", "2.0", "2.5", "5.0", "10.0", "15.0", "20.0", "30.0", "40.0"]
REQUEST_SECONDS += ["50.0", "60.0", "120.0", "240.0", "480.0", "960.0", "1920.0", "7680.0", "+Inf"]
TOKEN_SECONDS = ["0.01", "0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.4", "0.5", "0.75", "1.0", "2.5"]
TOKEN_SECONDS += ["5.0", "7.5", "10.0", "20.0", "40.0", "80.0", "+Inf"]
# Up to MAX_MODEL_LEN.
TOKENS = ["1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "100.0", "200.0", "500.0", "1000.0", "2000.0", "+Inf"]
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": [
        *("0.001", "0.005", "0.01", "0.02", "0.04", "0.06", "0.08", "0.1", "0.25", "0.5", "0.75", "1.0", "2.5", "5.0"),
        *("7.5", "10.0", "20.0", "40.0", "80.0", "160.0", "640.0", "2560.0", "+Inf"),
    ],
    "vllm:inter_token_latency_seconds": TOKEN_SECONDS,
    "vllm:time_per_output_token_seconds": TOKEN_SECONDS,
    "vllm:request_time_per_output_token_seconds": TOKEN_SECONDS,
    "vllm:e2e_request_latency_seconds": REQUEST_SECONDS,
    "vllm:request_queue_time_seconds": REQUEST_SECONDS,
    "vllm:request_prefill_time_seconds": REQUEST_SECONDS,
    "vllm:request_decode_time_seconds": REQUEST_SECONDS,
    "vllm:request_inference_time_seconds": REQUEST_SECONDS,
    "vllm:request_prompt_tokens": TOKENS,
    "vllm:request_generation_tokens": TOKENS,
    "vllm:request_max_num_generation_tokens": TOKENS,
    "vllm:request_prefill_kv_computed_tokens": TOKENS,
    "vllm:request_params_max_tokens": TOKENS,
    "vllm:request_params_n": ["1.0", "2.0", "5.0", "10.0", "20.0", "+Inf"],
    "vllm:iteration_tokens_total": [
        *("1.0", "8.0", "16.0", "32.0", "64.0", "128.0", "256.0", "512.0", "1024.0", "2048.0", "4096.0", "8192.0"),
        *("16384.0", "+Inf"),
    ],
    "http_request_duration_seconds": ["0.1", "0.5", "1.0", "+Inf"],
}


@dataclass
class Engine:
    ready: bool = True
    open_streams: int = 0
    stats: EngineStats | None = STATS
    info: Ready | None = READY


@pytest.fixture
def metrics() -> Metrics:
    """After one sequence of one request."""
    metrics = Metrics([Engine()], "demo", {"/health"})
    metrics.http_requests.labels("/v1/completions", 200).inc()
    metrics.request_duration.labels("/v1/completions").observe(0.4)
    metrics.inter_token_latency.observe(0.012)
    metrics.sequences_finished.labels("length").inc()
    metrics.count_prompt(64, 32)
    metrics.observe_sequence(SEQUENCE)
    metrics.observe_samples(2, 9)
    return metrics


def exposed(metrics: Metrics) -> dict[str, Metric]:
    """The families under others' names, without the gauges that tell when counting began."""
    text = metrics.exposition([metrics.snapshot()]).decode()
    return {
        family.name: family
        for family in text_string_to_metric_families(text)
        if not family.name.startswith("persimmon_") and not family.name.endswith("_created")
    }


def values(family: Metric, suffix: str = "", label: str | None = None) -> dict[str, float]:
    """The values of one series of a family, by one of its labels."""
    wanted = [sample for sample in family.samples if sample.name == family.name + suffix]
    return {"" if label is None else sample.labels[label]: sample.value for sample in wanted}


def test_names_and_types_are_vllms(metrics: Metrics) -> None:
    expected = (
        dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(HISTOGRAMS, "histogram")
    )
    assert {name: family.type for name, family in exposed(metrics).items()} == expected


def test_labels_are_vllms(metrics: Metrics) -> None:
    for name, family in exposed(metrics).items():
        for sample in family.samples:
            assert name.startswith("http_") or sample.labels.items() >= MODEL.items(), sample


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_buckets_are_vllms(metrics: Metrics, name: str) -> None:
    assert list(values(exposed(metrics)[name], "_bucket", "le")) == HISTOGRAMS[name]


def test_a_histogram_has_the_counts_of_ours(metrics: Metrics) -> None:
    text = metrics.exposition([metrics.snapshot()]).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for each in TRANSLATIONS:
        own, other = families[each.own], families[each.name]
        if own.type == "histogram":
            ours, theirs = (values(family, "_bucket", "le") for family in (own, other))
            assert theirs.items() <= ours.items()
            assert [values(family, "_sum") for family in (own, other)] == [values(own, "_sum")] * 2
            assert [values(family, "_count") for family in (own, other)] == [values(own, "_count")] * 2


def test_a_finished_sequence_is_recorded_in_its_parts(metrics: Metrics) -> None:
    families = exposed(metrics)
    sums = {name: values(families[name], "_sum").get("") for name in HISTOGRAMS}
    assert sums["vllm:request_prompt_tokens"] == 64
    assert sums["vllm:request_prefill_kv_computed_tokens"] == 32
    assert sums["vllm:request_generation_tokens"] == 9
    assert sums["vllm:request_max_num_generation_tokens"] == 9
    assert sums["vllm:request_params_max_tokens"] == 100
    assert sums["vllm:request_params_n"] == 2
    assert sums["vllm:request_prefill_time_seconds"] == pytest.approx(0.25)
    assert sums["vllm:request_decode_time_seconds"] == pytest.approx(0.8)
    assert sums["vllm:request_inference_time_seconds"] == pytest.approx(1.05)
    assert sums["vllm:request_time_per_output_token_seconds"] == pytest.approx(0.1)


def test_what_has_no_counterpart_of_ours_is_made_of_what_there_is(metrics: Metrics) -> None:
    metrics.http_requests.labels("/v1/completions", 201).inc()
    metrics.http_requests.labels("/v1/completions", 499).inc(3)
    metrics.http_requests.labels("/health", 503).inc(5)
    families = exposed(metrics)
    sources = {"local_compute": 32, "local_cache_hit": 32}
    assert values(families["vllm:prompt_tokens_by_source"], "_total", "source") == sources
    assert values(families["vllm:prompt_tokens_cached"], "_total") == {"": 32}
    waiting = values(families["vllm:num_requests_waiting_by_reason"], label="reason")
    assert waiting == {"capacity": STATS.waiting, "deferred": 0}
    answered = {
        (sample.labels["handler"], sample.labels["status"]): sample.value
        for sample in families["http_requests"].samples
    }
    assert answered == {("/v1/completions", "2xx"): 2, ("/v1/completions", "4xx"): 3}


def test_the_values_of_levels_and_counters_are_ours(metrics: Metrics) -> None:
    families = exposed(metrics)
    assert values(families["vllm:num_requests_running"]) == {"": STATS.running}
    assert values(families["vllm:kv_cache_usage_perc"]) == values(families["vllm:gpu_cache_usage_perc"]) == {"": 0.75}
    assert values(families["vllm:generation_tokens"], "_total") == {"": STATS.generated_tokens}
    config = {"block_size": "32", "cache_dtype": "int8", "num_gpu_blocks": "100"}
    assert families["vllm:cache_config_info"].samples[0].labels == MODEL | config
    finished = values(families["vllm:request_success"], "_total", "finished_reason")
    assert finished == {"stop": 0, "length": 1, "abort": 0, "error": 0}


def test_an_engine_that_serves_is_awake_and_one_that_does_not_has_no_state() -> None:
    for ready, states in ((True, {"awake": 1, "weights_offloaded": 0, "discard_all": 0}), (False, {})):
        family = exposed(Metrics([Engine(ready=ready)], "demo"))["vllm:engine_sleep_state"]
        assert values(family, label="sleep_state") == states


def test_before_the_engine_has_loaded_there_are_names_all_the_same() -> None:
    families = exposed(Metrics([Engine(ready=False, stats=None, info=None)], "demo"))
    assert "vllm:request_prompt_tokens" in families
    assert "vllm:num_requests_running" not in families


def test_engines_have_their_numbers_and_what_workers_count_for_all_of_them_has_none() -> None:
    families = exposed(Metrics([Engine(), Engine()], "demo"))
    running = {sample.labels["engine"]: sample.value for sample in families["vllm:num_requests_running"].samples}
    assert running == {"0": STATS.running, "1": STATS.running}
    assert {sample.labels["engine"] for sample in families["vllm:request_success"].samples} == {"all"}
