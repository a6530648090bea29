"""An engine without a model that speaks the engine's protocol, for benchmarks of the API side.

It has the next token for each stream at once, when the benchmark grants a step.
"""

import os
import time
from multiprocessing.connection import Connection

import msgspec
import zmq

from persimmon.server.engine.client import WARM_UP_ID
from persimmon.server.engine.messages import (
    Abort,
    EngineStats,
    Hello,
    Ready,
    SequenceOutput,
    StepOutput,
    Submit,
    ToEngine,
)

MAX_MODEL_LEN = 2**20
STATS = EngineStats(
    running=1,
    waiting=0,
    free_blocks=1,
    total_blocks=1,
    steps=1,
    prompt_tokens=1,
    generated_tokens=1,
    cached_tokens=1,
    queried_tokens=1,
    preemptions=0,
    recomputed_tokens=0,
)


class EngineReport(msgspec.Struct, array_like=True, frozen=True):
    """What the engine reports to the benchmark.

    Attributes:
        live: sequences that have not ended.
        own_s: from a submission's arrival to its first token's departure; None when it has just arrived.
    """

    live: int
    own_s: float | None


class ScriptedEngine:
    """An engine that says one token again and again.

    Args:
        socket: a bound ROUTER socket.
        control: brings steps that may be run, as numbers in bytes; takes `EngineReport`.
        token_id: the token.
    """

    def __init__(self, socket: zmq.Socket[bytes], control: Connection, token_id: int) -> None:
        self._socket = socket
        self._control = control
        self._token_ids = [token_id]
        self._granted = 0
        self._arrived_at: float | None = None
        # By worker, and there by sequence: the tokens that it still gets.
        self._live: dict[bytes, dict[int, int]] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(control.fileno(), zmq.POLLIN)

    def serve_forever(self) -> None:
        """Runs until the benchmark ends."""
        while True:
            self._poller.poll()
            self._drain_inbox(time.perf_counter())
            try:
                while self._control.poll():
                    self._granted += int(self._control.recv_bytes())
            except EOFError:
                return
            while self._granted and any(self._live.values()):
                self._granted -= 1
                self._step()

    def _drain_inbox(self, now: float) -> None:
        submitted = False
        while True:
            try:
                worker, body = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            live = self._live.setdefault(worker, {})
            match self._decode(body):
                case Hello():
                    self._send(
                        worker,
                        Ready(
                            max_model_len=MAX_MODEL_LEN,
                            block_size=32,
                            total_blocks=1,
                            device="cpu",
                            dtype="float32",
                            stats=STATS,
                        ),
                    )
                case Submit() as submit if submit.sequence_id == WARM_UP_ID:
                    self._send(worker, StepOutput([SequenceOutput(WARM_UP_ID, self._token_ids, "length")], STATS))
                case Submit() as submit:
                    submitted = True
                    live |= dict.fromkeys(submit.sequence_ids, submit.max_tokens)
                case Abort(sequence_ids):
                    for sequence_id in sequence_ids:
                        live.pop(sequence_id, None)
        if submitted:
            self._arrived_at = now
            self._tell(None)

    def _step(self) -> None:
        for worker, live in self._live.items():
            if not live:
                continue
            outputs = []
            for sequence_id, left in live.items():
                live[sequence_id] = left - 1
                outputs.append(SequenceOutput(sequence_id, self._token_ids, "length" if left == 1 else None))
            self._send(worker, StepOutput(outputs, STATS))
            self._live[worker] = {sequence_id: left for sequence_id, left in live.items() if left}
        if self._arrived_at is not None:
            own_s, self._arrived_at = time.perf_counter() - self._arrived_at, None
            self._tell(own_s)

    def _send(self, worker: bytes, message: Ready | StepOutput) -> None:
        self._socket.send_multipart((worker, self._encode(message)))

    def _tell(self, own_s: float | None) -> None:
        self._control.send_bytes(msgspec.msgpack.encode(EngineReport(sum(map(len, self._live.values())), own_s)))


def run_scripted_engine(core: int, address: str, token_id: int, control: Connection) -> None:
    """Entry point of the engine's process.

    Args:
        core: to run on.
        address: the ZeroMQ endpoint to bind.
        token_id: what it says.
        control: the benchmark's.
    """
    os.sched_setaffinity(0, {core})
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.set_hwm(0)
    socket.bind(address)
    ScriptedEngine(socket, control, token_id).serve_forever()
    context.destroy(linger=0)
