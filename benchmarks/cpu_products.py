"""How fast the C kernels multiply: one product of each shape, with each format of weights and build.

    python -m benchmarks.cpu_products [--builds avx2] [--formats float32 int8] [--rows 1 8 64] [--out FILE]

Prints 10^9 multiplications and additions a second on all cores; with one row, the 10^9 bytes of weights read a second
say more.  A shape's weight is there several times, so that it comes from memory or the last-level cache, as in a
network, and not from a core's own.  The figure is the fastest of some tries: other programs only make a product slower.
`--builds torch` measures torch's own products of float32 and bfloat16 next to those, which says how near they are to
what this processor can do; MKL_ENABLE_INSTRUCTIONS=AVX2 limits it to AVX2.  Knows no network.
"""

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# As the server sets it, see server/supervisor.py; read when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.machine import device
from persimmon.kernels import Activation, Linear, QuantizedMatrix
from persimmon.kernels.cpu import library
from persimmon.kernels.cpu.native import NativeKernels, NativePlan, QuantizedActivations, step_of_plan
from persimmon.kernels.cpu.program import Program
from persimmon.kernels.quantized import pack_int4

CPU = torch.device("cpu")

WEIGHT_BYTES = 16 << 20
"""Of all copies of a weight together: several times what a core's own caches hold."""

ROWS = (1, 2, 4, 8, 16, 64, 256)

TORCH = "torch"
"""In the place of a build: what torch makes of the same product."""


@dataclass(frozen=True)
class Shape:
    """A product of the random network.

    Attributes:
        name: which.
        outputs: of the weight.
        inputs: of the weight.
        squared_relu: whether inputs come from squared ReLU, half of them zero.
    """

    name: str
    outputs: int
    inputs: int
    squared_relu: bool = False


SHAPES = (
    Shape("attention out", 512, 512),
    Shape("up", 2048, 512),
    Shape("down", 512, 2048, squared_relu=True),
    Shape("lm_head", 8192, 512),
)

FORMATS: dict[str, tuple[torch.dtype | int, int | None, QuantizedActivations]] = {
    "float32": (torch.float32, None, "auto"),
    "bfloat16": (torch.bfloat16, None, "auto"),
    "int8": (8, None, "int8"),
    "int4-32": (4, 32, "int8"),
    "int4-128": (4, 128, "int8"),
    "int8, float activations": (8, None, "float"),
    "int4-32, float activations": (4, 32, "float"),
}
"""A dtype or bits, the weight's group, and what quantized weights are multiplied by."""


@dataclass(frozen=True)
class Timing:
    """One product.

    Attributes:
        build: of the C kernels, or `TORCH`.
        format: of the weight.
        shape: of the weight, by name.
        rows: of inputs.
        us: the fewest microseconds that it took.
        gmac_s: 10^9 multiplications and additions a second.
        gb_s: 10^9 bytes of weights read a second.
    """

    build: str
    format: str
    shape: str
    rows: int
    us: float
    gmac_s: float
    gb_s: float


