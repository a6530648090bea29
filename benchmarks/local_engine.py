"""The server's engine in this process, without HTTP, and the worker at the other end of its socket.

Knows nothing of what is measured.
"""

import sys
import threading
import time
from pathlib import Path

import msgspec
import zmq

from persimmon.kernels.cpu.pages import POPULATE
from persimmon.server.config import Settings
from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.core import Engine
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.loading import LoadedModel, load_model
from persimmon.server.engine.messages import FromEngine, Hello, Ready, SequenceOutput, StepOutput, Submit
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.step_cost import StepCostModel
from persimmon.server.engine.step_runner import StepRunner


def load(settings: Settings, folder: Path) -> LoadedModel:
    """Loads a model, and waits until all of its memory is in place.

    Args:
        settings: what is served.
        folder: the checkpoint.
    """
    loaded = load_model(settings, folder, lambda line: print(line, file=sys.stderr))
    for thread in threading.enumerate():
        if thread.name == POPULATE:  # it would take its share of the first figures
            thread.join()
    return loaded


class LocalEngine:
    """An engine without prefix caching whose turns the caller takes.

    Args:
        loaded: the model.
        settings: of the scheduler.
        run: runs the scheduler's plans.
        costs: learns what steps cost; None where chunks are bounded by tokens only.
        speculation: how next tokens are guessed; None where none is.

    Attributes:
        scheduler: the engine's.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        settings: Settings,
        run: StepRunner,
        *,
        costs: StepCostModel | None,
        speculation: Speculation | None = None,
    ) -> None:
        plan = loaded.plan
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        router, self._worker = self._context.socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        router.bind("inproc://engine")
        self._worker.connect("inproc://engine")
        self.scheduler = Scheduler(
            BlockPool(plan.num_blocks, plan.block_size, prefix_caching=False),
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
            speculation=speculation,
        )
        ready = Ready(
            max_model_len=plan.max_model_len,
            block_size=plan.block_size,
            total_blocks=plan.num_blocks,
            device="cpu",
            dtype="float32",
            stats=self.scheduler.stats(),
        )
        self._engine = Engine(socket=router, scheduler=self.scheduler, run=run, limits=ready, costs=costs)
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._worker.send(msgspec.msgpack.encode(Hello()))
        self.turn()

    def submit(self, submit: Submit) -> None:
        """Sends a prompt."""
        self._worker.send(msgspec.msgpack.encode(submit))

    def turn(self) -> list[tuple[float, SequenceOutput]]:
        """One turn of the engine: what it has sent of sequences, and when that was read, in seconds."""
        self._engine.turn()
        received = []
        while self._worker.poll(0):
            message = self._decoder.decode(self._worker.recv())
            now = time.perf_counter()
            received += [(now, output) for output in message.outputs] if isinstance(message, StepOutput) else []
        return received

    def close(self) -> None:
        """Gives everything back."""
        self._engine.close()
        self._context.destroy(linger=0)
