"""Matrices of 8-bit or 4-bit numbers with scales: what a quantized checkpoint holds and kernels lay out for themselves.

Symmetric only: a weight is its number times the scale of its output and its group of inputs, and zero is zero.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from persimmon.kernels.cpu import pages

Bits = Literal[4, 8]

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What scales may be stored in."""


@dataclass(frozen=True, slots=True)
class QuantizedFormat:
    """How a matrix is quantized.

    Attributes:
        bits: of a number.
        group_size: neighbouring inputs that share a scale; None for all inputs of an output.
        scale_dtype: of the scales.
    """

    bits: Bits
    group_size: int | None
    scale_dtype: torch.dtype

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of an (out, in) matrix: its numbers and its scales."""
        rows, columns = shape
        groups = 1 if self.group_size is None else columns // self.group_size
        return rows * (columns * self.bits // 8 + groups * self.scale_dtype.itemsize)

    def __str__(self) -> str:
        groups = "a scale for each output" if self.group_size is None else f"groups of {self.group_size}"
        return f"int{self.bits}, {groups}"


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A [out, in] matrix of small integers times scales.

    Attributes:
        numbers: of 8 bits, [out, in] int8.  Of 4 bits, [out, in / 2] uint8: each byte holds two numbers from -8 to 7
            plus 8, the one of the even column in the low half.
        scales: [out, in / group_size], one of SCALE_DTYPES.
        bits: of a number.
        group_size: neighbouring inputs that share a scale; `in` where an output has one.

    Raises:
        ValueError: the parts do not fit together.
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    bits: Bits
    group_size: int

    def __post_init__(self) -> None:
        rows, columns = self.shape
        stored = torch.int8 if self.bits == 8 else torch.uint8
        if self.numbers.dtype != stored or self.scales.dtype not in SCALE_DTYPES:
            raise ValueError(
                f"{self.bits}-bit numbers are {self.numbers.dtype} with scales of {self.scales.dtype}; expected "
                f"{stored} and one of {', '.join(map(str, SCALE_DTYPES))}"
            )
        if self.group_size < 1 or columns % self.group_size or (self.bits == 4 and self.group_size % 2):
            raise ValueError(f"groups of {self.group_size} do not divide {columns} inputs of {self.bits} bits")
        if tuple(self.scales.shape) != (rows, columns // self.group_size):
            raise ValueError(
                f"{list(self.scales.shape)} scales for a {[rows, columns]} matrix in groups of {self.group_size}; "
                f"expected {[rows, columns // self.group_size]}"
            )

    @classmethod
    def empty(
        cls, shape: tuple[int, int], format: QuantizedFormat, device: torch.device | str = "cpu"
    ) -> "QuantizedMatrix":
        """An (out, in) matrix whose numbers and scales are still to be written; on a CPU in pages of its own."""
        rows, columns = shape
        group_size = columns if format.group_size is None else format.group_size
        empty = pages.empty if torch.device(device).type == "cpu" else partial(torch.empty, device=device)
        return cls(
            numbers=empty((rows, columns), dtype=torch.int8)
            if format.bits == 8
            else empty((rows, columns // 2), dtype=torch.uint8),
            scales=empty((rows, columns // group_size), dtype=format.scale_dtype),
            bits=format.bits,
            group_size=group_size,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.numbers.shape[0], self.numbers.shape[1] * (1 if self.bits == 8 else 2)

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers and scales."""
        return self.numbers.nbytes + self.scales.nbytes

    @property
    def format(self) -> QuantizedFormat:
        """How it is quantized."""
        group_size = None if self.group_size == self.shape[1] else self.group_size
        return QuantizedFormat(self.bits, group_size, self.scales.dtype)

    @property
    def integers(self) -> torch.Tensor:
        """[out, in] int8: the numbers, those of 4 bits unpacked."""
        return self.numbers if self.bits == 8 else unpack_int4(self.numbers)

    def dequantized(self) -> torch.Tensor:
        """[out, in] float32: what it stands for."""
        rows, columns = self.shape
        grouped = self.integers.view(rows, -1, self.group_size) * self.scales.float()[:, :, None]
        return grouped.view(rows, columns)

    def rows(self, start: int, stop: int) -> "QuantizedMatrix":
        """Outputs from start to stop, as a view."""
        return replace(self, numbers=self.numbers[start:stop], scales=self.scales[start:stop])

    def columns(self, start: int, stop: int) -> "QuantizedMatrix":
        """Inputs from start to stop, as a view.

        Raises:
            ValueError: a group of inputs that share a scale would be divided, unless all inputs of an output do.
        """
        count, group_size, scales = stop - start, self.group_size, self.scales
        if group_size == self.shape[1]:
            group_size = count
        elif start % group_size or stop % group_size:
            raise ValueError(f"inputs {start} to {stop} begin or end within a group of {group_size}")
        else:
            scales = scales[:, start // group_size : stop // group_size]
        numbers = self.numbers[:, start * self.bits // 8 : stop * self.bits // 8]
        return replace(self, numbers=numbers, scales=scales, group_size=group_size)

    def to(self, device: torch.device) -> "QuantizedMatrix":
        """The matrix on a device: itself where it is there already."""
        if self.numbers.device == device:
            return self
        return replace(self, numbers=self.numbers.to(device), scales=self.scales.to(device))


def dense(weight: "torch.Tensor | QuantizedMatrix") -> torch.Tensor:
    """[out, in], widened to the dtype of its scales where it is quantized: for kernels without such a format."""
    return weight.dequantized().to(weight.scales.dtype) if isinstance(weight, QuantizedMatrix) else weight


def pack_int4(integers: torch.Tensor) -> torch.Tensor:
    """[out, in] int8 from -8 to 7 as `QuantizedMatrix.numbers` has them: [out, in / 2] uint8."""
    shifted = (integers + 8).to(torch.uint8)
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)


def unpack_int4(numbers: torch.Tensor) -> torch.Tensor:
    """The reverse of `pack_int4`: [out, in] int8."""
    halves = torch.stack((numbers & 15, numbers >> 4), dim=-1)
    return (halves.to(torch.int8) - 8).flatten(1)
