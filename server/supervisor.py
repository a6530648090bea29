"""Starts the engine process and the API workers, watches them, starts them again, and ends them in order.

Knows processes and signals; what they say to each other is theirs.
"""

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from server.children import Child
from server.config import Settings, SettingsError
from server.engine.messages import Ready
from server.http.access import reads_keys_again
from server.http.authentication import KeyCheck
from server.http.keys import key_ring
from server.http.model_use import ModelUse
from server.http.siblings import WorkerPlace
from server.logs import error_logged, say
from server.step_watch import StepWatch, step_limit
from server.vitals import Vitals

LAST_WORDS_SECONDS = 2.0
"""How long an API worker may take, after its open requests should have ended, to tell clients that they have not."""

FLUSH_SECONDS = 5.0
"""How long an API worker may take to tell its clients that the server ends."""

LOOK_SECONDS = 0.5
"""How often the engine's heartbeat is looked at."""

ENDING = frozenset({signal.SIGTERM, signal.SIGINT})
"""Signals that ask the server to end."""


class ListenError(OSError):
    """The address cannot be listened on.  One line for the person who gave it."""


def supervise(settings: Settings, folder: Path, served_model_name: str, use: ModelUse) -> int:
    """Runs the server until it is told to stop or cannot go on.

    A process that dies is started again, unless it never came to serve or dies time and again.  SIGHUP has a
    file of keys read again.

    Args:
        settings: of the server.
        folder: the checkpoint's, checked already as far as is quick.
        served_model_name: the model's name in the API.
        use: what the model is for.

    Returns:
        The exit code: 0 after SIGTERM or Ctrl-C; 2 when the checkpoint or the settings do not allow a start,
        which the engine has explained on the console; 1 when a process ended and is not started again.

    Raises:
        ListenError: the port is taken, or the address is not this machine's.
        SettingsError: the keys cannot be read.
    """
    with contextlib.ExitStack() as stack:
        # Elsewhere SIGHUP does what it always does, and the end of a terminal is the end of the server.
        passed_on = {signal.SIGHUP} if reads_keys_again(settings) else set()
        signals = stack.enter_context(_signal_pipe(ENDING | passed_on))
        listeners = listen(settings.host, settings.port, settings.api_workers)
        for listener in listeners:
            stack.enter_context(listener)
        runtime = stack.enter_context(runtime_folder())
        return _Supervisor(settings, folder, served_model_name, use, listeners, runtime, signals, passed_on).run()


