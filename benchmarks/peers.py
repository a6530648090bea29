"""This server next to vLLM's CPU build and OpenVINO GenAI: the same checkpoint, precision and load, all in turn.

    python -m benchmarks.peers --vllm VENV/bin/vllm --rounds 3 --streams 1 8 64 --out benchmarks/results/NAME.json
    python -m benchmarks.peers --openvino VENV/bin/python --openvino-server SCRIPT --precision int8 --instructions avx2

One server runs at a time, started afresh for every round; a warm-up comes before each measurement.  Prints medians
over the rounds and their ratios, and writes every figure as JSON with the machine's description.  Machines and
hours differ: compare each figure with the other server's from the same run, and look at how busy other processes
kept the machine meanwhile ("cores busy with other work").  Processor time per token suffers less from them.
"""

import argparse
import datetime
import json
import math
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
import uvloop

from benchmarks.checkpoint import RANDOM, checkpoint_named
from benchmarks.instruction_sets import INSTRUCTION_SETS
from benchmarks.machine import device, measure_rates
from benchmarks.peer_figures import (
    Agreement,
    Measurement,
    agreement,
    best_of,
    comparisons,
    floors_of,
    summarize,
    table,
)
from benchmarks.peer_servers import (
    NO_GUESSES,
    OPENVINO,
    OURS,
    PRECISIONS,
    QUANTIZED,
    VLLM,
    Contender,
    Field,
    Installed,
    Limits,
)
from benchmarks.serve import Round, Workload, add_workload_arguments, describe, measure, warm_up
from benchmarks.servers import RunningServer, ServerFailedError, running
from persimmon.model.checkpoint import expected_shapes
from persimmon.model.config import PersimmonConfig
from persimmon.server.bench.probe import served_model

SEED_STEP = 1009
"""Between the seeds of neighbouring numbers of streams: more than the rounds of a comparison."""


def measure_server(
    server: RunningServer, arguments: argparse.Namespace, round_number: int
) -> list[tuple[Measurement, Round]]:
    """Measures a running server at each number of streams.

    Raises:
        ServerFailedError: a request failed: a round with errors measures nothing.
    """
    return [
        measure_workload(server, workload_at(streams, arguments, round_number), arguments.timeout, round_number)
        for streams in arguments.streams
    ]


def measure_workload(
    server: RunningServer, workload: Workload, timeout_s: float, round_number: int
) -> tuple[Measurement, Round]:
    """Warms a running server up and measures one workload.

    Raises:
        ServerFailedError: a request failed.
    """
    model = uvloop.run(served_model(server.endpoint))
    uvloop.run(warm_up(server.endpoint, model, workload, timeout_s))
    server_before, machine_before = server.cpu_seconds(), _machine_cpu_seconds()
    result = uvloop.run(measure(server.endpoint, model, workload, timeout_s))
    server_cpu, machine_cpu = server.cpu_seconds() - server_before, _machine_cpu_seconds() - machine_before
    report = result.report
    if report.errors:
        raise ServerFailedError(f"{server.name} at {workload.streams} streams: {report.errors}", server.log)
    print(f"\nround {round_number}, {server.name}:\n{describe(report)}", flush=True)
    measured = Measurement(
        server=server.name,
        round=round_number,
        start_s=server.start_s,
        report=report,
        server_cores=round(server_cpu / report.duration_s, 2),
        other_cores=round(max(0.0, machine_cpu - server_cpu - report.client_cpu_s) / report.duration_s, 2),
    )
    return measured, result


