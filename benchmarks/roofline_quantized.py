"""Predicted times of a decode step of the 8B model with fewer bits, of weights and of the KV cache, from machine code.

    TRITON_INTERPRET=0 python -m benchmarks.roofline_quantized [--out FILE]

As `benchmarks.roofline`, whose assumptions it shares: nothing runs, and nothing was measured.  Unpacking takes
instructions, so there is a sixth stream: those of the loop, at the rate that the warps of a multiprocessor issue them;
in attention, whose programs take one item after the other, those around the loop too.
The RTX 4090 stands for cards of 24 GB, which are what quantized weights are for; its kernels are compiled for sm_89.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.floors import ITEM_BYTES, PERSIMMON_8B
from benchmarks.roofline import ASSUMED, CONTEXT, TILE_TOKENS, Card, waits_before
from persimmon.kernels.decode_work import SPLIT_TOKENS
from persimmon.kernels.packed_weight import Packing
from persimmon.kernels.quantized import QuantizedFormat
from tests.kernels.ahead_of_time import compile_calls
from tests.kernels.machine_code import latency
from tests.kernels.machine_code.compiled import Compiled
from tests.kernels.machine_code.instructions import Code
from tests.kernels.machine_code.tensors import Tensors, argument_names
from tests.kernels.production import calls_of
from tests.kernels.production_calls_packed_projection import FORMATS

RESULTS = Path(__file__).parent / "results" / "roofline_quantized_8b.json"
"""What `--out` wrote last; docs/design/gpu-kernels.md and `benchmarks.gpu` show it."""

BATCHES = (1, 16, 64)
STORED = {"int8": "int8", "int4, groups of 32": "int4_g32"}
"""What `--quantization` makes of a layer's matrices, by the name of the format among the production calls."""

