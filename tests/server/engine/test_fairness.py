"""Clients share the engine: no sequence starves behind a more urgent priority, or behind a client with more work."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.waiting import AGEING_TURN, WaitingQueue
from tests.server.engine.simulation import Simulation


class Arrivals:
    """A queue, and what arrives there."""

    def __init__(self) -> None:
        self.queue = WaitingQueue()
        self.count = 0

    def add(self, owner: str = "", priority: int = 0, weight: int = 1) -> Sequence:
        sequence = Sequence(self.count, [0], 1, priority=priority, owner=owner, weight=weight)
        sequence.arrival = self.count
        sequence.share = self.queue.share_of(owner, weight)
        self.count += 1
        self.queue.add(sequence)
        return sequence

    def admit(self, tokens: int = 1) -> Sequence:
        first = next(self.queue.in_order())
        self.queue.admit(first, tokens)
        return first


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=8),
    st.lists(st.lists(st.integers(-3, 3), max_size=3), max_size=60),
)
def test_each_sequence_is_overtaken_a_bounded_number_of_times_whatever_arrives(
    first: list[int], later: list[list[int]]
) -> None:
    arrivals = Arrivals()
    waits = {arrivals.add(priority=priority): AGEING_TURN * (place + 1) for place, priority in enumerate(first)}
    for priorities in later:
        for priority in priorities:
            waits[arrivals.add(priority=priority)] = AGEING_TURN * (len(waits) + 1)
        if waits:
            del waits[arrivals.admit()]
        for sequence in waits:
            waits[sequence] -= 1
            assert waits[sequence] > 0, f"sequence {sequence.key} waits for too long"


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1)), min_size=1, max_size=30),
    st.lists(st.integers(0, 2**31), min_size=30, max_size=30),
)
def test_sequences_leave_the_queue_in_its_order_or_any_other(arrived: list[tuple[str, int]], picks: list[int]) -> None:
    arrivals = Arrivals()
    present = [arrivals.add(owner, priority) for owner, priority in arrived]
    for pick in picks[: len(present)]:
        in_order = list(arrivals.queue.in_order())
        assert len(in_order) == len(arrivals.queue) == len(present)
        assert set(in_order) == set(present)
        sequence = present.pop(pick % len(present))
        if pick % 3:
            arrivals.queue.remove(sequence)
        else:
            arrivals.queue.admit(sequence, 3)
    assert not arrivals.queue


@pytest.mark.parametrize("weight", [1, 3])
@settings(max_examples=50)
@given(st.lists(st.integers(1, 50), min_size=40, max_size=40))
def test_clients_that_wait_are_served_by_their_weights(weight: int, tokens: list[int]) -> None:
    arrivals = Arrivals()
    for _ in range(len(tokens)):
        arrivals.add("plain")
        arrivals.add("heavy", weight=weight)
    served = Counter[str]()
    for count in tokens:
        served[arrivals.admit(count).owner] += count
        assert abs(served["plain"] - served["heavy"] / weight) <= 50


def test_a_client_saves_nothing_up_while_it_wants_nothing() -> None:
    arrivals = Arrivals()
    for _ in range(50):
        arrivals.add("busy")
    for _ in range(20):
        arrivals.admit(100)
    for _ in range(10):
        arrivals.add("newcomer")
    assert Counter(arrivals.admit(100).owner for _ in range(10)) == {"busy": 5, "newcomer": 5}


def test_a_client_that_joins_goes_before_those_that_were_served_as_little() -> None:
    arrivals = Arrivals()
    for _ in range(10):
        arrivals.add("busy")
    for _ in range(4):
        assert arrivals.admit(100).owner == "busy"
        arrivals.add("newcomer")
        assert arrivals.admit(1).owner == "newcomer"


def test_a_more_urgent_priority_goes_before_shares() -> None:
    arrivals = Arrivals()
    for _ in range(20):
        arrivals.add("plain")
        arrivals.add("urgent", priority=-1)
    owners = [arrivals.admit().owner for _ in range(2 * AGEING_TURN)]
    assert owners == ["urgent", "urgent", "urgent", "plain"] * 2


def test_a_client_gets_a_place_though_another_has_all() -> None:
    simulation = Simulation(num_blocks=64, block_size=4, max_model_len=64, max_num_seqs=4)
    hog = [simulation.add([place % 3] * 3, 60, owner="hog") for place in range(20)]
    simulation.step_until(lambda: len(simulation.running) == 4)
    newcomer = simulation.add([1, 2], 4, owner="newcomer")
    for _ in range(5):
        simulation.step()
    assert newcomer.finished
    assert not any(own.finished for own in hog)
    assert simulation.stats.preemptions == 1
    simulation.drain()


def test_a_client_gets_its_first_token_from_the_next_step() -> None:
    simulation = Simulation(num_blocks=64, block_size=4, max_model_len=64, max_num_seqs=4)
    for place in range(20):
        simulation.add([place % 3] * 3, 60, owner="hog")
    simulation.step_until(lambda: len(simulation.running) == 4)
    for _ in range(3):
        newcomer = simulation.add([1, 2], 2, owner="newcomer")
        simulation.step()
        assert newcomer.num_output_tokens == 1
        simulation.step()
        assert newcomer.finished
    simulation.drain()


def test_a_client_gets_blocks_though_another_has_all() -> None:
    simulation = Simulation(num_blocks=16, block_size=4, max_model_len=32, max_num_seqs=8, prefix_caching=False)
    for place in range(8):
        simulation.add([place % 3] * 3, 29, owner="hog")
    simulation.step_until(lambda: simulation.pool.num_free == 0)
    hog_finished = len(simulation.finished)
    newcomer = simulation.add([1] * 11, 4, owner="newcomer")
    simulation.step_until(lambda: newcomer.finished)
    assert len(simulation.finished) - hog_finished <= 2
    simulation.drain()


def test_two_clients_that_want_everything_end_with_half_each_and_leave_one_another_in_peace() -> None:
    simulation = Simulation(num_blocks=200, block_size=4, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=64)
    for place in range(16):
        simulation.add([place % 3] * 3, 60, owner="first")
    simulation.step_until(lambda: len(simulation.running) == 8)
    for place in range(16):
        simulation.add([place % 3] * 3, 60, owner="second")
    for _ in range(10):
        simulation.step()
    assert Counter(own.owner for own in simulation.running) == {"first": 4, "second": 4}
    for _ in range(20):
        simulation.step()
    assert simulation.stats.preemptions == 4
    simulation.drain()


@pytest.mark.parametrize(("weight", "places"), [(1, 4), (3, 6)])
def test_places_follow_weights(weight: int, places: int) -> None:
    simulation = Simulation(num_blocks=200, block_size=4, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=64)
    for place in range(16):
        simulation.add([place % 3] * 3, 60, owner="first")
    simulation.step_until(lambda: len(simulation.running) == 8)
    for place in range(16):
        simulation.add([place % 3] * 3, 60, owner="second", weight=weight)
    for _ in range(12):
        simulation.step()
    assert sum(own.owner == "second" for own in simulation.running) == places
    simulation.drain()


def test_a_more_urgent_sequence_gives_its_place_to_no_other_client() -> None:
    simulation = Simulation(num_blocks=64, block_size=4, max_model_len=64, max_num_seqs=4)
    for place in range(8):
        simulation.add([place % 3] * 3, 20, owner="urgent", priority=-1)
    simulation.step_until(lambda: len(simulation.running) == 4)
    simulation.add([1, 2], 4, owner="plain")
    simulation.drain()
    assert simulation.stats.preemptions == 0


def test_with_one_client_no_place_is_taken_away() -> None:
    simulation = Simulation(num_blocks=64, block_size=4, max_model_len=64, max_num_seqs=4)
    for place in range(12):
        simulation.add([place % 3] * 3, 20, priority=-place)
        simulation.step()
    simulation.drain()
    assert simulation.stats.preemptions == 0


def test_the_prompt_of_a_client_with_little_is_not_computed_behind_all_of_another() -> None:
    simulation = Simulation(
        num_blocks=200,
        block_size=4,
        max_model_len=100,
        max_num_seqs=8,
        max_num_batched_tokens=16,
        prefix_caching=False,
    )
    for place in range(6):
        simulation.add([place % 3] * (20 + place), 2, owner="hog")
    simulation.step()
    newcomer = simulation.add([1] * 30, 2, owner="newcomer")
    simulation.step_until(lambda: newcomer.num_output_tokens > 0)
    begun = [own for own in (*simulation.live.values(), *simulation.finished.values()) if own.num_output_tokens]
    assert len(begun) <= 3, "the shorter prompts of a client that has many went first"
    simulation.drain()
