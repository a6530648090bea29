"""Numbers of a matrix -> integers of 8 or 4 bits and their scales, each rounded to the nearest."""

import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.kernels.quantized import pack_int4


def round_to_nearest(weight: torch.Tensor, form: QuantizedFormat) -> QuantizedMatrix:
    """A matrix, or some of its rows, in a quantized format.

    Args:
        weight: [out, in], floating point.
        form: its group size divides `in`.
    """
    rows, columns = weight.shape
    group_size = form.group_size or columns
    limit = (1 << (form.bits - 1)) - 1
    groups = weight.float().view(rows, -1, group_size)
    smallest = torch.finfo(form.scale_dtype).tiny
    scales = (groups.abs().amax(2) / limit).clamp_min(smallest).to(form.scale_dtype)
    integers = (groups / scales.float()[:, :, None]).round_().clamp_(-limit - 1, limit).to(torch.int8)
    integers = integers.view(rows, columns)
    numbers = integers if form.bits == 8 else pack_int4(integers)
    return QuantizedMatrix(numbers=numbers, scales=scales, bits=form.bits, group_size=group_size)
