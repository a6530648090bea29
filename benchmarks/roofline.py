"""Predicted time of each launch of a decode step of the 8B model on an H100 and an H200, from its machine code.

    TRITON_INTERPRET=0 python -m benchmarks.roofline [--out FILE]

Nothing runs: the kernels are compiled for sm_90 here, without a GPU.  A launch takes, one after the other:

    the gap before it,
    its start: instructions and waits for other loads before the first request, and the latency of that request,
    the slowest of five streams: bytes from memory; what all programs draw from the L2 cache; what a multiprocessor
        draws; what passes through its shared memory; bytes asked for at once, once a latency (Little's law),
    its end: the last stores, and where splits meet, the arrival and what the last program reads.

The rates in `CARDS` and `Assumptions` are assumptions, which `python -m benchmarks.gpu` measures.
"""

import argparse
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.floors import ITEM_BYTES, PERSIMMON_8B
from persimmon.kernels.decode_attention import AHEAD_BYTES
from persimmon.kernels.decode_work import SPLIT_TOKENS
from persimmon.kernels.projection import ATTENTION_OUT, MLP_DOWN, WIDE, ProjectionConfig
from tests.kernels.ahead_of_time import compile_calls
from tests.kernels.machine_code import latency
from tests.kernels.machine_code.compiled import Compiled
from tests.kernels.machine_code.instructions import Code
from tests.kernels.machine_code.tensors import Tensors, argument_names
from tests.kernels.production import calls_of

RESULTS = Path(__file__).parent / "results" / "roofline_8b.json"
"""What `--out` wrote last; docs/design/gpu-kernels.md shows it."""

CONTEXT = 512
"""Tokens of each sequence."""

TILE_TOKENS = 32
"""Tokens of an iteration of decode attention: a block."""


DOWN, DOWN_MASKED = "down + residual", "down + residual, 90% zeros"
"""The last launch of a layer, where no activation is zero and where 90% are."""

READERS = {"projection_kernel", "_head_kernel", "_decode_attention"}
"""Kernels that read weights or pages, of those that a call launches."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU: bytes that it copies a second (read and written ones together)."""

    name: str
    memory_tb_s: float


CARDS = (Card("H100", 3.0), Card("H200", 4.3))


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What both cards are taken to do; none of it was measured here.

    Attributes:
        l2_tb_s: what all multiprocessors together draw from the L2 cache; published figures are 5.5 to 7.
        clock_ghz: of the multiprocessors.
        sm_bytes_per_clock: what one draws from the L2 cache, of 64.
        shared_bytes_per_clock: what its shared memory takes or gives.
        memory_latency_us: of a request under load.
        l2_latency_us: of a request for what the launch before has left in the L2 cache.
        cycles_per_instruction: of a lone warp before the first request.
        gap_us: between two nodes of a CUDA graph.
        arrival_us: a fence and an atomic addition.
        drain_us: from the last load to the end of the launch.
        small_launch_us: a launch that moves next to nothing, its gap included.
    """

    l2_tb_s: float = 6.0
    clock_ghz: float = 1.755
    sm_bytes_per_clock: int = 48
    shared_bytes_per_clock: int = 128
    memory_latency_us: float = 0.8
    l2_latency_us: float = 0.4
    cycles_per_instruction: int = 4
    gap_us: float = 1.2
    arrival_us: float = 1.0
    drain_us: float = 0.3
    small_launch_us: float = 2.5


ASSUMED = Assumptions()


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: what it moves, and how its machine code goes about it.

    Attributes:
        name: of the launch.
        memory_bytes: read from memory.
        l2_bytes: drawn from the L2 cache, what comes from memory included.
        shared_bytes: that pass through shared memory, in and out, on all multiprocessors.
        in_flight: bytes that a multiprocessor has asked for while it waits.
        busy: multiprocessors that have work.
        instructions, waits: before the first request of a weight or a page; waits are loads that others depend on.
        merged_bytes: what the last program of a tile reads; 0 where no splits meet.
        prefetches: whether programs without work bring the next weight into the L2 cache.
    """

    name: str
    memory_bytes: float
    l2_bytes: float
    shared_bytes: float
    in_flight: float
    busy: float
    instructions: int
    waits: int
    merged_bytes: float = 0.0
    prefetches: bool = False

    def streams(self, card: Card) -> dict[str, float]:
        """Microseconds that each stream takes by itself."""
        clock = ASSUMED.clock_ghz * 1e3
        return {
            "memory": self.memory_bytes / card.memory_tb_s / 1e6,
            "L2": self.l2_bytes / ASSUMED.l2_tb_s / 1e6,
            "multiprocessor": self.l2_bytes / self.busy / ASSUMED.sm_bytes_per_clock / clock,
            "shared memory": self.shared_bytes / self.busy / ASSUMED.shared_bytes_per_clock / clock,
            "bytes in flight": self.memory_bytes / self.busy / self.in_flight * ASSUMED.memory_latency_us,
        }

    def us(self, card: Card) -> float:
        """The launch's whole time, its gap included."""
        instructions = self.instructions * ASSUMED.cycles_per_instruction / ASSUMED.clock_ghz / 1e3
        start = instructions + self.waits * ASSUMED.l2_latency_us + ASSUMED.memory_latency_us
        end = ASSUMED.drain_us
        if self.merged_bytes:
            read = self.merged_bytes / ASSUMED.sm_bytes_per_clock / ASSUMED.clock_ghz / 1e3
            end += ASSUMED.arrival_us + ASSUMED.l2_latency_us + read
        return ASSUMED.gap_us + start + max(self.streams(card).values()) + end


