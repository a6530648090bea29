"""This server next to vLLM's CPU build: the same checkpoint, the same load, the two servers in turn.

    python -m benchmarks.peers --vllm VENV/bin/vllm --rounds 3 --streams 1 8 64 --out benchmarks/results/NAME.json

One server runs at a time, started afresh for every round; a warm-up comes before each measurement.  Prints medians
over the rounds and their ratios, and writes every figure as JSON with the machine's description.  Machines and
hours differ: compare each figure with the other server's from the same run, and look at how busy other processes
kept the machine meanwhile ("cores busy with other work").
"""

import argparse
import datetime
import json
import math
import os
import signal
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import uvloop

from benchmarks.checkpoint import DEMO, write_checkpoint
from benchmarks.machine import Rates, floor_tokens_per_s, measure_rates
from benchmarks.serve import Round, Workload, add_workload_arguments, describe, measure, warm_up
from benchmarks.servers import RunningServer, Server, ServerFailedError, running
from persimmon.model.checkpoint import expected_shapes
from persimmon.model.config import PersimmonConfig
from persimmon.server.bench.probe import served_model
from persimmon.server.bench.report import Report

OURS, VLLM = "ours", "vLLM"
LISTEN = ("--host", "127.0.0.1", "--port", "{port}")
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def our_server(environment: dict[str, str], limits: tuple[str, ...]) -> Server:
    """This project's server, run by this interpreter."""
    program = (sys.executable, "-m", "persimmon.server.cli", "serve")
    return Server(
        name=OURS,
        program=program,
        shown_program="persimmon serve",
        arguments=("--model", "{checkpoint}", *LISTEN, *limits),
        environment=environment,
    )


def vllm_server(command: Path, environment: dict[str, str], limits: tuple[str, ...]) -> Server:
    """Its CPU build through the Transformers fallback, the only way in which it still runs Persimmon."""
    arguments = ("{checkpoint}", "--model-impl", "transformers", *LISTEN, *limits)
    return Server(
        name=VLLM,
        program=(str(command), "serve"),
        shown_program="vllm serve",
        arguments=arguments,
        environment=VLLM_ENVIRONMENT | environment,
    )


@dataclass(frozen=True)
class Measurement:
    """One measured round of one server.

    Attributes:
        server: its name.
        round: counted from 1.
        start_s: seconds from its start to its first healthy answer.
        report: the client's figures.
        server_cores: cores that the server kept busy, on average.
        other_cores: cores that other processes kept busy; a figure from a busy machine says little.
    """

    server: str
    round: int
    start_s: float
    report: Report[Workload]
    server_cores: float
    other_cores: float

    @property
    def figures(self) -> dict[str, float]:
        """The figures of the table, by title."""
        figures = {"output tokens/s": self.report.output_tokens_per_s, "requests/s": self.report.requests_per_s}
        for title, distribution in {
            "TTFT": self.report.ttft_ms,
            "ITL": self.report.itl_ms,
            "whole answer": self.report.e2e_ms,
        }.items():
            if distribution is not None:
                figures |= {f"{title} median, ms": distribution.median, f"{title} p99, ms": distribution.p99}
        return figures | {
            "cores busy with serving": self.server_cores,
            "cores busy with other work": self.other_cores,
            "start to healthy, s": self.start_s,
        }


@dataclass(frozen=True)
class Agreement:
    """How many prompts of a round got the same text from both servers.

    Greedy float32 answers part where two tokens nearly tie, so a few may differ; most must not.
    """

    round: int
    streams: int
    prompts: int
    same_text: int


@dataclass(frozen=True)
class Summary:
    """One figure of one server at one number of streams, over the rounds."""

    streams: int
    figure: str
    server: str
    median: float
    least: float
    most: float

    def __str__(self) -> str:
        digits = 1 if self.median >= 10 else 2
        return f"{self.median:,.{digits}f} ({self.least:,.{digits}f}-{self.most:,.{digits}f})"


def measure_server(
    server: RunningServer, arguments: argparse.Namespace, round_number: int
) -> list[tuple[Measurement, Round]]:
    """Measures a running server at each number of streams.

    Raises:
        ServerFailedError: a request failed: a round with errors measures nothing.
    """
    measured = []
    for streams in arguments.streams:
        workload = workload_at(streams, arguments, round_number)
        model = uvloop.run(served_model(server.endpoint))
        uvloop.run(warm_up(server.endpoint, model, workload, arguments.timeout))
        server_before, machine_before = server.cpu_seconds(), _machine_cpu_seconds()
        result = uvloop.run(measure(server.endpoint, model, workload, arguments.timeout))
        server_cpu, machine_cpu = server.cpu_seconds() - server_before, _machine_cpu_seconds() - machine_before
        report = result.report
        if report.errors:
            raise ServerFailedError(f"{server.name} at {streams} streams: {report.errors}", server.log)
        print(f"\nround {round_number}, {server.name}:\n{describe(report)}", flush=True)
        server_cores = round(server_cpu / report.duration_s, 2)
        other_cores = round(max(0.0, machine_cpu - server_cpu - report.client_cpu_s) / report.duration_s, 2)
        measured.append(
            (
                Measurement(
                    server=server.name,
                    round=round_number,
                    start_s=server.start_s,
                    report=report,
                    server_cores=server_cores,
                    other_cores=other_cores,
                ),
                result,
            )
        )
    return measured


