"""An API worker process: one event loop that serves HTTP on a socket it was handed.

Knows how to start, drain and end; nothing of requests.  Imports no torch: the model is the engine's.
"""

import asyncio
import contextlib
import gc
import logging
import shutil
import signal
import socket
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop

from persimmon.server import logs
from persimmon.server.child_process import follow_supervisor
from persimmon.server.config import Settings
from persimmon.server.engine.engines import EngineAccess
from persimmon.server.engine.load import Load
from persimmon.server.free_memory import return_free_memory
from persimmon.server.http.app import application
from persimmon.server.http.heartbeat import beat
from persimmon.server.http.middleware import observer
from persimmon.server.http.middleware.access import Access
from persimmon.server.http.middleware.authentication import KeyCheck
from persimmon.server.http.middleware.credentials import Credentials, reads_files_again
from persimmon.server.http.middleware.gate import Gate, Limits
from persimmon.server.http.middleware.tracing import Tracing
from persimmon.server.http.transport.siblings import WorkerPlace
from persimmon.server.http.transport.uvicorn_server import HttpServer
from persimmon.server.settings.section import SettingsError
from persimmon.server.vitals import Vitals

logger = logging.getLogger(__name__)

READY = "ready"
"""What a worker sends once, when it accepts connections and the engine answers."""

# Longer than clients and proxies keep an idle connection, so that none of them sends a request into a closing one.
KEEP_ALIVE_SECONDS = 75

ENGINE_HEAD_START_SECONDS = 0.5

ACCEPT_PER_TURN = 16
"""Connections that are accepted in one turn of the event loop."""


def run_api_worker(
    settings: Settings,
    folder: Path,
    served_model_name: str,
    engine_addresses: Sequence[str],
    listener: socket.socket,
    place: WorkerPlace,
    report: Connection,
    *,
    credentials: Credentials | None = None,
) -> None:
    """Serves HTTP until SIGTERM, then refuses what is new, lets open requests finish and returns.

    The entry point of a process, which ends at once if its supervisor does.  SIGTERM may come several times: only
    SIGUSR2, which the supervisor sends, ends open requests at once, with an error.

    Args:
        settings: of the server.
        folder: the checkpoint, of which config.json and the tokenizer are read.
        served_model_name: the model's name in the API.
        engine_addresses: the ZeroMQ endpoints of the engines.
        listener: bound and listening.
        place: which of the API workers it is.
        report: gets READY when connections are accepted and the engine answers.
        credentials: keys and certificate at first; None for what the settings say.

    Raises:
        CheckpointError: config.json or the tokenizer cannot be used.
        SettingsError: there are no `credentials`, and their files cannot be used.
    """
    follow_supervisor(lambda: _remove(place))
    name = "api worker" if place.count == 1 else f"api worker {place.index}"
    logs.configure(name, settings.log_format, settings.log_level)
    if not settings.access_log:
        access_log = logging.getLogger(observer.__name__)
        access_log.setLevel(max(logging.WARNING, access_log.getEffectiveLevel()))

    async def main() -> None:
        vitals = Vitals.private(place.count) if place.vitals is None else Vitals.open(place.vitals)
        beating = asyncio.create_task(beat(vitals, place.index))
        own = credentials or Credentials.read(settings)
        access = Access.of(settings, own.keys)
        key_check = access.key_check(place)
        load = Load(vitals, place.index)
        gate = Gate(load, Limits.of(settings), lambda: place.count * len(key_check.keys.keys))
        tracing = Tracing.from_environment(served_model_name) if settings.tracing else None
        app, engine = application(
            settings, folder, served_model_name, engine_addresses, place, gate, access, tracing, key_check
        )
        server = HttpServer(
            app,
            header_seconds=access.read_timeout,
            send_seconds=settings.send_timeout,
            keep_alive_seconds=KEEP_ALIVE_SECONDS,
            tls=None if own.certificate is None else own.certificate.context(),
            trusted_proxies=settings.forwarded_allow_ips,
        )
        if reads_files_again(settings):
            _read_files_again_at_hangup(settings, own, key_check, server)
        await engine.start()
        await _serve(server, engine, gate, listener, settings.drain_timeout, report)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
        beating.cancel()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


class _Signals:
    """Handles SIGTERM and SIGUSR2 from here to the end of the process, where removing a handler would let them kill it.

    Attributes:
        stopping: set when SIGTERM has come.
        stopping_now: set when SIGUSR2 has come.
    """

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.stopping_now = asyncio.Event()
        events = {signal.SIGTERM: self.stopping, signal.SIGUSR2: self.stopping_now}
        for number, event in events.items():
            asyncio.get_running_loop().add_signal_handler(number, event.set)
        # The process was started with them blocked, so that one that came before has waited until here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, events)


def _remove(place: WorkerPlace) -> None:
    """Removes the sockets of a server whose supervisor cannot."""
    if place.vitals is not None:
        shutil.rmtree(place.vitals.parent, ignore_errors=True)


def _read_files_again_at_hangup(
    settings: Settings, credentials: Credentials, key_check: KeyCheck, server: HttpServer
) -> None:
    """Has each SIGHUP take the keys and the certificate that the files have then.

    This process was started with the signal blocked, so one that came before its handler has waited until here.
    """

    def read() -> None:
        try:
            credentials.read_again(settings)
        except SettingsError as error:
            logger.error("%s; API keys and certificates are unchanged", error)
            return
        key_check.replace(credentials.keys)
        if credentials.certificate is not None:
            server.replace_tls(credentials.certificate.context())

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, read)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


async def _report_ready(server: HttpServer, engine: EngineAccess, report: Connection) -> None:
    await server.accepting.wait()
    await engine.wait_until_ready()
    _settle_garbage_collector()
    return_free_memory()  # what reading the tokenizer has borrowed
    report.send(READY)


def _settle_garbage_collector() -> None:
    """Makes the garbage collector look only at new objects.

    With Python's own settings and 1,000 open streams it stopped them all for 130 to 200 ms, twice a second, to look at
    every object of the process, and found no garbage: requests leave no reference cycles behind.  So what lives now is
    looked at no more (25 to 85 ms remained), and what turns old once in 100 million new objects.  There remained
    pauses of 3 ms every 300 ms and of 15 ms every 3 s, and a token took a third less processor time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 1_000)


async def _serve(
    server: HttpServer,
    engine: EngineAccess,
    gate: Gate,
    listener: socket.socket,
    drain_seconds: float,
    report: Connection,
) -> None:
    # A worker that replaces another finds the engine ready at once, and has no clients to refuse.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(engine.wait_until_ready(), ENGINE_HEAD_START_SECONDS)
    # libuv accepts one connection a turn from each: with one, thousands of connections wait for as many turns.
    listeners = [listener, *(listener.dup() for _ in range(ACCEPT_PER_TURN - 1))]
    signals = _Signals()
    serving = asyncio.create_task(server.serve(sockets=listeners))
    reporting = asyncio.create_task(_report_ready(server, engine, report))
    stopping = asyncio.create_task(signals.stopping.wait())
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    # It goes on listening: clients that have not noticed the shutdown get a 503 with `Connection: close`.
    gate.draining = True
    empty = asyncio.create_task(gate.wait_until_empty())
    at_once = asyncio.create_task(signals.stopping_now.wait())
    await asyncio.wait((empty, at_once), timeout=drain_seconds, return_when=asyncio.FIRST_COMPLETED)
    # Requests that are still open end with an error event from here, instead of a broken connection.
    await engine.close()
    server.should_exit = True
    for task in (reporting, stopping, empty, at_once):
        task.cancel()
    await serving
