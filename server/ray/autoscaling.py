"""How many replicas there should be: as many as the requests and the KV caches need.

Plain Python, called by Ray's controller: knows figures, and neither Ray nor an engine.
"""

from collections.abc import Mapping
from typing import Any, Protocol

KV_CACHE_USAGE = "persimmon_kv_cache_usage_ratio"
"""The metric that replicas report: the share of the KV blocks that sequences hold, 0 to 1."""

TARGET_KV_CACHE_USAGE = 0.8
"""Above it, on average, there should be more replicas: soon sequences would be preempted."""


class _Config(Protocol):
    def get_target_ongoing_requests(self) -> float:
        """Requests that each replica should have, running and waiting."""


class Situation(Protocol):
    """What is read of Ray's AutoscalingContext."""

    current_num_replicas: int
    target_num_replicas: int

    @property
    def total_num_requests(self) -> float:
        """Requests at the replicas and in the proxies' queues."""

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """By name, what each replica has reported, averaged over the look-back time."""

    @property
    def config(self) -> _Config:
        """Ray's AutoscalingConfig of the deployment."""


def wanted_replicas(situation: Situation) -> tuple[float, dict[str, Any]]:
    """A policy for Ray's autoscaler, which rounds up, and keeps to the bounds and the delays of its configuration.

    Returns:
        The number of replicas, and the state of the policy, which has none.
    """
    if not situation.current_num_replicas:
        return situation.target_num_replicas, {}
    by_requests = situation.total_num_requests / situation.config.get_target_ongoing_requests()
    usage = (situation.aggregated_metrics or {}).get(KV_CACHE_USAGE, {})
    by_cache = sum(usage.values()) / TARGET_KV_CACHE_USAGE
    return max(by_requests, by_cache), {}
