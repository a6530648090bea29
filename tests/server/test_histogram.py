"""Our histogram against prometheus_client's."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from persimmon.server.histogram import LocalHistogram, merged


@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.5, 2.0, 7.0]) | st.floats(0, 100)))
def test_it_says_what_prometheus_clients_says(values: list[float]) -> None:
    bounds = (0.1, 0.5, 1, 2)
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    reference = Histogram("seconds", "Times.", registry=theirs, buckets=bounds)
    own = LocalHistogram("seconds", "Times.", bounds)
    ours.register(own)
    for value in values:
        reference.observe(value)
        own.observe(value)
    lines = [line for line in generate_latest(theirs).splitlines() if b"_created" not in line]
    assert generate_latest(ours).splitlines() == lines


def test_merged_bounds_are_in_order_and_each_there_once() -> None:
    assert merged((1, 3), (0.5, 1, 7)) == (0.5, 1.0, 3.0, 7.0)
