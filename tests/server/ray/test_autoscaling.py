"""How many replicas requests and KV caches need."""

from dataclasses import dataclass, field

import pytest

from persimmon.server.ray.autoscaling import KV_CACHE_USAGE, wanted_replicas


@dataclass
class Config:
    target: float

    def get_target_ongoing_requests(self) -> float:
        return self.target


@dataclass
class Situation:
    """What Ray's autoscaler passes on."""

    current_num_replicas: int
    total_num_requests: float
    aggregated_metrics: dict[str, dict[str, float]] | None
    target_num_replicas: int = 3
    config: Config = field(default_factory=lambda: Config(100))


@pytest.mark.parametrize(
    ("requests", "usage", "wanted"),
    [
        (150, [0.1, 0.1], 1.5),  # requests decide
        (10, [0.9, 0.9], 2.25),  # caches that are nearly full
        (10, [0.4, 0.2], 0.75),
        (0, [0.0, 0.0], 0),
        (50, [], 0.5),  # before the first report
    ],
)
def test_the_scarcer_of_requests_and_cache_decides(requests: float, usage: list[float], wanted: float):
    reported = {KV_CACHE_USAGE: {str(index): own for index, own in enumerate(usage)}}
    number, state = wanted_replicas(Situation(2, requests, reported))
    assert number == pytest.approx(wanted)
    assert not state


def test_a_deployment_without_replicas_stays_as_it_is_meant_to_be():
    assert wanted_replicas(Situation(0, 10, None)) == (3, {})


def test_without_custom_metrics_requests_decide():
    assert wanted_replicas(Situation(1, 200, None)) == (2, {})
