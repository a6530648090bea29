"""Predicted time of each launch of a decode step of the 8B model with 8-bit and 4-bit weights, from its machine code.

    TRITON_INTERPRET=0 python -m benchmarks.roofline_quantized [--out FILE]

As `benchmarks.roofline`, whose assumptions it shares: nothing runs, and nothing was measured.  Unpacking takes
instructions, so there is a sixth stream: those of the loop, at the rate that the warps of a multiprocessor issue them.
The RTX 4090 stands for cards of 24 GB, which are what quantized weights are for; its kernels are compiled for sm_89.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.floors import ITEM_BYTES, PERSIMMON_8B
from benchmarks.roofline import ASSUMED, CONTEXT, Card, attention_launch, waits_before
from persimmon.kernels.packed_weight import Packing
from persimmon.kernels.quantized import QuantizedFormat
from tests.kernels.ahead_of_time import compile_calls
from tests.kernels.machine_code import latency
from tests.kernels.machine_code.compiled import Compiled
from tests.kernels.machine_code.instructions import Code
from tests.kernels.production import calls_of
from tests.kernels.production_calls_packed_projection import FORMATS

RESULTS = Path(__file__).parent / "results" / "roofline_quantized_8b.json"
"""Where `--out` belongs, for `benchmarks.gpu` to show next to what it measures; not written yet."""

BATCHES = (1, 16, 64)
STORED = {"int8": "int8", "int4, groups of 32": "int4_g32"}
"""What `--quantization` makes of a layer's matrices, by the name of the format among the production calls."""

HEAD, MASKED = "lm_head", "down + residual, 90% zeros"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU.

    Attributes:
        card: its name, and bytes that it copies a second.
        capability: that its kernels are compiled for, 89 for 8.9.
        multiprocessors: of it.
        clock_ghz: of the multiprocessors.
        l2_tb_s: what all multiprocessors together draw from the L2 cache.
        shared_bytes: of a multiprocessor.
        max_warps: of a multiprocessor.
    """

    card: Card
    capability: int
    multiprocessors: int
    clock_ghz: float
    l2_tb_s: float
    shared_bytes: int
    max_warps: int

    def programs_per_sm(self, kernel: "Facts") -> float:
        """Programs of a launch on a multiprocessor, on average."""
        registers = -(-kernel.registers // 8) * 8
        warps = min(self.max_warps, 4 * (16384 // (32 * registers)))
        possible = min(warps // kernel.warps, self.shared_bytes // (kernel.shared_bytes + 1024))
        return min(possible, kernel.programs / self.multiprocessors)


_HOPPER = Gpu(
    card=Card("H100", 3.0),
    capability=90,
    multiprocessors=132,
    clock_ghz=ASSUMED.clock_ghz,
    l2_tb_s=ASSUMED.l2_tb_s,
    shared_bytes=latency.SHARED_BYTES,
    max_warps=64,
)
GPUS = (
    _HOPPER,
    replace(_HOPPER, card=Card("H200", 4.3)),
    Gpu(
        card=Card("RTX 4090", 0.92),
        capability=89,
        multiprocessors=128,
        clock_ghz=2.52,
        l2_tb_s=5.0,
        shared_bytes=100 * 1024,
        max_warps=48,
    ),
)


@dataclass(frozen=True, slots=True)
class Issue:
    """How fast instructions are issued; assumed, for a loop of loads from shared memory, conversions and products.

    Attributes:
        per_warp: instructions that a warp issues in a clock.
        per_sm: the most that a multiprocessor does, of 4.
    """

    per_warp: float = 0.35
    per_sm: float = 2.4


ISSUE = Issue()


@dataclass(frozen=True, slots=True)
class Facts:
    """What a kernel's machine code says.

    Attributes:
        registers, warps, shared_bytes, programs: of the launch.
        in_flight: bytes of weights that a program has asked for when it first waits.
        instructions, waits: before the first request of a weight; waits are loads that others depend on.
        loop: instructions of an iteration.
    """

    registers: int
    warps: int
    shared_bytes: int
    programs: int
    in_flight: float
    instructions: int
    waits: int
    loop: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch with quantized weights.

    Attributes:
        name: of the launch.
        facts: of its kernel.
        iterations: of the loop, in all programs.
        memory_bytes: read from memory.
        drawn_bytes: rows that all programs draw from the L2 cache.
        shared_bytes: that pass through shared memory, in and out.
        partial_bytes: written and read where splits meet.
        tiles: that they meet in.
    """

    name: str
    facts: Facts
    iterations: int
    memory_bytes: float
    drawn_bytes: float
    shared_bytes: float
    partial_bytes: float
    tiles: int

    def streams(self, gpu: Gpu) -> dict[str, float]:
        """Microseconds that each stream takes by itself."""
        per_sm = gpu.programs_per_sm(self.facts)
        busy = gpu.multiprocessors * min(1.0, per_sm)
        resident = max(1.0, per_sm)
        clock = gpu.clock_ghz * 1e3
        drawn = self.memory_bytes + self.drawn_bytes + 2 * self.partial_bytes
        rate = min(ISSUE.per_sm, ISSUE.per_warp * self.facts.warps * resident)
        in_flight = self.facts.in_flight * resident
        return {
            "memory": self.memory_bytes / gpu.card.memory_tb_s / 1e6,
            "L2": drawn / gpu.l2_tb_s / 1e6,
            "multiprocessor": drawn / busy / ASSUMED.sm_bytes_per_clock / clock,
            "shared memory": self.shared_bytes / busy / ASSUMED.shared_bytes_per_clock / clock,
            "bytes in flight": self.memory_bytes / busy / in_flight * ASSUMED.memory_latency_us,
            "instructions": self.facts.loop * self.facts.warps * self.iterations / busy / rate / clock,
        }

    def us(self, gpu: Gpu) -> float:
        """The launch's whole time, its gap included."""
        clock = gpu.clock_ghz * 1e3
        start = self.facts.instructions * ASSUMED.cycles_per_instruction / clock
        start += self.facts.waits * ASSUMED.l2_latency_us + ASSUMED.memory_latency_us
        end = ASSUMED.drain_us
        if self.partial_bytes:
            read = self.partial_bytes / self.tiles / ASSUMED.sm_bytes_per_clock / clock
            end += ASSUMED.arrival_us + ASSUMED.l2_latency_us + read
        return ASSUMED.gap_us + start + max(self.streams(gpu).values()) + end