def _machine_cpu_seconds() -> float:
    """Processor time since boot of everything on this machine, and of what its host gave to other machines."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def workload_at(streams: int, arguments: argparse.Namespace, round_number: int) -> Workload:
    """The workload for a number of streams: fewer prompts where there are few, other prompts in every round."""
    return Workload(
        prompts=min(arguments.prompts, 8 * streams),
        streams=streams,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        prefix_len=arguments.prefix_len,
        token_ids=arguments.token_ids,
        seed=arguments.seed + round_number,
    )


def agreement(round_number: int, first: Round, second: Round) -> Agreement:
    """Compares the texts of two servers' answers to the same prompts."""
    pairs = list(zip(first.answers, second.answers, strict=True))
    same = sum(one is not None and other is not None and one.text == other.text for one, other in pairs)
    return Agreement(round=round_number, streams=first.report.workload.streams, prompts=len(pairs), same_text=same)


def summarize(measurements: list[Measurement]) -> list[Summary]:
    """Median, least and most of every figure, per number of streams and server, in the order measured."""
    samples: dict[tuple[int, str, str], list[float]] = {}
    for measured in measurements:
        for figure, value in measured.figures.items():
            samples.setdefault((measured.report.workload.streams, figure, measured.server), []).append(value)
    return [
        Summary(
            streams=streams,
            figure=figure,
            server=server,
            median=statistics.median(sample),
            least=min(sample),
            most=max(sample),
        )
        for (streams, figure, server), sample in samples.items()
    ]


