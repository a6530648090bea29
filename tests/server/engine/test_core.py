"""The engine's turns over a real socket: each worker gets its own tokens, and one worker's end affects no other."""

import itertools

import pytest

from persimmon.model.sampling_params import SamplingParams
from persimmon.server.engine.core import MAX_INTAKE_SECONDS
from persimmon.server.engine.messages import Hello, Ready, SequenceOutput, StepOutput, Submit
from tests.server.engine.engine_turns import LONG, House, Worker, submit, tokens_of
from tests.server.engine.fake_model import generate_alone


def test_a_hello_is_answered_with_the_limits_and_the_state(reachable_house: House) -> None:
    first = reachable_house.worker()
    first.send(submit(1, [1, 2], LONG))
    reachable_house.turn()
    second = Worker(reachable_house.context, reachable_house.address)
    second.send(Hello())
    reachable_house.turn_until(lambda: bool(second.socket.poll(0)))
    ready = second.receive()
    assert isinstance(ready, Ready)
    assert (ready.max_model_len, ready.block_size) == (2 * LONG, 4)
    assert ready.stats.running == 1


def test_a_submitted_sequence_gets_its_tokens_one_a_step(reachable_house: House) -> None:
    worker = reachable_house.worker()
    worker.send(submit(7, [1, 2, 0], 3))
    reachable_house.turn_until(lambda: reachable_house.scheduler.stats().generated_tokens == 3)
    outputs: list[SequenceOutput] = []
    while len(outputs) < 3:
        message = worker.receive()
        assert isinstance(message, StepOutput)
        outputs += message.outputs
    assert [output.sequence_id for output in outputs] == [7, 7, 7]
    assert [output.finish_reason for output in outputs] == [None, None, "length"]
    assert [output.token_ids for output in outputs] == [[token] for token in generate_alone([1, 2, 0], 3)[0]]
    assert reachable_house.is_empty()


def test_a_stop_token_is_reported_with_its_reason(house: House) -> None:
    worker = house.worker()
    expected, reason = generate_alone([1, 2, 0], 50, [1])
    assert reason == "stop"
    worker.send(submit(1, [1, 2, 0], 50, [1]))
    house.turn()
    house.finish()
    outputs = worker.outputs()
    assert tokens_of(outputs, 1) == expected
    assert outputs[-1].finish_reason == "stop"


def test_workers_may_use_the_same_ids_and_get_their_own_tokens(house: House) -> None:
    workers = [house.worker() for _ in range(3)]
    prompts = [[1, 1], [2, 0, 1], [0]]
    for worker, prompt in zip(workers, prompts, strict=True):
        worker.send(submit(1, prompt, 9), submit(2, [*prompt, 2], 9))
    house.turn()
    house.finish()
    for worker, prompt in zip(workers, prompts, strict=True):
        outputs = worker.outputs()
        assert tokens_of(outputs, 1) == generate_alone(prompt, 9)[0]
        assert tokens_of(outputs, 2) == generate_alone([*prompt, 2], 9)[0]


def test_an_id_may_be_used_again_after_its_sequence_has_ended(house: House) -> None:
    worker = house.worker()
    for prompt in ([1], [2, 2]):
        worker.send(submit(1, prompt, 4))
        house.turn()
        house.finish()
        assert tokens_of(worker.outputs(), 1) == generate_alone(prompt, 4)[0]


def test_cached_prompt_tokens_are_reported(house: House) -> None:
    worker = house.worker()
    for cached in (0, 8):
        worker.send(submit(1, [0, 1, 2, 0, 1, 2, 0, 1, 2], 2))
        house.turn()
        house.finish()
        assert [output.cached_tokens for output in worker.outputs()] == [cached, cached]


def test_every_worker_hears_of_the_state_after_each_step(house: House) -> None:
    busy, idle = house.worker(), house.worker()
    idle.received()
    busy.send(submit(1, [1], 2))
    house.first_step()
    house.finish()
    messages = idle.reports()
    assert [message.stats.generated_tokens for message in messages][-2:] == [1, 2]
    assert [message.stats.running for message in messages][-2:] == [1, 0]
    assert all(isinstance(message, StepOutput) and not message.outputs for message in messages)