def loop_instructions(kernel: Compiled) -> int:
    """Instructions of the shortest way through the smallest loop with a product, which skips what is done once."""
    code = Code.of_sass(kernel.sass)
    best: int | None = None
    for end, following in enumerate(code.successors):
        for head in following:
            products = [place for place in code.find(r"HGMMA|HMMA") if head <= place <= end]
            if head <= end and products and (steps := _shortest(code, head, end)) is not None:
                best = steps if best is None else min(best, steps)
    if best is None:
        raise ValueError(f"{kernel.kernel} has no loop with a matrix product")
    return best


def _shortest(code: Code, head: int, end: int) -> int | None:
    distances, ahead = {head: 1}, [head]
    for place in ahead:
        if place == end:
            return distances[place]
        for following in code.successors[place]:
            if following not in distances and head <= following <= end:
                distances[following] = distances[place] + 1
                ahead.append(following)
    return None


def facts_of(kernel: Compiled) -> Facts:
    """Read from a compiled kernel."""
    before = latency.instructions_before(kernel)
    if before is None:
        raise ValueError(f"{kernel.kernel} never asks for its weight")
    return Facts(
        registers=kernel.registers,
        warps=kernel.num_warps,
        shared_bytes=kernel.shared_bytes,
        programs=kernel.programs,
        in_flight=latency.bytes_in_flight(kernel) / latency.programs_per_sm(kernel),
        instructions=before,
        waits=waits_before(kernel, before),
        loop=loop_instructions(kernel),
    )


def launches(capability: int, stored: str, batch: int) -> Iterator[Launch]:
    """A layer's projections and lm_head of a step of `batch` sequences, and the down projection where 90% is zero."""
    hidden, inner, vocabulary = PERSIMMON_8B.hidden_size, PERSIMMON_8B.intermediate_size, PERSIMMON_8B.vocab_size
    rows = max(16, batch)
    widths = {
        "query_key_value": ("norm + QKV", hidden, 3 * hidden),
        "attention_out": ("out + residual", hidden, hidden),
        "mlp_up": ("norm + up", hidden, inner),
        "mlp_down": ("down + residual", inner, hidden),
        **({"mlp_down_masked": (MASKED, inner, hidden)} if rows <= 16 else {}),
    }
    calls = {name: calls_of("packed_projection").CALLS[f"{name}_{stored}_fp16_{rows}"] for name in widths}
    calls[HEAD] = calls_of("packed_head").CALLS["int8 head, 1 row" if rows <= 16 else "int8 head, 64 rows"]
    kernels = {
        name: next(kernel for kernel in compiled if kernel.kernel.startswith("packed_"))
        for name, compiled in compile_calls(calls, capability).items()
    }
    for name, kernel in kernels.items():
        title, in_features, out_features = widths.get(name, (HEAD, hidden, vocabulary))
        form = FORMATS["int8" if name == HEAD else stored]
        columns = name.startswith("mlp_down")
        yield _launch(title, kernel, batch, (in_features, out_features), form, columns=columns)


