"""Starts a server for a measurement and stops it again: a free port, a fresh process group, a log to quote from.

Knows nothing of what is measured.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from persimmon.server.bench.http_client import Connection, Endpoint

STOP_SECONDS = 30.0
ANSWER_SECONDS = 5
LOG_TAIL_LINES = 40


class ServerFailedError(Exception):
    """A server did not start, or did not answer as it should; the message ends with the tail of its log."""

    def __init__(self, message: str, log: Path) -> None:
        tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        super().__init__("\n".join([f"{message}; the end of its log:", *(f"    {line}" for line in tail)]))


@dataclass(frozen=True)
class Server:
    """How a server is started.

    Attributes:
        name: a short name for tables.
        program: the first words of its command line, with paths of this machine.
        shown_program: the same for reports.
        arguments: the rest, with {checkpoint} and {port} to be filled in.
        environment: variables to add to those of this process.
    """

    name: str
    program: tuple[str, ...]
    shown_program: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    def command(self, checkpoint: Path, port: int) -> list[str]:
        """The command line to run."""
        return [*self.program, *(word.format(checkpoint=checkpoint, port=port) for word in self.arguments)]

    @property
    def shown_command(self) -> str:
        """The command line for reports, free of paths."""
        variables = [f"{name}={Path(value).name}" for name, value in self.environment.items()]
        arguments = [word.format(checkpoint="CHECKPOINT", port="PORT") for word in self.arguments]
        return " ".join([*variables, self.shown_program, *arguments])


@dataclass(frozen=True)
class RunningServer:
    """A server that has answered /health.

    Attributes:
        name: the server's.
        endpoint: where it listens.
        start_s: seconds from starting its process to its first healthy answer.
        version: as its /version says.
        log: the file that its output goes to.
        process_id: of its first process.
    """

    name: str
    endpoint: Endpoint
    start_s: float
    version: str
    log: Path
    process_id: int

    def cpu_seconds(self) -> float:
        """Processor time of its living processes, since each started."""
        first = psutil.Process(self.process_id)
        times = [process.cpu_times() for process in (first, *first.children(recursive=True))]
        return sum(time.user + time.system for time in times)

    def resident_bytes(self) -> int:
        """Memory that its living processes hold, shared pages counted once (their proportional set sizes)."""
        first = psutil.Process(self.process_id)
        return sum(process.memory_full_info().pss for process in (first, *first.children(recursive=True)))


@contextlib.contextmanager
def running(server: Server, checkpoint: Path, log: Path, start_timeout_s: float) -> Iterator[RunningServer]:
    """Starts a server in a process group of its own; leaving the block stops the whole group.

    Args:
        server: what to start.
        checkpoint: the folder it serves.
        log: the file to write its output to.
        start_timeout_s: the longest it may take to become healthy.

    Raises:
        ServerFailedError: its process ended, or it was not healthy in time.
        OSError: its program cannot be started.
    """
    port = _free_port()
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            server.command(checkpoint, port),
            env={**os.environ, **server.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while _get(port, "/health") is None:
            if process.poll() is not None:
                raise ServerFailedError(f"{server.name} ended with code {process.returncode}", log)
            if time.perf_counter() - started > start_timeout_s:
                raise ServerFailedError(f"{server.name} was not healthy in {start_timeout_s:g} s", log)
            time.sleep(0.05)
        start_s = round(time.perf_counter() - started, 2)
        yield RunningServer(
            name=server.name,
            endpoint=Endpoint("127.0.0.1", port),
            start_s=start_s,
            version=_version(port),
            log=log,
            process_id=process.pid,
        )
    finally:
        _stop(process)


def own_server(
    *flags: str, name: str = "persimmon", environment: Mapping[str, str] | None = None, before: tuple[str, ...] = ()
) -> Server:
    """This project's server, run by this interpreter.

    Args:
        flags: of `persimmon serve`, after the checkpoint and the port.
        name: a short name for tables.
        environment: variables to add.
        before: words in front of the command, as of taskset.
    """
    return Server(
        name=name,
        program=(*before, sys.executable, "-m", "persimmon.server.cli"),
        shown_program=" ".join([*before, "persimmon"]),
        arguments=("serve", "--model", "{checkpoint}", "--port", "{port}", *flags),
        environment=environment or {},
    )


async def read_metrics(connection: Connection, *names: str) -> dict[str, float]:
    """Metrics of this project's server, each added up over its series.

    Args:
        connection: to the server.
        names: without persimmon_.

    Raises:
        LookupError: there is none of a name.
    """
    text = (await connection.get("/metrics")).body.decode()
    return {name: _sum(text, name) for name in names}


def _sum(text: str, name: str) -> float:
    values = re.findall(rf"^persimmon_{name}(?:{{\S+}})? (\S+)$", text, flags=re.MULTILINE)
    if not values:
        raise LookupError(f"/metrics has no persimmon_{name}")
    return sum(map(float, values))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _version(port: int) -> str:
    answer = json.loads(_get(port, "/version") or b"{}")
    return str(answer.get("version", "unknown"))


def _get(port: int, path: str) -> bytes | None:
    """The body of a 200 answer, else None."""

    async def get() -> bytes | None:
        async with asyncio.timeout(ANSWER_SECONDS), Connection(Endpoint("127.0.0.1", port)) as connection:
            response = await connection.get(path)
        return response.body if response.status == 200 else None

    try:
        return asyncio.run(get())
    except OSError:  # a TimeoutError is one
        return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    _signal_group(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    _signal_group(process.pid, signal.SIGKILL)  # a child that outlives its parent would share the cores
    process.wait()
    psutil.wait_procs(family, timeout=STOP_SECONDS)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
