"""What the card can do: copy and read rates of its memory, read rate of its L2 cache, rate of its matrix units.

Every share that the other sections print is a share of these.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from benchmarks.gpu import targets
from benchmarks.gpu.inputs import normal
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from benchmarks.gpu.timing import time_variants
from persimmon.kernels.launch import num_sms

COPIED = 4096
"""Elements that one program takes at a time."""

L2_TURNS = 64
"""Times that one launch reads what the L2 cache holds; all but the first find it there."""


@triton.jit  # type: ignore[untyped-decorator]
def _copy_kernel(target, source, elements, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < elements
    tl.store(target + places, tl.load(source + places, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["turns"])  # type: ignore[untyped-decorator]
def _read_kernel(sums, source, elements, turns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Each program adds up its share, so that every load is used and little is written.

    Past L1 (.cg); in each turn a program reads another's share, so that no load can be moved out of the loop.
    """
    total = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(elements, BLOCK)
    for turn in range(turns):
        first = (tl.program_id(0) + turn) % tl.num_programs(0)
        places = first.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        for _ in range(first, blocks, tl.num_programs(0)):
            total += tl.load(source + places, mask=places < elements, other=0.0, cache_modifier=".cg").to(tl.float32)
            places += tl.num_programs(0) * BLOCK
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    _copy_kernel[(triton.cdiv(source.numel(), COPIED),)](target, source, source.numel(), BLOCK=COPIED)


def _read(sums: torch.Tensor, source: torch.Tensor, turns: int) -> None:
    _read_kernel[(sums.numel(),)](sums, source, source.numel(), turns, BLOCK=COPIED, num_warps=8)


def run(setting: Setting, report: Report) -> None:
    """What memory, cache and matrix units reach on this card, now."""
    report.attempt("memory", lambda: _memory(setting, report), seconds=3)
    for dtype in (torch.float16, torch.bfloat16):
        report.attempt(f"matmul in {dtype}", partial(_matmul, setting, report, dtype))


def _memory(setting: Setting, report: Report) -> None:
    suite, device, generator = setting.suite, setting.device, setting.generator()
    source = normal(generator, suite.copy_bytes // torch.float16.itemsize, dtype=torch.float16)
    target = torch.empty_like(source)
    sums = torch.empty(8 * num_sms(device) if setting.on_gpu else 2, device=device)
    cached = source[: suite.l2_bytes // source.itemsize]
    turns = L2_TURNS if setting.on_gpu else 2
    timed = time_variants(
        {
            "torch copy": [partial(target.copy_, source)],
            "Triton copy": [partial(_copy, target, source)],
            "Triton read": [partial(_read, sums, source, 1)],
            "Triton read of L2": [partial(_read, sums, cached, turns)],
        },
        device,
        10 * suite.seconds_per_figure,
    )
    moved = {
        "torch copy": 2 * source.nbytes,
        "Triton copy": 2 * source.nbytes,
        "Triton read": source.nbytes,
        "Triton read of L2": cached.nbytes * turns,
    }
    rates = {name: moved[name] / timing.seconds for name, timing in timed.items()}
    for name, timing in timed.items():
        report.row("memory", what=name, **timing.columns, gb_s=rates[name] / 1e9)
    report.figure(targets.COPY, max(rates["torch copy"], rates["Triton copy"]))
    report.figure(targets.READ, rates["Triton read"])
    report.figure(targets.L2_READ, rates["Triton read of L2"])


def _matmul(setting: Setting, report: Report, dtype: torch.dtype) -> None:
    suite, generator = setting.suite, setting.generator()
    size = suite.matmul_size
    one, other = (normal(generator, size, size, dtype=dtype) for _ in range(2))
    out = torch.empty_like(one)
    product = {"matmul": [partial(torch.mm, one, other, out=out)]}
    timing = time_variants(product, setting.device, 10 * suite.seconds_per_figure)["matmul"]
    rate = 2 * size**3 / timing.seconds
    report.row("matmul", what=f"{dtype} {size}^3", **timing.columns, tflop_s=rate / 1e12)
    report.figure(targets.MATMUL if dtype == torch.float16 else targets.MATMUL_BFLOAT16, rate)
