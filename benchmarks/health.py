"""How long health probes take while 2,500 clients press: each asks again as soon as it has its answer or refusal.

    python -m benchmarks.health --out benchmarks/results/NAME.json

The clients are in a process of their own; the probes come from this one, each on a connection of its own, as a load
balancer's do.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection as Connected
from pathlib import Path

import uvloop

from benchmarks.checkpoint import DEMO
from benchmarks.machine import write_figures
from benchmarks.servers import RunningServer, own_server, running
from persimmon.server.bench.http_client import Connection, Endpoint
from persimmon.server.bench.report import Distribution

PATHS = ("/livez", "/health")
PROBE_TIMEOUT_S = 60.0
PAUSE_S = 0.05


@dataclass(frozen=True)
class Pressure:
    """What presses.

    Attributes:
        clients: how many.
        tokens: of each answer.
        fresh: whether each request has a connection of its own.
    """

    clients: int
    tokens: int
    fresh: bool


@dataclass(frozen=True)
class Result:
    """A measurement.

    Attributes:
        command: how the server was started.
        pressure: what pressed it.
        seconds: for how long.
        idle_ms: by path, how long probes took before.
        pressed_ms: by path, how long they took meanwhile.
        probes: by status, all of them.
        answers: by status, what the clients got in the same time.
    """

    command: str
    pressure: Pressure
    seconds: float
    idle_ms: Mapping[str, Distribution]
    pressed_ms: Mapping[str, Distribution]
    probes: Mapping[int, int]
    answers: Mapping[int, int]


def press(endpoint: Endpoint, pressure: Pressure, pipe: Connected) -> None:
    """The main function of the clients' process.

    Args:
        endpoint: the server.
        pressure: what they do.
        pipe: gets a message when each client has had an answer and, after one has come back, the answers by status.
    """
    uvloop.run(_press(endpoint, pressure, pipe))


async def _press(endpoint: Endpoint, pressure: Pressure, pipe: Connected) -> None:
    body = json.dumps({"prompt": [300, 301, 302], "max_tokens": pressure.tokens, "ignore_eos": True}).encode()
    answers = Counter[int]()
    had_one = 0

    async def client() -> None:
        nonlocal had_one
        first = True
        async with Connection(endpoint) as connection:
            while True:
                try:
                    answers[(await connection.post("/v1/completions", body)).status] += 1
                except OSError:
                    answers[0] += 1
                if first:
                    first, had_one = False, had_one + 1
                    if had_one == pressure.clients:
                        pipe.send("begun")
                        answers.clear()
                if pressure.fresh:
                    connection.close()

    tasks = [asyncio.create_task(client()) for _ in range(pressure.clients)]
    await asyncio.to_thread(pipe.recv)
    for task in tasks:
        task.cancel()
    pipe.send(dict(answers))


def probe(endpoint: Endpoint, seconds: float, statuses: Counter[int]) -> dict[str, Distribution]:
    """Probes all paths in turn for some time; by path how long they took."""
    taken: dict[str, list[float]] = {path: [] for path in PATHS}
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        for path in PATHS:
            started = time.perf_counter()
            connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=PROBE_TIMEOUT_S)
            with contextlib.closing(connection):
                connection.request("GET", path)
                response = connection.getresponse()
                response.read()
            taken[path].append(time.perf_counter() - started)
            statuses[response.status] += 1
            time.sleep(PAUSE_S)
    return {path: figures for path, each in taken.items() if (figures := Distribution.of(each)) is not None}


def measure(server: RunningServer, command: str, pressure: Pressure, seconds: float) -> Result:
    """Probes an idle and a pressed server.

    Raises:
        TimeoutError: some clients had no answer in two minutes.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    statuses = Counter[int]()
    idle = probe(server.endpoint, min(5.0, seconds), statuses)
    process = context.Process(target=press, args=(server.endpoint, pressure, theirs), daemon=True)
    process.start()
    if not ours.poll(120):
        raise TimeoutError("some of the clients had no answer in two minutes")
    ours.recv()
    pressed = probe(server.endpoint, seconds, statuses)
    ours.send("stop")
    answers = ours.recv()
    process.join()
    return Result(
        command=command,
        pressure=pressure,
        seconds=seconds,
        idle_ms=idle,
        pressed_ms=pressed,
        probes=dict(statuses),
        answers=answers,
    )


def describe(result: Result) -> str:
    """The figures in lines for people."""
    rows = [f"{'':10}{'probes':>12}{'median':>10}{'p90':>10}{'p99':>10}{'max, ms':>10}"]
    for name, each in (("idle", result.idle_ms), ("pressed", result.pressed_ms)):
        rows += [
            f"{name:10}{path:>12}{ms.median:>10.1f}{ms.p90:>10.1f}{ms.p99:>10.1f}{ms.max:>10.1f}"
            for path, ms in each.items()
        ]
    rows.append(
        f"probes by status: {dict(result.probes)}; {result.pressure.clients} clients' answers: {dict(result.answers)}"
    )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.health", description="Probe a server under pressure.")
    parser.add_argument("--clients", type=int, default=2500, help="[default: %(default)s]")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer [default: %(default)s]")
    parser.add_argument("--fresh", action="store_true", help="clients open a connection for each request")
    parser.add_argument("--seconds", type=float, default=30, help="[default: %(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("arguments", nargs="*", help="more for persimmon serve, after --")
    arguments = parser.parse_args()
    server = own_server(*arguments.arguments)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = stack.enter_context(running(server, DEMO, folder / "log", 120))
        pressure = Pressure(arguments.clients, arguments.tokens, arguments.fresh)
        result = measure(started, server.shown_command, pressure, arguments.seconds)
    print(describe(result))
    write_figures(arguments.out, asdict(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
