"""Weights that C rounds to 8 or 4 bits, on all threads; weight_rounding.h says how.  Knows no files and no policy."""

import ctypes
from collections.abc import Sequence

import torch

from persimmon.kernels.cpu import library
from persimmon.kernels.quantized import QuantizedMatrix

_TYPES = {torch.float32: library.FLOAT32, torch.float16: library.FLOAT16, torch.bfloat16: library.BFLOAT16}


def available() -> bool:
    """Whether there is a build of the C kernels for this processor."""
    return bool(library.builds())


def round_weights(
    weight: torch.Tensor, result: QuantizedMatrix, steps: Sequence[float], refits: int, build: str | None = None
) -> int | None:
    """Rounds a matrix; every group gets the scale of least squared error among those that are tried.

    Args:
        weight: [out, in] floating point, on the CPU.
        result: of that shape, contiguous and on the CPU, whose numbers and scales are written.
        steps: multiples of the scale that a group's weight of the largest magnitude may stand for, negated.
        refits: how often the scale of least squares for the numbers at hand is tried after them.
        build: of the C kernels; None for the fastest.

    Returns:
        The first row that has no finite scale, after which `result` holds nothing of use; None where all have one.

    Raises:
        KernelsUnavailableError: the build was compiled from other sources.
    """
    if weight.dtype not in _TYPES:
        weight = weight.float()
    weight = weight.contiguous()
    rows, columns = weight.shape
    failed, tried = ctypes.c_int64(rows), (ctypes.c_double * len(steps))(*steps)
    rounding = library.WeightRounding(
        weights=weight.data_ptr(),
        numbers=result.numbers.data_ptr(),
        scales=result.scales.data_ptr(),
        steps=ctypes.addressof(tried),
        failed=ctypes.addressof(failed),
        rows=rows,
        in_=columns,
        group=result.group_size,
        type=_TYPES[weight.dtype],
        scale_type=_TYPES[result.scales.dtype],
        bits=result.bits,
        step_count=len(steps),
        refits=refits,
    )
    code = library.load(build or library.builds()[0])
    code.persimmon_round_weights(ctypes.byref(rounding), torch.get_num_threads())
    return None if failed.value == rows else failed.value
