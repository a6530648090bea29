"""Where converted tensors come from: files in several formats, seen as named tensors that are read row by row.

Knows nothing of which tensors a network has or of where they go.
"""

import bisect
import itertools
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from persimmon.model.errors import CheckpointError
from persimmon.model.stored import LFS_POINTER, Region, Storage, StoredTensor, damaged, lfs_pointer

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The names of the types that a network's tensors may have."""


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

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """As in `TensorSource`, of the rows that are selected."""
        pieces, begins = [], 0
        for rows in self.kept:
            part = rows[max(0, start - begins) : max(0, stop - begins)]
            if part:
                pieces.append(self.source.rows(part.start, part.stop))
            begins += len(rows)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def read_safetensors(path: Path) -> dict[str, TensorSource]:
    """The tensors of a safetensors file, in file order.

    The safetensors library checks the file's header.  The numbers are read without it, since a mapping of the file
    would stay in memory as far as it was read.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or has tensors of another type than floats.
    """
    region = Region.of_file(path)
    with region.opened() as file:
        if file.read(64).startswith(LFS_POINTER):
            raise lfs_pointer(region)
        try:
            with safe_open(path, framework="pt", device="cpu"):
                pass
        except SafetensorError as error:
            raise damaged(region, str(error)) from error
        except RuntimeError as error:  # PyTorch could not map it
            raise CheckpointError(f"{path} is too large to be mapped into memory: {error}") from error
        file.seek(0)
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    tensors: dict[str, TensorSource] = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: tensor {name} is {entry['dtype']}; expected F16, BF16 or F32")
        shape = tuple(entry["shape"])
        storage = Storage(SAFETENSORS_DTYPES[entry["dtype"]], math.prod(shape), 8 + size + entry["data_offsets"][0])
        tensors[name] = StoredTensor.contiguous(region, shape, storage)
    return tensors