def _launch(
    title: str, kernel: Compiled, batch: int, widths: tuple[int, int], stored: QuantizedFormat, *, columns: bool
) -> Launch:
    (in_features, out_features), facts = widths, facts_of(kernel)
    packing = Packing.of(stored, columns=columns)
    zeros = 0.9 if title == MASKED else 0.0
    numbers = in_features * out_features * packing.bits // 8
    scales = packing.nbytes((out_features, in_features)) - numbers
    added = "residual" in title
    splits = (4 * packing.outputs // 64) if added else 1
    tiles = facts.programs // splits
    drawn = tiles * batch * in_features * ITEM_BYTES
    return Launch(
        title,
        facts,
        iterations=facts.programs * -(-in_features // splits // 128),
        memory_bytes=numbers * (1 - zeros) + scales,
        drawn_bytes=drawn,
        # A byte of a number comes in and goes out; out of columns two at a time, from two rows in one bank.
        shared_bytes=numbers * (1 + (4 if columns else 1)) + 2 * drawn,
        partial_bytes=4 * splits * batch * out_features if added else 0,
        tiles=tiles,
    )


def predict(gpu: Gpu, stored: str, batch: int, step: Iterable[Launch], attention_us: float) -> list[dict[str, object]]:
    """A row for each launch, and for the step with and without zeros, of its predicted time and least time."""
    found: list[dict[str, object]] = []
    layers, totals = PERSIMMON_8B.num_hidden_layers, {"step": 0.0, "step, 90% zeros": 0.0}
    has_masked = False
    for launch in step:
        streams, us = launch.streams(gpu), launch.us(gpu)
        floor, limit = streams["memory"], max(streams, key=streams.__getitem__)
        shown = {"us": round(us, 1), "floor_us": round(floor, 1), "limit": limit}
        found.append({"card": gpu.card.name, "weights": stored, "batch": batch, "launch": launch.name, **shown})
        has_masked |= launch.name == MASKED
        for name in totals:
            skipped = {"step": MASKED, "step, 90% zeros": "down + residual"}[name]
            totals[name] += 0 if launch.name == skipped else us * (1 if launch.name == HEAD else layers)
    small = 4 + (2 * layers if batch > 16 else 0)
    for name, us in totals.items():
        if name == "step" or has_masked:
            total = us + layers * attention_us + small * ASSUMED.small_launch_us
            found.append(
                {"card": gpu.card.name, "weights": stored, "batch": batch, "launch": name, "us": round(total, 1)}
            )
    return found


def dequantizing_ms(gpu: Gpu, stored: str) -> float:
    """What a chunk of a prompt takes longer: all matrices of the layers read as stored and written in 16 bits."""
    hidden, inner, form = PERSIMMON_8B.hidden_size, PERSIMMON_8B.intermediate_size, FORMATS[stored]
    shapes = [(3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)]
    moved = sum(form.nbytes(shape) + shape[0] * shape[1] * ITEM_BYTES for shape in shapes)
    return PERSIMMON_8B.num_hidden_layers * (moved / gpu.card.memory_tb_s / 1e9 + 4 * ASSUMED.small_launch_us / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline_quantized", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON here")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("Triton interprets kernels in this process: set TRITON_INTERPRET=0")
    call = calls_of("decode_attention").CALLS["decode, blocks of 32"]
    [decode] = [kernel for kernel in compile_calls({"decode": call}, 90)["decode"] if "attention" in kernel.kernel]
    attention = {batch: attention_launch(decode, batch) for batch in BATCHES}
    code = {
        f"{capability} {title} {batch}": list(launches(capability, name, batch))
        for capability in sorted({gpu.capability for gpu in GPUS})
        for title, name in STORED.items()
        for batch in BATCHES
    }
    rows = [
        row
        for gpu in GPUS
        for title in STORED
        for batch in BATCHES
        for row in predict(gpu, title, batch, code[f"{gpu.capability} {title} {batch}"], attention[batch].us(gpu.card))
    ]
    print(f"predicted, not measured; sequences of {CONTEXT} tokens")
    for row in rows:
        print(" ", *row.values())
    dequantizing = {
        gpu.card.name: {title: round(dequantizing_ms(gpu, name), 1) for title, name in STORED.items()} for gpu in GPUS
    }
    if arguments.out:
        content = {
            "device": "none: predicted from machine code for sm_89 and sm_90",
            "context": CONTEXT,
            "assumptions": asdict(ASSUMED) | {"issue": asdict(ISSUE), "gpus": [asdict(gpu) for gpu in GPUS]},
            "attention_us": {
                gpu.card.name: {b: round(a.us(gpu.card), 1) for b, a in attention.items()} for gpu in GPUS
            },
            "code": {name: [asdict(launch) for launch in step] for name, step in code.items()},
            "predicted": rows,
            "dequantizing_ms": dequantizing,
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
