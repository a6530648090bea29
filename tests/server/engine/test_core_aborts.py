"""Aborts in the engine: of sequences that run, wait, are being handed over or are gone."""

import itertools

import pytest

from persimmon.server.engine.core import MAX_INTAKE_SECONDS
from persimmon.server.engine.messages import Abort, Submit
from tests.server.engine.engine_turns import LONG, House, last_stats, submit, tokens_of
from tests.server.engine.fake_model import generate_alone


def test_a_running_sequence_is_aborted_before_the_next_step(house: House) -> None:
    worker = house.worker()
    worker.send(submit(1, [1], LONG), submit(2, [2], 5))
    house.first_step()
    worker.send(Abort([1]))
    worker.outputs()
    house.turn()
    assert house.scheduler.num_running == 1
    house.finish()
    outputs = worker.outputs()
    assert [output.sequence_id for output in outputs] == [2] * 4
    assert house.is_empty()


def test_the_last_abort_is_news_for_the_workers(house: House) -> None:
    worker = house.worker()
    worker.send(submit(1, [1], LONG))
    house.turn()
    worker.send(Abort([1]))
    house.turn()
    stats = last_stats(worker)
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, house.pool.num_blocks)


def test_a_queued_sequence_can_be_aborted(house: House) -> None:
    worker = house.worker()
    worker.send(*(submit(i, [1], 3) for i in range(4)), submit(4, [2], 3))
    house.turn()
    assert house.scheduler.num_waiting == 1
    worker.send(Abort([4]))
    house.turn()
    assert house.scheduler.num_waiting == 0
    house.finish()
    assert tokens_of(worker.outputs(), 4) == []


def test_an_abort_that_comes_with_its_submission_leaves_nothing(house: House) -> None:
    worker = house.worker()
    worker.received()
    worker.send(submit(1, [1], LONG), Abort([1]))
    house.turn()
    assert house.is_empty()
    assert worker.outputs() == []


def test_aborts_of_unknown_and_finished_sequences_are_ignored(house: House) -> None:
    worker = house.worker()
    worker.send(submit(1, [1], 1))
    house.turn()
    worker.send(Abort([1, 99]), submit(2, [2], 3))
    house.turn()
    house.finish()
    assert tokens_of(worker.outputs(), 2) == generate_alone([2], 3)[0]


def test_one_worker_cannot_abort_anothers_sequence(house: House) -> None:
    owner, other = house.worker(), house.worker()
    owner.send(submit(1, [1], 4))
    other.send(Abort([1]))
    house.turn()
    house.finish()
    assert tokens_of(owner.outputs(), 1) == generate_alone([1], 4)[0]


@pytest.mark.parametrize("aborted", [[5], [6], [5, 7], [5, 6, 7]])
def test_some_samples_of_a_prompt_can_be_aborted(house: House, aborted: list[int]) -> None:
    worker = house.worker()
    # Before the prompt is computed: it takes three steps.
    worker.send(Submit(sequence_id=5, samples=3, token_ids=[1, 2, 0] * 50, max_tokens=6))
    house.turn()
    worker.send(Abort(aborted))
    house.turn()
    house.finish()
    outputs = worker.outputs()
    for index, sequence_id in enumerate((5, 6, 7)):
        alone = generate_alone([1, 2, 0] * 50, 6, sample_index=index)[0]
        assert tokens_of(outputs, sequence_id) == ([] if sequence_id in aborted else alone)
    assert house.is_empty()


def test_samples_are_aborted_while_their_submissions_wait_to_be_handed_over() -> None:
    ticks = itertools.count()
    house = House("inproc://engine", clock=lambda: next(ticks) * MAX_INTAKE_SECONDS / 128)
    try:
        worker, other = house.worker(), house.worker()
        worker.send(*(Submit(sequence_id=number, token_ids=[1], max_tokens=9, owner="many") for number in range(100)))
        worker.send(Submit(sequence_id=100, token_ids=[1], max_tokens=2, samples=2, owner="few"), Abort([98, 100]))
        other.send(Submit(sequence_id=0, token_ids=[1], max_tokens=2))
        house.turn_until(lambda: house.scheduler.stats().steps == 1)
        house.finish()
        ended = {output.sequence_id for output in worker.outputs() if output.finish_reason}
        assert ended == set(range(102)) - {98, 100}
        assert [output.finish_reason for output in other.outputs()][-1] == "length"
        assert house.is_empty()
    finally:
        house.close()
