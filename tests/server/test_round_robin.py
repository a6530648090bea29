"""Clients take turns, and each one's items stay in order."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persimmon.server.round_robin import RoundRobin


@given(st.lists(st.one_of(st.sampled_from("abc"), st.none()), max_size=60))
def test_items_leave_in_order_and_wait_for_one_of_each_other_client_at_most(events: list[str | None]) -> None:
    queue: RoundRobin[tuple[str, int]] = RoundRobin()
    arrived, left = Counter[str](), Counter[str]()
    overtaken: dict[str, Counter[str]] = {}
    for event in [*events, *[None] * len(events)]:
        if event is not None:
            queue.put(event, (event, arrived[event]))
            arrived[event] += 1
            overtaken.setdefault(event, Counter())
        elif queue:
            client, number = queue.take()
            assert number == left[client]
            left[client] += 1
            overtaken[client] = Counter()
            for other in overtaken.keys() - {client}:
                if arrived[other] > left[other]:
                    overtaken[other][client] += 1
                    assert overtaken[other][client] == 1
    assert left == arrived


def test_an_empty_queue_has_no_next_item() -> None:
    queue: RoundRobin[int] = RoundRobin()
    assert not queue
    with pytest.raises(IndexError, match="the queue is empty"):
        queue.take()
