"""Tensors that become quantized one at a time, a few rows at a time: those of a checkpoint, or random ones.

The memory that this takes beyond the result is that of some rows in float32, never of a whole matrix.
"""

from collections.abc import Iterator, Mapping

import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.model.errors import CheckpointError
from persimmon.model.quantization.rounding import quantize


def quantized(
    tensors: Iterator[tuple[str, torch.Tensor | QuantizedMatrix]], formats: Mapping[str, QuantizedFormat]
) -> Iterator[tuple[str, torch.Tensor | QuantizedMatrix]]:
    """Tensors of which those with a format are quantized.

    Args:
        tensors: by name, one at a time.
        formats: by name; the others stay as they are.

    Raises:
        CheckpointError: a weight is not finite, or too large for its scale.
    """
    for name, tensor in tensors:
        form = formats.get(name)
        yield name, tensor if form is None or isinstance(tensor, QuantizedMatrix) else _rounded(name, tensor, form)
        del tensor


def _rounded(name: str, weight: torch.Tensor, form: QuantizedFormat) -> QuantizedMatrix:
    try:
        return quantize(weight, form)
    except CheckpointError as error:
        raise CheckpointError(f"tensor {name}: {error}") from error


def random_matrix(shape: tuple[int, int], form: QuantizedFormat, generator: torch.Generator) -> QuantizedMatrix:
    """A matrix of random integers whose weights have mean 0 and deviation 0.02, to measure speed.

    Its numbers are uniform, not normal: random bits make them in seconds for billions of weights.

    Args:
        shape: (out, in).
        form: its format.
        generator: of the device where it is made.
    """
    result = _empty(shape, form, generator.device)
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


def _empty(shape: tuple[int, int], form: QuantizedFormat, device: torch.device) -> QuantizedMatrix:
    rows, columns = shape
    group_size = form.group_size or columns
    numbers = (
        torch.empty(shape, dtype=torch.int8, device=device)
        if form.bits == 8
        else torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
    )
    scales = torch.empty(rows, columns // group_size, dtype=form.scale_dtype, device=device)
    return QuantizedMatrix(numbers=numbers, scales=scales, bits=form.bits, group_size=group_size)
