"""The engine loop: inbox -> plan -> launch -> wait -> commit -> outbox, one turn after the other.

On a device that computes asynchronously, the next step is launched before waiting for the last one.  Knows API workers
by their ZeroMQ identity, never by what is on their other side, and the model as a function from a plan to tokens.
"""

import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec
import zmq

from persimmon.model.step_outcome import StepOutcome
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.intake import Intake, Submission
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
from persimmon.server.engine.step_cost import StepCostModel
from persimmon.server.engine.step_counts import StepCounts
from persimmon.server.engine.step_plan import Advance, StepPlan
from persimmon.server.engine.step_runner import EngineBrokenError, LaunchedStep, NoRoomError, StepRunner
from persimmon.server.engine.submitted import SequenceKey, key_of, sequence_of
from persimmon.server.logs import with_fields

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""Consecutive failed steps after which the engine exits: by then the requests are unlikely to be the cause."""

MAX_INTAKE_SECONDS = 0.02
"""Time in which messages are read between two steps, and time in which submissions are handed to the scheduler.

So steps go on while workers submit thousands of prompts.  Reading one takes about 15 us, handing it over 40.
"""

PREPARING_MS = 1000
"""While only threads work, for sequences that may not run yet, the heart beats so often."""

Outputs = dict[bytes, list[SequenceOutput]]
"""Outputs for the workers, by their identity."""

_NO_REPORT: tuple[list[TokenLogprobs], bytes] = ([], b"")


@dataclass(frozen=True, slots=True)
class _Preparing:
    """A sequence, with its forks, that may not run yet; `aborted` are those of them that were aborted."""

    first: Sequence
    prepared: "Future[Any]"
    aborted: set[SequenceKey] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _FailedLaunch:
    """A step that could not even be started."""

    error: Exception

    def wait(self) -> StepOutcome:
        raise self.error


@dataclass(frozen=True, slots=True)
class _Step:
    """A step under way, when it was launched, and whether it is the replay of a CUDA graph."""

    plan: StepPlan
    launched: LaunchedStep
    started: float
    graph: bool = False


class Engine:
    """The loop and its socket.

    Args:
        socket: a bound ROUTER socket; the engine owns it from now on.
        scheduler: decides what runs.
        run: runs it.
        limits: this engine's description for workers that connect; its stats are replaced by current ones.
        costs: learns what steps take, so that prompts leave those who decode their pace.
        overlap: whether a step is planned and launched while the one before it runs.  That pays where a device computes
            asynchronously; on a device where the host itself computes, it would report every token one step late.
        queue_timeout: seconds after which a sequence that has not been begun ends with "expired"; 0 for never.
        graph_replays: how many steps were CUDA graphs so far.
        reported_pool: the blocks, which track their changes, if workers are to know what is cached; else None.
        beat: called before and after each step as a sign of life, with whether the engine has work.
        clock: seconds, for everything the engine times.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        scheduler: Scheduler,
        run: StepRunner,
        limits: Ready,
        *,
        costs: StepCostModel | None = None,
        overlap: bool = False,
        queue_timeout: float = 0.0,
        beat: Callable[[bool], None] = lambda busy: None,
        graph_replays: Callable[[], int] = lambda: 0,
        reported_pool: BlockPool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._socket = socket
        # A message to a worker that has gone is an error here instead of silence, so that its sequences can end.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._scheduler = scheduler
        self._run = run
        self._limits = limits
        self._costs = costs
        self._overlap = overlap
        self._queue_timeout = queue_timeout
        self._reported_pool = reported_pool
        self._beat = beat
        self._clock = clock
        # When each sequence must have been begun, the earliest first; of those behind the first that has not been, some
        # may have ended, and are not kept alive by it.
        self._deadlines: deque[tuple[float, weakref.ref[Sequence]]] = deque()
        self._graph_replays = graph_replays
        self._step_counts = StepCounts()
        self._last_end = 0.0
        # The older first; while a turn begins there is one at most, and none where steps do not overlap.
        self._under_way: deque[_Step] = deque()
        # The workers that have said hello, each with its live sequences.
        self._workers: dict[bytes, set[int]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        self._intake = Intake()
        self._failed_steps = 0
        # Sequences that wait for something to be prepared; the thread that prepared it increments the event.
        self._preparing: list[_Preparing] = []
        self._prepared = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._prepared, zmq.POLLIN)

    def close(self) -> None:
        """Gives back what is not the socket; no turn may follow."""
        os.close(self._prepared)

    def serve_forever(self) -> None:
        """Runs until the process is ended."""
        while True:
            self.turn()

    @property
    def has_work(self) -> bool:
        """Whether a turn would do something though no message comes."""
        return self._scheduler.has_work or bool(self._under_way) or bool(self._intake)

    def turn(self) -> None:
        """Takes what has arrived, waiting for it when there is nothing to do, and ends or begins a step."""
        outputs: Outputs = {}
        if not self.has_work:
            self._wait()
        changed = self._read_inbox(outputs)
        changed |= self._take_in(outputs)
        if self._preparing:
            changed |= self._admit_prepared(outputs)
        changed |= self._expire(outputs)
        if self.has_work:
            self._beat(True)
            self._step(outputs)
            changed = True
        if changed:
            self._publish(outputs)
        self._beat(self.has_work)

    def _wait(self) -> None:
        """Returns when something has come, from a worker or from the threads that prepare sequences."""
        patience = PREPARING_MS if self._preparing else None
        if any(source == self._prepared for source, _ in self._poller.poll(patience)):
            os.eventfd_read(self._prepared)

    def _read_inbox(self, outputs: Outputs) -> bool:
        """Reads the messages that have come, as many as time allows; whether there were any."""
        arrived = False
        end = self._clock() + MAX_INTAKE_SECONDS
        while not arrived or self._clock() < end:
            try:
                worker, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return arrived
            arrived = True
            try:
                message = self._decoder.decode(b"".join(frames))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                logger.error("ignored an unreadable message from an API worker: %s", error)
                continue
            self._handle(worker, message, outputs)
        return True

    def _take_in(self, outputs: Outputs) -> bool:
        """Hands submissions to the scheduler, as many as time allows; whether there were any."""
        taken = False
        end = self._clock() + MAX_INTAKE_SECONDS
        while self._intake and (not taken or self._clock() < end):
            taken = True
            submission = self._intake.take()
            if submission.worker in self._workers:  # else it has gone
                self._submit(submission.worker, submission.submit, outputs)
        return taken

    def _handle(self, worker: bytes, message: ToEngine, outputs: Outputs) -> None:
        match message:
            case Hello():
                self._workers.setdefault(worker, set())
                self._send(worker, msgspec.structs.replace(self._limits, stats=self._stats()))
                if self._reported_pool is not None:
                    self._report_prefixes([worker], dict.fromkeys(self._reported_pool.indexed, True))
            case _ if worker not in self._workers:
                # It does not keep to the protocol, or sent this before it went and that was noticed first.
                logger.warning("ignored a message from an API worker that is not connected")
            case Submit():
                self._intake.put(Submission(worker, message))
            case Abort(sequence_ids):
                for sequence_id in sequence_ids:
                    submission = self._intake.withdraw((worker, sequence_id))
                    if submission is not None:
                        self._submit(worker, submission.submit, outputs)  # its other samples live on
                    self._abort((worker, sequence_id))
                    self._workers[worker].discard(sequence_id)

    def _submit(self, worker: bytes, submit: Submit, outputs: Outputs) -> None:
        first = sequence_of(worker, submit, self._clock())
        try:
            self._scheduler.check(first)
            prepared = self._run.prepare(first)
        except ValueError as error:
            ending = "expired" if isinstance(error, NoRoomError) else "error"
            self._refuse([(worker, sequence_id) for sequence_id in submit.sequence_ids], str(error), outputs, ending)
            return
        self._workers[worker] |= set(submit.sequence_ids)
        if self._queue_timeout:
            deadline = self._clock() + self._queue_timeout
            self._deadlines.extend((deadline, weakref.ref(sequence)) for sequence in first.family)
        if prepared is None:
            self._scheduler.add(first)
        else:
            self._preparing.append(_Preparing(first, prepared))
            prepared.add_done_callback(lambda _: os.eventfd_write(self._prepared, 1))

    def _admit_prepared(self, outputs: Outputs) -> bool:
        """Hands the scheduler the sequences whose preparation has ended; whether there were any."""
        ended = [waiting for waiting in self._preparing if waiting.prepared.done()]
        for waiting in ended:
            self._preparing.remove(waiting)
            failure = waiting.prepared.exception()
            if failure is None:
                self._scheduler.add(waiting.first)
                for key in waiting.aborted:
                    self._scheduler.abort(key)
                continue
            if not isinstance(failure, ValueError):
                raise failure
            keys = [key_of(sequence) for sequence in waiting.first.family]
            self._refuse([key for key in keys if key not in waiting.aborted], str(failure), outputs)
        return bool(ended)

    def _expire(self, outputs: Outputs) -> bool:
        """Ends the sequences that have waited too long to be begun; whether there were any."""
        expired: list[SequenceKey] = []
        while self._deadlines:
            deadline, reference = self._deadlines[0]
            sequence = reference()
            if sequence is not None and not sequence.finished and not sequence.begun:
                if deadline > self._clock():
                    break
                expired.append(key_of(sequence))
            self._deadlines.popleft()
        for key in expired:
            self._abort(key)
        reason = f"The request waited in the queue for {self._queue_timeout:g} s without being started."
        self._refuse(expired, reason, outputs, "expired")
        return bool(expired)

    def _abort(self, key: SequenceKey) -> None:
        for waiting in self._preparing:
            if any(sequence.key == key for sequence in waiting.first.family):
                waiting.aborted.add(key)
        self._scheduler.abort(key)

    def _step(self, outputs: Outputs) -> None:
        """Launches the next step, then ends the one before it and, where steps do not overlap, this one."""
        costs = self._costs.costs if self._costs is not None else None
        plan = self._scheduler.plan_ahead(costs) if self._under_way else self._scheduler.plan(costs)
        if plan is None:
            # What comes next depends on the tokens of the step under way.
            self._end_oldest(outputs)
            plan = self._scheduler.plan(costs)
        launched = self._launch(plan)
        stay_under_way = 1 if launched and self._overlap else 0
        while len(self._under_way) > stay_under_way:
            self._end_oldest(outputs)

    def _launch(self, plan: StepPlan) -> bool:
        """Starts a step; False if it is empty, or failed at once and its failure is still to be reported."""
        if not plan.scheduled:
            return False
        started = self._clock()
        # Whose first step it is, is among the chunks.
        for item in plan.scheduled[plan.work.decodes :]:
            if item.sequence.queue_seconds is None:
                for own in item.sequence.family:
                    own.queue_seconds = started - own.submitted
        try:
            replays = self._graph_replays()
            launched = self._run.launch(plan)
            self._under_way.append(_Step(plan, launched, started, self._graph_replays() > replays))
        except Exception as error:  # noqa: BLE001, it is raised when the step ends
            self._under_way.append(_Step(plan, _FailedLaunch(error), started))
            return False
        return True

    def _end_oldest(self, outputs: Outputs) -> None:
        """Waits for the oldest running step, applies its results, and reports them to the workers."""
        step = self._under_way.popleft()
        plan = step.plan
        try:
            outcome = step.launched.wait()
        except Exception as error:
            self._failed_steps += 1
            if self._failed_steps >= MAX_FAILED_STEPS or isinstance(error, EngineBrokenError):
                raise
            failed_requests = sorted({item.sequence.request_id for item in plan.scheduled})
            logger.exception(
                "a step of %d sequences failed; they end with an error",
                len(plan.scheduled),
                extra=with_fields(request_ids=failed_requests),
            )
            failed = map(key_of, self._scheduler.fail(plan))
            self._refuse(failed, "the model failed on this request; see the log", outputs)
            return
        self._failed_steps = 0
        now = self._clock()
        # A device begins a step when the one before it has ended.
        seconds = now - max(step.started, self._last_end)
        self._step_counts.add(seconds, plan.work.tokens)
        if self._costs is not None:
            self._costs.observe(plan.work, seconds)
        self._last_end = now
        reports = {
            item.sequence: (outcome.prompt_logprobs.get(place, []), outcome.pooled.get(place, b""))
            for place, item in enumerate(plan.scheduled)
            if (place in outcome.prompt_logprobs or place in outcome.pooled) and item.sequence.wants_report
        }
        for advance in self._scheduler.commit(plan, outcome.tokens):
            if (reason := outcome.failures.get(advance.row)) is not None and advance.tokens:
                self._abort(key_of(advance.sequence))
                self._refuse([key_of(advance.sequence)], reason, outputs)
            else:
                self._report(advance.sequence, advance, outcome, reports.pop(advance.sequence, _NO_REPORT), outputs)
        for sequence, report in reports.items():
            if not sequence.finished:
                self._report(sequence, None, outcome, report, outputs)
        if logger.isEnabledFor(logging.DEBUG):
            self._log_step(step, seconds)

    def _log_step(self, step: _Step, seconds: float) -> None:
        """One line on a step that has ended; `preemptions` are all since the start."""
        stats = self._scheduler.stats()
        logger.debug(
            "step",
            extra=with_fields(
                step=stats.steps,
                ms=round(seconds * 1000, 3),
                decodes=step.plan.work.decodes,
                chunk_tokens=step.plan.work.chunk_tokens,
                guesses=step.plan.num_guesses,
                running=stats.running,
                waiting=stats.waiting,
                free_blocks=stats.free_blocks,
                preemptions=stats.preemptions,
                graph=step.graph,
            ),
        )

    def _report(
        self,
        sequence: Sequence,
        advance: Advance | None,
        outcome: StepOutcome,
        report: tuple[list[TokenLogprobs], bytes],
        outputs: Outputs,
    ) -> None:
        """Tells a sequence's worker what the step did for it."""
        worker, sequence_id = key_of(sequence)
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        if advance is not None and advance.tokens:
            token_ids = advance.tokens
            if advance.row in outcome.logprobs:
                logprobs = outcome.logprobs[advance.row][: len(token_ids)]
        prompt_logprobs, pooled = report
        outputs.setdefault(worker, []).append(
            SequenceOutput(
                sequence_id=sequence_id,
                token_ids=token_ids,
                finish_reason=sequence.finish_reason,
                cached_tokens=sequence.cached_tokens or 0,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                pooled=pooled,
                queue_seconds=sequence.queue_seconds or 0.0,
            )
        )
        if sequence.finished:
            self._workers[worker].discard(sequence_id)

    def _refuse(self, keys: Iterable[SequenceKey], reason: str, outputs: Outputs, finish_reason: str = "error") -> None:
        """Ends sequences with an error; they are in no part of the engine any more."""
        for worker, sequence_id in keys:
            self._workers[worker].discard(sequence_id)
            output = SequenceOutput(sequence_id, [], finish_reason, error=reason)
            outputs.setdefault(worker, []).append(output)

    def _publish(self, outputs: Outputs) -> None:
        if self._reported_pool is not None:
            self._report_prefixes(list(self._workers), self._reported_pool.take_changes())
        stats = self._stats()
        reached = [self._send(worker, StepOutput(outputs.get(worker, []), stats)) for worker in list(self._workers)]
        if not all(reached):
            # Perhaps no step follows that would tell the others what is free now.
            self._publish({})

    def _report_prefixes(self, workers: Iterable[bytes], changes: Mapping[bytes, bool]) -> None:
        """Tells workers which blocks can be found in the prefix cache now, and which no more."""
        left = iter(changes.items())
        while piece := dict(islice(left, MAX_PREFIXES_SENT)):
            change = PrefixChange(
                entered=[block_hash for block_hash, present in piece.items() if present],
                left=[block_hash for block_hash, present in piece.items() if not present],
            )
            for worker in workers:
                self._send(worker, change)

    def _stats(self) -> EngineStats:
        return msgspec.structs.replace(
            self._scheduler.stats(),
            graph_replays=self._graph_replays(),
            step_seconds=self._step_counts.seconds,
            step_counts=tuple(self._step_counts.by_seconds),
            step_tokens=self._step_counts.tokens,
            step_token_counts=tuple(self._step_counts.by_tokens),
        )

    def _send(self, worker: bytes, message: FromEngine) -> bool:
        """Sends a message; False when the worker has gone, whose sequences then end."""
        try:
            self._socket.send_multipart((worker, self._encoder.encode(message)))
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            orphans = self._workers.pop(worker, set())
            logger.warning("an API worker has disconnected; aborting its sequences: %d", len(orphans))
            for sequence_id in orphans:
                self._abort((worker, sequence_id))
            return False
        return True
