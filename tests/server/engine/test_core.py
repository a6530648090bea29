"""The engine's turns over a real socket: each worker gets its own tokens, and one worker's end affects no other."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
import zmq

from persimmon.model.sampling_params import SamplingParams
from persimmon.model.step_outcome import StepOutcome
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.server.engine.blocks import BlockPool, block_hashes
from persimmon.server.engine.core import MAX_FAILED_STEPS, MAX_INTAKE_SECONDS, Engine
from persimmon.server.engine.messages import (
    MAX_PREFIXES_SENT,
    Abort,
    EngineStats,
    FromEngine,
    Hello,
    PrefixChange,
    Ready,
    SequenceOutput,
    StepOutput,
    Submit,
    ToEngine,
)
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_cost import StepCostModel, StepCosts, StepWork
from persimmon.server.engine.step_plan import ScheduledSequence, StepPlan
from tests.server.engine.fake_model import generate_alone, next_token

PATIENCE_MS = 10_000
LONG = 10_000
"""More tokens than any test waits for."""


class Worker:
    """An API worker's end of the socket."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def send(self, *messages: ToEngine) -> None:
        for message in messages:
            self.socket.send(msgspec.msgpack.encode(message))

    def receive(self) -> FromEngine:
        assert self.socket.poll(PATIENCE_MS), "the engine said nothing"
        return msgspec.msgpack.decode(self.socket.recv(), type=FromEngine)

    def received(self) -> list[FromEngine]:
        """What has come until now."""
        messages = []
        while self.socket.poll(0):
            messages.append(self.receive())
        return messages

    def report(self) -> Ready | StepOutput:
        """The next message, of an engine that says nothing of its prefix index."""
        message = self.receive()
        assert not isinstance(message, PrefixChange)
        return message

    def reports(self) -> list[Ready | StepOutput]:
        """What has come until now, but for changes of the prefix index."""
        return [message for message in self.received() if not isinstance(message, PrefixChange)]

    def outputs(self) -> list[SequenceOutput]:
        """What has come until now of sequences."""
        steps = [message for message in self.received() if isinstance(message, StepOutput)]
        return [output for step in steps for output in step.outputs]


