"""The matrices of products as the kernels of a GPU keep them, and their products for steps of many tokens by cuBLAS."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812

from persimmon.kernels.dequantize import dequantize
from persimmon.kernels.packed_weight import PADDED_OUTPUTS, PackedWeight


@dataclass(frozen=True, slots=True)
class FusedWeight:
    """The matrix of a product as these kernels read it, not quantized.

    Attributes:
        matrix: [out, in] where the format is "rows"; [in, out] where it is "columns".
        format: "columns" where the input is sparse, so that what meets a zero lies side by side and is not read.
    """

    matrix: torch.Tensor
    format: Literal["rows", "columns"] = "rows"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        first, second = self.matrix.shape
        return (first, second) if self.format == "rows" else (second, first)

    @property
    def rows(self) -> torch.Tensor:
        """[out, in], a view: as torch's products take it."""
        return self.matrix if self.format == "rows" else self.matrix.t()

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.matrix.nbytes


GpuWeight = FusedWeight | PackedWeight
"""What `FusedKernels` multiply by."""


def is_columns(weight: GpuWeight) -> bool:
    """Whether what a sparse input does not need is not read."""
    return weight.packing.columns if isinstance(weight, PackedWeight) else weight.format == "columns"


def numbers_of(weight: GpuWeight) -> torch.Tensor:
    """The numbers as they lie in memory."""
    return weight.numbers if isinstance(weight, PackedWeight) else weight.matrix


def operand_of(weight: GpuWeight) -> torch.Tensor | PackedWeight:
    """The matrix as kernels take it that read either kind."""
    return weight if isinstance(weight, PackedWeight) else weight.matrix


class DequantizingBuffer:
    """Memory in which a quantized matrix gets its 16 bits for one product; all matrices share it.

    Args:
        nbytes: of it; a matrix that takes more is multiplied in slices of its outputs.
        device: of the matrices.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        """Of the memory."""
        return self._bytes.nbytes

    def linear(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """X [M, in] @ weight.T + bias: [M, out] in x's dtype, of weights that are rounded to it.

        Writes and reads 2 * in * out bytes in 16 bits on top of the product.
        """
        rows = self._slice(weight, x.dtype)
        if rows >= weight.shape[0]:
            return F.linear(x, self._dequantized(weight, x.dtype, 0, weight.shape[0]), bias)
        out = torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device)
        for first in range(0, weight.shape[0], rows):
            stop = min(first + rows, weight.shape[0])
            part = self._dequantized(weight, x.dtype, first, stop)
            out[:, first:stop] = F.linear(x, part, None if bias is None else bias[first:stop])
        return out

    def logits(self, hidden: torch.Tensor, head: PackedWeight, out: torch.Tensor | None) -> torch.Tensor:
        """Hidden [R, hidden] @ head.T: [R, vocab_size] float32, never rounded to 16 bits; into `out` if given."""
        vocab_size = head.shape[0]
        if out is None:
            out = torch.empty(len(hidden), vocab_size, dtype=torch.float32, device=hidden.device)
        rows = self._slice(head, hidden.dtype)
        for first in range(0, vocab_size, rows):
            stop = min(first + rows, vocab_size)
            out[:, first:stop] = float32_product(hidden, self._dequantized(head, hidden.dtype, first, stop).t())
        return out

    def _slice(self, weight: PackedWeight, dtype: torch.dtype) -> int:
        """Outputs that fit, whole tiles."""
        rows = self._bytes.numel() // (weight.shape[1] * dtype.itemsize) // PADDED_OUTPUTS * PADDED_OUTPUTS
        if rows == 0:
            raise RuntimeError(
                f"a buffer of {self._bytes.numel()} bytes holds no {PADDED_OUTPUTS} outputs of {weight.shape[1]} inputs"
            )
        return rows

    def _dequantized(self, weight: PackedWeight, dtype: torch.dtype, first: int, stop: int) -> torch.Tensor:
        return dequantize(weight, self._bytes.view(dtype), first, stop)


def buffer_bytes(hidden_size: int, intermediate_size: int) -> int:
    """Of a buffer for the largest matrix of a layer, and for a small network's slice of any matrix."""
    widest = max(hidden_size, intermediate_size)
    return max(2 * hidden_size * max(intermediate_size, 3 * hidden_size), 4 * PADDED_OUTPUTS * widest)


def float32_product(x: torch.Tensor, columns: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """X [M, in] @ columns [in, out]: [M, out] float32, never rounded to 16 bits; into `out` if given."""
    if x.dtype == torch.float32:
        return torch.mm(x, columns, out=out)
    if x.device.type != "cuda":
        return torch.mm(x.float(), columns.float(), out=out)
    if out is None:
        return torch.mm(x, columns, out_dtype=torch.float32)
    return torch.mm(x, columns, out_dtype=torch.float32, out=out)
