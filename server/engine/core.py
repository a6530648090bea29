"""The engine loop: inbox -> plan -> run -> commit -> outbox, one step after the other.

Knows API workers by their ZeroMQ identity, never by what is on their other side, and the model as a function from a
plan to tokens.
"""

import logging
from collections.abc import Sequence as Ids
from typing import Protocol

import msgspec
import zmq

from server.engine.messages import (
    Abort,
    FromEngine,
    Hello,
    Ready,
    SequenceOutput,
    StepOutput,
    Submit,
    ToEngine,
)
from server.engine.scheduler import Scheduler, StepPlan
from server.engine.sequence import Sequence

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""After so many failed steps in a row the engine ends: it is not the requests that are bad."""

SequenceKey = tuple[bytes, int]
"""A worker's identity and its own number for the sequence."""


class StepRunner(Protocol):
    """What the engine needs of a model: one token for each scheduled sequence that samples, in the plan's order."""

    def __call__(self, plan: StepPlan) -> Ids[int]: ...  # noqa: D102


class Engine:
    """The loop and its socket.

    Args:
        socket: a bound ROUTER socket; the engine owns it from now on.
        scheduler: decides what runs.
        run: runs it.
        limits: the news of this engine for workers that say hello; its stats are replaced by current ones.
    """

    def __init__(self, socket: zmq.Socket[bytes], scheduler: Scheduler, run: StepRunner, limits: Ready) -> None:
        self._socket = socket
        # A message to a worker that has gone is an error here instead of silence, so that its sequences can end.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._scheduler = scheduler
        self._run = run
        self._limits = limits
        # The workers that have said hello, each with its live sequences.
        self._workers: dict[bytes, set[int]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        self._failed_steps = 0

    def serve_forever(self) -> None:
        """Runs until the process is ended."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Takes what has arrived, waiting for it when there is nothing to do, and runs one step."""
        outputs: dict[bytes, list[SequenceOutput]] = {}
        if not self._scheduler.has_work:
            self._socket.poll()
        news = self._drain_inbox(outputs)
        if self._scheduler.has_work:
            self._step(outputs)
            news = True
        if news:
            self._publish(outputs)

    def _drain_inbox(self, outputs: dict[bytes, list[SequenceOutput]]) -> bool:
        """Hands all messages to the scheduler; whether there were any."""
        arrived = False
        while True:
            try:
                worker, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return arrived
            arrived = True
            try:
                message = self._decoder.decode(b"".join(frames))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                logger.error("a message from an API worker cannot be read and is ignored: %s", error)
                continue
            self._handle(worker, message, outputs)

    def _handle(self, worker: bytes, message: ToEngine, outputs: dict[bytes, list[SequenceOutput]]) -> None:
        match message:
            case Hello():
                self._workers.setdefault(worker, set())
                self._send(worker, msgspec.structs.replace(self._limits, stats=self._scheduler.stats()))
            case _ if worker not in self._workers:
                # It does not keep to the protocol, or sent this before it went and that was noticed first.
                logger.warning("a message from an API worker that has gone or has not said hello is ignored")
            case Submit():
                self._submit(worker, message, outputs)
            case Abort(sequence_ids):
                for sequence_id in sequence_ids:
                    self._scheduler.abort((worker, sequence_id))
                    self._workers[worker].discard(sequence_id)

    def _submit(self, worker: bytes, submit: Submit, outputs: dict[bytes, list[SequenceOutput]]) -> None:
        sequence = Sequence(
            key=(worker, submit.sequence_id),
            token_ids=submit.token_ids,
            max_tokens=submit.max_tokens,
            stop_token_ids=frozenset(submit.stop_token_ids),
            sampling=submit.sampling,
        )
        try:
            self._scheduler.add(sequence)
        except ValueError as error:
            outputs.setdefault(worker, []).append(
                SequenceOutput(submit.sequence_id, [], finish_reason="error", error=str(error))
            )
        else:
            self._workers[worker].add(submit.sequence_id)

    def _step(self, outputs: dict[bytes, list[SequenceOutput]]) -> None:
        plan = self._scheduler.plan()
        try:
            sampled = self._run(plan)
        except Exception:
            self._failed_steps += 1
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise
            logger.exception("a step of %d sequences failed; they end with an error", len(plan.scheduled))
            self._fail(plan, outputs)
            return
        self._failed_steps = 0
        for sequence, token in self._scheduler.commit(plan, sampled):
            worker, sequence_id = _key(sequence)
            outputs.setdefault(worker, []).append(
                SequenceOutput(sequence_id, [token], sequence.finish_reason, sequence.cached_tokens or 0)
            )
            if sequence.finished:
                self._workers[worker].discard(sequence_id)

    def _fail(self, plan: StepPlan, outputs: dict[bytes, list[SequenceOutput]]) -> None:
        for item in plan.scheduled:
            worker, sequence_id = _key(item.sequence)
            self._scheduler.abort(item.sequence.key)
            self._workers[worker].discard(sequence_id)
            outputs.setdefault(worker, []).append(
                SequenceOutput(
                    sequence_id,
                    [],
                    finish_reason="error",
                    error="the model failed on this request; see the log",
                )
            )

    def _publish(self, outputs: dict[bytes, list[SequenceOutput]]) -> None:
        stats = self._scheduler.stats()
        reached = [self._send(worker, StepOutput(outputs.get(worker, []), stats)) for worker in list(self._workers)]
        if not all(reached):
            # Perhaps no step follows that would tell the others what is free now.
            self._publish({})

    def _send(self, worker: bytes, message: FromEngine) -> bool:
        """Sends a message; False when the worker has gone, whose sequences then end."""
        try:
            self._socket.send_multipart((worker, self._encoder.encode(message)))
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            orphans = self._workers.pop(worker, set())
            logger.warning("an API worker has gone; its %d sequences end", len(orphans))
            for sequence_id in orphans:
                self._scheduler.abort((worker, sequence_id))
            return False
        return True


def _key(sequence: Sequence) -> SequenceKey:
    key = sequence.key
    if not isinstance(key, tuple):
        raise TypeError(f"the engine's sequences are keyed by worker and number, not {key!r}")
    return key
