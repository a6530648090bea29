"""What a step of the 8B model must read and compute, launch by launch, and the least time that takes on one GPU.

    python -m benchmarks.floors [--copy-tb-s 3.0] [--matmul-tflop-s 798] [--out FILE]

Arithmetic from the model's shapes: nothing runs.  The rates are those of the GPU; the defaults are what one H100 SXM
copies (read and written bytes together) and multiplies in 16 bits.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from persimmon.model.config import PersimmonConfig

PERSIMMON_8B = PersimmonConfig(
    vocab_size=262144,
    hidden_size=4096,
    intermediate_size=16384,
    num_hidden_layers=36,
    num_attention_heads=64,
    max_position_embeddings=16384,
)
ITEM_BYTES = 2


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a decode step: bytes of weights and of cached keys and values that it reads."""

    name: str
    weights: int
    cache: int = 0

    @property
    def bytes(self) -> int:
        """All that it reads; what it writes is a few rows."""
        return self.weights + self.cache


def layer_launches(config: PersimmonConfig, context: int, zeros: float) -> list[Launch]:
    """The five launches of a layer, for `context` cached tokens in all and a share of MLP neurons that are zero."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return [
        Launch("norm + QKV", 3 * hidden * hidden * ITEM_BYTES),
        Launch("attention", 0, 2 * hidden * ITEM_BYTES * context),
        Launch("out + residual", hidden * hidden * ITEM_BYTES),
        Launch("norm + up", hidden * inner * ITEM_BYTES),
        Launch("down + residual", round(hidden * inner * ITEM_BYTES * (1 - zeros))),
    ]


def step_bytes(config: PersimmonConfig, batch: int, context: int, zeros: float) -> int:
    """What a decode step of `batch` sequences of `context` tokens reads."""
    layer = sum(launch.bytes for launch in layer_launches(config, batch * context, zeros))
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size * ITEM_BYTES


def prompt_flops(config: PersimmonConfig, tokens: int) -> int:
    """Multiplications and additions for a prompt: projections for all tokens, causal attention, logits for one."""
    hidden, inner = config.hidden_size, config.intermediate_size
    projections = 2 * hidden * (4 * hidden + 2 * inner) * tokens
    attention = 4 * hidden * tokens * (tokens + 1) // 2
    return config.num_hidden_layers * (projections + attention) + 2 * config.vocab_size * hidden


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floors", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--copy-tb-s", type=float, default=3.0, help="bytes copied a second, in 10^12 [default: %(default)s]"
    )
    parser.add_argument("--matmul-tflop-s", type=float, default=798.0, help="16-bit matmul rate [default: %(default)s]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON here")
    arguments = parser.parse_args()
    rate, matmul = arguments.copy_tb_s * 1e12, arguments.matmul_tflop_s * 1e12
    config = PERSIMMON_8B
    launches = [
        asdict(launch) | {"us": round(launch.bytes / rate * 1e6, 1)}
        for launch in [*layer_launches(config, 512, 0.0), Launch("lm_head", config.vocab_size * config.hidden_size * 2)]
    ]
    steps = []
    for batch, context, zeros in (
        (1, 0, 0.0),
        (1, 0, 0.9),
        (1, 512, 0.0),
        (8, 512, 0.0),
        (64, 512, 0.0),
        (1, 16384, 0.0),
    ):
        read = step_bytes(config, batch, context, zeros)
        steps.append(
            {"batch": batch, "context": context, "zeros": zeros, "bytes": read}
            | {"ms": round(read / rate * 1e3, 2), "tokens_s": round(batch * rate / read)}
        )
    prompts = []
    for tokens in (512, 2048, 8192):
        seconds = prompt_flops(config, tokens) / matmul
        prompts.append({"tokens": tokens, "ms": round(seconds * 1e3, 1), "tokens_s": round(tokens / seconds)})
    print(f"at {arguments.copy_tb_s} TB/s, {arguments.matmul_tflop_s} TFLOP/s: arithmetic, nothing was measured\n")
    print("a layer's launches, one sequence of 512 tokens, and lm_head:")
    for launch in launches:
        print(f"  {launch['name']:<16} {(launch['weights'] + launch['cache']) / 1e6:9.1f} MB {launch['us']:8.1f} us")
    print("decode steps:")
    for step in steps:
        about = f"{step['batch']} x {step['context']}, {step['zeros']:.0%} zeros"
        print(f"  {about:<24} {step['bytes'] / 1e9:7.2f} GB {step['ms']:8.2f} ms {step['tokens_s']:8,} tokens/s")
    print("prompts:")
    for prompt in prompts:
        print(f"  {prompt['tokens']:>6} tokens {prompt['ms']:8.1f} ms {prompt['tokens_s']:8,} tokens/s")
    if arguments.out:
        rates = {"copy_tb_s": arguments.copy_tb_s, "matmul_tflop_s": arguments.matmul_tflop_s}
        content = {
            "device": "none: arithmetic",
            "rates": rates,
            "launches": launches,
            "steps": steps,
            "prompts": prompts,
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
