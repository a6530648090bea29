"""What the card can do: copy and read rates of its memory, and the rate of its matrix units.

Every share that the other sections print is a share of these.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from benchmarks.gpu.inputs import normal
from benchmarks.gpu.report import Report
from benchmarks.gpu.suite import Setting
from benchmarks.gpu.timing import time_variants
from persimmon.kernels.launch import num_sms

COPIED = 4096
"""Elements that one program takes at a time."""

COPY, READ, MATMUL = "copy bytes/s", "read bytes/s", "float16 matmul flop/s"


@triton.jit  # type: ignore[untyped-decorator]
def _copy_kernel(target, source, elements, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < elements
    tl.store(target + places, tl.load(source + places, mask=inside), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _read_kernel(sums, source, elements, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Each program adds up its share, so that nothing is read in vain and hardly anything is written."""
    total = tl.zeros([BLOCK], tl.float32)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    for _ in range(tl.program_id(0), tl.cdiv(elements, BLOCK), tl.num_programs(0)):
        total += tl.load(source + places, mask=places < elements, other=0.0).to(tl.float32)
        places += tl.num_programs(0) * BLOCK
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    _copy_kernel[(triton.cdiv(source.numel(), COPIED),)](target, source, source.numel(), BLOCK=COPIED)


def _read(sums: torch.Tensor, source: torch.Tensor) -> None:
    _read_kernel[(sums.numel(),)](sums, source, source.numel(), BLOCK=COPIED, num_warps=8)


def run(setting: Setting, report: Report) -> None:
    """What memory and matrix units reach on this card, now."""
    suite, device, generator = setting.suite, setting.device, setting.generator()
    with report.attempt("memory"):
        elements = suite.copy_bytes // torch.float16.itemsize
        source = normal(generator, elements, dtype=torch.float16)
        target = torch.empty_like(source)
        programs = 8 * num_sms(device) if setting.on_gpu else 2
        sums = torch.empty(programs, device=device)
        timed = time_variants(
            {
                "torch copy": [partial(target.copy_, source)],
                "Triton copy": [partial(_copy, target, source)],
                "Triton read": [partial(_read, sums, source)],
            },
            device,
            10 * suite.seconds_per_figure,
        )
        moved = {"torch copy": 2 * source.nbytes, "Triton copy": 2 * source.nbytes, "Triton read": source.nbytes}
        rates = {name: moved[name] / timing.seconds for name, timing in timed.items()}
        for name, timing in timed.items():
            report.row("memory", what=name, **timing.columns, gb_s=rates[name] / 1e9)
        report.figure(COPY, max(rates["torch copy"], rates["Triton copy"]))
        report.figure(READ, rates["Triton read"])
        del source, target
    for dtype in (torch.float16, torch.bfloat16):
        with report.attempt(f"matmul in {dtype}"):
            size = suite.matmul_size
            one, other = (normal(generator, size, size, dtype=dtype) for _ in range(2))
            out = torch.empty_like(one)
            timing = time_variants(
                {"matmul": [partial(torch.mm, one, other, out=out)]}, device, 10 * suite.seconds_per_figure
            )["matmul"]
            rate = 2 * size**3 / timing.seconds
            name = str(dtype).removeprefix("torch.")
            report.row("matmul", what=f"{name} {size}^3", **timing.columns, tflop_s=rate / 1e12)
            report.figure(f"{name} matmul flop/s", rate)
