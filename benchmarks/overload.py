"""Five times the load that a server can carry: does what is admitted keep its speed, and what does a refusal cost?

    python -m benchmarks.overload --seconds 60 --out FILE.json

Starts the server on the demo or a random checkpoint, finds its peak in a closed loop, then sends requests in an open
loop at some multiple of that, whether earlier ones are answered or not.  Goodput is tokens of whole answers a second
while the load lasts.  The client shares the machine's cores with the server, unless --server-cores gives the server
some of its own and the client is started on others; so the figures say which cores each had, and what it took of them.
"""

import argparse
import asyncio
import contextlib
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import uvloop

from benchmarks.checkpoint import checkpoint_named
from benchmarks.machine import write_figures
from benchmarks.processes import Family, Sample, watch
from benchmarks.serve import spread_around
from benchmarks.servers import RunningServer, own_server, running
from persimmon.server.bench.answer import Answer, RequestFailedError
from persimmon.server.bench.http_client import Response
from persimmon.server.bench.load import ClosedLoop, Exchange, Limits, Load, OpenLoop, Run, drive
from persimmon.server.bench.probe import served_model
from persimmon.server.bench.report import read_exchanges
from persimmon.server.bench.workload import RandomWorkload, Request, request

SETTLE_SECONDS = 5.0
"""What ends in the first seconds of a load was begun at another one, and is not counted."""

CLIENT = "client"
"""This process, among those that take processor time."""


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
        busy_cores: by process, seconds of processor time that it took in a second of the whole load.
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
    busy_cores: Mapping[str, float]


def figures(run: Run, offered: float | None, seconds: float, server_cpu_s: Mapping[str, float]) -> Figures:
    """The results of a load that lasted `seconds`. Answers count if they ended within that time.

    Args:
        run: as it was driven.
        offered: requests a second; None in a closed loop.
        seconds: that requests were sent for.
        server_cpu_s: processor time of the server's processes in the run.
    """
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
    cpu_s = {CLIENT: run.client_cpu_s, **server_cpu_s}
    return Figures(
        offered_per_s=offered,
        seconds=round(counted, 2),
        answered_per_s=round(len(answers) / counted, 2),
        goodput_tokens_per_s=round(sum(each.completion_tokens for each in answers) / counted, 1),
        refused=statuses[429],
        server_errors=sum(count for status, count in statuses.items() if status >= 500),
        other_failures=dict(failures),
        refusal_ms=None if not refusals else (_at(refusals, 0.5), _at(refusals, 0.99), _at(refusals, 1)),
        ttft_ms=None if not answers else _first_tokens(answers),
        busy_cores={name: round(each / run.duration_s, 3) for name, each in cpu_s.items()},
    )


def _first_tokens(answers: Sequence[Answer]) -> tuple[float, float]:
    times = [1000 * each.time_to_first_token for each in answers if each.time_to_first_token is not None]
    return _at(times, 0.5), _at(times, 0.99)


def _status(exchange: Exchange) -> int | None:
    return exchange.outcome.status if isinstance(exchange.outcome, Response) else None


def _took_ms(outcome: Response | RequestFailedError) -> float:
    return 1000 * (outcome.finished - outcome.started) if isinstance(outcome, Response) else 0.0


def _at(values: Sequence[float], share: float) -> float:
    """The smallest value that this share of them does not exceed, rounded to hundredths."""
    ordered = sorted(values)
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 2)


@dataclass(frozen=True)
class Cores:
    """Where processes may run, as the system numbers cores.

    Attributes:
        client: this process.
        server: all of the server's.
    """

    client: Sequence[int]
    server: Sequence[int]

    @property
    def count(self) -> int:
        """Of both together."""
        return len({*self.client, *self.server})

    def __str__(self) -> str:
        if set(self.client) & set(self.server):
            return f"client and server share cores: {_listed(self.client)} and {_listed(self.server)}"
        return f"the server has cores of its own, {_listed(self.server)}; the client has {_listed(self.client)}"


def _listed(cores: Sequence[int]) -> str:
    return ",".join(map(str, cores))


@dataclass(frozen=True)
class Result:
    """A measurement.

    Attributes:
        command: how the server was started.
        cores: where client and server ran.
        peak: in a closed loop of twice as many streams as run at once.
        overload: in an open loop.
        memory: of all processes of the server, before, during and after the overload.
    """

    command: str
    cores: Cores
    peak: Figures
    overload: Figures
    memory: Sequence[Sample]

    @property
    def goodput_ratio(self) -> float:
        """Goodput under overload over the peak's."""
        return self.overload.goodput_tokens_per_s / self.peak.goodput_tokens_per_s

    def client_share(self, load: Figures) -> float:
        """How much of the time of all cores the client took in one of the loads, from 0 to 1."""
        return load.busy_cores[CLIENT] / self.cores.count


