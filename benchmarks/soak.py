"""Clients that leave at random, then very many tiny requests of which a tenth is aborted: does anything stay behind?

    python -m benchmarks.soak --disconnects 10000 --requests 200000 --out FILE.json

Starts the server on the demo checkpoint and shows what its processes hold over time, and at the end what the engine
says of its blocks and sequences.  Knows nothing of answers but their status.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop

from benchmarks.machine import write_figures
from benchmarks.processes import Family, Sample, watch
from benchmarks.servers import own_server, read_metrics, running
from persimmon.model import demo
from persimmon.server.bench.http_client import Connection, Endpoint
from persimmon.server.bench.workload import COMPLETIONS

ABORTED_SHARE = 0.1
IDLE_SECONDS = 60.0
LEVELS = ("requests_running", "requests_waiting", "open_streams", "kv_blocks_free", "kv_blocks")


@dataclass(frozen=True)
class Phase:
    """A part of the soak.

    Attributes:
        name: of it.
        requests: sent.
        outcomes: HTTP statuses, or "left" for clients that did not wait.
        seconds: it took.
        samples: what the processes held.
    """

    name: str
    requests: int
    outcomes: Mapping[str, int]
    seconds: float
    samples: Sequence[Sample]


@dataclass(frozen=True)
class Result:
    """A soak.

    Attributes:
        command: how the server was started.
        phases: in order.
        metrics: the engine's levels in the end, when nothing is in flight.
        after: what the processes hold then.
    """

    command: str
    phases: Sequence[Phase]
    metrics: Mapping[str, float]
    after: Sample


async def leave(endpoint: Endpoint, number: int) -> str:
    """Asks for something and leaves: before the first byte, after some, or as the answer ends."""
    dice = random.Random(number)
    text = "word " * dice.choice((1, 20, 300, 1500))
    body = {
        "prompt": text,
        "max_tokens": dice.choice((1, 8, 64, 300)),
        "n": dice.choice((1, 1, 1, 3)),
        "stream": dice.random() < 0.5,
        "ignore_eos": True,
    }
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    writer.write(
        endpoint.request("POST", COMPLETIONS, json.dumps(body).encode())[: dice.choice((None,) * 8 + (-1, 40))]
    )
    with contextlib.suppress(TimeoutError, ConnectionError, asyncio.IncompleteReadError):
        async with asyncio.timeout(dice.choice((0, 0.001, 0.01, 0.05, 0.2, 1))):
            await reader.readexactly(dice.choice((1, 300, 3000, 20_000)))
    if dice.random() < 0.5:
        writer.transport.abort()  # a reset instead of an end
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return "left"


class TinyRequests:
    """Asks for a token or two on kept connections; a tenth leaves.

    Args:
        endpoint: the server.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._idle: list[Connection] = []

    async def __call__(self, number: int) -> str:
        """Sends one; its status, or that it has left."""
        dice = random.Random(number)
        aborts = dice.random() < ABORTED_SHARE
        body = {
            "prompt": [dice.randrange(300, 4000) for _ in range(4)],
            "max_tokens": 64 if aborts else dice.choice((1, 2)),
            "ignore_eos": True,
            "stream": dice.random() < 0.5,
        }
        connection = self._idle.pop() if self._idle else Connection(self._endpoint)
        try:
            async with asyncio.timeout(dice.random() * 0.02 if aborts else 60):
                return str((await connection.post("/v1/completions", json.dumps(body).encode())).status)
        except TimeoutError:
            return "left" if aborts else "no answer in a minute"
        except OSError as error:
            return type(error).__name__
        finally:
            self._idle.append(connection)

    def close(self) -> None:
        """Closes the connections."""
        for connection in self._idle:
            connection.close()


async def run_phase(name: str, one: Callable[[int], Awaitable[str]], count: int, at_once: int, family: Family) -> Phase:
    """Runs `one` `count` times, `concurrency` at once."""
    outcomes: Counter[str] = Counter()
    numbers = iter(range(count))
    samples: list[Sample] = []

    async def client() -> None:
        for number in numbers:
            outcomes[await one(number)] += 1

    watching = asyncio.create_task(watch(family, 10, samples))
    started = time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        for _ in range(at_once):
            clients.create_task(client())
    watching.cancel()
    samples.append(family.sample())
    return Phase(
        name=name,
        requests=count,
        outcomes=dict(outcomes),
        seconds=round(time.perf_counter() - started, 1),
        samples=samples,
    )


async def idle_metrics(endpoint: Endpoint) -> dict[str, float]:
    """The levels of all engines together when nothing is in flight, or those that there are after a minute."""
    deadline = time.monotonic() + IDLE_SECONDS
    async with Connection(endpoint) as connection:
        while True:
            metrics = await read_metrics(connection, *LEVELS)
            busy = metrics["requests_running"] + metrics["requests_waiting"] + metrics["open_streams"]
            if not busy or time.monotonic() > deadline:
                return metrics
            await asyncio.sleep(0.1)


async def soak(endpoint: Endpoint, command: str, process_id: int, disconnects: int, requests: int) -> Result:
    """Both phases, after a few requests of each kind that make the processes as large as they will be."""
    family = Family(process_id)
    tiny = TinyRequests(endpoint)

    async def leaver(number: int) -> str:
        return await leave(endpoint, number)

    phases = [
        await run_phase("warm-up", leaver, min(disconnects, 200), 64, family),
        await run_phase("clients that leave", leaver, disconnects, 64, family),
        await run_phase("tiny requests", tiny, requests, 32, family),
    ]
    tiny.close()
    metrics = await idle_metrics(endpoint)
    return Result(command=command, phases=phases, metrics=metrics, after=family.sample())


def describe(result: Result) -> str:
    """The figures in lines for people."""
    lines = []
    for phase in result.phases:
        lines.append(f"{phase.name}: {phase.requests} in {phase.seconds} s; {dict(phase.outcomes)}")
        lines += [sample.line for sample in phase.samples]
    lines.append("in the end: " + ", ".join(f"{name} {value:g}" for name, value in result.metrics.items()))
    lines.append(result.after.line)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Soak a server.")
    parser.add_argument("--disconnects", type=int, default=10_000, help="clients that leave [default: %(default)s]")
    parser.add_argument("--requests", type=int, default=200_000, help="tiny requests [default: %(default)s]")
    parser.add_argument("--api-workers", type=int, default=1, help="of the server [default: %(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    server = own_server(
        *("--no-access-log", "--max-num-seqs", "32", "--kv-cache-memory", "64MB"),
        *("--api-workers", str(arguments.api_workers)),
    )
    checkpoint = Path(next(iter(demo.__path__)))
    with tempfile.TemporaryDirectory() as folder, running(server, checkpoint, Path(folder) / "log", 120) as started:
        result = uvloop.run(
            soak(
                started.endpoint,
                server.shown_command,
                started.process_id,
                arguments.disconnects,
                arguments.requests,
            )
        )
    print(describe(result))
    write_figures(arguments.out, asdict(result))
    left = result.metrics
    clean = left["kv_blocks_free"] == left["kv_blocks"] and left["open_streams"] == 0
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
