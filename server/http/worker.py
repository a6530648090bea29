"""An API worker process: one event loop that serves HTTP on a socket it was handed.

Knows how to start, drain and end; nothing of requests.  Imports no torch: the model is the engine's.
"""

import asyncio
import contextlib
import gc
import logging
import math
import signal
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import uvicorn
import uvloop

from server.child_process import follow_supervisor
from server.config import Settings
from server.engine.client import EngineClient
from server.http.app import application
from server.http.siblings import WorkerPlace

READY = "ready"
"""What a worker sends once, when it accepts connections and the engine answers."""

DRAIN_SECONDS = 25.0
"""How long open requests may go on after SIGTERM before they end with an error.  The supervisor waits longer."""

# Longer than clients and proxies keep an idle connection, so that none of them sends a request into a closing one.
KEEP_ALIVE_SECONDS = 75

_LAST_WORDS_SECONDS = 2  # for those errors to reach clients that read


def run_api_worker(
    settings: Settings,
    folder: Path,
    served_model_name: str,
    engine_address: str,
    listener: socket.socket,
    place: WorkerPlace,
    report: Connection,
    drain_seconds: float = DRAIN_SECONDS,
) -> None:
    """Serves HTTP until SIGTERM, then lets open requests finish and returns.

    The entry point of a process, which ends at once if its supervisor does.

    Args:
        settings: of the server.
        folder: the checkpoint, of which config.json and the tokenizer are read.
        served_model_name: the model's name in the API.
        engine_address: the engine's ZeroMQ endpoint.
        listener: bound and listening.
        place: which of the API workers it is.
        report: gets READY when connections are accepted and the engine answers.
        drain_seconds: how long open requests may go on after SIGTERM.

    Raises:
        CheckpointError: config.json or the tokenizer cannot be used.
    """
    follow_supervisor()
    name = "api worker" if place.count == 1 else f"api worker {place.index}"
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s %(levelname)s {name}: %(message)s")

    async def main() -> None:
        app, engine = application(settings, folder, served_model_name, engine_address, place)
        server_config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(drain_seconds) + _LAST_WORDS_SECONDS,
        )
        server = _Server(server_config)
        await engine.start()
        await _serve(server, engine, listener, drain_seconds, report)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


class _Server(uvicorn.Server):
    """uvicorn, with a word when it has started and its own idea of signals.

    Args:
        config: uvicorn's.

    Attributes:
        accepting: set when connections are accepted.
        stopping: set when SIGTERM has come.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()
        self.stopping = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn would raise SIGTERM again at the end, and a drained worker has ended well.
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        yield
        loop.remove_signal_handler(signal.SIGTERM)

    def _stop(self) -> None:
        self.should_exit = True
        self.stopping.set()


async def _report_ready(server: _Server, engine: EngineClient, report: Connection) -> None:
    await server.accepting.wait()
    await engine.wait_until_ready()
    _settle_garbage_collector()
    report.send(READY)


def _settle_garbage_collector() -> None:
    """Lets the collector look at what is new and leave the rest alone.

    With Python's own settings and 1,000 open streams it stopped them all for 130 to 200 ms, twice a second, to look at
    every object of the process, and found no garbage: requests leave no reference cycles behind.  So what lives now is
    looked at no more (25 to 85 ms remained), and what turns old once in 100 million new objects.  There remained
    pauses of 3 ms every 300 ms and of 15 ms every 3 s, and a token took a third less processor time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 1_000)


async def _serve(
    server: _Server, engine: EngineClient, listener: socket.socket, drain_seconds: float, report: Connection
) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    reporting = asyncio.create_task(_report_ready(server, engine, report))
    stopping = asyncio.create_task(server.stopping.wait())
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait((serving,), timeout=drain_seconds)
    # What is still open gets an error of its own from here, instead of a connection that breaks.
    await engine.close()
    reporting.cancel()
    stopping.cancel()
    await serving