def _machine_cpu_seconds() -> float:
    """Processor time since boot of everything on this machine, and of what its host gave to other machines."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def workload_at(streams: int, arguments: argparse.Namespace, round_number: int) -> Workload:
    """The workload for a number of streams: fewer prompts where there are few, other prompts in every workload.

    What a server has computed for one number of streams must not be in its prefix cache for the next.
    """
    return Workload(
        prompts=min(arguments.prompts, 8 * streams),
        streams=streams,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        prefix_len=arguments.prefix_len,
        token_ids=arguments.token_ids,
        seed=arguments.seed + round_number + SEED_STEP * streams,
    )


def compare(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Runs all rounds, prints each as it ends and the table after the last.

    Args:
        arguments: of the command line.
        scratch: an existing folder for checkpoints, exports and logs.

    Returns:
        What the JSON file holds.

    Raises:
        ServerFailedError: a server did not start, or a request failed.
        LookupError: no build of the C kernels is within the asked instructions.
        OSError: a server's program cannot be started.
        subprocess.CalledProcessError: a checkpoint could not be exported.
    """
    started = now()
    checkpoint = checkpoint_named(arguments.checkpoint, scratch / arguments.checkpoint)
    config = PersimmonConfig.from_folder(checkpoint)
    contenders = contenders_of(arguments, checkpoint, scratch)
    measurements: list[Measurement] = []
    agreements: list[Agreement] = []
    versions: dict[str, str] = {}
    # Activations of 8-bit and 4-bit weights are float32, too.
    dtype = torch.float32 if arguments.precision[0] in QUANTIZED else getattr(torch, arguments.precision[0])
    level = INSTRUCTION_SETS[arguments.instructions]
    build = None if arguments.instructions == "native" else level.build
    rates = [measure_rates(dtype, build)]
    for round_number in range(1, arguments.rounds + 1):
        rounds: dict[str, list[Round]] = {}
        for contender in contenders:
            log = scratch / f"{contender.name}.log"
            with running(contender.server, contender.checkpoint, log, arguments.start_timeout) as live:
                versions[contender.name] = contender.version or live.version
                measured = measure_server(live, arguments, round_number)
            measurements += [measurement for measurement, _ in measured]
            rounds[contender.name] = [result for _, result in measured]
        for own, other in comparisons(contenders):
            agreements += [
                agreement(other, round_number, *both) for both in zip(rounds[own], rounds[other], strict=True)
            ]
    rates.append(measure_rates(dtype, build))
    summaries = summarize(measurements)
    print(f"\n{table(summaries, comparisons(contenders))}")
    floors = floors_of(
        summaries=summaries,
        contenders=contenders,
        config=config,
        rates=best_of(rates),
        arguments=arguments,
    )
    for floor in floors:
        print(floor)
    for name in dict.fromkeys(each.server for each in agreements):
        own_agreements = [each for each in agreements if each.server == name]
        same, prompts = (sum(getattr(each, what) for each in own_agreements) for what in ("same_text", "prompts"))
        print(f"{same} of {prompts} answers are the same text from {name}")
    return {
        "started": started,
        "ended": now(),
        "device": device(),
        "checkpoint": {
            "weights": arguments.checkpoint,
            "parameters": sum(math.prod(shape) for shape in expected_shapes(config).values()),
            "stored": config.dtype,
        },
        "machine": asdict(best_of(rates)),
        "floors": [asdict(floor) for floor in floors],
        "servers": {
            contender.name: {
                "version": versions[contender.name],
                "command": contender.server.shown_command,
                "precision": contender.precision,
                "instructions": contender.instructions,
            }
            for contender in contenders
        },
        "summary": [asdict(summary) for summary in summaries],
        "agreement": [asdict(each) for each in agreements],
        "measurements": [asdict(measurement) for measurement in measurements],
    }


def contenders_of(arguments: argparse.Namespace, checkpoint: Path, scratch: Path) -> list[Contender]:
    """The servers that the command line asks for, in the order in which they are measured.

    Raises:
        LookupError: no build of the C kernels is within the asked instructions.
        subprocess.CalledProcessError: a checkpoint could not be exported.
    """
    field = Field(
        installed=installed(arguments, NO_GUESSES),
        checkpoint=checkpoint,
        limits=Limits(arguments.max_model_len, arguments.max_num_seqs),
        level=INSTRUCTION_SETS[arguments.instructions],
        scratch=scratch,
        several=len(arguments.precision) > 1,
    )
    contenders = [contender for precision in arguments.precision for contender in field.contenders(precision)]
    return [contender for contender in contenders if contender.name not in arguments.without]


