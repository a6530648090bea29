"""What two ranks on a CPU bring over one: tokens a second of steps, and the time of the sums alone.

    python -m benchmarks.scale_out_tensor_parallel --rounds 5 --out benchmarks/results/NAME.json

Each case is a process of its own that loads a network as the engine does and repeats steps of several kinds; cases take
turns.  Sums are measured in ranks that do nothing else.  Knows no server and no scheduler.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.checkpoint import RANDOM, write_checkpoint
from benchmarks.machine import device
from benchmarks.rank_sums import SumFigures, measure_sums
from persimmon.kernels.cpu.pages import POPULATE
from persimmon.model.config import PersimmonConfig
from persimmon.model.kv_cache import block_bytes
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams
from persimmon.server.config import read_settings
from persimmon.server.engine.loading import load_model

CASES = {"1 rank, 1 thread": (1, 1), "1 rank, 2 threads": (1, 2), "2 ranks, 1 thread each": (2, 1)}
"""Ranks, and threads of each."""

BLOCK_SIZE = 32
CONTEXT = 128
MAX_MODEL_LEN = 1024
SPARE_BLOCKS = 4
STEPS = ((1, 1), (8, 1), (64, 1), (1, 512))
"""Sequences of a step, and tokens of each: decodes behind CONTEXT tokens, and a prompt."""

ROWS = [sequences * tokens for sequences, tokens in STEPS]
"""Tokens of each step."""


@dataclass(frozen=True)
class StepFigures:
    """One kind of step in one case; medians of the rounds, each of which has the median of its steps.

    Attributes:
        case: ranks and threads.
        sequences, tokens: of the step, and of each sequence.
        tokens_per_s: computed, of all sequences.
    """

    case: str
    sequences: int
    tokens: int
    tokens_per_s: float


def median_seconds(repeated: Callable[[], object], seconds: float) -> float:
    """Of one call, of those that fit into the time; at least three, after one that does not count."""
    repeated()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        repeated()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def start_of(tokens: int) -> int:
    """Tokens before those that a sequence of a step computes."""
    return CONTEXT if tokens == 1 else 0


def blocks_of(tokens: int) -> int:
    """Blocks of a sequence that computes this many tokens."""
    return -(-(start_of(tokens) + tokens) // BLOCK_SIZE)


def batch(sequences: int, tokens: int) -> list[SequenceInput]:
    """A step whose sequences draw greedily."""
    greedy = [RowSampling(asked=SamplingParams(temperature=0.0))]
    blocks = blocks_of(tokens)
    return [
        SequenceInput(
            token_ids=[7] * tokens,
            start=start_of(tokens),
            block_table=list(range(number * blocks, (number + 1) * blocks)),
            samplings=greedy,
        )
        for number in range(sequences)
    ]


def measure_steps(runner: Runner, seconds: float) -> list[float]:
    """Tokens a second of each of STEPS."""
    rates = []
    for sequences, tokens in STEPS:
        step = batch(sequences, tokens)
        rates.append(sequences * tokens / median_seconds(lambda step=step: runner.run(step), seconds))  # type: ignore[misc]
    return rates


def run_case(ranks: int, threads: int, folder: Path, seconds: float) -> list[float]:
    """`measure_steps` in a process of its own, which is the first rank."""
    command = [sys.executable, "-m", "benchmarks.scale_out_tensor_parallel", "--folder", str(folder)]
    command += ["--seconds", str(seconds), "--ranks", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": str(ranks * threads), "GOMP_SPINCOUNT": "5000"}
    run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return [float(rate) for rate in json.loads(run.stdout)]


def run_as_first_rank(ranks: int, folder: Path, seconds: float) -> list[float]:
    """Loads the network as the engine does, and measures its steps."""
    blocks = max(sequences * blocks_of(tokens) for sequences, tokens in STEPS)
    blocks = max(blocks, MAX_MODEL_LEN // BLOCK_SIZE) + SPARE_BLOCKS
    memory = blocks * block_bytes(PersimmonConfig.from_folder(folder), BLOCK_SIZE, torch.float32)
    settings = read_settings(
        {
            "tensor_parallel_size": str(ranks),
            "kv_cache_memory": str(memory),
            "max_model_len": str(MAX_MODEL_LEN),
            "block_size": str(BLOCK_SIZE),
        }
    )
    loaded = load_model(settings.of_engine(), folder, lambda line: print(line, file=sys.stderr))
    for thread in threading.enumerate():
        if thread.name == POPULATE:  # it would take its share of the first figures
            thread.join()
    try:
        return measure_steps(loaded.runner, seconds)
    finally:
        if loaded.followers is not None:
            loaded.followers.close()


def measure(folder: Path, rounds: int, seconds: float) -> list[StepFigures]:
    """All cases in turns."""
    rates: dict[str, list[list[float]]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, (ranks, threads) in CASES.items():
            rates[name].append(run_case(ranks, threads, folder, seconds))
    return [
        StepFigures(case=name, sequences=sequences, tokens=tokens, tokens_per_s=statistics.median(own))
        for name, of_rounds in rates.items()
        for (sequences, tokens), own in zip(STEPS, zip(*of_rounds, strict=True), strict=True)
    ]


def table(steps: list[StepFigures], sums: list[SumFigures]) -> str:
    """The figures for people."""
    kinds = [f"{sequences} x {tokens}" for sequences, tokens in STEPS]
    lines = [f"| tokens/s | {' | '.join(kinds)} |", f"| --- |{' ---: |' * len(kinds)}"]
    for name in CASES:
        rates = [f"{own.tokens_per_s:,.0f}" for own in steps if own.case == name]
        lines.append(f"| {name} | {' | '.join(rates)} |")
    lines.append(f"| sums of a step alone, µs | {' | '.join(f'{own.us:,.0f}' for own in sums)} |")
    lines.append(f"| bytes sent for them | {' | '.join(f'{own.sent_bytes:,}' for own in sums)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale_out_tensor_parallel", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--shape", choices=RANDOM, default="random", help="of the network [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="[default: %(default)s]")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each kind of step [default: %(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    # Of the processes that this program starts.
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        print(json.dumps(run_as_first_rank(arguments.ranks, arguments.folder, arguments.seconds)))
        return
    with tempfile.TemporaryDirectory(prefix="persimmon-tensor-parallel-") as scratch:
        folder = Path(scratch)
        write_checkpoint(folder, shape=arguments.shape)
        steps = measure(folder, arguments.rounds, arguments.seconds)
        sums = measure_sums(PersimmonConfig.from_folder(folder), ROWS, arguments.seconds)
    print(table(steps, sums))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "device": device(),
            "network": arguments.shape,
            "rounds": arguments.rounds,
            "steps": [asdict(own) for own in steps],
            "sums": [asdict(own) for own in sums],
        }
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