def waits_before(kernel: Compiled, place: int) -> int:
    """The longest chain of loads that instructions before a place wait for, each needing the one before it."""
    behind: dict[str, int] = {}
    longest = 0
    for instruction in Code.of_sass(kernel.sass).instructions[: place + 1]:
        first, _, others = instruction.text.partition(",")
        registers = re.findall(r"U?[RP]\d+", f"{others} {instruction.predicate}")
        waited = max((behind.get(register, 0) for register in registers), default=0)
        longest = max(longest, waited)
        if written := re.fullmatch(r"\S+ (U?[RP])(\d+)", first):
            width = {"64": 2, "128": 4}.get(first.split()[0].rpartition(".")[2], 1)
            loads = first.startswith("LDG.")
            for number in range(int(written[2]), int(written[2]) + width):
                behind[f"{written[1]}{number}"] = waited + loads
    return longest


def projection_launch(
    name: str, kernel: Compiled, rows: int, widths: tuple[int, int], config: ProjectionConfig, zeros: float = 0.0
) -> Launch:
    """A projection of `rows` rows from widths[0] to widths[1] features."""
    in_features, out_features = widths
    weight = in_features * out_features * ITEM_BYTES
    tiles = kernel.programs // config.splits
    drawn = tiles * rows * in_features * ITEM_BYTES
    partials = 4 * config.splits * rows * out_features if config.splits > 1 else 0
    instructions = latency.instructions_before(kernel)
    if instructions is None:
        raise ValueError(f"{name} never asks for its weight")
    per_sm = min(1.0, kernel.programs / latency.MULTIPROCESSORS)
    return Launch(
        name,
        memory_bytes=weight * (1 - zeros),
        l2_bytes=weight * (1 - zeros) + drawn + 2 * partials,
        # A row of the weight that is not read fills its place with zeros.
        shared_bytes=2 * (weight + drawn),
        in_flight=latency.bytes_in_flight(kernel) * (1 - zeros) / per_sm,
        busy=latency.MULTIPROCESSORS * per_sm,
        instructions=instructions,
        waits=waits_before(kernel, instructions),
        merged_bytes=partials / tiles,
    )


