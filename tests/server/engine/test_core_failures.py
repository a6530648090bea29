"""Steps that fail: which sequences end, and when the engine does."""

import msgspec
import pytest

from persimmon.server.engine.core import MAX_FAILED_STEPS
from tests.server.engine.engine_turns import House, submit, tokens_of
from tests.server.engine.fake_model import generate_alone


def test_a_failed_step_ends_its_sequences_with_an_error_and_the_next_request_works(house: House) -> None:
    worker = house.worker()
    worker.send(*(submit(i, [1, i % 3], 4) for i in range(5)))
    house.failures_to_come = 1
    house.first_step()
    outputs = worker.outputs()
    assert [(output.sequence_id, output.finish_reason) for output in outputs] == [(i, "error") for i in range(4)]
    assert all(output.error for output in outputs)
    house.finish()
    # The fifth was waiting, so the failure was none of its own.
    assert tokens_of(worker.outputs(), 4) == generate_alone([1, 1], 4)[0]
    worker.send(submit(0, [2], 3))
    house.turn()
    house.finish()
    assert tokens_of(worker.outputs(), 0) == generate_alone([2], 3)[0]
    assert house.is_empty()


def test_a_step_that_cannot_be_launched_does_not_take_the_tokens_of_the_one_before(house: House) -> None:
    worker = house.worker()
    worker.send(submit(1, [1], 4), submit(2, [2], 1))
    house.turn()
    house.failed_launches_to_come = 1
    house.turn()
    house.finish()
    outputs = worker.outputs()
    assert tokens_of(outputs, 1) == generate_alone([1], 1)[0]
    assert tokens_of(outputs, 2) == generate_alone([2], 1)[0]
    assert [output.finish_reason for output in outputs] == [None, "length", "error"]
    assert house.is_empty()


def test_a_failed_step_leaves_the_newcomers_of_the_next_alone() -> None:
    house = House("inproc://engine", overlap=True)
    worker = house.worker()
    worker.send(submit(1, [1], 4))
    house.failures_to_come = 1
    house.turn()
    worker.send(submit(2, [2], 3))
    house.turn()
    house.finish()
    outputs = worker.outputs()
    assert [output.finish_reason for output in outputs if output.sequence_id == 1] == ["error"]
    assert tokens_of(outputs, 2) == generate_alone([2], 3)[0]
    assert house.is_empty()
    house.close()


def test_nothing_of_a_failed_step_is_found_in_the_prefix_cache(house: House) -> None:
    worker = house.worker()
    prompt = [0, 1, 2, 0, 1, 2]
    house.failures_to_come = 1
    for _ in range(2):
        worker.send(submit(1, prompt, 1))
        house.first_step()
    assert [output.finish_reason for output in worker.outputs()] == ["error", "length"]
    assert house.scheduler.stats().cached_tokens == 0


def test_an_engine_whose_steps_keep_failing_ends(house: House) -> None:
    worker = house.worker()
    house.failures_to_come = MAX_FAILED_STEPS
    for i in range(MAX_FAILED_STEPS - 1):
        worker.send(submit(i, [1], 1))
        house.first_step()
    worker.send(submit(9, [1], 1))
    with pytest.raises(RuntimeError, match="out of memory"):
        house.first_step()


def test_failures_between_good_steps_do_not_end_the_engine(house: House) -> None:
    worker = house.worker()
    for i in range(2 * MAX_FAILED_STEPS):
        house.failures_to_come = i % 2
        worker.send(submit(i, [1], 1))
        house.first_step()
    reasons = [output.finish_reason for output in worker.outputs()]
    assert reasons == ["length", "error"] * MAX_FAILED_STEPS


def test_a_sequence_that_cannot_go_on_ends_alone(house: House) -> None:
    worker = house.worker()
    house.fails_after = 3
    worker.send(submit(1, [1], 3), submit(2, [2], 9))
    house.turn()
    house.finish()
    outputs = worker.outputs()
    assert tokens_of(outputs, 1) == generate_alone([1], 3)[0]
    assert tokens_of(outputs, 2) == generate_alone([2], 3)[0]
    assert (outputs[-1].sequence_id, outputs[-1].finish_reason) == (2, "error")
    assert outputs[-1].error == "it cannot go on"
    assert house.is_empty()


def test_the_log_names_the_requests_of_a_step_that_failed(house: House, caplog: pytest.LogCaptureFixture) -> None:
    worker = house.worker()
    house.failures_to_come = 1
    worker.send(msgspec.structs.replace(submit(1, [1], 3), request_id="mine"))
    house.turn()
    house.turn_until(house.is_empty)
    (record,) = [record for record in caplog.records if record.exc_info]
    assert vars(record)["fields"] == {"request_ids": ["mine"]}
