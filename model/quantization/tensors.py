"""Matrices that become quantized a few rows at a time, those of a checkpoint, or that are made of random integers.

The memory that this takes beyond the result is that of some rows in float32, never of a whole matrix.
"""

from collections.abc import Iterator

import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.model.errors import CheckpointError
from persimmon.model.quantization.rounding import quantize_into
from persimmon.model.stored import StoredTensor

_NUMBERS_AT_ONCE = 1 << 20
"""Numbers of a matrix that are read at once, 4 MiB in float32."""


def quantize_rows(source: StoredTensor, form: QuantizedFormat, name: str) -> QuantizedMatrix:
    """A matrix [out, in] of a file in a quantized format, on the CPU; some rows are read and rounded at a time.

    Args:
        source: floating point.
        form: its group size divides `in`.
        name: of the tensor, for messages.

    Raises:
        CheckpointError: the file cannot be read, or a weight is not finite or too large for its scale.
    """
    rows, columns = source.shape
    result = QuantizedMatrix.empty((rows, columns), form)
    for start, stop in slices(rows, columns):
        try:
            quantize_into(source.rows(start, stop), result.rows(start, stop), first_row=start)
        except CheckpointError as error:
            raise CheckpointError(f"{source.region}: tensor {name}: {error}") from None
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
