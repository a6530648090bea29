"""What a step takes with each format of weights on a CPU: 32, 16, 8 and 4 bits, with each build of the C kernels.

    python -m benchmarks.cpu_formats [--network random] [--builds avx2] [--formats int8 int4-32] [--out FILE]

Decode steps of 1, 8 and 64 sequences with 128 cached tokens each, and a prompt of 512, each format in turn in several
rounds.  Weights are random.  The figure is the fastest of all rounds: other programs only make a step slower.  Knows no
server and no scheduler.
"""

import argparse
import datetime
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

# As the server sets it, see server/supervisor.py; read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch

from benchmarks.checkpoint import CONFIG
from benchmarks.cpu_step import BLOCK_SIZE, BLOCKS_EACH, CONTEXT, CPU, PROMPT
from benchmarks.machine import device
from persimmon.kernels.cpu import library
from persimmon.kernels.cpu.native import NativeKernels, QuantizedActivations
from persimmon.model.checkpoint import dummy_parameters
from persimmon.model.config import PersimmonConfig
from persimmon.model.executor import executor_for
from persimmon.model.kv_cache import KVCache
from persimmon.model.persimmon import Persimmon
from persimmon.model.quantization.scheme import Quantization, quantized_formats
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams

NETWORKS = {
    "random": CONFIG,
    "8b-layer": CONFIG
    | {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 1, "num_attention_heads": 64},
}
"""The network that all benchmarks serve, and one layer of the 8B model."""

STEPS = ((1, 1), (8, 1), (64, 1), (1, PROMPT))
"""(sequences, tokens of each)."""


@dataclass(frozen=True)
class Format:
    """How weights are stored and multiplied.

    Attributes:
        stored: dtype of weights that are not quantized.
        quantization: of the others.
        group_size: of 4-bit weights.
        activations: what quantized weights are multiplied by.
    """

    stored: torch.dtype = torch.float32
    quantization: Quantization | None = None
    group_size: int = 32
    activations: QuantizedActivations = "int8"


FORMATS = {
    "float32": Format(),
    "bfloat16": Format(torch.bfloat16),
    "int8": Format(quantization="int8"),
    "int4-32": Format(quantization="int4"),
    "int4-128": Format(quantization="int4", group_size=128),
    "int8, float activations": Format(quantization="int8", activations="float"),
    "int4-32, float activations": Format(quantization="int4", activations="float"),
}


@dataclass(frozen=True)
class Timing:
    """One kind of step.

    Attributes:
        build: of the C kernels.
        format: of the weights.
        sequences: of the step.
        tokens: of each sequence.
        us: the fewest microseconds that one took.
        weight_bytes: of the layers' matrices and lm_head.
    """

    build: str
    format: str
    sequences: int
    tokens: int
    us: float
    weight_bytes: int


class Steps:
    """A network in one format, and its steps."""

    def __init__(self, name: str, config: PersimmonConfig, build: str, cache_dtype: torch.dtype | None) -> None:
        self.name, self.build = name, build
        form = FORMATS[name]
        # With weights of bfloat16 activations are bfloat16 too where the build multiplies such numbers, as in serving.
        self.dtype = form.stored if build == "avx512_bf16" else torch.float32
        operations = NativeKernels(build, self.dtype, form.activations)
        formats = quantized_formats(config, form.quantization, form.group_size) if form.quantization else {}
        tensors = dummy_parameters(config, form.stored, CPU, 0, formats)
        model = Persimmon(config=config, tensors=tensors, dtype=self.dtype, device=CPU, kernels=operations)
        cache = KVCache.allocate(config, STEPS[2][0] * BLOCKS_EACH, BLOCK_SIZE, cache_dtype or self.dtype, CPU)
        for layer in cache.layers:
            for tensor in layer.tensors:
                tensor.zero_()
        self.runner = Runner(executor_for(operations, CPU).start(model, cache))
        linears = (
            linear
            for layer in model.layers
            for linear in (layer.query_key_value, layer.attention_out, layer.mlp_up, layer.mlp_down)
        )
        self.weight_bytes = sum(linear.weight.nbytes for linear in linears) + model.head.nbytes

    def run(self, sequences: int, tokens: int) -> None:
        """One step: single tokens follow their context, more are a prompt."""
        start = CONTEXT if tokens == 1 else 0
        greedy = [RowSampling(asked=SamplingParams(temperature=0.0))]
        self.runner.run(
            [
                SequenceInput(
                    token_ids=[7] * tokens,
                    start=start,
                    block_table=list(range(i * BLOCKS_EACH, (i + 1) * BLOCKS_EACH)),
                    samplings=greedy,
                )
                for i in range(sequences)
            ]
        )


