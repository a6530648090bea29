"""How much of the weights a launch has asked for while it waits, and how soon it asks: counted in PTX and SASS.

For an H100 or H200 (sm_90).  What the memory then delivers only a GPU can show.
"""

import re

from tests.kernels.machine_code.compiled import Compiled, Matrix
from tests.kernels.machine_code.instructions import Code
from tests.kernels.machine_code.tensors import Tensors, argument_names

MULTIPROCESSORS = 132
SHARED_BYTES = 228 * 1024
"""Of a multiprocessor; a program takes 1 KiB besides its own."""

_SHARED_BYTES_BESIDES = 1024
_SCHEDULERS, _REGISTERS_OF_A_SCHEDULER, _MAX_WARPS = 4, 16384, 64
_COPY = re.compile(r"cp\.async\.c[ag]\.\S+ \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)")
_PTX_REQUEST = r"cp\.async\.c[ag]\.|prefetch\.global"
_SASS_REQUEST = r"LDGSTS|CCTL\.E\.PF"


PROJECTIONS = [
    (projection, rows)
    for projection in ("query_key_value", "mlp_up", "attention_out", "mlp_down")
    for rows in (16, 32, 64)
]
MIN_BYTES_IN_FLIGHT = 40 * 1024
"""Of weights, for each multiprocessor: 4.3 TB/s, an H200's copy rate, times a latency of 0.8 to 1 us is 26 to 33 KB."""


def projection_kernel(matrix: Matrix, projection: str, rows: int) -> Compiled:
    """The kernel of a projection of that many rows in float16, without the norm before it."""
    return matrix[90, "projection", f"{projection}_fp16_{rows}"][-1]


def programs_per_sm(kernel: Compiled) -> float:
    """Programs of the launch on a multiprocessor, on average; at most what registers, warps and shared memory allow.

    Registers are given to a warp in steps of 8 a thread (CUDA C++ Programming Guide, compute capability 9.0).
    """
    registers = -(-kernel.registers // 8) * 8
    warps = min(_MAX_WARPS, _SCHEDULERS * (_REGISTERS_OF_A_SCHEDULER // (32 * registers)))
    possible = min(warps // kernel.num_warps, SHARED_BYTES // (kernel.shared_bytes + _SHARED_BYTES_BESIDES))
    return min(possible, kernel.programs / MULTIPROCESSORS)


def bytes_in_flight(kernel: Compiled, tensor: str = "weight") -> float:
    """Bytes of a tensor that a multiprocessor's programs have asked for when they first wait for a copy."""
    code = Code.of_ptx(kernel.ptx)
    tensors = Tensors(code, argument_names(kernel.ttgir))
    waits = code.find(r"cp\.async\.wait_")
    before = [
        place for place in code.find(_COPY.pattern) if place < min(waits, default=0) and tensors.at(place) == {tensor}
    ]
    sizes = [int(found[1], 0) for place in before if (found := _COPY.match(code.instructions[place].text))]
    return sum(sizes) * 32 * kernel.num_warps * programs_per_sm(kernel)


def instructions_before(kernel: Compiled, tensor: str = "weight") -> int | None:
    """Instructions of machine code before the first one that asks for a part of a tensor; None if there is none.

    The assembler keeps the order of asynchronous copies and prefetches, so the place of the first one of the tensor
    among all of them in PTX is its place among them in SASS.
    """
    ptx, sass = Code.of_ptx(kernel.ptx), Code.of_sass(kernel.sass)
    tensors = Tensors(ptx, argument_names(kernel.ttgir))
    requested = [tensors.at(place) == {tensor} for place in ptx.find(_PTX_REQUEST)]
    return sass.find(_SASS_REQUEST)[requested.index(True)] if True in requested else None
