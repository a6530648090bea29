"""What Ray's proxy costs: one replica on Ray against `persimmon serve` with the same engine, in turns.

    python -m benchmarks.scale_out_ray --streams 32 --rounds 3 --out benchmarks/results/NAME.json

Both have one engine of one thread, so that on two cores the other one is left to all that is not the engine: API worker
or Ray's processes, and this client.  The network is random unless one is given, and nothing is guessed.  First tokens
are measured with one stream too, where nothing waits.  Needs the extra `ray`.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import uvloop

from benchmarks.checkpoint import write_checkpoint
from benchmarks.machine import device
from benchmarks.serve import Workload, measure_warm
from benchmarks.servers import RunningServer, Server, running
from persimmon.server.bench.report import Report
from persimmon.server.ray.application import MAX_CHUNKS_PER_SECOND

START_SECONDS = 180.0
PLAIN = "persimmon serve"
SETTINGS = {
    "kv_cache_memory": "512MB",
    "max_num_seqs": "64",
    "speculative_config": "off",
}
"""Of both engines."""

RAY_DEFAULTS = {
    "RAY_SERVE_PROXY_USE_GRPC": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "1",
}
"""Of the variables of `persimmon.server.ray.environment` that change what a chunk costs."""

PARTS = ("engine", "application", "proxy", "rest")
"""Of a server's processes: the application is the API worker, or a replica on Ray; the rest on Ray are raylet, GCS,
controller and agents."""


@dataclass(frozen=True)
class Measurement:
    """One server in one round.

    Attributes:
        server: its name.
        alone: with one stream.
        report: with all streams.
        cpu_ms_per_token: processor time of each of PARTS, with all streams.
    """

    server: str
    alone: Report[Workload]
    report: Report[Workload]
    cpu_ms_per_token: Mapping[str, float]


@dataclass(frozen=True)
class Figures:
    """A server, over all rounds: medians.

    Attributes:
        server: its name.
        ttft_ms: time to first token with one stream.
        tokens_per_s: with all streams.
        share: of what `persimmon serve` gives.
        chunks_per_token: with all streams.
        cpu_ms_per_token: of each of PARTS, with all streams.
    """

    server: str
    ttft_ms: float
    tokens_per_s: float
    share: float
    chunks_per_token: float
    cpu_ms_per_token: Mapping[str, float]


def contenders(max_chunks_per_second: float) -> Iterator[Server]:
    """The servers, in the order in which they run."""
    # The second is Ray's way to say that its processes listen on loopback.
    environment = {"OMP_NUM_THREADS": "1", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", value)]
    yield Server(
        name=PLAIN,
        program=(sys.executable, "-m", "persimmon.server.cli"),
        shown_program="persimmon",
        arguments=("serve", "--port", "{port}", "--model", "{checkpoint}", *flags),
        environment=environment,
    )
    for name, rate, variables in (
        (f"Ray, {max_chunks_per_second:g} chunks/s", max_chunks_per_second, {}),
        ("Ray, a chunk for each token", math.inf, {}),
        ("Ray with its defaults, a chunk for each token", math.inf, RAY_DEFAULTS),
    ):
        given = SETTINGS | {"model": "{checkpoint}", "num_replicas": "1", "max_chunks_per_second": f"{rate:g}"}
        yield Server(
            name=name,
            program=(sys.executable, "-m", "benchmarks.ray_server"),
            shown_program="python -m benchmarks.ray_server",
            arguments=("--port", "{port}", *(f"{name}={value}" for name, value in given.items())),
            environment=environment | variables,
        )


def measure(server: RunningServer, workload: Workload, alone: int) -> Measurement:
    """Measures a running server.

    Args:
        server: which.
        workload: with all streams.
        alone: requests with one stream.
    """
    first = uvloop.run(measure_warm(server.endpoint, None, replace(workload, streams=1, prompts=alone)))
    processes = _parts(server.process_id)
    busy = _cpu_seconds(processes)
    report = uvloop.run(measure_warm(server.endpoint, None, workload)).report
    taken = {part: seconds - busy[part] for part, seconds in _cpu_seconds(processes).items()}
    tokens = report.output_tokens + min(workload.prompts, 2 * workload.streams) * workload.output_len[0]
    return Measurement(
        server=server.name,
        alone=first.report,
        report=report,
        cpu_ms_per_token={part: round(seconds * 1e3 / tokens, 4) for part, seconds in taken.items()},
    )


def _parts(first: int) -> dict[psutil.Process, str]:
    """The processes of a server, and which of PARTS each is."""
    parent = psutil.Process(first)
    return {process: _part(process) for process in (parent, *parent.children(recursive=True))}


def _part(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    if command.startswith("ray::ServeReplica:"):
        return "application"
    if command.startswith("ray::ProxyActor"):
        return "proxy"
    if "spawn_main" not in command:
        return "rest"
    return "engine" if any("libtorch" in mapped.path for mapped in process.memory_maps()) else "application"


def _cpu_seconds(processes: Mapping[psutil.Process, str]) -> dict[str, float]:
    """Processor time of each of PARTS since the processes started."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for process, part in processes.items():
        times = process.cpu_times()
        seconds[part] += times.user + times.system
    return seconds


