"""The asyncio side of the engine: submit a sequence, stream its tokens, abort it.

Knows nothing of HTTP or text.  One client per API worker and event loop.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace

import msgspec
import zmq

from persimmon.model.sampling_params import SamplingParams
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.model.vocabulary import VocabularyMap
from persimmon.server.engine.load import Load
from persimmon.server.engine.messages import (
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
from persimmon.server.engine.routing import Router
from persimmon.server.round_robin import RoundRobin

logger = logging.getLogger(__name__)


_RECEIVED_AT_ONCE = 64
"""Messages that are taken before the rest of the event loop has its turn."""

_KEPT_APART = 1024
"""Outputs that wait for a slow reader before they are merged: a token then takes 40 bytes instead of 300."""

_DISPATCHED_AT_ONCE = 32
"""Outputs that are handed to their streams before the rest of the event loop has its turn: each may end an answer."""

WARM_UP_ID = 0
"""The sequence that an engine must finish before it counts as ready."""


class EngineDeadError(RuntimeError):
    """The engine process is gone; nothing that was in flight will finish."""


class EngineNotReadyError(RuntimeError):
    """The engine is still loading the model."""


GENERATES = Submit(token_ids=[0], max_tokens=1, sampling=SamplingParams(temperature=0), sequence_id=WARM_UP_ID)
"""The first prompt for a model that generates; every vocabulary has a token 0."""

CLASSIFIES = Submit(token_ids=[0], max_tokens=0, pooling="last", scores=True, sequence_id=WARM_UP_ID)
"""The same for one that classifies."""


class SequenceStream:
    """The outputs of one sequence, as an async iterator.

    Ends after the output that carries a finish_reason.  Outputs that arrived while the reader was busy, or in a pause,
    come merged into one.  Raises EngineDeadError when the engine dies first.

    Args:
        sequence_id: the sequence's.
        abort: ends it in the engine, if it has not ended there.
        prompt_tokens: number of tokens that the engine has to read before its first output; counted for only one sample
            of a prompt.
        owner: the client that asked for it.
        cached_tokens: of its prompt tokens those that the engine is expected to have cached.
        pause: seconds that are to pass between tokens and the next ones; the end does not wait.  None for none.

    Attributes:
        prompt_tokens: those that are still to be read.
        computed_tokens: of these, those that are not expected to be cached.
    """

    def __init__(
        self,
        sequence_id: int,
        abort: Callable[[int], None],
        prompt_tokens: int = 0,
        owner: str = "",
        cached_tokens: int = 0,
        pause: Callable[[], float] | None = None,
    ) -> None:
        self.sequence_id = sequence_id
        self.owner = owner
        self.prompt_tokens = prompt_tokens
        self.computed_tokens = prompt_tokens - cached_tokens
        self._abort = abort
        self._pause = pause
        self._pausing = False
        self.finished = False
        self._arrived: list[SequenceOutput] = []
        self._wakeup = asyncio.Event()
        self._failure: Exception | None = None

    def put(self, output: SequenceOutput) -> None:
        """Takes the engine's next output; only the client calls it."""
        self._arrived.append(output)
        if len(self._arrived) >= _KEPT_APART:
            # Its reader waits for a client that reads slowly.
            self._arrived = [_merged(self._arrived)]
        if self._due:
            self._wakeup.set()

    def fail(self, error: Exception) -> None:
        """Ends the stream with an error; only the client calls it."""
        self._failure = error
        self._wakeup.set()

    def close(self) -> None:
        """Nothing more is wanted of it: where it still runs, it is aborted."""
        self._abort(self.sequence_id)

    def __aiter__(self) -> AsyncIterator[SequenceOutput]:
        return self

    async def __anext__(self) -> SequenceOutput:
        if self.finished:
            raise StopAsyncIteration
        while not self._due:
            if self._failure is not None:
                raise self._failure
            self._wakeup.clear()
            await self._wakeup.wait()
        arrived, self._arrived = self._arrived, []
        merged = _merged(arrived)
        self.finished = merged.finish_reason is not None
        if self._pause is not None and merged.token_ids and not self.finished:
            self._pausing = True
            asyncio.get_running_loop().call_later(self._pause(), self._resume)
        return merged

    @property
    def _due(self) -> bool:
        """Whether there is an output that may be read now."""
        if not self._arrived:
            return False
        return not self._pausing or self._arrived[-1].finish_reason is not None or self._failure is not None

    def _resume(self) -> None:
        self._pausing = False
        if self._arrived:
            self._wakeup.set()


