"""A GGUF file: its metadata, and its tensors as sources that are read and dequantized some rows at a time.

Knows the container.  Knows nothing of what keys and names mean.

The layout is that of llama.cpp's specification (docs/gguf.md in github.com/ggml-org/ggml, versions 2 and 3).  Blocks of
quantized numbers are decoded by the gguf package.  Its GGUFReader is not used: it makes an array for each element of
the metadata, which for Persimmon's 262,144 pieces takes half a minute and 700 MB (gguf 0.19).
"""

import io
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.kernels.quantized import Bits
from persimmon.model.convert.sources import TensorSource, exact_format, exact_matrix
from persimmon.model.errors import CheckpointError
from persimmon.model.stored import LFS_POINTER, Region, Storage, StoredTensor, damaged, lfs_pointer

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALIGNMENT = 32
_BLOCK = 32
_SYMMETRIC: Mapping[str, Bits] = {"Q4_0": 4, "Q8_0": 8}
"""Bits of the types whose blocks of _BLOCK numbers are a float16 scale and integers, without a minimum."""

_MAX_DIMENSIONS = 4


def gguf_package() -> tuple[ModuleType, ModuleType]:
    """The modules gguf.constants and gguf.quants of the gguf package.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        from gguf import constants, quants
    except ImportError:
        raise CheckpointError(
            "--from-gguf needs the gguf package: install it with pip install 'persimmon-server[gguf]'"
        ) from None
    return constants, quants


@dataclass(frozen=True)
class QuantizedBlocks:
    """A matrix whose rows are blocks of quantized numbers.

    Attributes:
        region: the file.
        shape: rows and columns.
        offset: of the first block in the file, in bytes.
        row_bytes: size of one row.
        kind: the type, as gguf.GGMLQuantizationType has it.
    """

    region: Region
    shape: tuple[int, ...]
    offset: int
    row_bytes: int
    kind: Any

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers once they are decoded."""
        return torch.float32

    @property
    def compressed(self) -> bool:
        """As in `QuantizedSource`, like form and matrix: always."""
        return True

    @property
    def form(self) -> QuantizedFormat | None:
        """Of symmetric types."""
        bits = _SYMMETRIC.get(self.kind.name)
        return None if bits is None else exact_format(bits, _BLOCK, self.shape[1], torch.float16)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """As in `TensorSource`, decoded."""
        _, quants = gguf_package()
        decoded = quants.dequantize(self._blocks(start, stop), self.kind)
        return torch.from_numpy(np.ascontiguousarray(decoded, dtype=np.float32))

    def matrix(self, start: int, stop: int) -> QuantizedMatrix:
        """Numbers and scales as stored."""
        form = self.form
        if form is None:
            raise ValueError(f"{self.kind.name} is not symmetric in blocks of {_BLOCK}")
        rows, columns = stop - start, self.shape[1]
        blocks = torch.from_numpy(self._blocks(start, stop)).view(rows, columns // _BLOCK, -1)
        scales, numbers = blocks[..., :2].contiguous().view(torch.float16), blocks[..., 2:].contiguous()
        if form.bits == 8:
            integers = numbers.view(torch.int8)
        else:  # plus 8; the low halves of the bytes come first
            integers = (torch.cat((numbers & 15, numbers >> 4), dim=-1)).view(torch.int8) - 8
        return exact_matrix(integers.view(rows, columns), scales.view(rows, -1), form)

    def _blocks(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """[rows, row_bytes] as stored."""
        buffer = bytearray((stop - start) * self.row_bytes)
        with self.region.opened() as file:
            file.seek(self.offset + start * self.row_bytes)
            if file.readinto(buffer) != len(buffer):
                raise damaged(self.region, "it ends within a tensor")
        return np.frombuffer(buffer, dtype=np.uint8).reshape(stop - start, self.row_bytes)


@dataclass(frozen=True)
class GGUFFile:
    """What a file says.

    Attributes:
        region: the file.
        metadata: numbers, strings, and arrays: of numbers as numpy arrays, of strings as lists of bytes.
        tensors: by their names.
        types: the type of each, like "Q4_K".
    """

    region: Region
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorSource]
    types: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> "GGUFFile":
        """Reads everything but the tensors.

        Raises:
            CheckpointError: the gguf package is missing; the file is not GGUF, is damaged, or has a type that the
                package cannot decode.
        """
        gguf_package()
        region = Region.of_file(path)
        with region.opened() as file:
            begin = file.read(len(LFS_POINTER))
            if begin.startswith(LFS_POINTER):
                raise lfs_pointer(region)
            if not begin.startswith(_MAGIC):
                raise CheckpointError(f"{region} is not a GGUF file: it does not begin with 'GGUF'")
            file.seek(len(_MAGIC))
            reader = _Reader(file, region)
            version = reader.number("I")
            if version not in _VERSIONS:
                what = "is big-endian" if version & 0xFFFF == 0 else f"has version {version} of GGUF"
                raise CheckpointError(f"{region} {what}; expected a little-endian file of version 2 or 3")
            count, keys = reader.number("Q"), reader.number("Q")
            metadata: dict[str, Any] = {}
            for _ in range(keys):
                key = reader.text()
                if key in metadata:
                    raise CheckpointError(f"{region} contains the key {key!r} twice")
                metadata[key] = reader.value(reader.number("I"))
            entries = [reader.tensor() for _ in range(count)]
            alignment = metadata.get("general.alignment", _ALIGNMENT)
            if type(alignment) is not int or alignment < 1:
                raise damaged(region, f"general.alignment is {alignment!r}")
            start = -(-file.tell() // alignment) * alignment
        tensors: dict[str, TensorSource] = {}
        types: dict[str, str] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise CheckpointError(f"{region} contains the tensor {name!r} twice")
            tensors[name], types[name] = _source(region, name, shape, kind, start + offset)
        return cls(region=region, metadata=metadata, tensors=tensors, types=types)


def _source(region: Region, name: str, shape: tuple[int, ...], number: int, offset: int) -> tuple[TensorSource, str]:
    """A tensor and the name of its type."""
    constants, quants = gguf_package()
    try:
        kind = constants.GGMLQuantizationType(number)
    except ValueError:
        raise CheckpointError(f"{region}: tensor {name} has the unknown type {number}") from None
    if (dtype := _FLOATS.get(kind.name)) is not None:
        source: TensorSource = StoredTensor.contiguous(region, shape, Storage(dtype, math.prod(shape), offset))
        size = math.prod(shape) * dtype.itemsize
    else:
        block, block_bytes = constants.GGML_QUANT_SIZES[kind]
        if len(shape) != 2 or shape[1] % block:
            raise CheckpointError(
                f"{region}: tensor {name} of shape {list(shape)} is {kind.name}; expected a matrix with rows of "
                f"{block} numbers or a multiple of it"
            )
        try:
            quants.dequantize(np.zeros((1, block_bytes), dtype=np.uint8), kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{region}: tensor {name} is {kind.name}, which the gguf package cannot decode: requantize the file "
                f"with llama.cpp, for example to Q8_0"
            ) from None
        row_bytes = shape[1] // block * block_bytes
        source = QuantizedBlocks(region=region, shape=shape, offset=offset, row_bytes=row_bytes, kind=kind)
        size = shape[0] * row_bytes
    if offset + size > region.length:
        raise damaged(region, f"tensor {name} reaches beyond its end")
    return source, kind.name


class _Reader:
    """Reads a header's parts, one after the other."""

    def __init__(self, file: io.BufferedReader, region: Region) -> None:
        self._file = file
        self._region = region

    def take(self, size: int) -> bytes:
        """The next bytes."""
        # Sizes come from the file: none is allocated that the file cannot fill.
        content = self._file.read(size) if size <= self._region.length else b""
        if len(content) != size:
            raise damaged(self._region, "it ends within its header")
        return content

    def number(self, code: str) -> int:
        """An integer, by its code in the struct module."""
        value: int = struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]
        return value

    def text(self) -> str:
        """A string that has to be UTF-8."""
        return self._decoded(self.take(self.number("Q")))

    def value(self, kind: int) -> Any:
        """A value of metadata."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            of, count = self.number("I"), self.number("Q")
            if of == _STRING:
                return [self.take(self.number("Q")) for _ in range(self._plausible(count, 8))]
            dtype = self._scalar(of)
            return np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype)
        dtype = self._scalar(kind)
        return np.frombuffer(self.take(dtype.itemsize), dtype=dtype)[0].item()

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape, type and offset.  The file has the innermost dimension first."""
        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise damaged(self._region, f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        if not math.prod(shape):
            raise damaged(self._region, f"tensor {name} has no elements")
        return name, shape, self.number("I"), self.number("Q")

    def _scalar(self, kind: int) -> np.dtype[Any]:
        if kind not in _SCALARS:
            raise damaged(self._region, f"its metadata has the unknown type {kind}")
        return np.dtype(_SCALARS[kind]).newbyteorder("<")

    def _plausible(self, count: int, size: int) -> int:
        if count * size > self._region.length:
            raise damaged(self._region, "it ends within its header")
        return count

    def _decoded(self, content: bytes) -> str:
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise damaged(self._region, "a name in it is not UTF-8") from None