def measure(
    build: str,
    names: Sequence[str],
    config: PersimmonConfig,
    *,
    rounds: int,
    seconds: float,
    cache_dtype: torch.dtype | None = None,
) -> list[Timing]:
    """All formats in turn, `rounds` times, each kind of step for `seconds`.

    Without a `cache_dtype` the cache is of the activations' type.
    """
    networks = [Steps(name=name, config=config, build=build, cache_dtype=cache_dtype) for name in names]
    best: dict[tuple[str, int, int], float] = {}
    for _ in range(rounds):
        for network in networks:
            for sequences, tokens in STEPS:
                key = (network.name, sequences, tokens)
                work = partial(network.run, sequences, tokens)
                best[key] = min(best.get(key, float("inf")), *_seconds(work, seconds))
    return [
        Timing(
            build=build,
            format=network.name,
            sequences=sequences,
            tokens=tokens,
            us=round(best[network.name, sequences, tokens] * 1e6, 1),
            weight_bytes=network.weight_bytes,
        )
        for network in networks
        for sequences, tokens in STEPS
    ]


def _seconds(work: "partial[None]", enough: float) -> Iterator[float]:
    work()
    end = time.perf_counter() + enough
    while True:
        started = time.perf_counter()
        work()
        finished = time.perf_counter()
        yield finished - started
        if finished > end:
            return


def table(timings: Sequence[Timing]) -> str:
    """A line for each build and format."""
    lines = [f"{'':<40}{'weights':>10}" + "".join(f"{f'{s} x {t}':>12}" for s, t in STEPS)]
    rows: dict[tuple[str, str], list[Timing]] = {}
    for timing in timings:
        rows.setdefault((timing.build, timing.format), []).append(timing)
    for (build, name), own in rows.items():
        figures = "".join(f"{timing.us / 1000:9.2f} ms" for timing in own)
        lines.append(f"{build:<13}{name:<27}{own[0].weight_bytes / 1e6:7.1f} MB{figures}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_formats", description="Measure steps with weights of fewer bits on this CPU."
    )
    builds = library.builds()
    parser.add_argument("--network", choices=NETWORKS, default="random")
    parser.add_argument(
        "--builds", nargs="+", choices=builds, default=builds[:1], metavar="NAME", help=", ".join(builds)
    )
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="NAME", help=", ".join(FORMATS)
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "int8"), default="auto", help="of the KV cache [default: %(default)s]"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of all formats in turn [default: %(default)s]")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each step and round [default: %(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="persimmon-cpu-formats-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(NETWORKS[arguments.network]))
        config = PersimmonConfig.from_folder(Path(folder))
    timings = []
    for build in arguments.builds:
        timings += measure(
            build,
            arguments.formats,
            config,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            cache_dtype=torch.int8 if arguments.kv_cache_dtype == "int8" else None,
        )
    print(table(timings))
    if arguments.out:
        content = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": device() | {"threads": torch.get_num_threads()},
            "network": arguments.network,
            "kv_cache_dtype": arguments.kv_cache_dtype,
            "timings": [asdict(timing) for timing in timings],
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