async def measure(
    server: RunningServer, command: str, workload: RandomWorkload, streams: int, factor: float, seconds: float
) -> Result:
    """Finds the peak and overloads the server.

    Args:
        server: which serves.
        command: how it was started.
        workload: what is asked.
        streams: sequences that run at once; at the peak twice as many requests are in flight.
        factor: the open loop's rate over the peak's.
        seconds: of each load.
    """
    model = await served_model(server.endpoint)
    family, memory = Family(server.process_id), list[Sample]()

    def requests(seed: int) -> Iterator[Request]:
        return (request(model, prompt, ignore_eos=True) for prompt in workload.prompts(seed))

    async def loaded(seed: int, load: Load, offered: float | None) -> Figures:
        before = family.sample()
        run = await drive(server.endpoint, requests(seed), load, Limits(duration_s=seconds))
        after = family.sample()
        server_cpu_s = {name: held.cpu_s - before.held[name].cpu_s for name, held in after.held.items()}
        return figures(run, offered, seconds, server_cpu_s)

    await drive(server.endpoint, requests(1), ClosedLoop(streams), Limits(2 * streams))
    # As many again wait, so that no place stays empty for a moment.
    closed = await loaded(2, ClosedLoop(2 * streams), None)
    rate = factor * closed.answered_per_s
    if not rate:
        sys.exit(f"no request was answered in {seconds:g} s of the load before: give a larger --seconds")
    watching = asyncio.create_task(watch(family, seconds / 5, memory))
    opened = await loaded(3, OpenLoop(rate), round(rate, 2))
    watching.cancel()
    memory.append(family.sample())
    return Result(command=command, cores=_cores(server.process_id), peak=closed, overload=opened, memory=memory)


def _cores(server: int) -> Cores:
    return Cores(*(tuple(psutil.Process(each).cpu_affinity()) for each in (None, server)))


def describe(result: Result) -> str:
    """The figures in lines for people."""
    rows = [f"{'':12}{'offered/s':>10}{'answers/s':>10}{'tokens/s':>10}{'TTFT p50':>10}{'p99, ms':>10}"]
    loads = {"peak": result.peak, "overload": result.overload}
    for name, each in loads.items():
        offered = "" if each.offered_per_s is None else f"{each.offered_per_s:.1f}"
        ttft = each.ttft_ms or (0.0, 0.0)
        rows.append(
            f"{name:12}{offered:>10}{each.answered_per_s:>10.1f}{each.goodput_tokens_per_s:>10.0f}"
            f"{ttft[0]:>10.0f}{ttft[1]:>10.0f}"
        )
    over = result.overload
    rows.append(f"goodput under overload: {100 * result.goodput_ratio:.1f}% of the peak")
    rows.append(str(result.cores))
    for name, each in loads.items():
        taken = ", ".join(f"{process} {busy:.2f}" for process, busy in each.busy_cores.items())
        rows.append(f"cores busy, {name}: {taken}; the client's are {result.client_share(each):.0%} of all")
    refusals = over.refusal_ms
    took = "" if refusals is None else f"; {refusals[0]} ms median, {refusals[1]} ms p99, {refusals[2]} ms the longest"
    rows.append(f"refused with 429: {over.refused}{took}")
    rows.append(f"5xx: {over.server_errors}; other failures: {dict(over.other_failures) or 0}")
    rows += [sample.line for sample in result.memory]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description="Overload a server.")
    parser.add_argument(
        "--checkpoint",
        choices=("demo", "random"),
        default="demo",
        help="demo: the one that comes with the server, which answers faster than anything that people use; random: "
        "33M parameters, of benchmarks.checkpoint [default: %(default)s]",
    )
    parser.add_argument("--seconds", type=float, default=60, help="of each of the two loads [default: %(default)s]")
    parser.add_argument("--factor", type=float, default=5, help="rate over the peak's [default: %(default)s]")
    parser.add_argument("--streams", type=int, default=32, help="sequences that run at once [default: %(default)s]")
    parser.add_argument("--input-len", type=int, default=64, help="token ids of a prompt [default: %(default)s]")
    parser.add_argument("--output-len", type=int, default=64, help="of an answer, on average [default: %(default)s]")
    parser.add_argument(
        "--server-cores",
        metavar="LIST",
        help="the server's, as taskset has them; start this program on others: taskset -c LIST",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    taskset = () if arguments.server_cores is None else ("taskset", "-c", arguments.server_cores)
    server = own_server("--no-access-log", "--max-num-seqs", str(arguments.streams), before=taskset)
    lengths = spread_around(arguments.output_len)
    workload = RandomWorkload((arguments.input_len,) * 2, lengths, 0, token_ids=(300, 4000))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = checkpoint_named(arguments.checkpoint, folder / "checkpoint")
        started = stack.enter_context(running(server, checkpoint, folder / "log", 120))
        result = uvloop.run(
            measure(
                started,
                server.shown_command,
                workload,
                arguments.streams,
                arguments.factor,
                arguments.seconds,
            )
        )
    print(describe(result))
    write_figures(arguments.out, asdict(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
