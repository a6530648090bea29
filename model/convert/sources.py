"""Where converted tensors come from: files in several formats, seen as named tensors that are read row by row.

Knows nothing of which tensors a network has or of where they go.
"""

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.kernels.quantized import Bits, pack_int4

EXACT_GROUP_SIZES = (128, 32)
"""Of formats that hold other groups: a group of 64 is two of 32 with one scale."""


class TensorSource(Protocol):
    """A tensor whose numbers have not been read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """At least one dimension."""

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop, contiguous, on the CPU, in the stored type; shape [stop - start, ...]."""


@runtime_checkable
class QuantizedSource(TensorSource, Protocol):
    """A matrix whose file may hold small numbers and scales; its rows are what these stand for."""

    @property
    def compressed(self) -> bool:
        """Whether the file holds it so."""

    @property
    def form(self) -> QuantizedFormat | None:
        """The format that holds the file's numbers as they are; None where there is no such format."""

    def matrix(self, start: int, stop: int) -> QuantizedMatrix:
        """Rows start to stop in that format."""


@dataclass(frozen=True)
class JoinedTensor:
    """Parts of one tensor in several files, one after the other along a dimension.

    Attributes:
        parts: of one type, and of one shape apart from that dimension.
        dim: 0 where each part has some of the rows, 1 where each has some of every row's columns.
    """

    parts: tuple[TensorSource, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of all parts."""
        return self.parts[0].dtype

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """As in `TensorSource`."""
        if self.dim == 1:
            return torch.cat([part.rows(start, stop) for part in self.parts], dim=1)
        ends = list(itertools.accumulate(part.shape[0] for part in self.parts))
        pieces = []
        while start < stop:
            number = bisect.bisect_right(ends, start)
            begins = ends[number] - self.parts[number].shape[0]
            end = min(stop, ends[number])
            pieces.append(self.parts[number].rows(start - begins, end - begins))
            start = end
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@dataclass(frozen=True)
class SelectedRows:
    """Some rows of a tensor.

    Attributes:
        source: the tensor.
        kept: ranges of its rows, in ascending order.
    """

    source: TensorSource
    kept: tuple[range, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is selected."""
        return (sum(map(len, self.kept)), *self.source.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self.source.dtype

    @property
    def compressed(self) -> bool:
        """As in `QuantizedSource`, like form."""
        return isinstance(self.source, QuantizedSource) and self.source.compressed

    @property
    def form(self) -> QuantizedFormat | None:
        """Of the tensor."""
        return self.source.form if isinstance(self.source, QuantizedSource) else None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """As in `TensorSource`, of the rows that are selected."""
        pieces = [self.source.rows(part.start, part.stop) for part in self._parts(start, stop)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def matrix(self, start: int, stop: int) -> QuantizedMatrix:
        """As in `QuantizedSource`, of the rows that are selected."""
        if not isinstance(self.source, QuantizedSource):
            raise TypeError(f"{type(self.source).__name__} has no quantized format")
        pieces = [self.source.matrix(part.start, part.stop) for part in self._parts(start, stop)]
        return replace(
            pieces[0],
            numbers=torch.cat([piece.numbers for piece in pieces]),
            scales=torch.cat([piece.scales for piece in pieces]),
        )

    def _parts(self, start: int, stop: int) -> Iterator[range]:
        """The source's rows of those from start to stop."""
        begins = 0
        for rows in self.kept:
            part = rows[max(0, start - begins) : max(0, stop - begins)]
            if part:
                yield part
            begins += len(rows)


def exact_format(bits: Bits, group_size: int, columns: int, scale_dtype: torch.dtype) -> QuantizedFormat | None:
    """The format that holds symmetric numbers in groups of any size as they are; None where there is none.

    Args:
        bits: of a number.
        group_size: neighbouring inputs that share a scale.
        columns: inputs.
        scale_dtype: of the scales.
    """
    if bits == 8 and group_size == columns and columns % 8 == 0:
        return QuantizedFormat(8, None, scale_dtype)
    size = next((size for size in EXACT_GROUP_SIZES if group_size % size == 0), None)
    return None if size is None else QuantizedFormat(bits, size, scale_dtype)


def exact_matrix(integers: torch.Tensor, scales: torch.Tensor, form: QuantizedFormat) -> QuantizedMatrix:
    """A matrix in the format that `exact_format` has for it.

    Args:
        integers: [out, in] int8.
        scales: [out, groups], of any groups.
        form: the format.
    """
    columns = integers.shape[1]
    groups = 1 if form.group_size is None else columns // form.group_size
    return QuantizedMatrix(
        numbers=integers if form.bits == 8 else pack_int4(integers),
        scales=scales.repeat_interleave(groups // scales.shape[1], dim=1),
        bits=form.bits,
        group_size=columns // groups,
    )