def _merged(outputs: Sequence[SequenceOutput]) -> SequenceOutput:
    """Outputs of one sequence, one after the other, as one."""
    last = outputs[-1]
    if len(outputs) == 1:
        return last
    return msgspec.structs.replace(
        last,
        token_ids=[token for output in outputs for token in output.token_ids],
        logprobs=[entry for output in outputs for entry in output.logprobs],
        prompt_logprobs=[entry for output in outputs for entry in output.prompt_logprobs],
        pooled=b"".join(output.pooled for output in outputs),
    )


class _Connection:
    """A DEALER socket in the running event loop, which watches ZeroMQ's own descriptors.

    With one stream a token takes 48 us of the worker's processor time so, and took 77 through the futures and tasks of
    zmq.asyncio.  A third of what remains is ZeroMQ's own thread.

    Args:
        address: a ZeroMQ endpoint, to connect to.
        take: called with each message.
        lost: called when the other side has gone.
    """

    def __init__(self, address: str, take: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        self._take = take
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        # Unbounded on purpose: what is in flight is bounded by admission, and a dropped message is a lost answer.
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(address)
        for socket, arrived in ((self._monitor, self._watch), (self._socket, self._receive)):
            self._loop.add_reader(socket.fileno(), arrived)
            # A descriptor turns readable for a reader that has found nothing once, and for no other.
            self._loop.call_soon(arrived)

    def send(self, message: bytes) -> None:
        """Sends a message, which an unbounded socket always takes at once."""
        self._socket.send(message, zmq.NOBLOCK)
        # The descriptor signals changes, not messages, and sending may have consumed such a signal.
        self._loop.call_soon(self._receive)

    def close(self) -> None:
        """Disconnects; nothing is called any more."""
        self._loop.remove_reader(self._monitor.fileno())
        self._loop.remove_reader(self._socket.fileno())
        self._socket.disable_monitor()
        self._context.destroy(linger=0)  # the monitor's socket too: while one is open, a context does not end

    def _receive(self) -> None:
        for _ in range(_RECEIVED_AT_ONCE):
            if self._socket.closed:
                return
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(message)
        self._loop.call_soon(self._receive)

    def _watch(self) -> None:
        if not self._monitor.closed and self._monitor.poll(0):
            self._monitor.recv_multipart()  # it reports only one kind of event
            self._lost()


class EngineClient:
    """A worker's connection to the engine process, and to the one that is started when that has died.

    Args:
        address: the engine's ZeroMQ endpoint, like "ipc:///run/persimmon/engine".
        vocabulary: of a trimmed checkpoint: callers speak in token ids, the engine in rows of its embedding.
        load: where it counts what it wants of the engine.
        warm_up: what each engine must do, from here and back, before it is ready.
        number: the engine's among those of the server.
        router: is to know what the engine has cached; None for none.
        max_chunks_per_second: how often all streams of the engine together get tokens, at most; None for any number.

    Attributes:
        info: the engine's description of itself; None while it loads, and after it ended until the next one is ready.
        stats: its last report.
        dead: whether there is none: it has ended and the next one is not ready.
    """

    def __init__(
        self,
        address: str,
        vocabulary: VocabularyMap | None = None,
        load: Load | None = None,
        warm_up: Submit = GENERATES,
        number: int = 0,
        router: Router | None = None,
        max_chunks_per_second: float | None = None,
    ) -> None:
        self._address = address
        self._vocabulary = vocabulary
        self._warm_up = warm_up
        self._number = number
        self._router = router
        self._max_chunks_per_second = max_chunks_per_second
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._next_id = WARM_UP_ID + 1
        self._streams: dict[int, SequenceStream] = {}
        self._connection: _Connection | None = None
        # Outputs that have come and are not with their streams yet, by who asked for them.
        self._arrived: RoundRobin[SequenceOutput] = RoundRobin()
        self._dispatching = False
        self._answered = asyncio.Event()
        self._candidate: Ready | None = None
        self._closed = False
        self.load = load or Load()
        self.info: Ready | None = None
        self.stats: EngineStats | None = None
        self.dead = False

    @property
    def ready(self) -> bool:
        """Whether the engine serves now."""
        return self.info is not None and not self.dead

    @property
    def engines(self) -> "Sequence[EngineClient]":
        """The connections to all engines of the server: this one."""
        return (self,)

    @property
    def open_streams(self) -> int:
        """Sequences submitted and neither finished nor aborted."""
        return len(self._streams)

    async def start(self) -> None:
        """Connects; `ready` turns true when the engine has done its warm-up."""
        self._connect()

    async def wait_until_ready(self) -> None:
        """Returns when an engine has loaded its model and done its warm-up."""
        await self._answered.wait()

    async def close(self) -> None:
        """Disconnects.  Streams still open end with EngineDeadError."""
        self._closed = True
        self._die("the server is shutting down")
        if self._connection is not None:
            self._connection.close()

    @contextlib.contextmanager
    def submit(self, submit: Submit, cached_tokens: int = 0) -> Iterator[list[SequenceStream]]:
        """Starts the samples of one prompt; leaving the block aborts those that have not finished.

        Args:
            submit: what is wanted; its `sequence_id` is chosen here.
            cached_tokens: tokens of the prompt that the engine is expected to have cached.

        Raises:
            EngineNotReadyError: the model is still loading.
            EngineDeadError: the engine process is gone.
        """
        self.check_ready()
        submit = msgspec.structs.replace(submit, sequence_id=self._next_id)
        self._next_id += submit.samples
        # The prompt is read once, for the first sample.
        prompts = [(len(submit.token_ids), cached_tokens)] + [(0, 0)] * (submit.samples - 1)
        streams = [
            SequenceStream(
                sequence_id=own,
                abort=self._abort,
                prompt_tokens=count,
                owner=submit.owner,
                cached_tokens=cached,
                pause=self._pause if self._max_chunks_per_second else None,
            )
            for own, (count, cached) in zip(submit.sequence_ids, prompts, strict=True)
        ]
        self._streams |= {stream.sequence_id: stream for stream in streams}
        self._count(len(streams), len(submit.token_ids), len(submit.token_ids) - cached_tokens, submit.owner)
        try:
            self._send(submit if self._vocabulary is None else _in_rows(submit, self._vocabulary))
            yield streams
        finally:
            self._abort(*submit.sequence_ids)

    def check_ready(self) -> Ready:
        """The engine's description of itself.

        Raises:
            EngineNotReadyError: the model is still loading.
            EngineDeadError: the engine process is gone.
        """
        if self.dead:
            raise EngineDeadError("the engine has stopped")
        if self.info is None:
            raise EngineNotReadyError("the model is still loading")
        return self.info

    def _pause(self) -> float:
        """Seconds between two outputs of a stream, as many streams as there are."""
        return self.stats.running / self._max_chunks_per_second if self.stats and self._max_chunks_per_second else 0.0

    def _connect(self) -> None:
        # A connection of its own for each engine: nothing that was meant for one reaches the next.
        self._connection = _Connection(self._address, self._take, lambda: self._lose("the engine process has ended"))
        self._send(Hello())

    def _lose(self, reason: str) -> None:
        self._die(reason)
        if self._connection is not None:
            self._connection.close()
        if not self._closed:
            self._connect()

    def _abort(self, *sequence_ids: int) -> None:
        # Still registered: the engine has not reported an end, so it may be holding blocks for these sequences.
        streams = [stream for own in sequence_ids if (stream := self._streams.pop(own, None)) is not None]
        if not streams:
            return
        for stream in streams:
            self._read_prompt(stream)
            self._count(-1, 0, 0, stream.owner)
        if not self.dead:
            self._send(Abort([stream.sequence_id for stream in streams]))

    def _send(self, message: ToEngine) -> None:
        if self._connection is None:
            raise RuntimeError("the client has not been started")
        self._connection.send(self._encoder.encode(message))

    def _take(self, payload: bytes) -> None:
        if self._closed:
            return
        try:
            message = self._decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            # It may have been the end of any stream, so none can be waited for any more.
            self._lose(f"the engine sent a message that cannot be read: {error}")
            return
        if isinstance(message, Ready):
            self._candidate = message
            self._send(self._warm_up)
        elif isinstance(message, PrefixChange):
            if self._router is not None:
                self._router.change(self._number, message.entered, message.left)
        elif self._candidate is not None:
            self._watch_warm_up(self._candidate, message)
        elif not self.dead:
            self.stats = message.stats
            for output in message.outputs:
                stream = self._streams.get(output.sequence_id)
                if stream is not None:  # else it was aborted here while the output was on its way
                    self._arrived.put(stream.owner, output)
            if not self._dispatching:
                self._dispatch()

    def _watch_warm_up(self, candidate: Ready, step: StepOutput) -> None:
        """Makes an engine the one that serves, when it has finished its warm-up."""
        for output in step.outputs:
            if output.finish_reason in ("error", "expired"):
                logger.error("the engine failed its warm-up and is not serving: %s", output.error)
                self._candidate = None
            elif output.finish_reason is not None:
                self._candidate = None
                self.info, self.stats, self.dead = candidate, step.stats, False
                self._answered.set()

    def _dispatch(self) -> None:
        """Hands outputs to their streams: some now, the others in the next turns of the event loop."""
        for _ in range(_DISPATCHED_AT_ONCE):
            if not self._arrived:
                break
            self._hand_over(self._arrived.take())
        self._dispatching = bool(self._arrived)
        if self._dispatching:
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _hand_over(self, output: SequenceOutput) -> None:
        if output.finish_reason is None:
            stream = self._streams.get(output.sequence_id)
        else:
            stream = self._streams.pop(output.sequence_id, None)
            if stream is not None:
                self.load.end_one(stream.owner)
                self.load.submit(self._number, -1, 0)
        if stream is not None:  # aborted here since it came
            if stream.prompt_tokens and (output.token_ids or output.finish_reason is not None):
                self._read_prompt(stream)
            stream.put(output if self._vocabulary is None else _in_ids(output, self._vocabulary))

    def _count(self, sequences: int, prompt_tokens: int, computed_tokens: int, owner: str) -> None:
        """Counts more work for the engine, or less; of the prompt tokens, `computed_tokens` are not cached."""
        self.load.add(sequences, prompt_tokens, owner)
        self.load.submit(self._number, sequences, computed_tokens)

    def _read_prompt(self, stream: SequenceStream) -> None:
        """Nothing is to be read of its prompt any more."""
        self._count(0, -stream.prompt_tokens, -stream.computed_tokens, stream.owner)
        stream.prompt_tokens = stream.computed_tokens = 0

    def _die(self, reason: str) -> None:
        while self._arrived:
            self._hand_over(self._arrived.take())
        if not self.dead:
            self.dead = True
            if self._streams:
                logger.error("%s; %d open sequences end with an error", reason, len(self._streams))
        self.info = self.stats = self._candidate = None
        if self._router is not None:
            self._router.forget(self._number)
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            self._count(-1, -stream.prompt_tokens, -stream.computed_tokens, stream.owner)
            stream.prompt_tokens = stream.computed_tokens = 0
            stream.fail(EngineDeadError(reason))


def _in_rows(submit: Submit, vocabulary: VocabularyMap) -> Submit:
    """A submission as the engine of a trimmed checkpoint reads it."""
    rows = vocabulary.to_rows
    sampling = submit.sampling
    if sampling.logit_bias:
        biases = zip(rows(list(sampling.logit_bias)), sampling.logit_bias.values(), strict=True)
        sampling = replace(sampling, logit_bias=dict(biases))
    return msgspec.structs.replace(
        submit,
        token_ids=rows(submit.token_ids),
        stop_token_ids=rows(submit.stop_token_ids),
        sampling=sampling,
    )


def _in_ids(output: SequenceOutput, vocabulary: VocabularyMap) -> SequenceOutput:
    """An output as callers read it."""

    def translated(entries: list[TokenLogprobs]) -> list[TokenLogprobs]:
        return [
            TokenLogprobs(
                token_id=ids([own.token_id])[0],
                logprob=own.logprob,
                top_ids=ids(own.top_ids),
                top_logprobs=own.top_logprobs,
            )
            for own in entries
        ]

    ids = vocabulary.to_ids
    return msgspec.structs.replace(
        output,
        token_ids=ids(output.token_ids),
        logprobs=translated(output.logprobs),
        prompt_logprobs=translated(output.prompt_logprobs),
    )