@pytest.mark.parametrize("bad", [submit(2, [1], 2 * LONG), submit(2, [], 4), submit(2, [1], -1)])
def test_a_sequence_that_cannot_run_ends_with_an_error_and_harms_nobody(house: House, bad: Submit) -> None:
    worker = house.worker()
    worker.send(submit(1, [1], 4), bad, submit(3, [2], 4))
    house.turn()
    house.finish()
    outputs = worker.outputs()
    (refusal,) = (output for output in outputs if output.sequence_id == 2)
    assert (refusal.token_ids, refusal.finish_reason) == ([], "error")
    assert refusal.error is not None
    assert "prompt tokens" in refusal.error
    assert tokens_of(outputs, 1) == generate_alone([1], 4)[0]
    assert tokens_of(outputs, 3) == generate_alone([2], 4)[0]


def test_a_refusal_is_sent_though_no_step_follows(house: House) -> None:
    worker = house.worker()
    worker.send(submit(1, [], 4))
    house.turn()
    assert [output.finish_reason for output in worker.outputs()] == ["error"]


def test_where_steps_overlap_the_next_is_launched_before_the_last_is_waited_for() -> None:
    house = House("inproc://engine", overlap=True)
    worker = house.worker()
    worker.send(submit(1, [1], 9))
    house.turn()
    assert worker.outputs() == []
    for number in range(9):
        assert house.launched == min(number + 1, 9)
        house.turn()
        assert len(worker.outputs()) == 1
    assert house.launched == 9
    house.close()


def test_samples_of_one_prompt_get_tokens_of_their_own(house: House) -> None:
    worker = house.worker()
    worker.send(Submit(sequence_id=5, samples=3, token_ids=[1, 2, 0], max_tokens=6))
    house.turn()
    house.finish()
    outputs = worker.outputs()
    for index, sequence_id in enumerate((5, 6, 7)):
        assert tokens_of(outputs, sequence_id) == generate_alone([1, 2, 0], 6, sample_index=index)[0]
    assert house.scheduler.stats().prompt_tokens == 3
    assert house.is_empty()


def test_what_a_step_reports_goes_to_the_sequence_that_asked(house: House) -> None:
    worker = house.worker()
    prompt = [1, 2, 0] * 30
    worker.send(
        submit(1, [2, 2], 3),
        Submit(
            sequence_id=2,
            samples=2,
            token_ids=prompt,
            max_tokens=2,
            sampling=SamplingParams(logprobs=0),
            prompt_logprobs=0,
        ),
        Submit(sequence_id=4, token_ids=prompt, max_tokens=0, pooling="all"),
    )
    house.turn()
    house.finish()
    outputs = worker.outputs()
    reported = {
        sequence_id: [output for output in outputs if output.sequence_id == sequence_id] for sequence_id in range(1, 5)
    }
    assert not any(output.logprobs or output.prompt_logprobs or output.pooled for output in reported[1])
    for sequence_id in (2, 3):
        entries = [entry.token_id for output in reported[sequence_id] for entry in output.logprobs]
        assert entries == tokens_of(outputs, sequence_id)
    assert [entry.token_id for output in reported[2] for entry in output.prompt_logprobs] == prompt
    assert not any(output.prompt_logprobs for output in reported[3])
    # In the order of the prompt, chunk by chunk, and all of it before the end.
    assert len(reported[4]) > 1
    assert b"".join(output.pooled for output in reported[4]) == bytes(prompt)
    assert [output.finish_reason for output in reported[4]] == [None] * (len(reported[4]) - 1) + ["length"]
    assert tokens_of(outputs, 4) == []


def test_steps_go_on_while_a_worker_submits_without_end() -> None:
    ticks = itertools.count()
    house = House("inproc://engine", clock=lambda: next(ticks) * MAX_INTAKE_SECONDS / 32)
    try:
        worker = house.worker()
        worker.send(*(Submit(sequence_id=number, token_ids=[1], max_tokens=1) for number in range(100)))
        house.turn_until(lambda: house.scheduler.stats().steps == 1)
        assert 0 < house.scheduler.num_waiting < 32
        house.finish()
        assert len({output.sequence_id for output in worker.outputs()}) == 100
    finally:
        house.close()
