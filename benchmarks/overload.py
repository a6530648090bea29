"""Five times the load that a server can carry: does what is admitted keep its speed, and what does a refusal cost?

    python -m benchmarks.overload --seconds 60 --out FILE.json

Starts the server on the demo checkpoint, finds its peak in a closed loop, then sends requests in an open loop at some
multiple of that, whether earlier ones are answered or not.  Goodput is tokens of whole answers a second while the load
lasts.  The client shares the machine's cores with the server, unless --server-cores gives the server some of its own.
"""

import argparse
import asyncio
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop

from benchmarks.processes import Family, Sample, watch
from benchmarks.servers import Server, running
from model import demo
from server.bench.answer import Answer, RequestFailedError
from server.bench.http_client import Endpoint, Response
from server.bench.load import ClosedLoop, Exchange, Limits, OpenLoop, Run, drive
from server.bench.probe import served_model
from server.bench.report import read_exchanges
from server.bench.workload import RandomWorkload, Request, request

SETTLE_SECONDS = 5.0
"""What ends in the first seconds of a load was begun at another one, and is not counted."""


@dataclass(frozen=True)
class Figures:
    """One load.

    Attributes:
        offered_per_s: requests a second; None in a closed loop.
        seconds: counted.
        answered_per_s: whole answers a second.
        goodput_tokens_per_s: their tokens.
        refused: responses of 429.
        server_errors: responses of 5xx.
        other_failures: of any other kind, by it.
        refusal_ms: how long refusals took: median, 99th percentile and longest.
        ttft_ms: time to first token of whole answers: median and 99th percentile.
    """

    offered_per_s: float | None
    seconds: float
    answered_per_s: float
    goodput_tokens_per_s: float
    refused: int
    server_errors: int
    other_failures: Mapping[str, int]
    refusal_ms: tuple[float, float, float] | None
    ttft_ms: tuple[float, float] | None


def figures(run: Run, offered: float | None, seconds: float) -> Figures:
    """What came of a load that lasted so long.  Answers count where they ended while it lasted."""
    begin = min(exchange.outcome.started for exchange in run.exchanges if isinstance(exchange.outcome, Response))
    first, last = begin + SETTLE_SECONDS, begin + seconds
    results = list(zip(run.exchanges, read_exchanges(run.exchanges), strict=True))
    answers = [each for _, each in results if isinstance(each, Answer) and first <= each.finished <= last]
    statuses = Counter(status for exchange, _ in results if (status := _status(exchange)) is not None)
    refusals = [_took_ms(exchange.outcome) for exchange, _ in results if _status(exchange) == 429]
    failures = Counter(
        each.kind
        for exchange, each in results
        if isinstance(each, RequestFailedError) and (_status(exchange) or 0) not in range(400, 600)
    )
    counted = last - first
    return Figures(
        offered,
        round(counted, 2),
        round(len(answers) / counted, 2),
        round(sum(each.completion_tokens for each in answers) / counted, 1),
        statuses[429],
        sum(count for status, count in statuses.items() if status >= 500),
        dict(failures),
        None if not refusals else (_at(refusals, 0.5), _at(refusals, 0.99), _at(refusals, 1)),
        None if not answers else _first_tokens(answers),
    )


def _first_tokens(answers: Sequence[Answer]) -> tuple[float, float]:
    times = [1000 * each.time_to_first_token for each in answers if each.time_to_first_token is not None]
    return _at(times, 0.5), _at(times, 0.99)


def _status(exchange: Exchange) -> int | None:
    return exchange.outcome.status if isinstance(exchange.outcome, Response) else None


def _took_ms(outcome: Response | RequestFailedError) -> float:
    return 1000 * (outcome.finished - outcome.started) if isinstance(outcome, Response) else 0.0


def _at(values: Sequence[float], share: float) -> float:
    """The smallest value that so many of them do not exceed, to a hundredth."""
    ordered = sorted(values)
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 2)


@dataclass(frozen=True)
class Result:
    """A measurement.

    Attributes:
        command: how the server was started.
        peak: in a closed loop of twice as many streams as run at once.
        overload: in an open loop.
        memory: of all processes of the server, before, during and after the overload.
    """

    command: str
    peak: Figures
    overload: Figures
    memory: Sequence[Sample]

    @property
    def goodput_ratio(self) -> float:
        """Goodput under overload over the peak's."""
        return self.overload.goodput_tokens_per_s / self.peak.goodput_tokens_per_s


