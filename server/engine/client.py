"""The asyncio side of the engine: submit a sequence, stream its tokens, abort it.

Knows nothing of HTTP or text.  One client per API worker and event loop.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Iterator

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from server.engine.messages import (
    Abort,
    EngineStats,
    FromEngine,
    Hello,
    Ready,
    Sampling,
    SequenceOutput,
    StepOutput,
    Submit,
    ToEngine,
)

logger = logging.getLogger(__name__)


class EngineDeadError(RuntimeError):
    """The engine process is gone; nothing that was in flight will finish."""


class EngineNotReadyError(RuntimeError):
    """The engine is still loading the model."""


class SequenceStream:
    """The outputs of one sequence, as an async iterator.

    Ends after the output that carries a finish_reason.  Outputs that arrived while the reader was busy come
    merged into one.  Raises EngineDeadError when the engine dies first.
    """

    def __init__(self, sequence_id: int) -> None:
        self.sequence_id = sequence_id
        self.finished = False
        self._arrived: list[SequenceOutput] = []
        self._wakeup = asyncio.Event()
        self._failure: Exception | None = None

    def put(self, output: SequenceOutput) -> None:
        """Takes the engine's next output; called by the client alone."""
        self._arrived.append(output)
        self._wakeup.set()

    def fail(self, error: Exception) -> None:
        """Ends the stream with an error; called by the client alone."""
        self._failure = error
        self._wakeup.set()

    def __aiter__(self) -> AsyncIterator[SequenceOutput]:
        return self

    async def __anext__(self) -> SequenceOutput:
        if self.finished:
            raise StopAsyncIteration
        while not self._arrived:
            if self._failure is not None:
                raise self._failure
            self._wakeup.clear()
            await self._wakeup.wait()
        arrived, self._arrived = self._arrived, []
        last = arrived[-1]
        self.finished = last.finish_reason is not None
        if len(arrived) == 1:
            return last
        merged = [token for output in arrived for token in output.token_ids]
        return msgspec.structs.replace(last, token_ids=merged)


class EngineClient:
    """A worker's connection to the engine process.

    Args:
        address: the engine's ZeroMQ endpoint, like "ipc:///run/persimmon/engine".
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        # Unbounded on purpose: what is in flight is bounded by admission, and a dropped message is a lost answer.
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._ids = itertools.count(1)
        self._streams: dict[int, SequenceStream] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._answered = asyncio.Event()
        self.info: Ready | None = None
        self.stats: EngineStats | None = None
        self.dead = False

    @property
    def ready(self) -> bool:
        """Whether the engine serves now."""
        return self.info is not None and not self.dead

    @property
    def open_streams(self) -> int:
        """Sequences submitted and neither finished nor aborted."""
        return len(self._streams)

    async def start(self) -> None:
        """Connects; `ready` turns true when the engine has answered."""
        monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(self._address)
        self._tasks = [
            asyncio.create_task(self._receive(), name="engine-receive"),
            asyncio.create_task(self._watch(monitor), name="engine-watch"),
        ]
        self._send(Hello())

    async def wait_until_ready(self) -> None:
        """Returns when the engine has loaded its model; never, if it dies before."""
        await self._answered.wait()

    async def close(self) -> None:
        """Disconnects.  Streams still open end with EngineDeadError."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._die("the server is shutting down")
        self._socket.disable_monitor()
        self._context.destroy(linger=0)  # the monitor's socket too: while one is open, a context does not end

    @contextlib.contextmanager
    def submit(
        self, token_ids: list[int], max_tokens: int, stop_token_ids: list[int], sampling: Sampling
    ) -> Iterator[SequenceStream]:
        """Starts one sequence; leaving the block before it has finished aborts it.

        Raises:
            EngineNotReadyError: the model is still loading.
            EngineDeadError: the engine process is gone.
        """
        if self.dead:
            raise EngineDeadError("the engine has stopped")
        if self.info is None:
            raise EngineNotReadyError("the model is still loading")
        stream = SequenceStream(next(self._ids))
        self._streams[stream.sequence_id] = stream
        self._send(Submit(stream.sequence_id, token_ids, max_tokens, stop_token_ids, sampling))
        try:
            yield stream
        finally:
            # Still registered: the engine has not reported an end, so it may be holding blocks for this sequence.
            if self._streams.pop(stream.sequence_id, None) is not None and not self.dead:
                self._send(Abort([stream.sequence_id]))

    def _send(self, message: ToEngine) -> None:
        # The future of an unbounded socket's send is done at once, so nobody has to wait for it.
        self._socket.send(self._encoder.encode(message))

    async def _receive(self) -> None:
        while True:
            payload = await self._socket.recv()
            try:
                message = self._decoder.decode(payload)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                # It may have been the end of any stream, so none can be waited for any more.
                self._die(f"the engine sent a message that cannot be read: {error}")
                return
            self.stats = message.stats
            if isinstance(message, Ready):
                self.info = message
                self._answered.set()
                continue
            self._dispatch(message)

    def _dispatch(self, step: StepOutput) -> None:
        for output in step.outputs:
            if output.finish_reason is None:
                stream = self._streams.get(output.sequence_id)
            else:
                stream = self._streams.pop(output.sequence_id, None)
            if stream is not None:  # aborted here while the output was on its way
                stream.put(output)

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        await recv_monitor_message(monitor)
        self._die("the engine process has ended")

    def _die(self, reason: str) -> None:
        if not self.dead:
            self.dead = True
            if self._streams:
                logger.error("%s; %d open sequences end with an error", reason, len(self._streams))
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.fail(EngineDeadError(reason))
