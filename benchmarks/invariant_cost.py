"""What the batch-invariant mode is predicted to cost on a GPU, for the 8B model in 16 bits.

    python -m benchmarks.invariant_cost [--copy-tb-s 3.0] [--l2-tb-s 5.5] [--matmul-tflop-s 640] [--out FILE]

Arithmetic from shapes and tiles: nothing runs, so nothing here is measured.  The defaults are an H100's rates: bytes
copied, bytes read from the L2 cache, and what cuBLAS multiplies in products as large as a prompt's.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.floors import PERSIMMON_8B, prompt_flops, step_bytes
from persimmon.kernels.invariant_projection import TILES
from persimmon.model.config import PersimmonConfig

LAUNCH_US = 2.5
"""A small launch in a CUDA graph: a gap of about 1.2 us, and a kernel that does little."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Of a GPU: bytes a second from memory and from the L2 cache, and multiplications and additions of cuBLAS."""

    copy: float
    l2: float
    matmul: float

    @property
    def tiled(self) -> float:
        """Multiplications and additions a second of `project_rows`, whose tiles come from the L2 cache."""
        flops_per_byte = 2 * TILES.rows * TILES.columns / (2 * (TILES.rows + TILES.columns))
        return min(self.matmul, flops_per_byte * self.l2)


@dataclass(frozen=True, slots=True)
class Cost:
    """A step's least time with and without the mode.

    Attributes:
        step: what it computes.
        default_ms, invariant_ms: milliseconds.
    """

    step: str
    default_ms: float
    invariant_ms: float

    @property
    def factor(self) -> float:
        """How many times as long the step takes in the mode."""
        return self.invariant_ms / self.default_ms


def decode_cost(config: PersimmonConfig, batch: int, context: int, rates: Rates) -> Cost:
    """A decode step: the mode adds one launch a layer, since queries are stored before they attend.

    More than 64 rows also leave cuBLAS, and write their LayerNorms' statistics in two launches a layer more.
    """
    by_memory = step_bytes(config, batch, context, 0.0) / rates.copy * 1e3
    if batch <= 64:
        return Cost(f"{batch} x {context}", by_memory, by_memory + config.num_hidden_layers * LAUNCH_US / 1e3)
    hidden, inner = config.hidden_size, config.intermediate_size
    flops = 2 * hidden * (config.num_hidden_layers * (4 * hidden + 2 * inner) + config.vocab_size)
    # Rows are computed in whole tiles.
    rows = -(-batch // TILES.rows) * TILES.rows
    tiled = max(by_memory, rows * flops / rates.tiled * 1e3) + 3 * config.num_hidden_layers * LAUNCH_US / 1e3
    return Cost(f"{batch} x {context}", max(by_memory, batch * flops / rates.matmul * 1e3), tiled)


def prompt_cost(config: PersimmonConfig, tokens: int, rates: Rates) -> Cost:
    """A prompt in one chunk."""
    flops = prompt_flops(config, tokens)
    statistics = 2 * config.num_hidden_layers * (LAUNCH_US / 1e3 + 2 * tokens * config.hidden_size / rates.copy * 1e3)
    return Cost(f"a prompt of {tokens}", flops / rates.matmul * 1e3, flops / rates.tiled * 1e3 + statistics)


def costs(rates: Rates, config: PersimmonConfig = PERSIMMON_8B) -> list[Cost]:
    """The steps that the design page shows."""
    return [
        *(decode_cost(config, batch, context, rates) for batch, context in ((1, 128), (8, 512), (64, 512), (256, 512))),
        *(prompt_cost(config, tokens, rates) for tokens in (512, 2048)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.invariant_cost", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--copy-tb-s", type=float, default=3.0, help="memory, 10^12 bytes/s [default: %(default)s]")
    parser.add_argument("--l2-tb-s", type=float, default=5.5, help="from the L2 cache [default: %(default)s]")
    parser.add_argument("--matmul-tflop-s", type=float, default=640.0, help="of cuBLAS [default: %(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON here")
    arguments = parser.parse_args()
    rates = Rates(arguments.copy_tb_s * 1e12, arguments.l2_tb_s * 1e12, arguments.matmul_tflop_s * 1e12)
    found = costs(rates)
    print(f"predicted; project_rows multiplies at {rates.tiled / 1e12:.0f} TFLOP/s, by its tiles' bytes")
    for cost in found:
        print(f"{cost.step:>18} {cost.default_ms:8.2f} ms {cost.invariant_ms:8.2f} ms  x {cost.factor:.2f}")
    if arguments.out is not None:
        arguments.out.write_text(
            json.dumps([asdict(cost) | {"factor": cost.factor} for cost in found], indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