def attention_launch(kernel: Compiled, rows: int) -> Launch:
    """Decode attention of `rows` sequences of CONTEXT tokens."""
    config = PERSIMMON_8B
    read = 2 * rows * CONTEXT * config.hidden_size * ITEM_BYTES
    work = rows * config.num_attention_heads * -(-CONTEXT // SPLIT_TOKENS)
    resident = latency.programs_per_sm(kernel) * latency.MULTIPROCESSORS
    programs = min(work, resident)
    busy = min(latency.MULTIPROCESSORS, programs)
    code = Code.of_ptx(kernel.ptx)
    tensors = Tensors(code, argument_names(kernel.ttgir))
    copies = [place for place in code.find(r"cp\.async\.cg\.") if tensors.at(place) & {"k_cache", "v_cache"}]
    # All tiles but one, which the loop asks for: these are on their way when it begins.
    asked = 16 * 32 * kernel.num_warps * len(copies) - 2 * TILE_TOKENS * config.head_dim * ITEM_BYTES
    place = latency.instructions_before(kernel, "k_cache")
    if place is None:
        raise ValueError("decode attention never asks for its keys")
    return Launch(
        "attention",
        memory_bytes=read,
        l2_bytes=read,
        shared_bytes=2 * read,
        in_flight=asked * programs / busy,
        busy=busy,
        instructions=place,
        waits=waits_before(kernel, place),
        merged_bytes=4 * (config.head_dim + 2) * -(-CONTEXT // SPLIT_TOKENS),
        prefetches=work < resident,
    )


def launches(rows: int) -> Iterator[Launch]:
    """A layer's launches and lm_head of a step of `rows` sequences, and the down projection where 90% is zero."""
    hidden, inner, vocabulary = PERSIMMON_8B.hidden_size, PERSIMMON_8B.intermediate_size, PERSIMMON_8B.vocab_size
    bucket = max(16, rows)
    names = ["query_key_value", "attention_out", "mlp_up", "mlp_down", *(["mlp_down_masked"] if rows <= 16 else [])]
    calls = {name: calls_of("projection").CALLS[f"{name}_fp16_{bucket}"] for name in names}
    calls["head"] = calls_of("head").CALLS["head, 1 row" if rows <= 16 else "head, 64 rows"]
    calls["attention"] = calls_of("decode_attention").CALLS["decode, blocks of 32"]
    kernels = {
        name: next(kernel for kernel in compiled if kernel.kernel in READERS)
        for name, compiled in compile_calls(calls, 90).items()
    }
    yield projection_launch("norm + QKV", kernels["query_key_value"], rows, (hidden, 3 * hidden), WIDE)
    yield attention_launch(kernels["attention"], rows)
    yield projection_launch("out + residual", kernels["attention_out"], rows, (hidden, hidden), ATTENTION_OUT)
    yield projection_launch("norm + up", kernels["mlp_up"], rows, (hidden, inner), WIDE)
    yield projection_launch(DOWN, kernels["mlp_down"], rows, (inner, hidden), MLP_DOWN)
    if rows <= 16:
        masked = kernels["mlp_down_masked"]
        yield projection_launch(DOWN_MASKED, masked, rows, (inner, hidden), MLP_DOWN, zeros=0.9)
    yield projection_launch("lm_head", kernels["head"], rows, (hidden, vocabulary), WIDE)


def predict(card: Card, rows: int, step: list[Launch]) -> list[dict[str, object]]:
    """A row for each launch, and for the step with and without zeros, of its predicted time and share of the least."""
    found: list[dict[str, object]] = []
    totals: dict[str, list[float]] = {}
    ahead = 0.0

    def add(name: str, us: float, floor: float, limit: str) -> None:
        shown = {"us": round(us, 1), "floor_us": round(floor, 1), "share": round(floor / us, 2), "limit": limit}
        found.append({"card": card.name, "batch": rows, "launch": name, **shown})

    for launch in step:
        streams = launch.streams(card)
        us, floor, limit = launch.us(card), streams["memory"], max(streams, key=streams.__getitem__)
        if ahead:  # part of the weight is in the L2 cache
            us -= max(streams.values()) - max(floor - ahead / card.memory_tb_s / 1e6, streams["L2"])
        ahead = 0.0
        if launch.prefetches:
            ahead = min(AHEAD_BYTES, (us - ASSUMED.gap_us - floor) * card.memory_tb_s * 1e6)
        add(launch.name, us, floor, limit)
        times = 1 if launch.name == "lm_head" else PERSIMMON_8B.num_hidden_layers
        only = {DOWN: ["step"], DOWN_MASKED: ["step, 90% zeros"]}.get(launch.name, ["step", "step, 90% zeros"])
        for name in only:
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += times * us
            total[1] += times * floor
    # The work list, the embedding, the last LayerNorm, the merge of draws; above 16 rows two LayerNorms a layer.
    small = 4 + (2 * PERSIMMON_8B.num_hidden_layers if rows > 16 else 0)
    for name, (us, floor) in totals.items():
        if name == "step" or any(launch.name == DOWN_MASKED for launch in step):
            add(name, us + small * ASSUMED.small_launch_us, floor, "")
    return found


def _place(row: dict[str, object]) -> tuple[object, ...]:
    return row["card"], row["batch"], row["launch"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, metavar="FILE", help="an older --out, to compare with")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write JSON here")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("Triton interprets kernels in this process: set TRITON_INTERPRET=0")
    steps = {rows: list(launches(rows)) for rows in (1, 8, 64)}
    rows = [row for card in CARDS for batch, step in steps.items() for row in predict(card, batch, step)]
    if arguments.before:
        older = {_place(row): row["us"] for row in json.loads(arguments.before.read_text())["predicted"]}
        rows = [row | {"before_us": older[_place(row)]} for row in rows]
    print(f"predicted, not measured; sequences of {CONTEXT} tokens")
    for row in rows:
        print(
            f"  {row['card']} batch {row['batch']:>2} {row['launch']:<28} {row['us']:8.1f} us, at least "
            f"{row['floor_us']:8.1f}: {row['share']:4.0%} {row['limit']}"
        )
    if arguments.out:
        content = {
            "device": "none: predicted from machine code for sm_90",
            "context": CONTEXT,
            "assumptions": asdict(ASSUMED) | {card.name: card.memory_tb_s for card in CARDS},
            "code": {batch: [asdict(launch) for launch in step] for batch, step in steps.items()},
            "predicted": rows,
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
