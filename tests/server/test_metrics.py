from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from server.engine.messages import EngineStats
from server.metrics import Metrics
from tests.server.http.fake_engine import STATS


@dataclass
class Engine:
    open_streams: int
    ready: bool = True
    stats: EngineStats | None = STATS


def read(exposition: bytes) -> dict[str, float]:
    """Every series, by its name and the values of its labels."""
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(exposition.decode())
        for sample in family.samples
    }


def test_the_workers_counts_are_added_up_and_the_engines_figures_are_told_once():
    one, other = Metrics(Engine(2)), Metrics(Engine(5))
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
    one, other = Metrics(Engine(0)), Metrics(Engine(0))
    for metrics in (one, other):
        metrics.http_requests.labels("/health", 200).inc()
    created = "persimmon_http_requests_created /health 200"
    first = read(one.exposition([one.snapshot()]))[created]
    assert read(other.exposition([other.snapshot(), one.snapshot()]))[created] == first


def test_a_snapshot_is_of_its_moment():
    metrics = Metrics(Engine(0))
    before = metrics.snapshot()
    metrics.request_latency.observe(1)
    count = "persimmon_e2e_request_latency_seconds_count"
    assert read(metrics.exposition([before]))[count] == 0
    assert read(metrics.exposition([metrics.snapshot()]))[count] == 1
