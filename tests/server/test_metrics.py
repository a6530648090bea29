from dataclasses import dataclass

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from persimmon.server.engine.messages import EngineStats, Ready
from persimmon.server.metrics import Metrics
from tests.server.http.fake_engine import MAX_MODEL_LEN, STATS

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
    one, other = Metrics([Engine(2)], "demo"), Metrics([Engine(5)], "demo")
    one.http_requests.labels("/v1/completions", 200).inc()
    other.http_requests.labels("/v1/completions", 200).inc(2)
    other.http_requests.labels("/v1/completions", 400).inc()
    one.inter_token_latency.observe(0.012)
    other.inter_token_latency.observe(0.5)
    snapshots = [one.snapshot(), other.snapshot()]
    reported = read(one.exposition(snapshots))
    assert reported["persimmon_http_requests_total /v1/completions 200"] == 3
    assert reported["persimmon_http_requests_total /v1/completions 400"] == 1
    assert reported["persimmon_inter_token_latency_seconds_count"] == 2
    assert reported["persimmon_inter_token_latency_seconds_sum"] == 0.512
    assert reported["persimmon_inter_token_latency_seconds_bucket 0.01"] == 0
    assert reported["persimmon_inter_token_latency_seconds_bucket 0.015"] == 1
    assert reported["persimmon_inter_token_latency_seconds_bucket +Inf"] == 2
    assert reported["persimmon_open_streams"] == 7
    assert reported["persimmon_requests_running 0"] == STATS.running
    assert reported["persimmon_steps_total 0"] == STATS.steps
    assert other.exposition(snapshots) == one.exposition(snapshots)


def test_counting_began_with_the_worker_that_began_first():
    one, other = Metrics([Engine(0)], "demo"), Metrics([Engine(0)], "demo")
    for metrics in (one, other):
        metrics.http_requests.labels("/health", 200).inc()
    created = "persimmon_http_requests_created /health 200"
    first = read(one.exposition([one.snapshot()]))[created]
    assert read(other.exposition([other.snapshot(), one.snapshot()]))[created] == first


def test_a_snapshot_is_of_its_moment():
    metrics = Metrics([Engine(0)], "demo")
    before = metrics.snapshot()
    metrics.request_latency.observe(1)
    count = "persimmon_e2e_request_latency_seconds_count"
    assert read(metrics.exposition([before]))[count] == 0
    assert read(metrics.exposition([metrics.snapshot()]))[count] == 1


def test_steps_are_a_histogram_of_the_time_they_took():
    metrics = Metrics([Engine(0)], "demo")
    reported = read(metrics.exposition([metrics.snapshot()]))
    buckets = [
        reported[f"persimmon_step_seconds_bucket 0 {bound}"] for bound in ("0.001", "0.002", "15.0", "60.0", "+Inf")
    ]
    assert buckets == [0, 3, 3, 7, 7]
    assert (reported["persimmon_step_seconds_count 0"], reported["persimmon_step_seconds_sum 0"]) == (7, 3.5)
    assert reported["persimmon_graph_replays_total 0"] == 31


def test_steps_are_a_histogram_of_the_tokens_they_computed():
    metrics = Metrics([Engine(0)], "demo")
    reported = read(metrics.exposition([metrics.snapshot()]))
    buckets = [reported[f"persimmon_step_tokens_bucket 0 {bound}"] for bound in ("1.0", "8.0", "16384.0", "+Inf")]
    assert buckets == [2, 5, 5, 7]
    assert (reported["persimmon_step_tokens_count 0"], reported["persimmon_step_tokens_sum 0"]) == (7, 40_000)


def test_names_follow_prometheus_rules():
    metrics = Metrics([Engine(0)], "demo")
    types = {family.name: family.type for family in metrics.families()}
    # The client library writes a counter's _total itself; on any other type it would promise a counter.
    assert [name for name in types if name.endswith("_total")] == []
    assert all(name.startswith("persimmon_") for name in types)
    assert [name for name in types if name.endswith(("_ms", "_milliseconds", "_s", "_perc"))] == []
    exposed = [line.split()[2:] for line in metrics.exposition([]).decode().splitlines() if line.startswith("# TYPE")]
    assert all(name.endswith("_total") for name, type_ in exposed if type_ == "counter")
    assert [name for name, type_ in exposed if type_ == "gauge" and name.endswith("_total")] == []


def test_each_engine_has_its_own_series():
    other = msgspec.structs.replace(STATS, running=9, steps=70)
    metrics = Metrics([Engine(2), Engine(3, stats=other), Engine(0, ready=False, stats=None, info=None)], "demo")
    reported = read(metrics.exposition([metrics.snapshot()]))
    assert [reported[f"persimmon_engine_ready {engine}"] for engine in range(3)] == [1, 1, 0]
    assert [reported.get(f"persimmon_requests_running {engine}") for engine in range(3)] == [STATS.running, 9, None]
    assert [reported[f"persimmon_steps_total {engine}"] for engine in range(2)] == [STATS.steps, 70]
    assert reported["persimmon_step_seconds_count 0"] == reported["persimmon_step_seconds_count 1"] == 7
    assert reported["persimmon_open_streams"] == 5
