from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from server.engine.messages import EngineStats, Ready
from server.metrics import VLLM_NAMES, Metrics, metrics_table
from tests.server.http.fake_engine import MAX_MODEL_LEN, STATS

README = Path(__file__).parents[2] / "README.md"
READY = Ready(MAX_MODEL_LEN, block_size=32, total_blocks=100, device="cpu", dtype="float32", stats=STATS)


@dataclass
class Engine:
    open_streams: int
    ready: bool = True
    stats: EngineStats | None = STATS
    info: Ready | None = READY


def read(exposition: bytes) -> dict[str, float]:
    """Every series, by its name and the values of its labels."""
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(exposition.decode())
        for sample in family.samples
    }


def test_the_workers_counts_are_added_up_and_the_engines_figures_are_told_once():
    one, other = Metrics(Engine(2), "demo"), Metrics(Engine(5), "demo")
    one.http_requests.labels("/v1/completions", 200).inc()
    other.http_requests.labels("/v1/completions", 200).inc(2)
    other.http_requests.labels("/v1/completions", 400).inc()
    one.inter_token_latency.observe(0.012)
    other.inter_token_latency.observe(0.5)
    snapshots = [one.snapshot(), other.snapshot()]
    told = read(one.exposition(snapshots))
    assert told["persimmon_http_requests_total /v1/completions 200"] == 3
    assert told["persimmon_http_requests_total /v1/completions 400"] == 1
    assert told["persimmon_inter_token_latency_seconds_count"] == 2
    assert told["persimmon_inter_token_latency_seconds_sum"] == 0.512
    assert told["persimmon_inter_token_latency_seconds_bucket 0.01"] == 0
    assert told["persimmon_inter_token_latency_seconds_bucket 0.015"] == 1
    assert told["persimmon_inter_token_latency_seconds_bucket +Inf"] == 2
    assert told["persimmon_open_streams"] == 7
    assert told["persimmon_requests_running"] == STATS.running
    assert told["persimmon_steps_total"] == STATS.steps
    assert other.exposition(snapshots) == one.exposition(snapshots)


def test_counting_began_with_the_worker_that_began_first():
    one, other = Metrics(Engine(0), "demo"), Metrics(Engine(0), "demo")
    for metrics in (one, other):
        metrics.http_requests.labels("/health", 200).inc()
    created = "persimmon_http_requests_created /health 200"
    first = read(one.exposition([one.snapshot()]))[created]
    assert read(other.exposition([other.snapshot(), one.snapshot()]))[created] == first


def test_a_snapshot_is_of_its_moment():
    metrics = Metrics(Engine(0), "demo")
    before = metrics.snapshot()
    metrics.request_latency.observe(1)
    count = "persimmon_e2e_request_latency_seconds_count"
    assert read(metrics.exposition([before]))[count] == 0
    assert read(metrics.exposition([metrics.snapshot()]))[count] == 1


# The names, types and labels that vLLM's documentation gives, which gateways and autoscalers look for.
VLLM_METRICS = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:num_preemptions": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:request_success": "counter",
}


def test_what_gateways_know_is_told_under_vllms_names_with_the_models_name():
    metrics = Metrics(Engine(0), "demo")
    metrics.inter_token_latency.observe(0.012)
    metrics.sequences_finished.labels("length").inc()
    exposition = metrics.exposition([metrics.snapshot()])
    families = {family.name: family for family in text_string_to_metric_families(exposition.decode())}
    told = {
        name: family
        for name, family in families.items()
        if name.startswith("vllm:") and not name.endswith("_created")  # when counting began, which vLLM tells too
    }
    assert {name: family.type for name, family in told.items()} == VLLM_METRICS
    assert all(sample.labels["model_name"] == "demo" for family in told.values() for sample in family.samples)
    told_samples = {
        sample.name: sample.value for family in told.values() for sample in family.samples if len(sample.labels) == 1
    }
    assert told_samples["vllm:num_requests_running"] == STATS.running
    assert told_samples["vllm:kv_cache_usage_perc"] == 0.75
    assert told_samples["vllm:generation_tokens_total"] == STATS.generated_tokens
    assert told_samples["vllm:inter_token_latency_seconds_count"] == 1
    assert told["vllm:cache_config_info"].samples[0].labels == {
        "model_name": "demo",
        "block_size": "32",
        "num_gpu_blocks": "100",
    }
    finished = {
        sample.labels["finished_reason"]: sample.value
        for sample in told["vllm:request_success"].samples
        if sample.name == "vllm:request_success_total"
    }
    assert finished == {"stop": 0, "length": 1, "abort": 0, "error": 0}


def test_each_of_vllms_names_is_another_name_of_a_metric_of_ours():
    metrics = Metrics(Engine(0), "demo")
    exposition = metrics.exposition([metrics.snapshot()])
    ours = {family.name: family for family in text_string_to_metric_families(exposition.decode())}
    for own, other in VLLM_NAMES.items():
        assert [sample.value for sample in ours[own].samples] == [sample.value for sample in ours[other].samples]


def test_steps_are_a_histogram_of_the_time_they_took():
    metrics = Metrics(Engine(0), "demo")
    told = read(metrics.exposition([metrics.snapshot()]))
    buckets = [told[f"persimmon_step_seconds_bucket {bound}"] for bound in ("0.001", "0.002", "15.0", "60.0", "+Inf")]
    assert buckets == [0, 3, 3, 7, 7]
    assert (told["persimmon_step_seconds_count"], told["persimmon_step_seconds_sum"]) == (7, 3.5)
    assert told["persimmon_graph_replays_total"] == 31


def test_every_metric_is_in_the_readme_as_the_code_has_it():
    assert metrics_table() in README.read_text()