class House:
    """An engine whose turns the test takes, with a model that can be made to fail."""

    def __init__(
        self,
        address: str,
        *,
        max_model_len: int = 2 * LONG,
        max_num_seqs: int = 4,
        overlap: bool = False,
        costs: StepCostModel | None = None,
        reports_prefixes: bool = False,
        **more: Any,
    ) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.address = address
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(address)
        self.pool = BlockPool(-(-max_model_len // 4) + 8, 4, tracks_changes=reports_prefixes)
        self.scheduler = Scheduler(
            self.pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=64, max_model_len=max_model_len
        )
        self.failures_to_come = 0
        self.preparations: dict[int, Future[None]] = {}
        """What sequences with prompts of such lengths wait for."""
        self.fails_after = -1
        """Sequences with this number of output tokens cannot continue."""
        ready = Ready(
            max_model_len=max_model_len,
            block_size=4,
            total_blocks=self.pool.num_blocks,
            device="cpu",
            dtype="float32",
            stats=self.scheduler.stats(),
        )
        self.overlap = overlap
        self.launched = 0
        self.failed_launches_to_come = 0
        self.engine = Engine(
            self.socket,
            self.scheduler,
            self,
            ready,
            costs=costs,
            overlap=overlap,
            reported_pool=self.pool if reports_prefixes else None,
            **more,
        )

    def worker(self) -> Worker:
        """A worker that has been welcomed."""
        worker = Worker(self.context, self.address)
        worker.send(Hello())
        self.turn()
        assert isinstance(worker.receive(), Ready)
        return worker

    def turn(self) -> None:
        # The engine itself waits for ever where nothing is to be done; a test should not.
        assert self.engine.has_work or self.socket.poll(PATIENCE_MS), "nothing has come"
        self.engine.turn()

    def first_step(self) -> None:
        """Turns until the first step of what has come has ended, which is a turn later where steps overlap."""
        self.turn()
        if self.overlap:
            self.engine.turn()

    def turn_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while not happened():
            assert time.monotonic() < deadline
            if self.engine.has_work or self.socket.poll(10):
                self.engine.turn()

    def finish(self) -> None:
        while self.engine.has_work:
            self.engine.turn()

    def is_empty(self) -> bool:
        return not self.scheduler.has_work and self.pool.num_free == self.pool.num_blocks

    def prepare(self, sequence: Sequence) -> Future[None] | None:
        return self.preparations.get(sequence.prompt_length)

    def launch(self, plan: StepPlan) -> "LaunchedStep":
        if self.failed_launches_to_come:
            self.failed_launches_to_come -= 1
            raise RuntimeError("out of memory")
        self.launched += 1
        fails = self.failures_to_come > 0
        self.failures_to_come -= fails
        return LaunchedStep(self, plan, fails)

    def outcome(self, plan: StepPlan) -> StepOutcome:
        samples = [sample for item in plan.scheduled for sample in item.samples]
        tokens = [next_token(sample.token_ids, sample.sample_index) for sample in samples]
        reporting = [(place, item) for place, item in enumerate(plan.scheduled) if item.report_from is not None]
        return StepOutcome(
            tokens=[[token] for token in tokens],
            logprobs={
                row: [TokenLogprobs(token_id=tokens[row], logprob=-row, top_ids=[], top_logprobs=[])]
                for row, sample in enumerate(samples)
                if sample.sampling.logprobs is not None
            },
            prompt_logprobs={
                place: [
                    TokenLogprobs(token_id=token, logprob=0, top_ids=[], top_logprobs=[]) for token in _reported(item)
                ]
                for place, item in reporting
                if item.sequence.prompt_logprobs is not None
            },
            pooled={place: bytes(_reported(item)) for place, item in reporting if item.sequence.pooling is not None},
            failures={
                row: "it cannot go on"
                for row, sample in enumerate(samples)
                if sample.num_output_tokens == self.fails_after
            },
        )

    def close(self) -> None:
        self.engine.close()
        self.context.destroy(linger=0)


@dataclass(frozen=True)
class LaunchedStep:
    """Is computed when it is waited for, when the tokens of the step before are known."""

    house: House
    plan: StepPlan
    fails: bool

    def wait(self) -> StepOutcome:
        if self.fails:
            raise RuntimeError("out of memory")
        return self.house.outcome(self.plan)


def _reported(item: ScheduledSequence) -> list[int]:
    return item.sequence.token_ids[item.report_from : item.end]


@pytest.fixture(params=[False, True], ids=["", "overlap"])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """An engine reached within the process, where what was sent has arrived."""
    house = House("inproc://engine", overlap=request.param)
    yield house
    house.close()


@pytest.fixture(params=["inproc", "ipc"])
def reachable_house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    """An engine reached within the process, or as it is in production."""
    house = House("inproc://engine" if request.param == "inproc" else f"ipc://{tmp_path}/e")
    yield house
    house.close()


def submit(sequence_id: int, prompt: list[int], max_tokens: int, stops: list[int] | None = None) -> Submit:
    return Submit(sequence_id=sequence_id, token_ids=prompt, max_tokens=max_tokens, stop_token_ids=stops or [])


def tokens_of(outputs: list[SequenceOutput], sequence_id: int) -> list[int]:
    return [token for output in outputs if output.sequence_id == sequence_id for token in output.token_ids]


def last_stats(worker: Worker) -> EngineStats:
    return worker.reports()[-1].stats


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


class KnownCosts(StepCostModel):
    """Each token of a chunk takes a second; a step with decodes has twenty for them."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: list[tuple[StepWork, float]] = []

    def observe(self, work: StepWork, seconds: float) -> None:
        self.observed.append((work, seconds))

    @property
    def costs(self) -> StepCosts:
        return StepCosts(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, longest=21.0)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_engine_learns_what_steps_take_and_bounds_chunks_by_it(overlap: bool) -> None:
    costs = KnownCosts()
    house = House("inproc://engine", overlap=overlap, costs=costs)
    worker = house.worker()
    worker.send(submit(1, [1], 30))
    house.first_step()
    worker.send(submit(2, [2, 0] * 30, 1))
    house.finish()
    assert tokens_of(worker.outputs(), 2) == generate_alone([2, 0] * 30, 1)[0]
    assert [work.chunk_tokens for work, _ in costs.observed if work.decodes and work.chunk_tokens] == [20, 20, 20]
    assert len(costs.observed) == house.scheduler.stats().steps
    assert all(seconds > 0 for _, seconds in costs.observed)
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


class TestPreparation:
    """Sequences with a prompt of five tokens wait for a future that the test completes."""

    PROMPT: ClassVar = [1, 2, 0, 1, 1]

    @pytest.fixture
    def prepared(self, house: House) -> Future[None]:
        return house.preparations.setdefault(5, Future())

    def test_holds_up_nobody_else(self, house: House, prepared: Future[None]) -> None:
        worker = house.worker()
        worker.send(submit(1, self.PROMPT, 3), submit(2, [2], 3))
        house.turn()
        house.finish()
        assert tokens_of(worker.outputs(), 2) == generate_alone([2], 3)[0]
        prepared.set_result(None)
        house.engine.turn()
        house.finish()
        assert tokens_of(worker.outputs(), 1) == generate_alone(self.PROMPT, 3)[0]

    def test_wakes_the_engine_when_it_ends(self, house: House, prepared: Future[None]) -> None:
        worker = house.worker()
        worker.send(submit(1, self.PROMPT, 3))
        house.turn()
        # From another thread, while this one waits in the engine's turn with nothing to do.
        thread = threading.Thread(target=prepared.set_result, args=(None,))
        thread.start()
        house.engine.turn()
        thread.join()
        house.finish()
        assert tokens_of(worker.outputs(), 1) == generate_alone(self.PROMPT, 3)[0]

    def test_that_fails_ends_its_sequences_alone(self, house: House, prepared: Future[None]) -> None:
        worker = house.worker()
        worker.send(Submit(sequence_id=1, samples=2, token_ids=self.PROMPT, max_tokens=3), submit(3, [2], 3))
        house.turn()
        prepared.set_exception(ValueError("no text fits it"))
        house.engine.turn()
        house.finish()
        outputs = worker.outputs()
        errors = {output.sequence_id: output.error for output in outputs if output.finish_reason == "error"}
        assert errors == dict.fromkeys((1, 2), "no text fits it")
        assert tokens_of(outputs, 3) == generate_alone([2], 3)[0]

    def test_of_an_aborted_sequence_starts_nothing(self, house: House, prepared: Future[None]) -> None:
        worker = house.worker()
        worker.send(Submit(sequence_id=1, samples=2, token_ids=self.PROMPT, max_tokens=3))
        house.turn()
        worker.send(Abort([1]))
        house.turn()
        prepared.set_result(None)
        house.engine.turn()
        house.finish()
        outputs = worker.outputs()
        assert tokens_of(outputs, 1) == []
        assert tokens_of(outputs, 2) == generate_alone(self.PROMPT, 3, sample_index=1)[0]
        assert house.is_empty()

    def test_may_end_after_its_worker_has_gone(self, house: House, prepared: Future[None]) -> None:
        worker, other = house.worker(), house.worker()
        worker.send(submit(1, self.PROMPT, 3))
        house.turn()
        worker.socket.close()
        other.send(submit(2, [2], 3))
        house.turn()
        house.finish()
        prepared.set_result(None)
        house.engine.turn()
        house.finish()
        assert tokens_of(other.outputs(), 2) == generate_alone([2], 3)[0]
        assert house.is_empty()


def test_steps_are_counted_with_their_time_their_tokens_and_the_graphs_among_them() -> None:
    house = House("inproc://steps", graph_replays=lambda: 5)
    worker = house.worker()
    worker.send(submit(1, list(range(9)), 3))
    house.turn()
    house.turn_until(house.is_empty)
    last = worker.reports()[-1].stats
    house.close()
    assert sum(last.step_counts) == last.steps == 3
    assert last.step_seconds > 0
    # The prompt is 9 tokens, and then each token but the last is computed.
    assert last.step_tokens == 9 + 1 + 1
    assert last.step_token_counts[:3] == (2, 0, 1)
    assert last.graph_replays == 5


def test_a_sequence_tells_how_long_it_waited_for_its_first_step() -> None:
    # Each look at the clock is a second later: real time may pass between the two submissions as well.
    house = House("inproc://queue", max_num_seqs=1, clock=itertools.count().__next__)
    worker = house.worker()
    worker.send(submit(1, [1], 3), submit(2, [1], 3))
    house.turn()
    house.turn_until(house.is_empty)
    waited = {output.sequence_id: output.queue_seconds for output in worker.outputs()}
    house.close()
    assert 0 < waited[1] < waited[2]


@pytest.mark.parametrize("overlap", [False, True])
def test_at_debug_the_log_has_a_line_for_each_step(overlap: bool, caplog: pytest.LogCaptureFixture) -> None:
    own: House = House("inproc://debug", overlap=overlap, max_num_seqs=1, graph_replays=lambda: own.launched // 2)
    worker = own.worker()
    with caplog.at_level(logging.DEBUG, "persimmon"):
        worker.send(submit(1, [1, 2, 3, 4, 5], 2), submit(2, [6], 1))
        own.turn()
        own.finish()
    steps = last_stats(worker).steps
    own.close()
    lines = [vars(record)["fields"] for record in caplog.records if record.message == "step"]
    assert len(lines) == steps == 3
    assert all(line["ms"] > 0 and line["preemptions"] == 0 for line in lines)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [(line["decodes"], line["chunk_tokens"]) for line in lines] == [(0, 5), (1, 0), (0, 1)]
    assert [line["graph"] for line in lines] == [False, True, False]
    assert (lines[0]["running"], lines[0]["waiting"]) == (1, 1)
    assert lines[-1]["free_blocks"] == own.pool.num_blocks > lines[0]["free_blocks"]


def test_above_debug_the_log_has_no_line_for_a_step(house: House, caplog: pytest.LogCaptureFixture) -> None:
    worker = house.worker()  # while it is referred to, it stays connected
    with caplog.at_level(logging.INFO, "persimmon"):
        worker.send(submit(1, [1, 2, 3], 2))
        house.turn()
        house.finish()
    assert not caplog.records


def test_the_log_names_the_requests_of_a_step_that_failed(house: House, caplog: pytest.LogCaptureFixture) -> None:
    worker = house.worker()
    house.failures_to_come = 1
    worker.send(msgspec.structs.replace(submit(1, [1], 3), request_id="mine"))
    house.turn()
    house.turn_until(house.is_empty)
    (record,) = [record for record in caplog.records if record.exc_info]
    assert vars(record)["fields"] == {"request_ids": ["mine"]}


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
