"""A matrix of floats and what it multiplies -> numbers of 8 or 4 bits whose products are off by little.

GPTQ (Frantar et al., arXiv:2210.17323): input by input, weights are rounded, and what that does to the products is
made up for by the weights of later inputs.  Knows nothing of networks.
"""

import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.kernels.quantized import pack_int4
from persimmon.model.errors import CheckpointError
from persimmon.model.quantization.rounding import best_scales

BLOCK = 128
"""Inputs that are rounded before the weights of all later ones are changed: one product instead of many updates."""

DAMPING = 0.01
"""Added to the diagonal of the Hessian, as a share of its mean: inputs that were never seen stay where they are."""


class Hessian:
    """The second derivative of the squared error of products by their weights, 2 X^T X / T, of T rows X of inputs.

    It takes inputs² numbers: 1 GiB for 16,384 of them.

    Args:
        inputs: of the matrix.
    """

    def __init__(self, inputs: int) -> None:
        self._sum = torch.zeros(inputs, inputs)
        self._rows = 0

    def add(self, rows: torch.Tensor) -> None:
        """Counts inputs [T, in] of products."""
        self._sum.addmm_(rows.t(), rows)
        self._rows += len(rows)

    def take(self) -> torch.Tensor:
        """[in, in] float32; this one is empty afterwards."""
        total, self._sum = self._sum, torch.empty(0)
        return total.mul_(2 / max(1, self._rows))


def quantize(weight: torch.Tensor, hessian: torch.Tensor, form: QuantizedFormat) -> QuantizedMatrix:
    """Rounds a matrix so that its products with the inputs that made the Hessian are off by little.

    The scales of a group are chosen by least squared error when its first input is reached, of the weights as they are
    then; errors count as they do in the sum that GPTQ makes small, divided by the diagonal of the inverse Hessian's
    Cholesky factor.

    Args:
        weight: [out, in], floating point.
        hessian: [in, in] float32, which is overwritten.
        form: its group size divides `in`.

    Raises:
        CheckpointError: a weight is not finite, or too large for its scale; the row is named.  Or an input was not
            finite.
    """
    rows, columns = weight.shape
    group_size = form.group_size or columns
    factor = _inverse_factor(hessian)
    # Transposed, so that what belongs to an input lies together.
    left = weight.t().float().contiguous()
    integers = torch.empty(columns, rows, dtype=torch.int8)
    scales = torch.empty(columns // group_size, rows, dtype=form.scale_dtype)
    limit = 1 << (form.bits - 1)
    for start in range(0, columns, BLOCK):
        stop = min(columns, start + BLOCK)
        errors = torch.empty(stop - start, rows)
        for column in range(start, stop):
            group, first = divmod(column, group_size)
            if first == 0:
                members = slice(column, column + group_size)
                importance = 1 / factor.diagonal()[members]
                scales[group] = best_scales(left[members].t().unsqueeze(1), form.bits, form.scale_dtype, importance)[
                    :, 0
                ]
                scale = scales[group].float()
            number = (left[column] / scale).round_().clamp_(-limit, limit - 1)
            integers[column] = number.to(torch.int8)
            torch.div(left[column] - number * scale, factor[column, column], out=errors[column - start])
            left[column + 1 : stop].addr_(factor[column, column + 1 : stop], errors[column - start], alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    numbers = integers.t().contiguous()
    return QuantizedMatrix(
        numbers=numbers if form.bits == 8 else pack_int4(numbers),
        scales=scales.t().contiguous(),
        bits=form.bits,
        group_size=group_size,
    )


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of a Hessian, which is overwritten."""
    diagonal = hessian.diagonal()
    if not bool(diagonal.isfinite().all()):
        raise CheckpointError("its inputs are not finite numbers: the network overflows in float32 on these texts")
    damping = DAMPING * diagonal.mean()
    damping = torch.where(damping > 0, damping, 1.0)  # no input was ever other than zero
    diagonal += damping
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            break
        diagonal += damping
        damping *= 2
    factor: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower, out=hessian), upper=True)
    return factor
