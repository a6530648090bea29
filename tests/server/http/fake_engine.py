"""An engine without a model: a real ROUTER socket that speaks the engine's messages and sends what the test sets."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Self

import msgspec
import zmq
import zmq.asyncio

from persimmon.model.sampling_params import SamplingParams
from persimmon.server.engine.client import WARM_UP_ID
from persimmon.server.engine.messages import (
    STEP_SECONDS,
    STEP_TOKENS,
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


@dataclass(frozen=True)
class Sample:
    """One of the sequences that a submission asks for."""

    whole: Submit
    index: int

    @property
    def sequence_id(self) -> int:
        return self.whole.sequence_ids[self.index]

    @property
    def token_ids(self) -> list[int]:
        return self.whole.token_ids

    @property
    def max_tokens(self) -> int:
        return self.whole.max_tokens

    @property
    def stop_token_ids(self) -> list[int]:
        return self.whole.stop_token_ids

    @property
    def sampling(self) -> SamplingParams:
        return self.whole.sampling


Script = Callable[[Sample], Sequence[SequenceOutput]]
"""The outputs that a submitted sequence gets, one step each."""

MAX_MODEL_LEN = 2048
BLOCK_SIZE = 32
ONLY_TEXT = {
    "reasoning_tokens": 0,
    "audio_tokens": 0,
    "accepted_prediction_tokens": 0,
    "rejected_prediction_tokens": 0,
}
"""The details of an answer's tokens, as usage has them."""

STATS = EngineStats(
    running=3,
    waiting=2,
    free_blocks=25,
    total_blocks=100,
    steps=7,
    prompt_tokens=11,
    generated_tokens=13,
    cached_tokens=17,
    queried_tokens=19,
    preemptions=23,
    recomputed_tokens=29,
    drafts=37,
    draft_tokens=43,
    accepted_tokens=41,
    graph_replays=31,
    step_seconds=3.5,
    step_counts=(0, 3, *[0] * (len(STEP_SECONDS) - 3), 4, 0),
    step_tokens=40_000,
    step_token_counts=(2, 3, *[0] * (len(STEP_TOKENS) - 2), 2),
)


def outputs(
    sequence_id: int, steps: Sequence[Sequence[int]], finish_reason: str = "length", cached_tokens: int = 0
) -> list[SequenceOutput]:
    """One output for each step's tokens; the last one finishes the sequence."""
    reasons = [None] * (len(steps) - 1) + [finish_reason]
    return [
        SequenceOutput(
            sequence_id=sequence_id, token_ids=list(tokens), finish_reason=reason, cached_tokens=cached_tokens
        )
        for tokens, reason in zip(steps, reasons, strict=True)
    ]


def says(token_ids: Sequence[int], eos: int | None = None, cached_tokens: int = 0) -> Script:
    """A script: these tokens, one a step, then the end-of-text token if there is one and it stops the sequence."""

    def script(submit: Sample) -> list[SequenceOutput]:
        stops = eos is not None and eos in submit.stop_token_ids
        tokens = [*token_ids, eos] if stops and eos is not None else list(token_ids)
        finish_reason = "stop" if len(tokens) <= submit.max_tokens and stops else "length"
        steps = [[token] for token in tokens[: submit.max_tokens]]
        return outputs(submit.sequence_id, steps, finish_reason, cached_tokens)

    return script


def silent(submit: Sample) -> list[SequenceOutput]:
    """A script: nothing; what comes is up to `FakeEngine.send`."""
    return []


class FakeEngine:
    """The engine's end of the socket, served by a task of the running event loop.

    Attributes:
        script: what new sequences get.
        submitted: all sequences that came, in order.
        aborted: all ids that were aborted, in order.
        workers: the identities of the API workers that said hello.
        address: where it listens.
    """

    def __init__(
        self,
        script: Script = silent,
        ready: bool = True,
        address: str = "tcp://127.0.0.1:*",
        rope_limit: int | None = None,
    ) -> None:
        self.script = script
        self.submitted: list[Sample] = []
        self.aborted: list[int] = []
        self._ready = ready
        self._rope_limit = rope_limit
        self.workers: list[bytes] = []
        self._owners: dict[int, bytes] = {}
        self._changed = asyncio.Condition()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        self.address = self._socket.getsockopt(zmq.LAST_ENDPOINT).decode()  # type: ignore[union-attr]
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.die()

    async def die(self) -> None:
        """Ends as a killed process does: the connection is gone."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._socket.close()
        self._context.term()

    async def become_ready(self) -> None:
        """Answers the workers that have asked so far, and later ones at once."""
        self._ready = True
        for worker in self.workers:
            await self._send(worker, self._welcome())

    async def send(self, sequence_id: int, token_ids: Sequence[int], finish_reason: str | None = None) -> None:
        """A step's output for one sequence."""
        await self.send_output(SequenceOutput(sequence_id, list(token_ids), finish_reason))

    async def send_output(self, output: SequenceOutput) -> None:
        """A step's output for one sequence."""
        await self._send(self._owners[output.sequence_id], StepOutput([output], STATS))

    async def send_step(self, outputs: Sequence[SequenceOutput]) -> None:
        """A step's output for several sequences of one worker."""
        await self._send(self._owners[outputs[0].sequence_id], StepOutput(list(outputs), STATS))

    async def send_prefixes(self, entered: Sequence[bytes], left: Sequence[bytes] = ()) -> None:
        """Tells all workers what has entered and left the prefix index."""
        for worker in self.workers:
            await self._send(worker, PrefixChange(list(entered), list(left)))

    async def until(self, condition: Callable[[Self], bool]) -> None:
        """Returns once the condition holds; the workers' messages may make it true."""
        async with asyncio.timeout(20), self._changed:
            await self._changed.wait_for(lambda: condition(self))

    async def submissions(self, count: int) -> list[Sample]:
        """The first `count` sequences, once they have come."""
        await self.until(lambda engine: len(engine.submitted) >= count)
        return self.submitted[:count]

    async def aborts(self, count: int) -> list[int]:
        """The first `count` aborted ids, once they have come."""
        await self.until(lambda engine: len(engine.aborted) >= count)
        return self.aborted[:count]

    async def _serve(self) -> None:
        while True:
            worker, body = await self._socket.recv_multipart()
            match self._decoder.decode(body):
                case Hello():
                    self.workers.append(worker)
                    if self._ready:
                        await self._send(worker, self._welcome())
                case Submit() as submit if submit.sequence_id == WARM_UP_ID:
                    output = SequenceOutput(WARM_UP_ID, [5], "length")
                    await self._send(worker, StepOutput([output], STATS))
                case Submit() as submit:
                    self._owners |= dict.fromkeys(submit.sequence_ids, worker)
                    for sample in map(partial(Sample, submit), range(submit.samples)):
                        self.submitted.append(sample)
                        for output in self.script(sample):
                            await self._send(worker, StepOutput([output], STATS))
                case Abort(sequence_ids):
                    self.aborted += sequence_ids
            async with self._changed:
                self._changed.notify_all()

    def _welcome(self) -> Ready:
        return Ready(
            MAX_MODEL_LEN,
            block_size=BLOCK_SIZE,
            total_blocks=100,
            device="cpu",
            dtype="float32",
            stats=STATS,
            rope_limit=self._rope_limit,
        )

    async def _send(self, worker: bytes, message: FromEngine) -> None:
        await self._socket.send_multipart([worker, self._encoder.encode(message)])