def summarize(measurements: Sequence[Measurement]) -> list[Figures]:
    """The medians over the rounds, in the order in which the servers ran."""
    rounds: dict[str, list[Measurement]] = {}
    for each in measurements:
        rounds.setdefault(each.server, []).append(each)
    plain = statistics.median(each.report.output_tokens_per_s for each in rounds[PLAIN])
    figures = []
    for server, own in rounds.items():
        speed = statistics.median(each.report.output_tokens_per_s for each in own)
        figures.append(
            Figures(
                server=server,
                ttft_ms=statistics.median(each.alone.ttft_ms.median for each in own if each.alone.ttft_ms),
                tokens_per_s=speed,
                share=round(speed / plain, 4),
                chunks_per_token=statistics.median(each.report.chunks_per_token for each in own),
                cpu_ms_per_token={
                    part: round(statistics.median(each.cpu_ms_per_token[part] for each in own), 4) for part in PARTS
                },
            )
        )
    return figures


def table(figures: Sequence[Figures]) -> str:
    """The figures for people."""
    head = "| server | TTFT alone, ms | tokens/s | share | chunks per token | processor time per token, ms: "
    rows = (
        f"| {own.server} | {own.ttft_ms:.1f} | {own.tokens_per_s:.0f} | {own.share:.0%} | {own.chunks_per_token:.2f} | "
        + " | ".join(f"{own.cpu_ms_per_token[part]:.3f}" for part in PARTS)
        + " |"
        for own in figures
    )
    return "\n".join([head + " | ".join(PARTS) + " |", "| --- " + "| ---: " * (4 + len(PARTS)) + "|", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale_out_ray", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="to serve [default: a random one]")
    parser.add_argument("--streams", type=int, default=32, help="at the same time [default: %(default)s]")
    parser.add_argument("--prompts", type=int, default=96, help="requests in all [default: %(default)s]")
    parser.add_argument("--alone", type=int, default=20, help="requests with one stream [default: %(default)s]")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of an answer [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="in which all run in turn [default: %(default)s]")
    parser.add_argument(
        "--max-chunks-per-second",
        type=float,
        default=MAX_CHUNKS_PER_SECOND,
        help="of the replica, in all streams [default: %(default)s]",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    measurements, commands = [], {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or Path(folder) / "checkpoint"
        if arguments.checkpoint is None:
            write_checkpoint(checkpoint)
        for number in range(arguments.rounds):
            for server in contenders(arguments.max_chunks_per_second):
                commands[server.name] = server.shown_command
                workload = Workload(
                    prompts=arguments.prompts,
                    streams=arguments.streams,
                    output_len=(arguments.output_len, arguments.output_len),
                    seed=number,
                )
                with running(server, checkpoint, Path(folder) / "log", START_SECONDS) as own:
                    measurements.append(measure(own, workload, arguments.alone))
    figures = summarize(measurements)
    print(table(figures))
    if arguments.out is not None:
        record: dict[str, Any] = {
            "device": device(),
            "ray": version("ray"),
            "commands": commands,
            "figures": [asdict(own) for own in figures],
            "rounds": [asdict(own) for own in measurements],
        }
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    return 1 if any(each.report.errors or each.alone.errors for each in measurements) else 0


if __name__ == "__main__":
    sys.exit(main())