def installed(arguments: argparse.Namespace, flags: Mapping[str, Sequence[str]] | None = None) -> Installed:
    """The programs that the command line names.

    Args:
        arguments: of `add_server_arguments`.
        flags: more flags, by the name of a program; those of the command line come last, and count.
    """
    programs = {OURS: "ours", VLLM: "vllm", OPENVINO: "openvino"}
    more = flags or {}
    return Installed(
        vllm=arguments.vllm,
        openvino=arguments.openvino,
        openvino_script=arguments.openvino_server,
        environments={name: dict(getattr(arguments, f"{flag}_env")) for name, flag in programs.items()},
        flags={
            name: [*more.get(name, ()), *shlex.split(getattr(arguments, f"{flag}_flags"))]
            for name, flag in programs.items()
        },
    )


def now() -> str:
    """The time, for reports."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def run(arguments: argparse.Namespace, compare: Callable[[argparse.Namespace, Path], dict[str, Any]]) -> int:
    """Runs a comparison and writes what it returns; the exit status.

    Args:
        arguments: of `add_server_arguments`, at least.
        compare: takes them and an existing folder for checkpoints, exports and logs.
    """
    # Like an interrupt, so that the server that is running is stopped, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="persimmon-peers-") as temporary:
        scratch = arguments.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            result = compare(arguments, scratch)
        except (ServerFailedError, LookupError, OSError, subprocess.CalledProcessError) as error:
            print(error, file=sys.stderr)
            return 1
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _name_and_value(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which servers run, and how."""
    parser.add_argument("--vllm", type=Path, metavar="FILE", help="vLLM's command, VENV/bin/vllm; measured if given")
    parser.add_argument(
        "--openvino",
        type=Path,
        metavar="FILE",
        help="an interpreter that has openvino-genai and optimum-intel, VENV/bin/python; measured if given",
    )
    parser.add_argument(
        "--openvino-server",
        type=Path,
        metavar="SCRIPT",
        help="an HTTP front of OpenVINO GenAI with OpenAI's completions, run by that interpreter",
    )
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="NAME", help="leave servers out, by their names in the table"
    )
    for name, server, flags in (
        ("ours", "this server", ""),
        ("vllm", "vLLM", ""),
        ("openvino", "OpenVINO", "--property ENABLE_CPU_PINNING=NO"),
    ):
        parser.add_argument(
            f"--{name}-env",
            type=_name_and_value,
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help=f"an environment variable for {server}; may be given again",
        )
        parser.add_argument(
            f"--{name}-flags",
            default=flags,
            metavar="WORDS",
            help=f"more flags for {server}, as one argument [default: %(default)r]",
        )
    parser.add_argument("--rounds", type=int, default=3, help="starts of each server [default: %(default)s]")
    parser.add_argument(
        "--instructions",
        choices=INSTRUCTION_SETS,
        default="native",
        help="what all servers may use: all that this processor has, no AMX, or nothing above AVX2 "
        "[default: %(default)s]",
    )
    parser.add_argument("--max-model-len", default="1024", help="of all servers [default: %(default)s]")
    parser.add_argument("--max-num-seqs", default="64", help="of all servers [default: %(default)s]")
    parser.add_argument(
        "--start-timeout", type=float, default=600.0, help="seconds to become healthy [default: %(default)s]"
    )
    parser.add_argument(
        "--scratch", type=Path, metavar="FOLDER", help="keep checkpoints and exports there, and use them again"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="Measure this server and others on this CPU in turn."
    )
    add_server_arguments(parser)
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
        choices=(*RANDOM, "demo"),
        default="random",
        help="random: 33M parameters in float32, of benchmarks.checkpoint; random-1b: 1B in bfloat16; demo: the one "
        "that comes with the server [default: %(default)s]",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=["float32"],
        help="of the weights of all servers, one after the other; vLLM runs only where nothing is quantized "
        "[default: float32]",
    )
    return parser


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if (arguments.openvino is None) != (arguments.openvino_server is None):
        parser.error("--openvino and --openvino-server need each other")
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}: expected at least 1")
    try:
        for streams in arguments.streams:
            workload_at(streams, arguments, round_number=0)
    except ValueError as error:
        parser.error(str(error))
    return run(arguments, compare)


if __name__ == "__main__":
    sys.exit(main())
