"""What several engines behind one server bring, and what they cost.

    python -m benchmarks.scale_out hits router engines --out FILE.json

hits: the share of prompts found in prefix caches, by one engine and by several with the same memory in all; without a
model (see `routed_conversations`).  router: the time in which a prompt's engine is chosen.  engines: real servers of
one engine and of several, each engine with one thread, in turn; no more engines than there are cores.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.checkpoint import checkpoint_named
from benchmarks.machine import write_figures
from benchmarks.routed_conversations import BLOCK_SIZE, Conversations, run
from benchmarks.serve import spread_around
from benchmarks.servers import RunningServer, Server, own_server, read_metrics, running
from persimmon.model.cores import usable_cores
from persimmon.server.bench.http_client import Connection, Response
from persimmon.server.bench.load import ClosedLoop, Limits, drive
from persimmon.server.bench.probe import served_model
from persimmon.server.bench.workload import RandomWorkload, request
from persimmon.server.engine.blocks import block_hashes
from persimmon.server.engine.load import Load
from persimmon.server.engine.routing import Router, tokens_to_compute
from persimmon.server.vitals import Vitals

PROMPT_LENGTHS = (64, 256, 512, 1024, 4096)
KNOWN_BLOCKS = 50_000
"""Blocks of other prompts that each engine has cached while the router is measured."""

GENERATED = "generated_tokens_total"
REPEATS = 15
"""Of each measurement of the router, of which the shortest counts: the longer ones lost the caches to others."""


@dataclass(frozen=True)
class HitsOfEngines:
    """How much of the conversations' prompts was cached.

    Attributes:
        engines: how many there were.
        share: of all prompt tokens, with the router.
        of_one_engine: the same, over that of one engine with the memory of all.
        round_robin_share: of all prompt tokens, when engines get prompts in turn.
        over_round_robin: `share` over that.
        requests: prompts that each engine got from the router.
    """

    engines: int
    share: float
    of_one_engine: float
    round_robin_share: float
    over_round_robin: float
    requests: Sequence[int]


def measure_hits(arguments: argparse.Namespace) -> dict[str, Any]:
    asked = Conversations(count=arguments.conversations, turns=arguments.turns)
    num_blocks = round(arguments.memory * asked.final_blocks)
    alone = run(asked, 1, num_blocks)
    results = []
    for engines in arguments.engines:
        routed, in_turn = (run(asked, engines, num_blocks, round_robin=round_robin) for round_robin in (False, True))
        results.append(
            HitsOfEngines(
                engines=engines,
                share=round(routed.share, 4),
                of_one_engine=round(routed.cached_tokens / alone.cached_tokens, 4),
                round_robin_share=round(in_turn.share, 4),
                over_round_robin=round(routed.cached_tokens / max(1, in_turn.cached_tokens), 2),
                requests=routed.requests,
            )
        )
    return {
        "conversations": asdict(asked),
        "blocks of all engines": num_blocks,
        "blocks of all conversations": asked.final_blocks,
        "share of one engine": round(alone.share, 4),
        "engines": [asdict(result) for result in results],
    }


@dataclass(frozen=True)
class RouterCost:
    """Microseconds to choose an engine: to read all loads, look the prompt up, and remember it until its end.

    Attributes:
        engines: how many there are.
        prompt_tokens: of the prompt.
        miss_us: when no engine has its first block.
        hit_us: when all engines have all of it.
        follow_us: when no engine has its first block, but an equal prompt is on its way.
    """

    engines: int
    prompt_tokens: int
    miss_us: float
    hit_us: float
    follow_us: float


def measure_router(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    return [asdict(_router_cost(engines, length)) for engines in arguments.engines for length in PROMPT_LENGTHS]


def _router_cost(engines: int, length: int) -> RouterCost:
    load = Load(Vitals.private(2, engines=engines))
    router = Router(engines, BLOCK_SIZE)
    known, unknown, coming = ([first, *range(1, length)] for first in (0, -1, -2))
    for engine in range(engines):
        router.change(engine, (number.to_bytes(32, "little") for number in range(KNOWN_BLOCKS)), [])
        router.change(engine, block_hashes(known, BLOCK_SIZE), [])
    router.begin(router.route(coming, dict.fromkeys(range(engines), 0)))

    def choose(token_ids: list[int]) -> Callable[[], None]:
        def chosen() -> None:
            loads = {}
            for engine in range(engines):
                own = load.of_engine(engine)
                loads[engine] = tokens_to_compute(own.prompt_tokens, own.sequences)
            route = router.route(token_ids, loads)
            router.begin(route)
            router.end(route)

        return chosen

    return RouterCost(engines, length, *(_microseconds(choose(each)) for each in (unknown, known, coming)))


def _microseconds(work: Callable[[], None]) -> float:
    number = 500
    return round(min(timeit.repeat(work, timer=time.thread_time, number=number, repeat=REPEATS)) / number * 1e6, 2)


@dataclass(frozen=True)
class Throughput:
    """Of a server.

    Attributes:
        engines: how many it had.
        command: how it was started.
        tokens_per_s: of each round.
        requests_failed: of all rounds.
    """

    engines: int
    command: str
    tokens_per_s: Sequence[float]
    requests_failed: int

    @property
    def median(self) -> float:
        """Tokens a second."""
        return statistics.median(self.tokens_per_s)


def measure_engines(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = checkpoint_named(arguments.checkpoint, folder / "checkpoint")
        counts = [count for count in arguments.engines if count <= usable_cores()]
        servers = {count: _server(count, arguments.streams) for count in (1, *counts)}
        tokens: Mapping[int, list[float]] = {count: [] for count in servers}
        failed = dict.fromkeys(servers, 0)
        for number in range(arguments.rounds):
            for count, server in servers.items():
                with running(server, checkpoint, folder / "log", 300) as started:
                    rate, failures = uvloop.run(_throughput(started, number, arguments))
                tokens[count].append(rate)
                failed[count] += failures
    results = [
        Throughput(engines=count, command=each.shown_command, tokens_per_s=tokens[count], requests_failed=failed[count])
        for count, each in servers.items()
    ]
    alone = results[0].median
    return {
        "checkpoint": arguments.checkpoint,
        "streams": arguments.streams,
        "seconds": arguments.seconds,
        "servers": [asdict(each) | {"over one engine": round(each.median / alone, 3)} for each in results],
    }


def _server(engines: int, streams: int) -> Server:
    return own_server(
        *("--no-access-log", "--max-num-seqs", str(streams), "--speculative-config", "off"),
        *("--data-parallel-size", str(engines)),
        name=f"persimmon with {engines} engines" if engines > 1 else "persimmon",
        environment={"OMP_NUM_THREADS": "1"},
    )


async def _throughput(server: RunningServer, seed: int, arguments: argparse.Namespace) -> tuple[float, int]:
    """Tokens that the engines generate in a second, and how many requests failed."""
    async with asyncio.timeout(300), Connection(server.endpoint) as connection:
        while json.loads((await connection.get("/health")).body)["status"] != "ready":  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    model = await served_model(server.endpoint)
    lengths = spread_around(arguments.output_len)
    workload = RandomWorkload((arguments.input_len,) * 2, lengths, token_ids=(300, 4000))
    requests = (request(model, prompt, ignore_eos=True) for prompt in workload.prompts(seed))
    limits = Limits(duration_s=arguments.settle + arguments.seconds)
    driving = asyncio.create_task(drive(server.endpoint, requests, ClosedLoop(arguments.streams), limits))
    await asyncio.sleep(arguments.settle)
    first, began = await _generated(server), time.perf_counter()
    await asyncio.sleep(arguments.seconds)
    last, ended = await _generated(server), time.perf_counter()
    exchanges = (await driving).exchanges
    answered = sum(isinstance(each.outcome, Response) and each.outcome.status == 200 for each in exchanges)
    return round((last - first) / (ended - began), 1), len(exchanges) - answered


async def _generated(server: RunningServer) -> float:
    """Tokens that all engines of a server have generated."""
    async with Connection(server.endpoint) as connection:
        return (await read_metrics(connection, GENERATED))[GENERATED]


PARTS: Mapping[str, Callable[[argparse.Namespace], Any]] = {
    "hits": measure_hits,
    "router": measure_router,
    "engines": measure_engines,
}


def describe(measured: Mapping[str, Any]) -> str:
    """The figures in lines for people."""
    lines = []
    if "hits" in measured:
        hits = measured["hits"]
        lines.append(f"prompt tokens cached: one engine {hits['share of one engine']:.1%}")
        lines += [
            f"  {each['engines']} engines {each['share']:.1%}, {each['of_one_engine']:.1%} of one engine's; "
            f"round robin {each['round_robin_share']:.1%}, so {each['over_round_robin']:.2f} times as many; "
            f"requests {each['requests']}"
            for each in hits["engines"]
        ]
    if "router" in measured:
        lines.append(f"{'engines':>8}{'prompt':>8}{'miss, us':>10}{'hit, us':>10}{'follow, us':>12}")
        lines += [
            f"{each['engines']:>8}{each['prompt_tokens']:>8}{each['miss_us']:>10.1f}{each['hit_us']:>10.1f}"
            f"{each['follow_us']:>12.1f}"
            for each in measured["router"]
        ]
    if "engines" in measured:
        lines += [
            f"{each['engines']} engines: {', '.join(f'{rate:.0f}' for rate in each['tokens_per_s'])} tokens/s, "
            f"{each['over one engine']:.2f} times one engine; {each['requests_failed']} requests failed"
            for each in measured["engines"]["servers"]
        ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale_out", description="Measure several engines behind one server."
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, help="what to measure")
    parser.add_argument(
        "--engines", type=int, nargs="+", default=[2, 4], help="numbers of engines to compare [default: 2 4]"
    )
    parser.add_argument("--conversations", type=int, default=64, help="at a time [default: %(default)s]")
    parser.add_argument("--turns", type=int, default=8, help="of a conversation [default: %(default)s]")
    parser.add_argument(
        "--memory",
        type=float,
        default=1.0,
        help="KV cache of all engines together, over what all conversations take at their ends [default: %(default)s]",
    )
    parser.add_argument("--checkpoint", choices=("demo", "random", "random-1b"), default="random", help="for engines")
    parser.add_argument("--streams", type=int, default=64, help="for engines [default: %(default)s]")
    parser.add_argument("--input-len", type=int, default=64, help="token ids of a prompt [default: %(default)s]")
    parser.add_argument("--output-len", type=int, default=64, help="of an answer, on average [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="of all servers in turn [default: %(default)s]")
    parser.add_argument("--settle", type=float, default=10, help="seconds of a load before [default: %(default)s]")
    parser.add_argument("--seconds", type=float, default=30, help="of a load that count [default: %(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    measured = {part: PARTS[part](arguments) for part in arguments.parts}
    print(describe(measured))
    write_figures(arguments.out, measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
