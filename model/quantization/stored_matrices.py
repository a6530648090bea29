"""Quantized matrices as the files of a checkpoint hold them, in the layout of compressed-tensors -> QuantizedMatrix.

Of a module's matrix there are, next to a bias that is stored as always:
- weight_packed: [out, in * bits / 32] int32, rounded up.  Each holds the number + 2 ** (bits - 1) of 32 / bits
  neighbouring inputs, the first in the lowest bits; or, not packed, weight: [out, in] int8.
- weight_scale: [out, groups of inputs], floating point.
- weight_shape, with weight_packed: [2] integers, out and in.
That is what pack_to_int32 and the compressors of compressed-tensors 0.20.1 write.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.model.errors import CheckpointError
from persimmon.model.quantization.compressed_tensors import MatrixScheme
from persimmon.model.quantization.tensors import slices
from persimmon.model.shard import WHOLE, Part
from persimmon.model.stored import StoredTensor
from persimmon.model.weight_files import BYTES, Header, WeightFile


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix whose numbers have not been read yet.

    Attributes:
        shape: (out, in).
        scheme: how it is stored.
        numbers: weight_packed or weight.
        scales: weight_scale.
        nbytes: of its tensors in the files.
    """

    shape: tuple[int, int]
    scheme: MatrixScheme
    numbers: StoredTensor
    scales: StoredTensor
    nbytes: int

    @property
    def format(self) -> QuantizedFormat:
        """What it is read into."""
        group_size = None if self.scheme.group_size == self.shape[1] else self.scheme.group_size
        return QuantizedFormat(self.scheme.bits, group_size, self.scales.dtype)

    def read(self, part: Part = WHOLE) -> QuantizedMatrix:
        """Some rows and columns, by default all, in memory of their own; some rows are read at a time.

        Raises:
            CheckpointError: a file has become unreadable.
        """
        columns, group_size = self.shape[1], self.scheme.group_size or self.shape[1]
        bits, packed = self.scheme.bits, self.scheme.packed
        rows = range(self.shape[0]) if part.rows is None else part.rows
        wanted = range(columns) if part.columns is None else part.columns
        result = QuantizedMatrix.empty((len(rows), len(wanted)), self.format)
        for first, last in slices(len(rows), columns):
            stored = self.numbers.rows(rows.start + first, rows.start + last)
            read = QuantizedMatrix(
                numbers=unpacked(stored, bits, columns) if packed else stored,
                scales=self.scales.rows(rows.start + first, rows.start + last),
                bits=bits,
                group_size=group_size,
            ).columns(wanted.start, wanted.stop)
            result.numbers[first:last] = read.numbers
            result.scales[first:last] = read.scales
        return result


def equal_matrices(first: StoredMatrix, second: StoredMatrix) -> bool:
    """Whether two matrices have the same format, numbers and scales; some rows at a time."""
    if first.shape != second.shape or first.format != second.format:
        return False
    parts = (Part(rows=range(*rows)) for rows in slices(*first.shape))
    pairs = ((first.read(part), second.read(part)) for part in parts)
    return all(torch.equal(a.numbers, b.numbers) and torch.equal(a.scales, b.scales) for a, b in pairs)