class _Supervisor:
    """The processes of a server; `supervise` says what the arguments are."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        served_model_name: str,
        use: ModelUse,
        listeners: Sequence[socket.socket],
        runtime: Path,
        signals: int,
        passed_on: Collection[signal.Signals],
    ) -> None:
        self._settings = settings
        self._served_model_name = served_model_name
        self._use = use
        self._listeners = listeners
        self._signals = signals
        address, vitals, count = f"ipc://{runtime}/engine", runtime / "vitals", len(listeners)
        self._vitals = Vitals.create(vitals, count)
        self._watch = StepWatch(self._vitals)
        # What the engine said of itself; None while it loads.
        self._ready: Ready | None = None
        self._announced = False
        # A worker that takes another's place gets what this holds then: its siblings' keys, whatever the file has.
        self._keys = KeyCheck(key_ring(settings))
        # A signal that workers must not miss waits until they are ready for it; in the engine, for ever.
        self._engine = Child(
            "persimmon-engine",
            "the engine process",
            engine_main,
            settings,
            folder,
            address,
            vitals,
            blocked=passed_on,
        )
        started = int(time.time())
        self._workers = [
            Child(
                f"persimmon-api-{index}",
                "the API process" if count == 1 else f"API process {index}",
                _worker_main,
                self._keys,
                settings,
                folder,
                served_model_name,
                address,
                listener,
                WorkerPlace(index, count, runtime, started, vitals),
                blocked=passed_on,
            )
            for index, listener in enumerate(listeners)
        ]

    def run(self) -> int:
        """Watches them until the server ends; its exit code."""
        children = [self._engine, *self._workers]
        while True:
            running = [child for child in children if child.due is None]
            sentinels = [child.process.sentinel for child in running]
            reports = [child.report for child in running if child.report is not None]
            happened = connection.wait([self._signals, *sentinels, *reports], LOOK_SECONDS)
            if self._signals in happened:
                if ENDING & self._take_signals():
                    return self._drain()
                self._read_keys_again()
            for child in running:
                if child.report in happened:
                    self._hear(child.receive())
                if child.process.sentinel in happened and (code := self._bury(child)) is not None:
                    return code
            for child in children:
                if child.due is not None and child.due <= time.monotonic():
                    child.start()
            self._look_at_engine()

    def _hear(self, message: object) -> None:
        """Takes what a child says when it is ready."""
        if isinstance(message, Ready):
            self._ready = message
            self._watch.restart()
            if self._announced:
                say("The engine serves again")
        everybody = all(child.has_served for child in (self._engine, *self._workers))
        if everybody and self._ready is not None and not self._announced:
            self._announced = True
            self._announce(self._ready)

    def _bury(self, child: Child) -> int | None:
        """Sees to the next one of a child that has died; the server's exit code where there is none."""
        child.process.join()
        if child is self._engine:
            self._ready = None
            self._vitals.forget_engine()
            if child.process.exitcode == 2 and not child.has_served:  # it could not start, and has said why
                self._kill_all()
                return 2
        else:
            self._vitals.forget_worker(self._workers.index(child))
        delay = child.plan_restart(time.monotonic()) if child.has_served else None
        if delay is None:
            say(f"persimmon: error: {child.obituary}; the server ends")
            self._end()
            return 1
        when = f"in {delay:g} s" if delay else "now"
        say(f"persimmon: error: {child.obituary}; its requests end with an error, and it is started again {when}")
        return None

    def _announce(self, ready: Ready) -> None:
        host, port = self._listeners[0].getsockname()[:2]
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
        url = f"{'http' if self._settings.ssl_certfile is None else 'https'}://{shown}:{port}"
        say(f"Serving {self._served_model_name} on {url} ({ready.dtype}, {ready.device}). Try:")
        endpoint, body = self._use.example
        keys = self._settings.api_key or self._settings.api_key_file
        key = " -H 'Authorization: Bearer KEY'" if keys else ""
        say(f"  curl {url}{endpoint}{key} -H 'Content-Type: application/json' -d '{body}'")

    def _look_at_engine(self) -> None:
        """Kills an engine that hangs, so that it is started again."""
        if self._ready is None:
            return
        overdue = self._watch.overdue_seconds()
        if overdue > step_limit(self._settings.step_timeout, self._ready.device):
            say(f"persimmon: error: the engine has work, but has ended no step for {overdue:.1f} s; it is killed")
            self._ready = None
            self._engine.process.kill()

    def _drain(self) -> int:
        say("Stopping: open requests may finish (a second signal stops at once)")
        self._terminate_workers()
        # The workers have their own, and go on accepting with them; connections after their end are refused.
        for listener in self._listeners:
            listener.close()
        self._wait_for_workers(self._settings.drain_timeout + LAST_WORDS_SECONDS + FLUSH_SECONDS, until_signal=True)
        self._kill_all()
        return 0

    def _end(self) -> None:
        """Lets workers tell their clients that the engine is gone, and ends them."""
        _kill(self._engine.process)
        self._terminate_workers()
        self._wait_for_workers(FLUSH_SECONDS)
        self._kill_all()

    def _terminate_workers(self) -> None:
        for worker in self._workers:
            worker.process.terminate()

    def _wait_for_workers(self, seconds: float, *, until_signal: bool = False) -> None:
        """Returns when all workers have ended, a signal asks for the end at once, or the time is over."""
        deadline = time.monotonic() + seconds
        running = {worker.process.sentinel for worker in self._workers}
        signals = [self._signals] if until_signal else []
        while running and (left := deadline - time.monotonic()) > 0:
            happened = connection.wait([*running, *signals], left)
            if self._signals in happened:
                if ENDING & self._take_signals():
                    return
                say("Stopping: the API keys are not read again")
            running.difference_update(happened)

    def _take_signals(self) -> set[int]:
        """The numbers of those that have come."""
        return set(os.read(self._signals, 64))

    def _read_keys_again(self) -> None:
        """Has the workers read the file of keys again, if it can be used."""
        try:
            self._keys.replace(key_ring(self._settings))
        except SettingsError as error:
            say(f"persimmon: error: {error}; the API keys stay as they were")
            return
        for worker in self._workers:
            worker.send(signal.SIGHUP)
        count = len(self._keys.keys.keys)
        say(f"{self._settings.api_key_file} is read again: {count} API key{'s' if count > 1 else ''} from now on")

    def _kill_all(self) -> None:
        _kill(self._engine.process, *(worker.process for worker in self._workers))


def engine_main(*args: object) -> None:
    """Entry point of the engine process; see `server.engine.process.run_engine` for its arguments."""
    # Read when torch is first imported.  Idle OpenMP threads spin for milliseconds by default, on cores that the API
    # worker or another program may need, and every parallel region then waits for a thread that is not running.
    # Some microseconds bridge the gap between two operations just as well.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # Imported here because it brings torch, which the supervisor and the API workers live without.
    from server.engine.process import run_engine

    with error_logged():
        run_engine(*args)  # type: ignore[arg-type]


def _worker_main(keys: KeyCheck, *args: object) -> None:
    from server.http.worker import run_api_worker

    with error_logged():
        run_api_worker(*args, keys=keys.keys)  # type: ignore[arg-type]


def _kill(*processes: SpawnProcess) -> None:
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
def _signal_pipe(numbers: Collection[signal.Signals]) -> Iterator[int]:
    """A file descriptor from which the number of each of these signals can be read when it has come, a byte each."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    previous = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield read_end
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous)
        os.close(read_end)
        os.close(write_end)
