"""The engine's heartbeat, and the end of what waits too long."""

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from persimmon.server.engine.messages import Submit
from tests.server.engine.engine_turns import LONG, House

TIMEOUT = 60.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def beats() -> list[bool]:
    return []


@pytest.fixture(params=[False, True], ids=["in turn", "overlapping"])
def house(request: pytest.FixtureRequest, clock: Clock, beats: list[bool]) -> Iterator[House]:
    house = House(
        "inproc://engine",
        max_num_seqs=2,
        overlap=request.param,
        queue_timeout=TIMEOUT,
        beat=beats.append,
        clock=clock,
    )
    yield house
    house.close()


def submit(sequence_id: int, *, samples: int = 1, tokens: int = LONG, length: int = 3) -> Submit:
    return Submit(sequence_id=sequence_id, samples=samples, token_ids=[7] * length, max_tokens=tokens)


def test_the_heart_beats_around_every_step_and_says_whether_there_is_more(house: House, beats: list[bool]) -> None:
    worker = house.worker()
    assert beats == [False]
    worker.send(submit(1, tokens=3))
    house.turn()
    house.finish()
    before_steps, after_steps = beats[1::2], beats[2::2]
    assert len(after_steps) >= 3
    assert all(before_steps)
    assert after_steps == [True] * (len(after_steps) - 1) + [False]


def test_the_heart_beats_while_only_threads_work(house: House, beats: list[bool]) -> None:
    worker = house.worker()
    house.preparations[3] = Future()
    worker.send(submit(1))
    house.turn()
    count = len(beats)
    house.engine.turn()  # it waits for the thread, but not for ever
    assert beats[count:] == [False]
    house.preparations[3].set_result(None)


def test_what_waits_too_long_to_be_begun_expires_and_what_was_begun_does_not(house: House, clock: Clock) -> None:
    worker = house.worker()
    worker.send(submit(1), submit(2))
    house.first_step()
    worker.send(submit(3), submit(4, samples=2))
    house.turn()
    clock.now += TIMEOUT - 1
    house.turn()
    assert all(output.finish_reason is None for output in worker.outputs())
    clock.now += 1
    house.turn()
    ended = [output for output in worker.outputs() if output.finish_reason is not None]
    assert [(output.sequence_id, output.finish_reason) for output in ended] == [(n, "expired") for n in (3, 4, 5)]
    assert all(output.error == "The request waited in the queue for 60 s without being started." for output in ended)
    assert house.scheduler.num_waiting == 0
    assert house.scheduler.num_running == 2


def test_a_preempted_sequence_does_not_expire(clock: Clock) -> None:
    # Room for two prompts but not for two answers: the second is preempted.
    house = House("inproc://engine", max_model_len=64, queue_timeout=TIMEOUT, clock=clock)
    worker = house.worker()
    worker.send(submit(1, tokens=60, length=4), submit(2, tokens=60, length=4))
    house.turn_until(lambda: house.scheduler.stats().preemptions > 0)
    clock.now += TIMEOUT
    house.finish()
    assert [output.finish_reason for output in worker.outputs() if output.finish_reason] == ["length", "length"]
    house.close()


def test_what_is_still_being_prepared_expires_too(house: House, clock: Clock) -> None:
    worker = house.worker()
    house.preparations[3] = Future()
    worker.send(submit(1))
    house.turn()
    clock.now += TIMEOUT
    house.engine.turn()
    (output,) = worker.outputs()
    assert output.finish_reason == "expired"
    house.preparations[3].set_result(None)
    house.engine.turn()
    assert house.is_empty()


def test_a_deadline_keeps_nothing_that_has_ended(house: House) -> None:
    worker = house.worker()
    for number in range(3):
        worker.send(submit(number, tokens=2))
        house.turn()
        house.finish()
    assert [reference() for _, reference in house.engine._deadlines] in ([None], [])