def unpacked(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Rows of weight_packed as `QuantizedMatrix.numbers` has them.

    Args:
        words: [rows, words] int32.
        bits: of a number.
        columns: numbers in a row, of which 4-bit ones have an even count; the last word may hold more.

    Returns:
        [rows, columns] int8, or of 4 bits [rows, columns / 2] uint8.
    """
    if sys.byteorder == "big":
        words = words.view(torch.uint8).view(*words.shape, 4).flip(-1).flatten(1).view(torch.int32)
    # Bytes in the order of the inputs: of 8 bits with 128 added, of 4 bits already as they are kept.
    stored = words.view(torch.uint8)[:, : columns * bits // 8]
    return stored.bitwise_xor(0x80).view(torch.int8) if bits == 8 else stored


def take_matrices(
    found: dict[str, tuple[WeightFile, Header]],
    shapes: Mapping[str, tuple[int, ...]],
    scheme_of: Callable[[str], MatrixScheme | None],
) -> dict[str, StoredMatrix]:
    """The quantized matrices among the tensors of a checkpoint, by the names that they would have unquantized.

    Their smallest tensors are read: the shapes and the scales.

    Args:
        found: file and header by name; those of the matrices are taken out.
        shapes: of a network's tensors, by name.
        scheme_of: a tensor's scheme; None where it is not quantized.

    Raises:
        CheckpointError: groups do not divide the inputs of a matrix; a tensor is missing, of another shape or type; or
            a scale is not finite.
    """
    opened: dict[WeightFile, Mapping[str, StoredTensor]] = {}
    matrices = {}
    for name, shape in shapes.items():
        scheme = scheme_of(name)
        if scheme is None:
            continue
        module, (rows, columns) = name.removesuffix(".weight"), shape
        expected = _expected_tensors((rows, columns), scheme)
        names = {f"{module}.{suffix}": suffix for suffix in expected}
        tensors = {suffix: (found.pop(full), full) for full, suffix in names.items() if full in found}
        if not tensors:
            continue
        if columns % (scheme.group_size or columns):
            raise CheckpointError(
                f"{module} has {columns} inputs, which groups of {scheme.group_size}, as config.json's "
                f"quantization_config has them, do not divide"
            )
        for suffix, (expected_shape, dtypes) in expected.items():
            if suffix not in tensors:
                path = next(iter(tensors.values()))[0][0].path
                raise CheckpointError(
                    f"{path}: tensor {module}.{suffix} is missing; by config.json {module} is quantized to {scheme}"
                )
            (file, header), full = tensors[suffix]
            if header.shape != expected_shape:
                raise CheckpointError(
                    f"{file.path}: tensor {full} has shape {list(header.shape)}; expected {list(expected_shape)}"
                )
            if header.dtype not in dtypes:
                raise CheckpointError(f"{file.path}: tensor {full} is {header.dtype}; expected {' or '.join(dtypes)}")
        for (file, _), _ in tensors.values():
            if file not in opened:
                opened[file] = file.stored()
        parts = {suffix: opened[file][full] for suffix, ((file, _), full) in tensors.items()}
        if scheme.packed and (declared := parts["weight_shape"].rows(0, 2).tolist()) != [rows, columns]:
            raise CheckpointError(
                f"{parts['weight_shape'].region}: tensor {module}.weight_shape is {declared}; expected "
                f"{[rows, columns]}"
            )
        if not _finite(parts["weight_scale"]):
            raise CheckpointError(
                f"{parts['weight_scale'].region}: tensor {module}.weight_scale holds a number that is not finite"
            )
        matrices[name] = StoredMatrix(
            shape=(rows, columns),
            scheme=scheme,
            numbers=parts["weight_packed" if scheme.packed else "weight"],
            scales=parts["weight_scale"],
            nbytes=sum(header.bytes for (_, header), _ in tensors.values()),
        )
    return matrices


def _expected_tensors(
    shape: tuple[int, int], scheme: MatrixScheme
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and types of each tensor of a matrix, by the last part of its name."""
    rows, columns = shape
    expected = {"weight_scale": ((rows, columns // (scheme.group_size or columns)), tuple(BYTES))}
    if not scheme.packed:
        return {"weight": (shape, ("int8",)), **expected}
    words = -(-columns * scheme.bits // 32)
    return {"weight_packed": ((rows, words), ("int32",)), **expected, "weight_shape": ((2,), ("int64", "int32"))}


def _finite(tensor: StoredTensor) -> bool:
    rows, columns = tensor.shape
    return all(bool(tensor.rows(start, stop).isfinite().all()) for start, stop in slices(rows, columns))
