"""`persimmon generate`: has an embedded server answer a batch file, and reports on the console how it went.

Knows signals and the console; nothing of what a line asks for.
"""

import asyncio
import math
import signal
import sys
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import uvloop

from persimmon.progress import progress_bar
from persimmon.server import logs
from persimmon.server.config import Settings
from persimmon.server.console import interruptible
from persimmon.server.embedded import EmbeddedServer, EngineFailedError
from persimmon.server.logs import print_line
from persimmon.server.offline.batch import Batch, EngineLostError
from persimmon.server.offline.files import BatchInput, BatchOutput

ANSWERED, SOME_FAILED, STOPPED = 0, 1, 130
"""Exit codes; 2 is for what the person at the console can mend."""

DRAIN_SECONDS = 10.0
"""How long the lines that run may go on after the first signal."""

ENGINE_EXIT_SECONDS = 5.0
"""Time for an engine whose connection is lost to exit."""

GOES_ON = "run the same command again to continue"


def concurrency(settings: Settings) -> int:
    """Lines that run at once: as many as the engine takes, and some that wait, so that no place stays empty."""
    return settings.max_num_seqs + max(8, math.ceil(settings.max_num_seqs / 4))


def generate(source: Path, out: Path, any_model: bool, settings: Mapping[str, Any]) -> int:
    """Answers the lines of `source` that have no answer in `out` yet.

    Args:
        source: the lines to answer.
        out: the file that answers are added to.
        any_model: whether lines are answered whichever model they name.
        settings: of `persimmon.EmbeddedServer`.

    Returns:
        The exit code: 0 when every line has what it asked for; 1 when some lines failed, or the engine did; 2 when
        the checkpoint or the settings do not allow a start, which the engine has explained; 130 after SIGTERM or
        Ctrl-C.

    Raises:
        SettingsError: a setting is invalid.
        CheckpointError: the checkpoint cannot be found, or is not one that this server serves.
        BatchFileError: a file cannot be used.
    """
    server = EmbeddedServer(**settings)
    for line in server.served.notices:
        print_line(line)
    try:
        with interruptible():
            return _answer(server, BatchInput(source), out, any_model)
    except KeyboardInterrupt:  # while the files were read
        print_line(f"persimmon: stopped; {GOES_ON}")
        return STOPPED


def _answer(server: EmbeddedServer, source: BatchInput, out: Path, any_model: bool) -> int:
    with BatchOutput(out) as output:
        missing = output.missing(source)
        if output.lines:
            print_line(f"{out} already has the answers of {source.lines - missing:,} of {source.lines:,} lines")
        if missing:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                code = runner.run(_generate(server, source, output, missing, any_model))
            if code is not None:
                return code
        print_line(
            f"{out}: {output.answered:,} line{'' if output.answered == 1 else 's'} answered, {output.failed:,} failed"
        )
        for line in output.failures.lines():
            print_line(f"  {line}")
        return SOME_FAILED if output.failed else ANSWERED


async def _generate(
    server: EmbeddedServer, source: BatchInput, output: BatchOutput, missing: int, any_model: bool
) -> int | None:
    """Runs a batch of lines; returns the exit code if it did not finish."""
    logs.configure("generate", log_level=server.settings.log_level)
    with _Signals() as signals:
        try:
            await server.start()
            async with _Tasks() as tasks:
                return await _run(server, source, output, missing, any_model, signals, tasks)
        finally:
            await server.stop()


async def _run(
    server: EmbeddedServer,
    source: BatchInput,
    output: BatchOutput,
    missing: int,
    any_model: bool,
    signals: "_Signals",
    tasks: "_Tasks",
) -> int | None:
    failed = tasks.start(server.engine_failed())
    ready = tasks.start(server.ready())
    stop = tasks.start(signals.first.wait())
    await asyncio.wait((ready, failed, stop), return_when=asyncio.FIRST_COMPLETED)
    if stop.done():
        print_line(f"persimmon: stopped; {GOES_ON}")
        return STOPPED
    if failed.done() or ready.exception() is not None:
        return await _engine_failed(failed)
    with _Bar(source.lines, source.lines - missing) as bar:
        batch = Batch(app=server.app, source=source, output=output, progress=bar, any_model=any_model)
        running = tasks.start(batch.run(min(concurrency(server.settings), missing)))
        await asyncio.wait((running, failed, stop), return_when=asyncio.FIRST_COMPLETED)
        if stop.done() and not running.done():
            bar.print_line("Stopping after the running lines have finished (send a second signal to stop immediately)")
            batch.stopping = True
            again = tasks.start(signals.second.wait())
            await asyncio.wait((running, failed, again), timeout=DRAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        await _settled(running)
    if not running.cancelled() and (error := running.exception()) is not None:
        if not isinstance(error, EngineLostError):
            raise error
        return await _engine_failed(failed)
    if failed.done() and bar.lines < source.lines:
        return await _engine_failed(failed)
    if stop.done() and bar.lines < source.lines:
        print_line(f"persimmon: stopped with {bar.lines:,} of {source.lines:,} lines done; {GOES_ON}")
        return STOPPED
    return None


async def _settled(task: asyncio.Task[Any]) -> None:
    """Ends a task that has not ended; how it ended is left in it."""
    task.cancel()
    await asyncio.wait((task,))


async def _engine_failed(failed: asyncio.Task[EngineFailedError]) -> int:
    await asyncio.wait((failed,), timeout=ENGINE_EXIT_SECONDS)
    error = failed.result() if failed.done() else None
    if error is not None and error.exit_code == 2:  # it could not start, and has said why
        return 2
    print_line(f"persimmon: error: {error or 'the engine process is lost'}; {GOES_ON}")
    return SOME_FAILED


class _Signals:
    """SIGTERM and SIGINT as events, for the length of a block.

    Attributes:
        first: set at the first one.
        second: set at the next.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._arrived)
        return self

    def __exit__(self, *exception: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)

    def _arrived(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


class _Tasks:
    """Tasks that end with a block; unlike a TaskGroup's, one that fails is left to those who look at it."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[Any]] = []

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs `work` during the block."""
        self._tasks.append(asyncio.create_task(work))
        return self._tasks[-1]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class _Bar:
    """A progress bar of lines, with the tokens of this run next to it.

    Args:
        total: lines in all.
        done: those of earlier runs.

    Attributes:
        lines: done so far, in earlier runs too.
    """

    def __init__(self, total: int, done: int) -> None:
        self._bar = progress_bar("batch", total, "req", initial=done, leave=True)
        self._started = time.perf_counter()
        self._tokens = 0
        self.lines = done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def print_line(self, line: str) -> None:
        """One line for the person at the console, above the bar."""
        self._bar.write(line, file=sys.stderr)
        sys.stderr.flush()

    def advance(self, tokens: int) -> None:
        """Counts one more line, for which the engine has read and written `tokens` tokens."""
        self.lines += 1
        self._tokens += tokens
        rate = self._tokens / max(time.perf_counter() - self._started, 1e-9)
        self._bar.set_postfix_str(f"{self._tokens:,} tokens, {rate:,.0f}/s", refresh=False)
        self._bar.update()
