"""Starts the engine process and the API workers, watches them, and ends them in order.

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
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from server.config import Settings
from server.engine.messages import Ready
from server.http.model_use import ModelUse
from server.http.siblings import WorkerPlace

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
        listeners = listen(settings.host, settings.port, settings.api_workers)
        for listener in listeners:
            stack.enter_context(listener)
        runtime = stack.enter_context(runtime_folder())
        return _run(settings, folder, served_model_name, use, listeners, runtime, signals)


def _run(
    settings: Settings,
    folder: Path,
    served_model_name: str,
    use: ModelUse,
    listeners: Sequence[socket.socket],
    runtime: Path,
    signals: int,
) -> int:
    address = f"ipc://{runtime}/engine"
    engine, engine_report = _start("persimmon-engine", engine_main, settings, folder, address)
    awaited = {engine_report: engine}
    workers: list[SpawnProcess] = []
    started = int(time.time())
    for index, listener in enumerate(listeners):
        place = WorkerPlace(index, len(listeners), runtime, started)
        worker, worker_report = _start(
            f"persimmon-api-{index}", _worker_main, settings, folder, served_model_name, address, listener, place
        )
        workers.append(worker)
        awaited[worker_report] = worker
    ready: Ready | None = None
    while True:
        happened = connection.wait([engine.sentinel, *(worker.sentinel for worker in workers), signals, *awaited])
        if signals in happened:
            return _drain(engine, workers, signals)
        if engine.sentinel in happened:
            return _engine_ended(engine, workers)
        for worker in workers:
            if worker.sentinel in happened:
                return _worker_ended(engine, workers, worker)
        for report in [each for each in awaited if each in happened]:
            message = _receive(report)
            ready = message if isinstance(message, Ready) else ready
            del awaited[report]
            if not awaited and ready is not None:
                _announce(listeners[0], served_model_name, use, ready)


def _start(name: str, main: Callable[..., None], *arguments: object) -> tuple[SpawnProcess, connection.Connection]:
    """Starts a process that gets, as its last argument, the other end of the connection that comes back."""
    spawn = multiprocessing.get_context("spawn")
    report, end = spawn.Pipe(duplex=False)
    process = spawn.Process(target=main, args=(*arguments, end), name=name)
    process.start()
    end.close()  # so that a report's end is seen when its process ends
    return process, report


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


def _engine_ended(engine: SpawnProcess, workers: Sequence[SpawnProcess]) -> int:
    engine.join()
    if engine.exitcode == 2:  # it could not start, and has said why
        _end(*workers)
        return 2
    say(f"persimmon: error: the engine process ended with code {engine.exitcode}; open requests end with an error")
    _flush(workers)
    return 1


def _worker_ended(engine: SpawnProcess, workers: Sequence[SpawnProcess], worker: SpawnProcess) -> int:
    worker.join()
    code = worker.exitcode
    others = "; open requests end with an error" if len(workers) > 1 else ""
    say(f"persimmon: error: the API process ended with code {code}{others}")
    _end(engine)
    _flush(workers)
    return 1


def _flush(workers: Sequence[SpawnProcess]) -> None:
    """Lets workers tell their clients that the engine is gone, and ends them."""
    _terminate(workers)
    _wait(workers, (), FLUSH_SECONDS)
    _end(*workers)


def _drain(engine: SpawnProcess, workers: Sequence[SpawnProcess], signals: int) -> int:
    say("Stopping: open requests may finish (a second signal stops at once)")
    os.read(signals, 64)
    _terminate(workers)
    _wait(workers, (engine.sentinel, signals), DRAIN_SECONDS)
    _end(*workers, engine)
    return 0


def _terminate(workers: Sequence[SpawnProcess]) -> None:
    for worker in workers:
        worker.terminate()


def _wait(workers: Sequence[SpawnProcess], reasons_to_stop: Sequence[int], seconds: float) -> None:
    """Returns when all workers have ended, one of the other descriptors is readable, or the time is over."""
    deadline = time.monotonic() + seconds
    running = {worker.sentinel for worker in workers}
    while running and (left := deadline - time.monotonic()) > 0:
        happened = connection.wait([*running, *reasons_to_stop], left)
        if any(reason in happened for reason in reasons_to_stop):
            return
        running.difference_update(happened)


def _end(*processes: SpawnProcess) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


def listen(host: str, port: int, count: int) -> list[socket.socket]:
    """Listening TCP sockets on one address: as many as there are API workers.

    With one shared socket, who wakes first takes all connections that wait: of 64 that came at once, one of two workers
    got 60 to 64.  With a socket each (SO_REUSEPORT) the kernel spreads connections by a hash of their addresses: it got
    26 to 38.

    Args:
        host: the address.
        port: 0 for a free one, the same for all.
        count: how many sockets.

    Raises:
        ListenError: the port is taken, or the address is not this machine's.
    """
    with contextlib.ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listeners: list[socket.socket] = []
            for _ in range(count):
                listener = stack.enter_context(socket.socket(family, kind, protocol))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if listeners:
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listener.bind(listeners[0].getsockname() if listeners else address)
                if not listeners and count > 1:
                    # Only after it is bound: another server of the same user with this option would not have been
                    # refused.
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listeners.append(listener)
            for listener in listeners:
                listener.listen(2048)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ListenError(
                f"cannot listen on {host}:{port}: {reason}; choose another with --host and --port"
            ) from None
        stack.pop_all()
    return listeners


@contextlib.contextmanager
def runtime_folder() -> Iterator[Path]:
    """A folder for the sockets of the server's processes, for the length of a block."""
    folder = Path(tempfile.mkdtemp(prefix="persimmon-"))  # mode 0700: nobody else reaches the sockets
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