CACHES = {"auto": ("decode, blocks of 32", 16), "int8": ("decode, int8", 8), "fp8_e4m3": ("decode, fp8", 8)}
"""By the value of --kv-cache-dtype: the production call, and the bits of a number."""

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
    """One launch that reads fewer bits.

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


def loop_instructions(kernel: Compiled, pattern: str = r"HGMMA|HMMA") -> list[int]:
    """Instructions of the shortest way through each loop with a matrix product, which skips what is done once.

    Args:
        kernel: a compiled one.
        pattern: what a loop must hold.

    Returns:
        One number for each loop, the smallest first; never empty.
    """
    code = Code.of_sass(kernel.sass)
    wanted = code.find(pattern)
    found = [
        steps
        for end, following in enumerate(code.successors)
        for head in following
        if head <= end
        and any(head <= place <= end for place in wanted)
        and (steps := _shortest(code, head, end)) is not None
    ]
    if not found:
        raise ValueError(f"{kernel.kernel} has no loop with {pattern}")
    return sorted(found)


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
        loop=loop_instructions(kernel)[0],
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
    calls[HEAD] = calls_of("head").CALLS["int8 head, 1 row" if rows <= 16 else "int8 head, 64 rows"]
    kernels = {
        name: next(kernel for kernel in compiled if kernel.kernel.startswith(("packed_", "_head")))
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


def attention(kernel: Compiled, batch: int, bits: int) -> Launch:
    """Decode attention of `batch` sequences of CONTEXT tokens over a cache of that many bits."""
    config, warps = PERSIMMON_8B, kernel.num_warps
    heads, splits, turns = batch * config.num_attention_heads, -(-CONTEXT // SPLIT_TOKENS), SPLIT_TOKENS // TILE_TOKENS
    code = Code.of_ptx(kernel.ptx)
    tensors = Tensors(code, argument_names(kernel.ttgir))
    copies = [place for place in code.find(r"cp\.async\.cg\.") if tensors.at(place) & {"k_cache", "v_cache"}]
    before = latency.instructions_before(kernel, "k_cache")
    if before is None:
        raise ValueError("decode attention never asks for its keys")
    scales = 4 * heads * CONTEXT if "cache_scales" in argument_names(kernel.ttgir) else 0
    read = 2 * heads * CONTEXT * config.head_dim * bits // 8 + scales
    loops = loop_instructions(kernel, r"LDGSTS")
    facts = Facts(
        registers=kernel.registers,
        warps=warps,
        shared_bytes=kernel.shared_bytes,
        programs=heads * splits,
        # All tiles but one, which the loop asks for: these are on their way when it begins.
        in_flight=16 * 32 * warps * len(copies) - 2 * TILE_TOKENS * config.head_dim * bits // 8,
        instructions=before,
        waits=waits_before(kernel, before),
        loop=loops[0] + (loops[-1] - loops[0]) // turns,
    )
    return Launch(
        "attention",
        facts,
        iterations=heads * splits * turns,
        memory_bytes=read,
        drawn_bytes=0,
        shared_bytes=2 * read,
        partial_bytes=4 * (config.head_dim + 2) * heads * splits,
        tiles=heads,
    )


def predict_attention(gpu: Gpu, cache: str, batch: int, launch: Launch) -> dict[str, object]:
    """Its predicted time, the least that its bytes take, and what limits it."""
    streams = launch.streams(gpu)
    shown = {"us": round(launch.us(gpu), 1), "floor_us": round(streams["memory"], 1)}
    return {
        "card": gpu.card.name,
        "cache": cache,
        "batch": batch,
        **shown,
        "limit": max(streams, key=streams.__getitem__),
    }


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


def decode_kernels(capability: int) -> dict[str, Compiled]:
    """The attention kernels of a decode step, by --kv-cache-dtype."""
    calls = {cache: calls_of("decode_attention").CALLS[call] for cache, (call, _) in CACHES.items()}
    return {
        cache: next(kernel for kernel in kernels if kernel.kernel == "_decode_attention")
        for cache, kernels in compile_calls(calls, capability).items()
    }


def predictions(
    code: Mapping[str, Sequence[Launch]], attended: Mapping[str, Launch]
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """`predict` and `predict_attention` of all cards; steps have the network's own cache.

    Args:
        code: by "capability weights batch".
        attended: by "capability cache batch".
    """
    rows = [
        row
        for gpu in GPUS
        for title in STORED
        for batch in BATCHES
        for row in predict(
            gpu,
            title,
            batch,
            code[f"{gpu.capability} {title} {batch}"],
            attended[f"{gpu.capability} auto {batch}"].us(gpu),
        )
    ]
    caches = [
        predict_attention(gpu, cache, batch, attended[f"{gpu.capability} {cache} {batch}"])
        for gpu in GPUS
        for cache in CACHES
        for batch in BATCHES
    ]
    return rows, caches


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline_quantized", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON here")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("Triton interprets kernels in this process: set TRITON_INTERPRET=0")
    capabilities = sorted({gpu.capability for gpu in GPUS})
    attended = {
        f"{capability} {cache} {batch}": attention(kernel, batch, CACHES[cache][1])
        for capability in capabilities
        for cache, kernel in decode_kernels(capability).items()
        for batch in BATCHES
    }
    code = {
        f"{capability} {title} {batch}": list(launches(capability, name, batch))
        for capability in capabilities
        for title, name in STORED.items()
        for batch in BATCHES
    }
    rows, caches = predictions(code, attended)
    print(f"predicted, not measured; sequences of {CONTEXT} tokens")
    for row in [*rows, *caches]:
        print(" ", *row.values())
    dequantizing = {
        gpu.card.name: {title: round(dequantizing_ms(gpu, name), 1) for title, name in STORED.items()} for gpu in GPUS
    }
    if arguments.out:
        content = {
            "device": "none: predicted from machine code for sm_89 and sm_90",
            "context": CONTEXT,
            "assumptions": asdict(ASSUMED) | {"issue": asdict(ISSUE), "gpus": [asdict(gpu) for gpu in GPUS]},
            "code": {name: [asdict(launch) for launch in step] for name, step in code.items()},
            "attention_code": {name: asdict(launch) for name, launch in attended.items()},
            "predicted": rows,
            "attention": caches,
            "dequantizing_ms": dequantizing,
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
