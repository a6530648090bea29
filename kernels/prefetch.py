"""Bringing weights into the L2 cache before the loads that need them.

Knows no kernel.  A prefetch changes no result and returns nothing; Triton's interpreter has no cache and skips it.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

LINE_BYTES = 128
"""Of the L2 cache of sm_80 and later."""


@triton.jit
def prefetch(pointers):
    """Asks for the cache line of each of these pointers, and does not wait for it.

    PTX ISA, prefetch: "brings the cache line containing the specified address" into the L2 cache.
    """
    if is_cuda():
        tl.inline_asm_elementwise("prefetch.global.L2 [$1];", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch_lines(start, lines, first, step, COUNT: tl.constexpr, LINE: tl.constexpr = LINE_BYTES):
    """Asks for COUNT of the `lines` lines at `start`, from line `first` on, and so on every `step` lines."""
    start = start.to(tl.pointer_type(tl.int8))
    for line in range(first, lines, step):
        prefetch(start + tl.minimum(line + tl.arange(0, COUNT), lines - 1).to(tl.int64) * LINE)
