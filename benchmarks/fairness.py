"""What one key's flood does to another key: the latency of four tokens while 2,048 long answers run and wait.

    python -m benchmarks.fairness --out benchmarks/results/NAME.json

Starts the server on the demo with two keys.  One sends a single request for 2,048 answers, over and over; the other
asks for four tokens, one request after the other.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import uvloop

from benchmarks.checkpoint import DEMO
from benchmarks.machine import write_figures
from benchmarks.servers import RunningServer, own_server, read_metrics, running
from persimmon.server.bench.http_client import Connection
from persimmon.server.bench.report import Distribution

COMPLETIONS = "/v1/completions"
WAITING = "requests_waiting"


@dataclass(frozen=True)
class Result:
    """A measurement.

    Attributes:
        command: how the server was started.
        sequences: that the flood asks for at a time.
        flood_tokens: of each of its answers.
        tokens: of each of the other key's answers.
        alone_ms: how long those took before the flood.
        beside_ms: how long they took while it lasted.
        failures: statuses other than 200 that the other key got.
    """

    command: str
    sequences: int
    flood_tokens: int
    tokens: int
    alone_ms: Distribution
    beside_ms: Distribution
    failures: Sequence[int]


def completion(prompts: Sequence[Sequence[int]], tokens: int) -> bytes:
    """A request for answers of this length."""
    return json.dumps({"prompt": prompts, "max_tokens": tokens, "ignore_eos": True}).encode()


async def measure(
    server: RunningServer, command: str, sequences: int, flood_tokens: int, tokens: int, requests: int
) -> Result:
    """Measures the other key without and with the flood."""
    failures: list[int] = []

    async def latencies() -> Distribution:
        taken = []
        async with Connection(replace(server.endpoint, api_key="small")) as connection:
            for number in range(requests):
                response = await connection.post(COMPLETIONS, completion([[300 + number % 1000, 400, 500]], tokens))
                taken.append(response.finished - response.started)
                if response.status != 200:
                    failures.append(response.status)
        distribution = Distribution.of(taken)
        if distribution is None:
            raise ValueError("nothing was asked")
        return distribution

    async def flood() -> None:
        prompts = [[300 + number, 301, 302, 303] for number in range(sequences)]
        async with Connection(replace(server.endpoint, api_key="flood")) as connection:
            while True:
                await connection.post(COMPLETIONS, completion(prompts, flood_tokens))

    alone = await latencies()
    flooding = asyncio.create_task(flood())
    await _until_full(server)
    beside = await latencies()
    flooding.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await flooding
    return Result(
        command=command,
        sequences=sequences,
        flood_tokens=flood_tokens,
        tokens=tokens,
        alone_ms=alone,
        beside_ms=beside,
        failures=failures,
    )


async def _until_full(server: RunningServer) -> None:
    """Returns when sequences wait in the engine."""
    async with asyncio.timeout(60), Connection(server.endpoint) as connection:
        while not (await read_metrics(connection, WAITING))[WAITING]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def describe(result: Result) -> str:
    """The figures in lines for people."""
    alone, beside = result.alone_ms, result.beside_ms
    return "\n".join(
        [
            f"{result.tokens} tokens for one key, alone: {alone.median:.1f} ms median, {alone.p99:.1f} ms p99",
            f"while another key has {result.sequences} answers of {result.flood_tokens} tokens in the server: "
            f"{beside.median:.1f} ms median, {beside.p99:.1f} ms p99, {beside.max:.1f} ms the longest",
            f"failures: {list(result.failures) or 'none'}",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description="Flood a server with one key.")
    parser.add_argument("--sequences", type=int, default=2048, help="of the flood [default: %(default)s]")
    parser.add_argument("--flood-tokens", type=int, default=500, help="of each [default: %(default)s]")
    parser.add_argument("--tokens", type=int, default=4, help="of the other key's answers [default: %(default)s]")
    parser.add_argument("--requests", type=int, default=100, help="of the other key [default: %(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keys = folder / "keys"
        keys.write_text("flood:flood\nsmall:small\n")
        server = own_server("--no-access-log", "--api-key-file", str(keys))
        started = stack.enter_context(running(server, DEMO, folder / "log", 120))
        shown = server.shown_command.replace(str(keys), "KEYS")
        result = uvloop.run(
            measure(started, shown, arguments.sequences, arguments.flood_tokens, arguments.tokens, arguments.requests)
        )
    print(describe(result))
    write_figures(arguments.out, asdict(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