async def measure(
    endpoint: Endpoint, command: str, pid: int, workload: RandomWorkload, streams: int, factor: float, seconds: float
) -> Result:
    """Finds the peak and overloads the server.

    Args:
        endpoint: the server.
        command: how it was started.
        pid: of its first process.
        workload: what is asked.
        streams: sequences that run at once; at the peak twice as many requests are in flight.
        factor: the open loop's rate over the peak's.
        seconds: of each load.
    """
    model = await served_model(endpoint)

    def requests(seed: int) -> Iterator[Request]:
        return (request(model, prompt, ignore_eos=True) for prompt in workload.prompts(seed))

    await drive(endpoint, requests(1), ClosedLoop(streams), Limits(2 * streams))
    limits = Limits(duration_s=seconds)
    # As many again wait, so that no place stays empty for a moment.
    closed = figures(await drive(endpoint, requests(2), ClosedLoop(2 * streams), limits), None, seconds)
    rate = factor * closed.answered_per_s
    family, memory = Family(pid), list[Sample]()
    watching = asyncio.create_task(watch(family, seconds / 5, memory))
    opened = figures(await drive(endpoint, requests(3), OpenLoop(rate), limits), round(rate, 2), seconds)
    watching.cancel()
    memory.append(family.sample())
    return Result(command, closed, opened, memory)


def describe(result: Result) -> str:
    """The figures in lines for people."""
    rows = [f"{'':12}{'offered/s':>10}{'answers/s':>10}{'tokens/s':>10}{'TTFT p50':>10}{'p99, ms':>10}"]
    for name, each in (("peak", result.peak), ("overload", result.overload)):
        offered = "" if each.offered_per_s is None else f"{each.offered_per_s:.1f}"
        ttft = each.ttft_ms or (0.0, 0.0)
        rows.append(
            f"{name:12}{offered:>10}{each.answered_per_s:>10.1f}{each.goodput_tokens_per_s:>10.0f}"
            f"{ttft[0]:>10.0f}{ttft[1]:>10.0f}"
        )
    over = result.overload
    rows.append(f"goodput under overload: {100 * result.goodput_ratio:.1f}% of the peak")
    refusals = over.refusal_ms
    took = "" if refusals is None else f"; {refusals[0]} ms median, {refusals[1]} ms p99, {refusals[2]} ms the longest"
    rows.append(f"refused with 429: {over.refused}{took}")
    rows.append(f"5xx: {over.server_errors}; other failures: {dict(over.other_failures) or 0}")
    rows += [sample.line for sample in result.memory]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description="Overload a server.")
    parser.add_argument("--seconds", type=float, default=60, help="of each of the two loads [default: %(default)s]")
    parser.add_argument("--factor", type=float, default=5, help="rate over the peak's [default: %(default)s]")
    parser.add_argument("--streams", type=int, default=32, help="sequences that run at once [default: %(default)s]")
    parser.add_argument("--input-len", type=int, default=64, help="token ids of a prompt [default: %(default)s]")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of an answer [default: %(default)s]")
    parser.add_argument("--server-cores", metavar="LIST", help="cores for the server alone, as taskset has them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    taskset = () if arguments.server_cores is None else ("taskset", "-c", arguments.server_cores)
    limits = ("--max-num-seqs", str(arguments.streams))
    server = Server(
        "persimmon",
        (*taskset, sys.executable, "-m", "server.cli"),
        " ".join([*taskset, "persimmon"]),
        ("serve", "--model", "{checkpoint}", "--port", "{port}", "--no-access-log", *limits),
        {},
    )
    workload = RandomWorkload((arguments.input_len,) * 2, (arguments.output_len,) * 2, 0, token_ids=(300, 4000))
    checkpoint = Path(next(iter(demo.__path__)))
    with tempfile.TemporaryDirectory() as folder, running(server, checkpoint, Path(folder) / "log", 120) as started:
        result = uvloop.run(
            measure(
                started.endpoint,
                server.shown_command,
                started.process_id,
                workload,
                arguments.streams,
                arguments.factor,
                arguments.seconds,
            )
        )
    print(describe(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(asdict(result), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
