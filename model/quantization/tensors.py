"""Matrices that become quantized a few rows at a time, those of a checkpoint, or that are made of random integers.

The memory that this takes beyond the result is that of some rows in float32, never of a whole matrix.
"""

from collections.abc import Iterator

import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.model.errors import CheckpointError
from persimmon.model.quantization.rounding import quantize_into
from persimmon.model.shard import WHOLE, Part
from persimmon.model.stored import StoredTensor

_NUMBERS_AT_ONCE = 1 << 20
"""Numbers of a matrix that are read at once, 4 MiB in float32."""


def quantize_rows(source: StoredTensor, form: QuantizedFormat, name: str, part: Part = WHOLE) -> QuantizedMatrix:
    """Some rows and columns of a matrix [out, in] of a file in a quantized format, on the CPU, by default all.

    Some rows are read and rounded at a time, each as a whole, so a part has the numbers that it has among all.

    Args:
        source: floating point.
        form: its group size divides `in`.
        name: of the tensor, for messages.
        part: what is wanted of it; its columns begin and end at the border of a group.

    Raises:
        CheckpointError: the file cannot be read, or a weight is not finite or too large for its scale.
    """
    columns = source.shape[1]
    rows = range(source.shape[0]) if part.rows is None else part.rows
    own_columns = columns if part.columns is None else len(part.columns)
    result = QuantizedMatrix.empty((len(rows), own_columns), form)
    for start, stop in slices(len(rows), columns):
        into = result.rows(start, stop)
        whole = into if part.columns is None else QuantizedMatrix.empty((stop - start, columns), form)
        try:
            first_row = rows.start + start
            quantize_into(source.rows(first_row, rows.start + stop), whole, first_row=first_row)
        except CheckpointError as error:
            raise CheckpointError(f"{source.region}: tensor {name}: {error}") from None
        if part.columns is not None:
            own = whole.columns(part.columns.start, part.columns.stop)
            into.numbers.copy_(own.numbers)
            into.scales.copy_(own.scales)
    return result


def slices(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of the rows of a matrix that are read at once."""
    step = max(1, _NUMBERS_AT_ONCE // columns)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def random_matrix(shape: tuple[int, int], form: QuantizedFormat, generator: torch.Generator) -> QuantizedMatrix:
    """A matrix of random integers whose weights have mean 0 and deviation 0.02, to measure speed.

    Its numbers are uniform, not normal: random bits make them in seconds for billions of weights.

    Args:
        shape: (out, in).
        form: its format.
        generator: of the device where it is made.
    """
    result = QuantizedMatrix.empty(shape, form, generator.device)
    # The lowest bit of each is set, so that numbers are odd: -127 to 127 or -7 to 7, whose mean is zero.
    odd, limit = (0x01, 1 << 7) if form.bits == 8 else (0x11, 1 << 3)
    _fill_with_bits(result.numbers, generator)
    result.numbers.bitwise_or_(odd)
    deviation = ((limit**2 - 1) / 3) ** 0.5
    result.scales.fill_(0.02 / deviation)
    return result


def _fill_with_bits(numbers: torch.Tensor, generator: torch.Generator) -> None:
    """Random bytes, drawn eight at a time."""
    flat = numbers.view(-1).view(torch.uint8)
    whole = len(flat) // 8 * 8
    flat[:whole].view(torch.int64).random_(-(2**63), None, generator=generator)
    flat[whole:].random_(0, 256, generator=generator)