class Product:
    """Copies of one weight, multiplied one after the other."""

    def __init__(self, build: str, form: str, shape: Shape, most_rows: int) -> None:
        self.build, self.form, self.shape = build, form, shape
        stored, group, activations = FORMATS[form]
        inputs = torch.randn(most_rows, shape.inputs)
        self.inputs = inputs.relu().square() if shape.squared_relu else inputs
        self._run: Callable[[int], object]
        if build == TORCH:
            self._prepare_torch(_weight(shape, stored, group))
            return
        # Weights of bfloat16 are multiplied as such where the build does that, as in serving.
        rounds = stored == torch.bfloat16 and build == "avx512_bf16"
        operations = NativeKernels(build, torch.bfloat16 if rounds else torch.float32, activations)
        first = _weight(shape, stored, group)
        prepared = operations.prepare_weight(first, sparse_input=shape.squared_relu)
        self.weight_bytes = prepared.nbytes
        self.copies = max(2, -(-WEIGHT_BYTES // prepared.nbytes))
        weights = [
            prepared,
            *(operations.prepare_weight(first, sparse_input=shape.squared_relu) for _ in range(self.copies - 1)),
        ]

        def forward(kernels: NativeKernels, plan: NativePlan) -> None:
            del plan
            for weight in weights:
                kernels.product(Activation(self.inputs), Linear(weight, None))

        program: Program = operations.record(most_rows, forward)

        def run(rows: int) -> None:
            plan = operations.plan_attention(
                *([[0]], [0], [rows]), num_blocks=0, num_heads=0, block_size=0, dtype=torch.float32, device=CPU
            )
            program.run(step_of_plan(plan))

        self._run = run

    def _prepare_torch(self, weight: torch.Tensor | QuantizedMatrix) -> None:
        if isinstance(weight, QuantizedMatrix):
            raise ValueError(f"torch multiplies no {self.form}; expected float32 or bfloat16")
        self.weight_bytes = weight.nbytes
        self.copies = max(2, -(-WEIGHT_BYTES // weight.nbytes))
        weights, inputs = [weight.clone() for _ in range(self.copies)], self.inputs.to(weight.dtype)

        def run(rows: int) -> None:
            for own in weights:
                F.linear(inputs[:rows], own)

        self._run = run

    def measure(self, rows: int, seconds: float) -> Timing:
        """Runs for about `seconds`."""
        self._run(rows)
        end = time.perf_counter() + seconds
        fastest = self._seconds(rows)
        while time.perf_counter() < end:
            fastest = min(fastest, self._seconds(rows))
        each = fastest / self.copies
        return Timing(
            build=self.build,
            format=self.form,
            shape=self.shape.name,
            rows=rows,
            us=round(each * 1e6, 1),
            gmac_s=round(rows * self.shape.outputs * self.shape.inputs / each / 1e9, 1),
            gb_s=round(self.weight_bytes / each / 1e9, 1),
        )

    def _seconds(self, rows: int) -> float:
        started = time.perf_counter()
        self._run(rows)
        return time.perf_counter() - started


def _weight(shape: Shape, stored: torch.dtype | int, group: int | None) -> torch.Tensor | QuantizedMatrix:
    if isinstance(stored, torch.dtype):
        return torch.randn(shape.outputs, shape.inputs).to(stored)
    most = 1 << (stored - 1)
    integers = torch.randint(-most, most, (shape.outputs, shape.inputs), dtype=torch.int8)
    scales = torch.full((shape.outputs, shape.inputs // (group or shape.inputs)), 1 / most)
    numbers = integers if stored == 8 else pack_int4(integers)
    return QuantizedMatrix(
        numbers=numbers, scales=scales, bits=8 if stored == 8 else 4, group_size=group or shape.inputs
    )


def table(timings: Sequence[Timing], rows: Sequence[int]) -> str:
    """A line for each build, format and shape: 10^9 multiplications a second, and of one row bytes."""
    lines = [f"{'GMAC/s by rows':<58}" + "".join(f"{count:8d}" for count in rows) + "    GB/s, 1 row"]
    for first in range(0, len(timings), len(rows)):
        own = timings[first : first + len(rows)]
        name = f"{own[0].build:<13}{own[0].format:<28}{own[0].shape:<17}"
        reads = "".join(f"{timing.gb_s:12.1f}" for timing in own if timing.rows == 1)
        lines.append(name + "".join(f"{timing.gmac_s:8.1f}" for timing in own) + reads)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_products", description="Measure the products of the C kernels on this CPU."
    )
    builds = [*library.builds(), TORCH]
    names = [shape.name for shape in SHAPES]
    parser.add_argument(
        "--builds", nargs="+", choices=builds, default=builds[:1], metavar="NAME", help=", ".join(builds)
    )
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="NAME", help=", ".join(FORMATS)
    )
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each product [default: %(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results as JSON")
    arguments = parser.parse_args()
    timings = []
    for build in arguments.builds:
        for form in arguments.formats:
            if build == TORCH and not isinstance(FORMATS[form][0], torch.dtype):
                continue
            for shape in (shape for shape in SHAPES if shape.name in arguments.shapes):
                product = Product(build=build, form=form, shape=shape, most_rows=max(arguments.rows))
                timings += [product.measure(rows, arguments.seconds) for rows in arguments.rows]
    print(table(timings, arguments.rows))
    if arguments.out:
        content = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": device() | {"threads": torch.get_num_threads()},
            "timings": [asdict(timing) for timing in timings],
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
