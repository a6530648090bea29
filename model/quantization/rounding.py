"""A matrix of floats -> numbers of 8 or 4 bits, each rounded to the nearest, with scales of least squared error.

Knows nothing of a matrix's inputs: `persimmon.model.quantization.gptq` weighs errors by what they do to its products.
"""

import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.kernels.cpu import weight_rounding
from persimmon.kernels.quantized import Bits, pack_int4
from persimmon.model.errors import CheckpointError

# Multiples of the scale that a group's largest weight may stand for.  The first three are the usual choices: the
# largest number, the middle of both ends, and the lowest number.  The others cut off the largest weights, so that all
# others have smaller steps.  In 4 bits the search takes a quarter off the squared error of normally distributed
# weights; in 8 bits, where the largest weights matter most, cutting them off never helps.
_STEPS: dict[Bits, tuple[float, ...]] = {4: (7.0, 7.5, 8.0, 9.0, 10.2), 8: (127.0, 127.5, 128.0)}

_REFITS: dict[Bits, int] = {4: 2, 8: 0}
"""How often the scale of least squares for the numbers at hand is tried."""

_WEIGHTS_AT_ONCE = 1 << 17
"""Half a MiB in float32, which stays in a core's cache."""


def quantize(weight: torch.Tensor, form: QuantizedFormat, *, first_row: int = 0) -> QuantizedMatrix:
    """Rounds each weight to the nearest multiple of its group's scale, one of least squared error among several.

    The largest weight of a group may become the lowest number, -8 or -128, which has no counterpart above zero: so the
    scale is negative where that weight is positive.  Errors are those of scales as they are stored, and the
    usual choices are among the tried ones, so the error of no group exceeds that of rounding by its largest weight.  A
    matrix of such numbers and of scales of 16 bits comes out as it was, if each group has the lowest or the largest
    number, as those that are made here do.

    Args:
        weight: [out, in], floating point.
        form: bfloat16 scales have the range of float32; float16 loses precision for scales below 6e-5, as small
            weights in 8 bits need them.  The eight bits of bfloat16 cost next to nothing, as numbers are rounded for
            the scale as it is stored.
        first_row: the number of the first row, for messages.

    Returns:
        The result; while it is made, memory for some MiB more is in use.

    Raises:
        ValueError: groups do not divide the inputs.
        CheckpointError: a weight is not finite, or too large for scales of the format; its row is named.
    """
    rows, columns = weight.shape
    group_size = columns if form.group_size is None else form.group_size
    if group_size < 1 or columns % group_size or (form.bits == 4 and group_size % 2):
        raise ValueError(f"groups of {group_size} do not divide {columns} inputs of {form.bits} bits")
    result = QuantizedMatrix.empty((rows, columns), form, weight.device)
    quantize_into(weight, result, first_row=first_row)
    return result


def quantize_into(weight: torch.Tensor, result: QuantizedMatrix, *, first_row: int = 0) -> None:
    """As `quantize`, into a matrix of the same shape and device whose rows are contiguous.

    On a CPU the C kernels do it where there is a build of them, else plain torch does, which takes several times as
    long and may choose the other one of two scales whose errors are equal but for rounding.
    """
    if weight.device.type == "cpu" and weight_rounding.available():
        failed = weight_rounding.round_weights(weight, result, _STEPS[result.bits], _REFITS[result.bits])
        if failed is not None:
            raise _refusal(weight[failed].float(), result.scales.dtype, first_row + failed)
        return
    rows, columns = weight.shape
    step = max(1, _WEIGHTS_AT_ONCE // columns)
    for start in range(0, rows, step):
        part = result.rows(start, min(start + step, rows))
        grouped = weight[start : start + step].float().view(-1, columns // result.group_size, result.group_size)
        part.scales.copy_(best_scales(grouped, result.bits, result.scales.dtype, first_row=first_row + start))
        rounded = round_to_scales(grouped, part.scales.float(), result.bits).to(torch.int8).view(-1, columns)
        part.numbers.copy_(rounded if result.bits == 8 else pack_int4(rounded))


def round_to_scales(weights: torch.Tensor, scales: torch.Tensor, bits: Bits) -> torch.Tensor:
    """[..., group_size] float32 whole numbers: the nearest for float32 weights with scales [...]."""
    limit = 1 << (bits - 1)
    return torch.mul(weights, scales.reciprocal().unsqueeze(-1)).round_().clamp_(-limit, limit - 1)


def best_scales(
    weights: torch.Tensor,
    bits: Bits,
    dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    *,
    first_row: int = 0,
) -> torch.Tensor:
    """The scale of each group for which rounding has the least squared error, among those that are tried.

    Args:
        weights: [rows, groups, group_size] float32.
        bits: of a number.
        dtype: that scales are stored in.
        importance: [group_size] what the errors of a group's weights are multiplied by; all count the same by default.
        first_row: the number of the first row, for messages.

    Returns:
        [rows, groups] of that dtype, finite and not zero.

    Raises:
        CheckpointError: as in `quantize`.
    """
    lowest, highest = torch.aminmax(weights, dim=-1)
    largest = torch.where(highest > -lowest, highest, lowest)
    best = _stored(largest / -_STEPS[bits][0], dtype)
    if not bool(best.isfinite().all()):
        row = int((~best.isfinite()).any(-1).nonzero()[0])
        raise _refusal(weights[row], dtype, first_row + row)
    least = _error(weights, best, bits, importance)
    for steps in _STEPS[bits][1:]:
        best, least = _better(weights, _stored(largest / -steps, dtype), best, least, bits, importance)
    for _ in range(_REFITS[bits]):
        rounded = round_to_scales(weights, best, bits)
        weighted = rounded if importance is None else rounded * importance.square()
        # Not a number where all are zero: not better.
        fitted = (weights * weighted).sum(-1) / (rounded * weighted).sum(-1)
        best, least = _better(weights, _stored(fitted, dtype), best, least, bits, importance)
    return best.to(dtype)


def _stored(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales as they are read back, in float32: the smallest normal number for those without a finite inverse."""
    stored = scales.to(dtype).float()
    return stored.masked_fill_(stored.abs() < torch.finfo(torch.float32).tiny, torch.finfo(dtype).tiny)


def _better(
    weights: torch.Tensor,
    scales: torch.Tensor,
    best: torch.Tensor,
    least: torch.Tensor,
    bits: Bits,
    importance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales with the smaller error for each group, and the errors."""
    error = _error(weights, scales, bits, importance)
    better = error < least
    return torch.where(better, scales, best), torch.where(better, error, least)


def _error(weights: torch.Tensor, scales: torch.Tensor, bits: Bits, importance: torch.Tensor | None) -> torch.Tensor:
    """[rows, groups]: the root of the sum of squared errors."""
    errors = round_to_scales(weights, scales, bits).mul_(scales.unsqueeze(-1)).sub_(weights)
    if importance is not None:
        errors.mul_(importance)
    roots: torch.Tensor = torch.linalg.vector_norm(errors, dim=-1)
    return roots


def _refusal(weights: torch.Tensor, dtype: torch.dtype, row: int) -> CheckpointError:
    """What to raise for the float32 weights of a row that has a scale that is not finite."""
    finite = weights.isfinite()
    if not bool(finite.all()):
        value = weights[~finite][0].item()
        return CheckpointError(f"row {row} has the weight {value}; only finite numbers can be quantized")
    return CheckpointError(
        f"row {row} has the weight {weights.abs().max().item():.6g}, too large for scales in "
        f"{str(dtype).removeprefix('torch.')}"
    )
