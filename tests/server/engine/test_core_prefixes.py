"""Which changes of its prefix index an engine reports to its workers."""

from collections.abc import Iterator

import pytest

from persimmon.server.engine.blocks import block_hashes
from persimmon.server.engine.messages import MAX_PREFIXES_SENT, FromEngine, PrefixChange, StepOutput
from tests.server.engine.engine_turns import House, submit


@pytest.fixture(params=[False, True], ids=["", "overlap"])
def reporting(request: pytest.FixtureRequest) -> Iterator[House]:
    """An engine next to others, whose workers want to know what it has cached."""
    house = House("inproc://engine", overlap=request.param, max_model_len=8 * MAX_PREFIXES_SENT, reports_prefixes=True)
    yield house
    house.close()


def prefixes(messages: list[FromEngine]) -> list[PrefixChange]:
    return [message for message in messages if isinstance(message, PrefixChange)]


def test_workers_hear_what_enters_the_prefix_index_before_the_output_of_the_step(reporting: House) -> None:
    one, other = reporting.worker(), reporting.worker()
    one.received()
    one.send(submit(1, list(range(10)), 3))
    reporting.turn()
    reporting.finish()
    messages = one.received()
    first = next(place for place, message in enumerate(messages) if isinstance(message, StepOutput) and message.outputs)
    known = [block_hash for change in prefixes(messages[:first]) for block_hash in change.entered]
    assert known == list(block_hashes(range(10), 4))
    assert prefixes(other.received()) == prefixes(messages)


def test_workers_hear_what_leaves_the_prefix_index(reporting: House) -> None:
    worker = reporting.worker()
    length = 4 * (reporting.pool.num_blocks - 2)
    tokens = [number % 251 for number in range(length + 5)]
    for begin in (0, 5):
        worker.send(submit(begin, tokens[begin : begin + length], 1))
        reporting.turn()
        reporting.finish()
    known: set[bytes] = set()
    for change in prefixes(worker.received()):
        known = known.union(change.entered).difference(change.left)
    assert known == set(reporting.pool.indexed)
    assert known.isdisjoint(list(block_hashes(tokens[:length], 4))[3:])


def test_a_worker_that_comes_later_gets_the_whole_index_in_pieces(reporting: House) -> None:
    worker = reporting.worker()
    tokens = [number % 251 for number in range(4 * (MAX_PREFIXES_SENT + 5))]
    worker.send(submit(1, tokens, 1))
    reporting.turn()
    reporting.finish()
    later = reporting.worker()
    pieces = prefixes(later.received())
    assert [len(piece.entered) for piece in pieces] == [MAX_PREFIXES_SENT, 5]
    assert {block_hash for piece in pieces for block_hash in piece.entered} == set(block_hashes(tokens, 4))


def test_a_single_engine_tells_nothing_of_its_prefix_index(house: House) -> None:
    worker = house.worker()
    worker.send(submit(1, list(range(10)), 3))
    house.turn()
    house.finish()
    assert prefixes(worker.received()) == []
