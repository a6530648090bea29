"""Gives the server's metrics to Ray's exporter, under the same names, which Ray puts `ray_` in front of.

Knows Ray's kinds of metrics.  Ray has no histogram that somebody else has counted, so of one there are the sum and the
count, which an average is made of.
"""

from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.samples import Sample
from ray.serve import metrics


class RayMetrics:
    """The metrics of one replica; Ray adds the labels application, deployment and replica."""

    def __init__(self) -> None:
        self._gauges: dict[str, metrics.Gauge] = {}
        self._counters: dict[str, metrics.Counter] = {}
        self._counted: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    def export(self, families: Iterable[Metric]) -> None:
        """Shows Ray the present values.

        Args:
            families: as `EmbeddedServer.metrics` gives them.
        """
        for family in families:
            for sample in family.samples:
                if family.type == "gauge":
                    self._set(family, sample)
                elif sample.name.endswith(("_total", "_sum", "_count")):
                    self._count(family, sample)

    def _set(self, family: Metric, sample: Sample) -> None:
        gauge = self._gauges.get(sample.name)
        if gauge is None:
            gauge = metrics.Gauge(sample.name, family.documentation, tuple(sample.labels))
            self._gauges[sample.name] = gauge
        gauge.set(sample.value, dict(sample.labels))

    def _count(self, family: Metric, sample: Sample) -> None:
        name = sample.name.removesuffix("_total")  # Ray adds it
        counter = self._counters.get(name)
        if counter is None:
            counter = self._counters[name] = metrics.Counter(name, family.documentation, tuple(sample.labels))
        series = (name, frozenset(sample.labels.items()))
        increase = sample.value - self._counted.get(series, 0.0)
        if increase > 0:
            self._counted[series] = sample.value
            counter.inc(increase, dict(sample.labels))