def table(summaries: list[Summary]) -> str:
    """The summaries side by side, as Markdown, with the ratio of medians where both servers were measured."""
    rows: dict[tuple[int, str], dict[str, Summary]] = {}
    for summary in summaries:
        rows.setdefault((summary.streams, summary.figure), {})[summary.server] = summary
    lines = [f"| streams | median (least-most) | {OURS} | {VLLM} | ratio |", "| ---: | --- | ---: | ---: | ---: |"]
    for (streams, figure), by_server in rows.items():
        ours, theirs = by_server.get(OURS), by_server.get(VLLM)
        ratio = f"{ours.median / theirs.median:.2f}" if ours and theirs and theirs.median else ""
        lines.append(f"| {streams} | {figure} | {ours or ''} | {theirs or ''} | {ratio} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Floor:
    """What the machine's own rates allow at one number of streams, and what share of it a server reached.

    Attributes:
        streams: requests in flight.
        server: its name.
        tokens_per_s: output tokens a second that reading the weights and multiplying by them allow.
        share: of those, in the median round; above 1 where the weights fit into the processor's cache.
    """

    streams: int
    server: str
    tokens_per_s: float
    share: float

    def __str__(self) -> str:
        return (
            f"{self.server} at {self.streams} streams: {self.share:.0%} of the {self.tokens_per_s:,.0f} tokens/s "
            "that this machine's memory and multipliers allow"
        )


def best_of(rates: list[Rates]) -> Rates:
    """The best that was seen before and after the rounds."""
    return Rates(max(each.read_gb_s for each in rates), max(each.matmul_gflop_s for each in rates), rates[0].dtype)


def floors_of(
    summaries: list[Summary], config: PersimmonConfig, rates: Rates, arguments: argparse.Namespace
) -> list[Floor]:
    """The machine's floor next to each server's output tokens per second."""
    floors = []
    for summary in summaries:
        if summary.figure != "output tokens/s":
            continue
        most = floor_tokens_per_s(
            config,
            rates,
            weight_bytes=getattr(torch, arguments.dtype).itemsize,
            streams=summary.streams,
            # A shared beginning is computed once, which is next to nothing.
            input_len=sum(arguments.input_len) / 2,
            output_len=sum(arguments.output_len) / 2,
        )
        floors.append(
            Floor(
                streams=summary.streams,
                server=summary.server,
                tokens_per_s=round(most, 1),
                share=round(summary.median / most, 3),
            )
        )
    return floors


def compare(servers: list[Server], arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds, prints each as it ends and the table after the last.

    Returns:
        What the JSON file holds.

    Raises:
        ServerFailedError: a server did not start, or a request failed.
        OSError: a server's program cannot be started.
    """
    started = _now()
    measurements: list[Measurement] = []
    agreements: list[Agreement] = []
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="persimmon-peers-") as scratch:
        checkpoint = DEMO
        if arguments.checkpoint == "random":
            checkpoint = Path(scratch) / "checkpoint"
            write_checkpoint(checkpoint)
        config = PersimmonConfig.from_folder(checkpoint)
        rates = [measure_rates(getattr(torch, arguments.dtype))]
        for round_number in range(1, arguments.rounds + 1):
            by_server: list[list[Round]] = []
            for server in servers:
                log = Path(scratch) / f"{server.name}.log"
                with running(server, checkpoint, log, arguments.start_timeout) as live:
                    versions[server.name] = live.version
                    measured = measure_server(live, arguments, round_number)
                measurements += [measurement for measurement, _ in measured]
                by_server.append([result for _, result in measured])
            if len(by_server) == 2:
                agreements += [agreement(round_number, *both) for both in zip(*by_server, strict=True)]
        rates.append(measure_rates(getattr(torch, arguments.dtype)))
    summaries = summarize(measurements)
    print(f"\n{table(summaries)}")
    floors = floors_of(summaries, config, best_of(rates), arguments)
    for floor in floors:
        print(floor)
    if agreements:
        same, prompts = sum(each.same_text for each in agreements), sum(each.prompts for each in agreements)
        print(f"{same} of {prompts} answers are the same text from both")
    return {
        "started": started,
        "ended": _now(),
        "device": device(),
        "checkpoint": {
            "weights": arguments.checkpoint,
            "parameters": sum(math.prod(shape) for shape in expected_shapes(config).values()),
            "stored": config.dtype,
        },
        "machine": asdict(best_of(rates)),
        "floors": [asdict(floor) for floor in floors],
        "servers": {
            server.name: {"version": versions[server.name], "command": server.shown_command} for server in servers
        },
        "summary": [asdict(summary) for summary in summaries],
        "agreement": [asdict(each) for each in agreements],
        "measurements": [asdict(measurement) for measurement in measurements],
    }


def device() -> dict[str, Any]:
    """The machine, as far as it explains the figures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {
        "cpu": ", ".join(sorted(names)) or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": sys.version.split()[0],
        "torch": version("torch"),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _name_and_value(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="Measure this server and vLLM's CPU build in turn."
    )
    parser.add_argument(
        "--vllm",
        type=Path,
        metavar="FILE",
        help="vLLM's command, VENV/bin/vllm; without it, only this server is measured",
    )
    parser.add_argument("--vllm-only", action="store_true", help="measure only vLLM")
    for name, server in {"ours": "this server", "vllm": "vLLM"}.items():
        parser.add_argument(
            f"--{name}-env",
            type=_name_and_value,
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"an environment variable for {server}; may be given again",
        )
    parser.add_argument("--rounds", type=int, default=3, help="starts of each server [default: %(default)s]")
    parser.add_argument(
        "--streams",
        type=int,
        nargs="+",
        default=[64],
        metavar="N",
        help="requests in flight, measured one after the other; N streams get at most 8 N prompts [default: 64]",
    )
    add_workload_arguments(parser)
    parser.add_argument(
        "--checkpoint",
        choices=("random", "demo"),
        default="random",
        help="random: 33M parameters in float32, of benchmarks.checkpoint; demo: the one that comes with the server "
        "[default: %(default)s]",
    )
    parser.add_argument("--dtype", default="float32", help="of both servers [default: %(default)s]")
    parser.add_argument("--max-model-len", default="1024", help="of both servers [default: %(default)s]")
    parser.add_argument("--max-num-seqs", default="64", help="of both servers [default: %(default)s]")
    parser.add_argument(
        "--start-timeout", type=float, default=600.0, help="seconds to become healthy [default: %(default)s]"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    return parser


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.vllm_only and not arguments.vllm:
        parser.error("--vllm-only needs --vllm VENV/bin/vllm")
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}: expected at least 1")
    try:
        for streams in arguments.streams:
            workload_at(streams, arguments, round_number=0)
    except ValueError as error:
        parser.error(str(error))
    lengths = ("--max-model-len", arguments.max_model_len, "--max-num-seqs", arguments.max_num_seqs)
    limits = ("--dtype", arguments.dtype, *lengths)
    servers = [] if arguments.vllm_only else [our_server(dict(arguments.ours_env), limits)]
    if arguments.vllm:
        servers.append(vllm_server(arguments.vllm, dict(arguments.vllm_env), limits))
    # Like an interrupt, so that the server that is running is stopped, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        result = compare(servers, arguments)
    except (ServerFailedError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
