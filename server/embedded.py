"""The server inside another program: an engine process, and the server's ASGI application in this process.

Knows processes and the application's life; nothing of what requests ask for.
"""

import asyncio
import atexit
import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client import Metric
from starlette.types import ASGIApp, Receive, Scope, Send

from persimmon.server.child_process import CannotStart
from persimmon.server.children import spawn
from persimmon.server.config import EMBEDDED_GROUPS, Settings, listed, read_settings
from persimmon.server.engine.load import Load
from persimmon.server.engine_places import EnginePlace
from persimmon.server.entry_points import engine_main
from persimmon.server.http.app import application
from persimmon.server.http.middleware.gate import Gate
from persimmon.server.metrics import Metrics
from persimmon.server.runtime_folder import runtime_folder
from persimmon.server.served_model import ServedModel
from persimmon.server.settings.section import SettingsError
from persimmon.server.step_watch import step_limit
from persimmon.server.vitals import Vitals


class EngineFailedError(RuntimeError):
    """The engine process could not start, has ended, or hangs.

    Attributes:
        exit_code: of the process: 2 where the checkpoint, the GPU or the settings do not allow a start; negative
            after a signal; None if it has not ended, but hangs.
    """

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EmbeddedServer:
    """Persimmon's server in the event loop of another program, without a network.

    The model runs in an engine process of its own, which ends when this process or the thread that called `start`
    ends, for whatever reason. `app` is the application that `persimmon serve` serves; every endpoint is there. It
    refuses nothing because it is busy, asks for no key and lets requests wait for any time: that is up to the program
    around it. The engine writes its progress and its log to the standard error.

        async with EmbeddedServer(model="path/to/checkpoint", max_num_seqs=32) as server:
            transport = httpx.ASGITransport(app=server.app)

    Entering the block starts the server and waits until it is ready; leaving it lets open requests finish and stops.
    A server starts once.

    Args:
        settings: those of `persimmon generate`, named as the flags are; numbers or texts. What is not given comes from
            the environment, then from the default.

    Attributes:
        settings: all of them, as they were read.
        served: the checkpoint.

    Raises:
        SettingsError: a setting is invalid, or there is not enough memory for the engine process; a ValueError.
        CheckpointError: the checkpoint cannot be found, or is not one that this server serves; a ValueError.
    """

    def __init__(self, **settings: Any) -> None:
        allowed = [name for name, _ in listed(EMBEDDED_GROUPS)]
        for name in settings:
            if name not in allowed:
                raise SettingsError(f"{name} is not a setting of EmbeddedServer; expected one of {', '.join(allowed)}")
        given = {name: os.fspath(value) if isinstance(value, Path) else value for name, value in settings.items()}
        self.settings = read_settings(given)
        self.served = ServedModel.find(self.settings, api_workers=0)
        self._resources = contextlib.ExitStack()
        self._running: _Running | None = None
        self._stopped = False

    @property
    def app(self) -> ASGIApp:
        """The application, for `httpx.ASGITransport` or to be mounted in another one.

        While the model loads and after the end, it answers requests that need the model with status 503.  Calling it
        before `start` is a RuntimeError.
        """
        return self._call

    async def start(self) -> None:
        """Starts the engine process, which then loads the model, and returns.

        Raises:
            RuntimeError: it has been started before.
            RuntimeFolderError: there is no place for the engine's socket; an OSError.
            OSError: the system allows no further process.
        """
        if self._running is not None:
            raise RuntimeError("this server has been started before; make another EmbeddedServer")
        with contextlib.ExitStack() as stack:
            self._running = running = _Running(self.settings, self.served, stack)
            await running.client.start()
            self._resources = stack.pop_all()
        # Before multiprocessing's own handler, which would wait for the engine's end.
        atexit.register(self._close_at_exit, os.getpid())

    async def ready(self) -> None:
        """Returns when the model is loaded and has computed a first token.

        Raises:
            EngineFailedError: the engine could not start, for the reason in the message, or has ended.
        """
        running = self._started()
        answered = asyncio.create_task(running.client.wait_until_ready())
        ended = asyncio.create_task(running.ended.wait())
        try:
            await asyncio.wait((answered, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            answered.cancel()
            ended.cancel()
        if running.ended.is_set():
            raise running.failure()

    async def engine_failed(self) -> EngineFailedError:
        """Returns when the engine process has ended, with the reason.  It does not end by itself unless it fails."""
        running = self._started()
        await running.ended.wait()
        return running.failure()

    def check_health(self) -> None:
        """Returns if the engine serves or still loads; for a program that replaces it otherwise.

        Raises:
            EngineFailedError: the engine process has ended, or hangs: it has work, and has ended no step for 30 s on a
                GPU, 300 s on a CPU, or PERSIMMON_STEP_TIMEOUT from the environment.
        """
        running = self._started()
        if running.ended.is_set():
            raise running.failure()
        info, overdue = running.client.info, running.gate.load.overdue_seconds()
        if info is not None and overdue > step_limit(self.settings.step_timeout, info.device):
            raise EngineFailedError(f"the engine has work but has not finished a step for {overdue:.0f} s", None)

    def metrics(self) -> Iterator[Metric]:
        """All metrics of docs/reference/metrics.md as they are now, for a program that exports them itself."""
        metrics: Metrics = self._started().app.state.metrics
        return metrics.families()

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens that the KV cache holds; 0 until the model is loaded."""
        info = self._started().client.info
        return 0 if info is None else info.total_blocks * info.block_size

    async def drain(self, seconds: float | None = None) -> bool:
        """Refuses new requests with status 503 from here on, and waits for the open ones.

        Args:
            seconds: to wait at most; None for the setting drain_timeout, which only the environment changes here.

        Returns:
            Whether all have ended.
        """
        running = self._started()
        running.gate.draining = True
        try:
            async with asyncio.timeout(self.settings.drain_timeout if seconds is None else seconds):
                await running.gate.wait_until_empty()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Ends the engine process at once.  Requests that are still open end with an error; may be called again."""
        if self._running is None or self._stopped:
            return
        self._stopped = True
        try:
            await self._running.client.close()
            if self._running.engine.is_alive():
                self._running.engine.kill()
                await self._running.ended.wait()
        finally:
            self._resources.close()
            atexit.unregister(self._close_at_exit)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
            await self.ready()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self.drain()
        finally:
            await self.stop()

    def _started(self) -> "_Running":
        if self._running is None:
            raise RuntimeError("this server has not been started; call start() first")
        return self._running

    def _close_at_exit(self, pid: int) -> None:
        if os.getpid() == pid:  # and not a forked one, whose exit leaves the engine to its parent
            self._resources.close()

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._started().app
        if root := scope.get("root_path"):  # of a mount; what comes before an endpoint looks at whole paths
            scope = {**scope, "path": scope["path"].removeprefix(root), "root_path": ""}
        await app(scope, receive, send)


class _Running:
    """What there is once a server has been started.

    Args:
        settings: of the server.
        served: the checkpoint.
        stack: ends the process and removes its files, when it is closed.

    Attributes:
        app: the application.
        client: its connection to the engine.
        gate: lets requests in.
        engine: the process.
        ended: set when it has ended.
    """

    def __init__(self, settings: Settings, served: ServedModel, stack: contextlib.ExitStack) -> None:
        runtime = stack.enter_context(runtime_folder())
        address, path = f"ipc://{runtime}/engine", runtime / "vitals"
        vitals = Vitals.create(path, workers=1)
        self.gate = Gate(Load(vitals))
        self.app, self.client = application(settings, served.folder, served.name, [address], gate=self.gate)
        # Requests may wait for any time.
        own = settings.of_engine().model_copy(update={"queue_timeout": 0.0})
        self._report, end = multiprocessing.get_context("spawn").Pipe(duplex=False)
        stack.callback(self._report.close)
        with end:
            place = EnginePlace(address, path)
            self.engine = spawn("persimmon-engine", engine_main, own, served.folder, place, end)
        stack.callback(_end, self.engine)
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.engine.sentinel, self._on_end)
        stack.callback(self._forget_end)

    def failure(self) -> EngineFailedError:
        """Why the engine has ended."""
        self.engine.join()
        code = self.engine.exitcode
        return EngineFailedError(_reason(self._report) or f"the engine process ended with code {code}", code)

    def _on_end(self) -> None:
        self._forget_end()
        self.ended.set()

    def _forget_end(self) -> None:
        if not self._loop.is_closed():
            self._loop.remove_reader(self.engine.sentinel)


def _end(process: SpawnProcess) -> None:
    if process.is_alive():
        process.kill()
    process.join()


def _reason(report: Connection) -> str | None:
    """Why an engine that has ended could not start; None where it had started, or ended without a word."""
    try:
        while not report.closed and report.poll():
            message = report.recv()
            if isinstance(message, CannotStart):
                return message.reason
    except EOFError:
        pass
    return None
