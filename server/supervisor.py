"""Starts the engine process and the API worker, watches them, and ends them in order.

Knows processes and signals; what they say to each other is theirs.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from server.config import Settings
from server.engine.messages import Ready
from server.http.model_use import ModelUse

DRAIN_SECONDS = 30.0
"""How long open requests may go on after the first signal."""

FLUSH_SECONDS = 5.0
"""How long an API worker may take to tell its clients that the engine has died."""


class ListenError(OSError):
    """The address cannot be listened on.  One line for the person who gave it."""


def supervise(settings: Settings, folder: Path, served_model_name: str, use: ModelUse) -> int:
    """Runs the server until it is told to stop or a part of it ends.

    Args:
        settings: of the server.
        folder: the checkpoint's, checked already as far as is quick.
        served_model_name: the model's name in the API.
        use: what the model is for.

    Returns:
        The exit code: 0 after SIGTERM or Ctrl-C; 2 when the checkpoint or the settings do not allow a start,
        which the engine has explained on the console; 1 when a process ended that should not have.

    Raises:
        ListenError: the port is taken, or the address is not this machine's.
    """
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(_signal_pipe())
        listener = stack.enter_context(listen(settings.host, settings.port))
        runtime = stack.enter_context(runtime_folder())
        return _run(settings, folder, served_model_name, use, listener, f"ipc://{runtime}/engine", signals)


def _run(
    settings: Settings,
    folder: Path,
    served_model_name: str,
    use: ModelUse,
    listener: socket.socket,
    address: str,
    signals: int,
) -> int:
    spawn = multiprocessing.get_context("spawn")
    engine_report, engine_end = spawn.Pipe(duplex=False)
    worker_report, worker_end = spawn.Pipe(duplex=False)
    engine = spawn.Process(target=engine_main, args=(settings, folder, address, engine_end), name="persimmon-engine")
    worker = spawn.Process(
        target=_worker_main,
        args=(settings, folder, served_model_name, address, listener, worker_end),
        name="persimmon-api",
    )
    engine.start()
    worker.start()
    for end in (engine_end, worker_end):
        end.close()  # so that a report's end is seen when its process ends
    awaited: dict[connection.Connection, SpawnProcess] = {engine_report: engine, worker_report: worker}
    ready: Ready | None = None
    while True:
        happened = connection.wait([engine.sentinel, worker.sentinel, signals, *awaited])
        if signals in happened:
            return _drain(engine, worker, signals)
        if engine.sentinel in happened:
            return _engine_ended(engine, worker)
        if worker.sentinel in happened:
            worker.join()
            say(f"persimmon: error: the API process ended with code {worker.exitcode}")
            _end(engine)
            return 1
        for report in [each for each in awaited if each in happened]:
            message = _receive(report)
            ready = message if isinstance(message, Ready) else ready
            del awaited[report]
            if not awaited and ready is not None:
                _announce(listener, served_model_name, use, ready)


def engine_main(*args: object) -> None:
    """Entry point of the engine process; see `server.engine.process.run_engine` for its arguments."""
    # Read when torch is first imported.  Idle OpenMP threads spin for milliseconds by default, on cores that the API
    # worker or another program may need, and every parallel region then waits for a thread that is not running.
    # Some microseconds bridge the gap between two operations just as well.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # Imported here because it brings torch, which the supervisor and the API workers live without.
    from server.engine.process import run_engine

    run_engine(*args)  # type: ignore[arg-type]


def _worker_main(*args: object) -> None:
    from server.http.worker import run_api_worker

    run_api_worker(*args)  # type: ignore[arg-type]


def _receive(report: connection.Connection) -> object:
    try:
        return report.recv()
    except EOFError:  # its process has ended; the sentinel tells the rest
        return None


def _announce(listener: socket.socket, served_model_name: str, use: ModelUse, ready: Ready) -> None:
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    url = f"http://{shown}:{port}"
    say(f"Serving {served_model_name} on {url} ({ready.dtype}, {ready.device}). Try:")
    endpoint, body = use.example
    say(f"  curl {url}{endpoint} -H 'Content-Type: application/json' -d '{body}'")


def _engine_ended(engine: SpawnProcess, worker: SpawnProcess) -> int:
    engine.join()
    if engine.exitcode == 2:  # it could not start, and has said why
        _end(worker)
        return 2
    code = engine.exitcode
    say(f"persimmon: error: the engine process ended with code {code}; open requests end with an error")
    worker.terminate()
    worker.join(FLUSH_SECONDS)
    _end(worker)
    return 1


def _drain(engine: SpawnProcess, worker: SpawnProcess, signals: int) -> int:
    say("Stopping: open requests may finish (a second signal stops at once)")
    os.read(signals, 64)
    worker.terminate()
    connection.wait([worker.sentinel, engine.sentinel, signals], timeout=DRAIN_SECONDS)
    _end(worker)
    _end(engine)
    return 0


def _end(process: SpawnProcess) -> None:
    if process.is_alive():
        process.kill()
    process.join()


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        ListenError: the port is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ListenError(f"cannot listen on {host}:{port}: {reason}; choose another with --host and --port") from None
    return listener


@contextlib.contextmanager
def runtime_folder() -> Iterator[Path]:
    """A folder for the engine's socket, for the length of a block."""
    folder = Path(tempfile.mkdtemp(prefix="persimmon-"))  # mode 0700: nobody else reaches the engine's socket
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _signal_pipe() -> Iterator[int]:
    """A file descriptor that turns readable when SIGTERM or SIGINT arrives."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    previous = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield read_end
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous)
        os.close(read_end)
        os.close(write_end)


def say(line: str) -> None:
    """One line for the person at the console."""
    print(line, file=sys.stderr, flush=True)
