"""An engine whose turns a test takes, over a real socket, and the workers at the other end."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from persimmon.model.step_outcome import StepOutcome
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.core import Engine
from persimmon.server.engine.messages import (
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
from persimmon.server.engine.step_cost import StepCostModel
from persimmon.server.engine.step_plan import ScheduledSequence, StepPlan
from tests.server.engine.fake_model import next_token

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


def submit(sequence_id: int, prompt: list[int], max_tokens: int, stops: list[int] | None = None) -> Submit:
    return Submit(sequence_id=sequence_id, token_ids=prompt, max_tokens=max_tokens, stop_token_ids=stops or [])


def tokens_of(outputs: list[SequenceOutput], sequence_id: int) -> list[int]:
    return [token for output in outputs if output.sequence_id == sequence_id for token in output.token_ids]


def last_stats(worker: Worker) -> EngineStats:
    return worker.reports()[-1].stats
