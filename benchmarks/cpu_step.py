"""What a step on a CPU takes, operation by operation: the C kernels, and plain torch for comparison.

    python -m benchmarks.cpu_step [--dtype float32] [--checkpoint random] [--out FILE]

Decode steps of 1, 8 and 64 sequences with 128 cached tokens each, a prompt of 512, and draws.  Medians over some runs,
of which other programs take their share: run it on a quiet machine.  Knows no server and no scheduler.
"""

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

# As the server sets it, see server/supervisor.py; read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch

from benchmarks.checkpoint import checkpoint_named
from benchmarks.machine import device, measure_rates
from persimmon import kernels
from persimmon.kernels import Kernels, reference
from persimmon.kernels.cpu import library
from persimmon.kernels.cpu.native import NativeKernels, step_of_plan
from persimmon.model import sampler
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.executor import executor_for
from persimmon.model.kv_cache import KVCache
from persimmon.model.native_draw import NativeDraw
from persimmon.model.persimmon import Persimmon
from persimmon.model.recorded_network import record
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams

CONTEXT = 128
PROMPT = 512
BLOCK_SIZE = 32
BLOCKS_EACH = -(-max(CONTEXT + 1, PROMPT) // BLOCK_SIZE)
CPU = torch.device("cpu")
DRAWS = {
    "greedy": RowSampling(asked=SamplingParams(temperature=0.0)),
    "temperature 1": RowSampling(asked=SamplingParams(temperature=1.0, seed=1)),
    "temperature 1, top_p 0.9": RowSampling(asked=SamplingParams(temperature=1.0, top_p=0.9, seed=1)),
    "temperature 1, top_k 50": RowSampling(asked=SamplingParams(temperature=1.0, top_k=50, seed=1)),
}


@dataclass(frozen=True)
class Timing:
    """Median microseconds of one thing.

    Attributes:
        what: the thing.
        sequences: of the step.
        tokens: of each.
        native_us: with the C kernels.
        torch_us: in plain torch; None where it does not come apart.
    """

    what: str
    sequences: int
    tokens: int
    native_us: float
    torch_us: float | None = None

    def __str__(self) -> str:
        compared = "" if self.torch_us is None else f"{self.torch_us:12,.0f}"
        return f"{self.what:<26} {self.sequences:4d} x {self.tokens:<4d} {self.native_us:12,.0f}{compared}"


class Network:
    """A checkpoint's network with a cache that holds the sequences of every step."""

    def __init__(self, folder: Path, dtype: torch.dtype, operations: Kernels[Any, Any], sequences: int) -> None:
        config = PersimmonConfig.from_folder(folder)
        self.model = Persimmon(
            config=config,
            tensors=Checkpoint.open(folder, config).tensors(),
            dtype=dtype,
            device=CPU,
            kernels=operations,
        )
        self.cache = KVCache.allocate(config, sequences * BLOCKS_EACH, BLOCK_SIZE, dtype, CPU)
        self.runner = Runner(executor_for(operations, CPU).start(self.model, self.cache))

    def batch(self, sequences: int, tokens: int) -> list[SequenceInput]:
        """A step: single tokens follow their context, more are a prompt."""
        start = CONTEXT if tokens == 1 else 0
        tables = [list(range(i * BLOCKS_EACH, (i + 1) * BLOCKS_EACH)) for i in range(sequences)]
        return [
            SequenceInput(
                token_ids=[7] * tokens,
                start=start,
                block_table=table,
                samplings=[RowSampling(asked=SamplingParams(temperature=0.0))],
            )
            for table in tables
        ]

    def fill(self, sequences: int) -> None:
        """Computes the contexts that decode steps read."""
        for i in range(sequences):
            self.runner.run(
                [
                    SequenceInput(
                        token_ids=[5] * CONTEXT,
                        start=0,
                        block_table=range(i * BLOCKS_EACH, (i + 1) * BLOCKS_EACH),
                        samplings=(),
                    )
                ]
            )


def median_us(work: Callable[[], object], runs: int) -> float:
    """Of some runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return round(statistics.median(seconds) * 1e6, 1)


def parts(native: Network, operations: NativeKernels, sequences: int, tokens: int, runs: int) -> list[Timing]:
    """The C kernels' operations of one step, all layers of each together: what the network takes less without them.

    Alone they would find their weights in the processor's cache, where they are not in a step.
    """
    config = native.model.config
    batch = native.batch(sequences, tokens)
    plan = operations.plan_attention(
        [item.block_table for item in batch],
        [item.start for item in batch],
        [tokens] * sequences,
        num_blocks=native.cache.num_blocks,
        num_heads=native.cache.num_heads,
        block_size=BLOCK_SIZE,
        dtype=native.cache.dtype,
        device=CPU,
    )
    hidden = torch.empty(sequences * tokens, config.hidden_size)
    token_ids = torch.full((sequences * tokens,), 7)
    step = step_of_plan(plan, token_ids=token_ids, hidden=hidden)
    program = record(native.model, native.cache, operations, sequences * tokens)
    kinds: dict[str, Callable[[library.Operation], bool]] = {
        "attention": lambda one: one.kind == library.ATTENTION,
        "norm + QKV": lambda one: one.kind == library.LINEAR and one.out == 3 * config.hidden_size,
        "out + residual": lambda one: one.kind == library.LINEAR and one.in_ == one.out,
        "norm + up": lambda one: one.finish == library.STORE_RELU_SQUARED,
        "down + residual": lambda one: one.kind == library.LINEAR and one.in_ == config.intermediate_size,
    }
    network_us = median_us(partial(program.run, step), runs)
    timings = [Timing(what="network", sequences=sequences, tokens=tokens, native_us=network_us)]
    for what, wanted in kinds.items():
        others = program.part(lambda one, wanted=wanted: not wanted(one))  # type: ignore[misc]
        others_us = median_us(partial(others.run, step), runs)
        timings.append(
            Timing(what=what, sequences=sequences, tokens=tokens, native_us=round(network_us - others_us, 1))
        )
    last = hidden[:sequences]
    timings.append(
        Timing(
            what="lm_head", sequences=sequences, tokens=1, native_us=median_us(lambda: native.model.logits(last), runs)
        )
    )
    return timings


def draws(operations: NativeKernels, vocab_size: int, rows: int, runs: int) -> list[Timing]:
    """Tokens drawn from `rows` rows of random logits."""
    logits = 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))
    native = NativeDraw(operations)
    return [
        Timing(
            what=f"{name}, {vocab_size:,} ids",
            sequences=rows,
            tokens=1,
            native_us=median_us(lambda own=own: native(logits, [own] * rows), runs),  # type: ignore[misc]
            torch_us=median_us(lambda own=own: sampler.draw(logits, [own] * rows), runs),  # type: ignore[misc]
        )
        for name, own in DRAWS.items()
    ]


@contextlib.contextmanager
def busy_program() -> Iterator[None]:
    """Keeps one core busy in another process."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def measure(folder: Path, dtype: torch.dtype, runs: int) -> list[Timing]:
    """Everything, in the order of the table.

    Raises:
        KernelsUnavailableError: there are no C kernels to measure.
    """
    operations = kernels.for_device(CPU, dtype)
    if not isinstance(operations, NativeKernels):
        raise kernels.KernelsUnavailableError(
            "there are no C kernels for this processor; see docs/reference/api.md, CPU"
        )
    native, plain = (
        Network(folder=folder, dtype=dtype, operations=own, sequences=64) for own in (operations, reference)
    )
    for network in (native, plain):
        network.fill(64)
    timings = []
    for sequences, tokens in ((1, 1), (8, 1), (64, 1), (1, PROMPT)):
        few = runs if sequences * tokens < 64 else max(3, runs // 4)
        native_us, torch_us = (
            median_us(partial(own.runner.run, own.batch(sequences, tokens)), few) for own in (native, plain)
        )
        timings.append(
            Timing(what="whole step", sequences=sequences, tokens=tokens, native_us=native_us, torch_us=torch_us)
        )
        timings += parts(native, operations, sequences, tokens, few)
    with busy_program():
        for sequences in (1, 8, 64):
            few = max(10, runs // sequences)
            native_us, torch_us = (
                median_us(partial(own.runner.run, own.batch(sequences, 1)), few) for own in (native, plain)
            )
            timings.append(
                Timing(
                    what="step next to a busy program",
                    sequences=sequences,
                    tokens=1,
                    native_us=native_us,
                    torch_us=torch_us,
                )
            )
    for vocab_size, rows in ((8192, 1), (8192, 64), (262144, 8)):
        timings += draws(operations, vocab_size, rows, max(3, runs // 8))
    return timings


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_step", description="Measure the steps of a small network on this CPU."
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--checkpoint", choices=("random", "demo"), default="random")
    parser.add_argument("--runs", type=int, default=80, help="of each step [default: %(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    with tempfile.TemporaryDirectory(prefix="persimmon-cpu-step-") as scratch:
        timings = measure(checkpoint_named(arguments.checkpoint, Path(scratch)), dtype, arguments.runs)
    rates = measure_rates(dtype)
    print(f"{'':<26} {'step':<11} {'C, us':>12}{'torch, us':>12}")
    for timing in timings:
        print(timing)
    print(
        f"this machine reads {rates.read_gb_s} GB/s and multiplies {rates.matmul_gflop_s:,.0f} GFLOP/s ({rates.dtype})"
    )
    if arguments.out:
        content = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": device() | {"threads": torch.get_num_threads(), "build": library.builds()[0]},
            "checkpoint": arguments.checkpoint,
            "dtype": arguments.dtype,
            "machine": asdict(rates),
            "timings": [asdict(timing) for timing in timings],
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
