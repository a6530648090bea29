"""The engine and its workers: some leave, come back, or send messages that cannot be read."""

import msgspec
import pytest

from persimmon.server.engine.messages import Abort, Hello, Ready, StepOutput, Submit
from tests.server.engine.engine_turns import LONG, House, Worker, submit, tokens_of
from tests.server.engine.fake_model import generate_alone


def test_the_sequences_of_a_worker_that_has_gone_end_and_others_go_on(reachable_house: House) -> None:
    house = reachable_house
    gone, stays = house.worker(), house.worker()
    gone.send(submit(1, [1], LONG), submit(2, [2], LONG))
    stays.send(submit(1, [0], LONG))
    house.turn_until(lambda: house.scheduler.num_running == 3)
    gone.socket.close()
    house.turn_until(lambda: house.scheduler.num_running == 1)
    before = house.scheduler.stats().generated_tokens
    house.turn()
    assert house.scheduler.stats().generated_tokens == before + 1
    stays.send(Abort([1]))
    house.turn_until(house.is_empty)


def test_the_other_workers_hear_of_blocks_that_a_gone_one_leaves(reachable_house: House) -> None:
    house = reachable_house
    gone, stays = house.worker(), house.worker()
    gone.send(submit(1, [1], LONG))
    house.turn_until(lambda: house.scheduler.num_running == 1)
    gone.socket.close()
    house.turn_until(house.is_empty)
    while stays.report().stats.free_blocks != house.scheduler.stats().free_blocks:
        pass  # earlier outputs


def test_a_worker_that_goes_after_submitting_leaves_nothing(reachable_house: House) -> None:
    house = reachable_house
    stays = house.worker()
    gone = house.worker()
    gone.send(submit(1, [1], LONG), Abort([1]), submit(2, [1], LONG))
    # Closing without linger may drop what is under way: either way nothing of it may stay.
    gone.socket.close()
    stays.send(submit(1, [2], 300))
    house.turn_until(lambda: house.scheduler.stats().generated_tokens >= 300 and house.is_empty())


def test_a_worker_that_comes_back_is_a_new_one(house: House) -> None:
    for _ in range(3):
        worker = house.worker()
        worker.send(submit(1, [1], LONG))
        house.turn_until(lambda: house.scheduler.num_running == 1)
        worker.socket.close()
        house.turn_until(house.is_empty)


GARBAGE = {
    "nothing": [b""],
    "noise": [b"\xff\x00garbage"],
    "another type": [msgspec.msgpack.encode({"sequence_id": 1})],
    "unknown message": [msgspec.msgpack.encode(["restart", 1])],
    "wrong field": [msgspec.msgpack.encode(["abort", "all"])],
    "cut short": [msgspec.msgpack.encode(submit(1, [1, 2], 3))[:-2]],
    "not UTF-8": [b"\x92\xa5abor\x93\x91\x01"],
    "too deep": [b"\x92\xa5hello" + b"\x91" * 100_000],
    "two parts": [msgspec.msgpack.encode(Hello()), msgspec.msgpack.encode(Hello())],
}


@pytest.mark.parametrize("frames", GARBAGE.values(), ids=GARBAGE)
def test_what_is_no_message_is_logged_and_ignored(
    house: House, frames: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    worker, other = house.worker(), house.worker()
    other.send(submit(1, [1], 4))
    worker.socket.send_multipart(frames)
    worker.send(submit(1, [2], 4))
    house.turn()
    house.finish()
    assert tokens_of(other.outputs(), 1) == generate_alone([1], 4)[0]
    assert tokens_of(worker.outputs(), 1) == generate_alone([2], 4)[0]
    assert "ignored an unreadable message" in caplog.text


@pytest.mark.parametrize("message", [Abort([1]), submit(1, [1], LONG)])
def test_a_worker_that_has_not_said_hello_is_not_served(
    house: House, message: Abort | Submit, caplog: pytest.LogCaptureFixture
) -> None:
    polite, rude = house.worker(), Worker(house.context, house.address)
    rude.send(message)
    polite.send(submit(1, [2], 3))
    house.turn()
    house.finish()
    assert tokens_of(polite.outputs(), 1) == generate_alone([2], 3)[0]
    assert rude.received() == []
    assert house.is_empty()
    assert "that is not connected" in caplog.text


def test_a_second_hello_keeps_the_sequences(house: House) -> None:
    worker = house.worker()
    worker.send(submit(1, [1], 3))
    house.turn()
    worker.send(Hello())
    house.turn()
    house.finish()
    messages = worker.received()
    outputs = [output for message in messages if isinstance(message, StepOutput) for output in message.outputs]
    assert sum(isinstance(message, Ready) for message in messages) == 1
    assert tokens_of(outputs, 1) == generate_alone([1], 3)[0]
