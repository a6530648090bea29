"""Starts the engine processes and the API workers, watches them, starts them again, and ends them in order.

Knows processes and signals; what they say to each other is theirs.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Self

from persimmon.model.identity import change, identity
from persimmon.server.child_process import CannotStart
from persimmon.server.children import Child, adopt_orphans, kill, reap_orphans
from persimmon.server.config import Settings
from persimmon.server.engine.messages import Ready
from persimmon.server.engine_places import EnginePlace, MachineShare
from persimmon.server.entry_points import engine_main, worker_main
from persimmon.server.http.endpoints.model_use import ModelUse
from persimmon.server.http.middleware.credentials import Credentials, reads_files_again
from persimmon.server.http.transport.siblings import WorkerPlace
from persimmon.server.listening import listen
from persimmon.server.logs import print_line
from persimmon.server.runtime_folder import runtime_folder
from persimmon.server.service_manager import notify
from persimmon.server.settings.section import SettingsError
from persimmon.server.shortage import ADVICE
from persimmon.server.step_watch import StepWatch, WorkerWatch, step_limit
from persimmon.server.vitals import Vitals

FINAL_ERROR_SECONDS = 2.0
"""Time for an API worker to send an error to requests that are still open when the drain is over."""

FLUSH_SECONDS = 5.0
"""Time for an API worker to exit after that."""

STACKS_SECONDS = 1.0
"""Time for a process that hangs to write the stacks of its threads before it is killed; it takes milliseconds, but a
stopped process never does."""

LOOK_SECONDS = 0.5
"""Interval between two looks at the heartbeats."""

REPEAT_SECONDS = 0.1
"""Signals that come within this time of the first one are the same request: a terminal signals all processes, and a
wrapper such as timeout(1) passes the signal on as well."""


def supervise(
    settings: Settings, folder: Path, served_model_name: str, use: ModelUse, shares: Sequence[MachineShare]
) -> int:
    """Runs the server until it is asked to stop or cannot continue.

    A process that dies is started again, unless it has never served or has died too often.  SIGHUP has the
    files of keys and certificates read again; SIGUSR1 has the stacks of all other processes' threads logged.

    Args:
        settings: of the server.
        folder: the checkpoint's, checked already as far as is quick.
        served_model_name: the model's name in the API.
        use: what the model is for.
        shares: what each engine may use of the machine.

    Returns:
        The exit code: 0 after SIGTERM or Ctrl-C; 2 when the checkpoint or the settings do not allow a start,
        which the engine has explained on the console; 1 when a process ended and is not started again.

    Raises:
        ListenError: the port is taken, or the address is not this machine's.
        SettingsError: the keys cannot be read.
        RuntimeFolderError: the folder for the sockets of the server's processes cannot be created.
    """
    with contextlib.ExitStack() as stack:
        ending = {signal.SIGTERM, signal.SIGINT}
        # Without files to read again, the end of a terminal is the end of the server; nohup ignores it.
        if not reads_files_again(settings) and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            ending.add(signal.SIGHUP)
        others = {signal.SIGUSR1, signal.SIGHUP} if reads_files_again(settings) else {signal.SIGUSR1}
        signals = stack.enter_context(_Signals(ending, others))
        listeners = listen(settings.host, settings.port, settings.api_workers)
        for listener in listeners:
            stack.enter_context(listener)
        runtime = stack.enter_context(runtime_folder())
        return _Supervisor(settings, folder, served_model_name, use, shares, listeners, runtime, signals).run()


@dataclass(slots=True)
class _Engine:
    """An engine process and its successors.

    Attributes:
        child: the process.
        name: for people.
        watch: sees when it hangs.
        ready: its description of itself; None while it loads, and while there is none.
    """

    child: Child
    name: str
    watch: StepWatch
    ready: Ready | None = None


class _Supervisor:
    """The processes of a server; `supervise` says what the arguments are."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        served_model_name: str,
        use: ModelUse,
        shares: Sequence[MachineShare],
        listeners: Sequence[socket.socket],
        runtime: Path,
        signals: "_Signals",
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._files = identity(folder)
        self._served_model_name = served_model_name
        self._use = use
        self._listeners = listeners
        self._signals = signals
        vitals, count = runtime / "vitals", len(listeners)
        names = ["engine"] if len(shares) == 1 else [f"engine-{index}" for index in range(len(shares))]
        addresses = [f"ipc://{runtime}/{name}" for name in names]
        self._vitals = Vitals.create(vitals, count, len(shares))
        self._worker_watches = [WorkerWatch(self._vitals, index, settings.worker_timeout) for index in range(count)]
        self._announced = False
        # Whether it has been printed why the engines cannot start; all of several say the same.
        self._refused = False
        # A worker that takes another's place gets what this holds then: its siblings', whatever the files have.
        self._credentials = Credentials.read(settings)
        self._engines = [
            _Engine(
                child=Child(
                    name=f"persimmon-{name}",
                    title="the engine process" if len(shares) == 1 else f"engine process {index}",
                    main=engine_main,
                    arguments=(
                        settings.of_engine(),
                        folder,
                        EnginePlace(address, vitals, index=index, count=len(shares), share=share),
                    ),
                ),
                name="the engine" if len(shares) == 1 else f"engine {index}",
                watch=StepWatch(self._vitals, index),
            )
            for index, (name, address, share) in enumerate(zip(names, addresses, shares, strict=True))
        ]
        started = int(time.time())
        self._workers = [
            Child(
                name=f"persimmon-api-{index}",
                title="the API process" if count == 1 else f"API process {index}",
                main=worker_main,
                arguments=(
                    self._credentials,
                    settings,
                    folder,
                    served_model_name,
                    addresses,
                    listener,
                    WorkerPlace(index=index, count=count, folder=runtime, started=started, vitals=vitals),
                ),
            )
            for index, listener in enumerate(listeners)
        ]
        self._children = [*(engine.child for engine in self._engines), *self._workers]

    def run(self) -> int:
        """Watches the processes until the server ends; returns its exit code."""
        adopt_orphans()
        try:
            return self._run()
        finally:
            kill(self._children)

    def _run(self) -> int:
        while True:
            for child in self._children:
                if child.due is not None and child.due <= time.monotonic() and (code := self._start(child)) is not None:
                    return code
            running = [child for child in self._children if child.sentinel is not None]
            sentinels = [child.sentinel for child in running]
            reports = [child.report for child in running if child.report is not None]
            happened = self._wait([*filter(None, sentinels), *reports], LOOK_SECONDS)
            if self._signals.descriptor in happened:
                come = self._take_signals()
                if self._signals.ends(come):
                    return self._drain()
                if signal.SIGHUP in come:
                    self._read_files_again()
            for child in running:
                if child.report in happened:
                    self._hear(child, child.receive())
                    if self._has_read_other_files():
                        return 1
                if child.sentinel in happened and (code := self._on_exit(child)) is not None:
                    return code
            reap_orphans(self._children)
            self._look_at_engines()
            self._look_at_workers()

    def _wait(self, for_what: Iterable[connection.Connection | int], seconds: float) -> Collection[object]:
        """What has happened of these, or that a signal has come; meanwhile logs the stacks that processes write."""
        stacks = {child.stacks: child for child in self._children if child.stacks is not None}
        happened = connection.wait([self._signals.descriptor, *for_what, *stacks], seconds)
        for child in (child for end, child in stacks.items() if end in happened):
            self._log_stacks(child)
        return happened

    def _log_stacks(self, child: Child) -> None:
        pid = child.process.pid if child.process is not None else None
        if stacks := child.read_stacks().rstrip():
            print_line(f"persimmon: stacks of {child.title} (pid {pid}):\n{stacks}")

    def _kill_hung(self, child: Child) -> None:
        """Kills a process, after it has had the time to write what its threads are doing."""
        child.send(signal.SIGUSR1)
        if child.stacks is not None and connection.wait([child.stacks], STACKS_SECONDS):
            self._log_stacks(child)
        else:
            print_line(
                f"persimmon: warning: {child.title} wrote no stacks in {STACKS_SECONDS:g} s: it is stopped or starved"
            )
        child.send(signal.SIGKILL)

    def _start(self, child: Child) -> int | None:
        """Starts a child that is due, or plans the next attempt; the server's exit code where there is none."""
        try:
            if child.has_served and self._checkpoint_changed():
                return 1
            child.start()
        except OSError as error:
            reason = f"{child.title} cannot be started: {error.strerror or error}; {ADVICE}"
            if not child.has_served:
                print_line(f"persimmon: error: {reason}")
                return 2
            print_line(f"persimmon: error: {reason}. Next attempt in {child.postpone():g} s")
        if child in self._workers:
            self._worker_watches[self._workers.index(child)].restart()
        return None

    def _has_read_other_files(self) -> bool:
        """Ends the server where a child that is ready has read other files than the others."""
        try:
            return self._checkpoint_changed()
        except OSError as error:  # they were the same when it was started
            print_line(
                f"persimmon: warning: cannot check whether {self._folder} has changed: {error.strerror or error}"
            )
            return False

    def _checkpoint_changed(self) -> bool:
        """Ends the server where a child would serve, or has read, other files than the others.

        Raises:
            OSError: the folder cannot be read now.
        """
        what = change(self._files, identity(self._folder))
        if what is None:
            return False
        print_line(
            f"persimmon: error: the checkpoint in {self._folder} has changed since the server started ({what}). The "
            f"server exits, because answers would change under the same model name; start it again to serve the new "
            f"files"
        )
        self._end()
        return True

    def _hear(self, child: Child, message: object) -> None:
        """Takes what a child says when it is ready, or cannot start."""
        engine = next((engine for engine in self._engines if engine.child is child), None)
        if engine is not None and isinstance(message, Ready):
            engine.ready = message
            engine.watch.restart()
            if self._announced:
                print_line(f"{engine.name[0].upper()}{engine.name[1:]} is serving again")
        # A single engine prints it itself.
        if isinstance(message, CannotStart) and len(self._engines) > 1 and not self._refused:
            self._refused = not self._announced
            print_line(f"persimmon: error: {message.reason}")
        if not self._announced and all(child.has_served for child in self._children) and self._ready is not None:
            self._announced = True
            self._announce(self._ready)
            notify("READY=1")

    @property
    def _ready(self) -> Ready | None:
        """The description of an engine that serves; None where none does."""
        return next((engine.ready for engine in self._engines if engine.ready is not None), None)

    def _on_exit(self, child: Child) -> int | None:
        """Plans the successor of a child that has ended; the server's exit code where there is none."""
        exit_code = child.join()
        if child in self._workers:
            self._vitals.forget_worker(self._workers.index(child))
        else:
            index, engine = next((index, own) for index, own in enumerate(self._engines) if own.child is child)
            engine.ready = None
            self._vitals.forget_engine(index)
        # What cannot start now has served before, and other engines go on.
        again = child.has_served or (self._announced and len(self._engines) > 1 and child not in self._workers)
        if exit_code == 2 and not again:  # it could not start, and has said why
            return 2
        delay = child.plan_restart() if again else None
        if delay is None:
            # What libraries do that cannot start a thread or map memory, after a line of their own.
            advice = f"; {ADVICE}" if exit_code == -signal.SIGABRT else ""
            print_line(f"persimmon: error: {child.exit_summary}; the server exits{advice}")
            self._end()
            return 1
        when = f"in {delay:g} s" if delay else "now"
        print_line(f"persimmon: error: {child.exit_summary}; its requests end with an error; restarting it {when}")
        return None

    def _announce(self, ready: Ready) -> None:
        host, port = self._listeners[0].getsockname()[:2]
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
        url = f"{'http' if self._settings.ssl_certfile is None else 'https'}://{shown}:{port}"
        kind = f"{ready.dtype}, {ready.weights} weights" if ready.weights else ready.dtype
        if len(self._engines) > 1:
            kind = f"{len(self._engines)} engines, {kind}"
        print_line(f"Serving {self._served_model_name} on {url} ({kind}, {ready.device}). Try:")
        endpoint, body = self._use.example
        keys = self._settings.api_key or self._settings.api_key_file
        key = " -H 'Authorization: Bearer KEY'" if keys else ""
        print_line(f"  curl {url}{endpoint}{key} -H 'Content-Type: application/json' -d '{body}'")

    def _look_at_engines(self) -> None:
        """Kills engines that hang, so that they are started again."""
        for engine in self._engines:
            if engine.ready is None:
                continue
            overdue = engine.watch.overdue_seconds()
            if overdue > step_limit(self._settings.step_timeout, engine.ready.device):
                print_line(
                    f"persimmon: error: {engine.name} has work but has not finished a step for {overdue:.1f} s; "
                    f"killing it"
                )
                engine.ready = None
                self._kill_hung(engine.child)

    def _look_at_workers(self) -> None:
        """Kills workers that hang, so that they are started again."""
        for worker, watch in zip(self._workers, self._worker_watches, strict=True):
            hung = watch.hung_seconds()
            if hung is not None and worker.sentinel is not None:
                print_line(f"persimmon: error: {worker.title} has been unresponsive for {hung:.1f} s; killing it")
                self._kill_hung(worker)
                watch.restart()

    def _drain(self) -> int:
        if self._ready is None:  # no request can be open, so a worker that is still starting need not come to its end
            kill([worker for worker in self._workers if worker.report is not None])
        self._signal_workers(signal.SIGTERM)
        notify("STOPPING=1")
        self._signals.take_repeats(REPEAT_SECONDS)
        print_line("Stopping after open requests have finished (send a second signal to stop immediately)")
        # The workers have their own, and go on accepting with them; connections after their end are refused.
        for listener in self._listeners:
            listener.close()
        if not self._wait_for_workers(self._settings.drain_timeout + FINAL_ERROR_SECONDS + FLUSH_SECONDS):
            print_line("Stopping immediately: open requests end with an error")
            self._signal_workers(signal.SIGUSR2)
            self._wait_for_workers(FINAL_ERROR_SECONDS + FLUSH_SECONDS)
        return 0

    def _end(self) -> None:
        """Lets workers tell their clients that the engines are gone, and ends them."""
        kill([engine.child for engine in self._engines])
        self._signal_workers(signal.SIGTERM)
        self._wait_for_workers(FLUSH_SECONDS)

    def _take_signals(self) -> Collection[int]:
        """The signals that have come; SIGUSR1 is passed on, so that all processes write their stacks."""
        come = self._signals.take()
        if signal.SIGUSR1 in come:
            for child in self._children:
                child.send(signal.SIGUSR1)
        return come

    def _signal_workers(self, number: signal.Signals) -> None:
        for worker in self._workers:
            worker.send(number)

    def _wait_for_workers(self, seconds: float) -> bool:
        """Returns when all workers have ended or the time is over; False when a signal asks for the end at once."""
        deadline = time.monotonic() + seconds
        running = {worker.sentinel for worker in self._workers if worker.sentinel is not None}
        while running and (left := deadline - time.monotonic()) > 0:
            happened = self._wait(running, left)
            if self._signals.descriptor in happened:
                come = self._take_signals()
                if self._signals.ends(come):
                    return False
                if signal.SIGHUP in come:
                    print_line("Stopping: API keys and certificates are not reloaded")
            running.difference_update(happened)
        return True

    def _read_files_again(self) -> None:
        """Has the workers read the files of keys and certificates again, if they can be used."""
        try:
            self._credentials.read_again(self._settings)
        except SettingsError as error:
            print_line(f"persimmon: error: {error}; API keys and certificates are unchanged")
            return
        for worker in self._workers:
            worker.send(signal.SIGHUP)
        if self._settings.api_key_file is not None:
            count = len(self._credentials.keys.keys)
            print_line(f"reloaded {self._settings.api_key_file}: {count} API key{'s' if count > 1 else ''}")
        if self._credentials.certificate is not None:
            print_line(f"reloaded {self._settings.ssl_certfile}: new connections get this certificate")


class _Signals:
    """Signals as something to wait for, for the length of a block.

    Args:
        ending: those that ask the server to end.
        others: to be waited for as well.

    Attributes:
        descriptor: readable when a signal has come.
    """

    def __init__(self, ending: Collection[signal.Signals], others: Collection[signal.Signals]) -> None:
        self._ending = frozenset(ending)
        self._numbers = self._ending | frozenset(others)

    def __enter__(self) -> Self:
        self.descriptor, self._write_end = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._write_end, False)
        self._previous = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in self._numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous)
        os.close(self.descriptor)
        os.close(self._write_end)

    def take(self) -> Collection[int]:
        """Takes those that have come."""
        try:
            return frozenset(os.read(self.descriptor, 1024))
        except BlockingIOError:
            return frozenset()

    def ends(self, come: Collection[int]) -> bool:
        """Whether one of these asks for the end of the server."""
        return not self._ending.isdisjoint(come)

    def take_repeats(self, seconds: float) -> None:
        """Takes what comes within this time."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and connection.wait([self.descriptor], left):
            self.take()
