"""Weights in an OpenVINO graph: constants, or constants that a few operations decompress, seen as sources of rows.

Knows the operations that NNCF's weight compression puts before a weight.  Knows nothing of which weight is which.

NNCF stores a matrix as numbers, with one scale for each row or group of a row, and a zero point where it is asymmetric.
Convert, Subtract and Multiply decompress it, then Reshape where rows are in groups, which add a dimension.  Codebooks
are a Gather of 16 values.  Here these operations are computed in float32, in which numbers times scales of 16 bits are
exact.  (Seen in exports of NNCF 2.12, 2.14 and 3.4.)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.kernels.quantized import Bits
from persimmon.model.convert.sources import exact_format, exact_matrix
from persimmon.model.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]

_FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_CODES = {"u4": 4, "i4": 4, "nf4": 4, "f4e2m1": 4, "u8": 8, "i8": 8, "f8e4m3": 8, "f8e5m2": 8, "f8e8m0": 8}
_SIGNED: Mapping[str, Bits] = {"i8": 8, "i4": 4}
_ARITHMETIC = {"Multiply": np.multiply, "Subtract": np.subtract}


class _Expression(Protocol):
    """Something with a shape whose rows can be computed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Array:
        """Rows start to stop in float32."""


@dataclass(frozen=True)
class _Constant:
    """Stored numbers.

    Attributes:
        kind: OpenVINO's name of their type.
        shape: of the constant.
        content: its bytes, a view of the mapped file.
    """

    kind: str
    shape: tuple[int, ...]
    content: Array

    def stored(self, start: int, stop: int) -> torch.Tensor:
        """Rows of floating point numbers in the type they are stored in."""
        dtype, row = _FLOATS[self.kind], math.prod(self.shape[1:])
        content = self.content[start * row * dtype.itemsize : stop * row * dtype.itemsize].copy()
        return torch.from_numpy(content).view(dtype).reshape(stop - start, *self.shape[1:])

    def rows(self, start: int, stop: int) -> Array:
        if self.kind in _FLOATS:
            decoded: Array = self.stored(start, stop).float().numpy()
            return decoded
        row = math.prod(self.shape[1:])
        first, last = start * row, stop * row
        if _CODES[self.kind] == 8:
            numbers: Array = np.take(_values(self.kind), self.content[first:last])
        else:  # the element with the even number is in the low half of a byte
            pairs: Array = np.take(_values(self.kind), self.content[first // 2 : (last + 1) // 2], axis=0)
            numbers = pairs.reshape(-1)[first % 2 :][: last - first]
        return numbers.reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class _Operation:
    """Two operands of one shape, but for dimensions of size 1."""

    name: str
    operands: tuple[_Expression, _Expression]
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Array:
        computed: Array = _ARITHMETIC[self.name](
            *(
                operand.rows(start, stop)
                if len(operand.shape) == len(self.shape) and operand.shape[0] == self.shape[0]
                else _whole(operand)
                for operand in self.operands
            )
        )
        return computed


@dataclass(frozen=True)
class _Reshape:
    """The rows of another expression in another shape."""

    operand: _Expression
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Array:
        return self.operand.rows(start, stop).reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class _Codebook:
    """Values by their numbers."""

    values: _Expression
    numbers: _Expression

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    def rows(self, start: int, stop: int) -> Array:
        return _whole(self.values)[self.numbers.rows(start, stop).astype(np.intp)]


@dataclass(frozen=True)
class Weight:
    """A weight as `QuantizedSource`, in the type it is stored in or, where it is compressed, in float32.

    Attributes:
        node: the last operation that makes it, for messages.
        expression: how it is made.
        shape: without dimensions of size 1 that stand before others.
    """

    node: str
    expression: _Expression
    shape: tuple[int, ...]

    @property
    def compressed(self) -> bool:
        """Whether it is more than numbers as they are stored."""
        return not isinstance(self.expression, _Constant) or self.expression.kind not in _FLOATS

    @property
    def dtype(self) -> torch.dtype:
        """As stored, or float32."""
        if isinstance(self.expression, _Constant) and not self.compressed:
            return _FLOATS[self.expression.kind]
        return torch.float32

    @property
    def form(self) -> QuantizedFormat | None:
        """As in `QuantizedSource`, like matrix."""
        found = _Integers.of(self.expression)
        if found is None or len(self.shape) != 2 or self.shape != self.expression.shape:
            return None
        columns, scales = self.shape[1], found.scales
        return exact_format(found.bits, columns // math.prod(scales.shape[1:]), columns, _FLOATS[scales.kind])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """As in `TensorSource`."""
        if isinstance(self.expression, _Constant) and not self.compressed:
            return self.expression.stored(start, stop)
        return torch.from_numpy(np.ascontiguousarray(self.expression.rows(start, stop)))

    def matrix(self, start: int, stop: int) -> QuantizedMatrix:
        """Numbers, less their zero points, and scales as stored."""
        found, form = _Integers.of(self.expression), self.form
        if found is None or form is None:
            raise ValueError(f"{self.node} is not made of symmetric integers")
        integers = torch.from_numpy(found.numbers.rows(start, stop).astype(np.int8))
        scales = found.scales.stored(start, stop)
        return exact_matrix(integers.reshape(stop - start, -1), scales.reshape(stop - start, -1), form)


@dataclass(frozen=True)
class _Integers:
    """Numbers times scales, one for each row or group of a row.

    Attributes:
        numbers: whole numbers that `bits` hold with a sign, zero points subtracted.
        scales: as stored.
        bits: 8 or 4.
    """

    numbers: _Expression
    scales: _Constant
    bits: Bits

    @classmethod
    def of(cls, expression: _Expression) -> "_Integers | None":
        """The parts of an expression; None where it is made in another way, or of integers of too many bits."""
        if isinstance(expression, _Reshape):
            expression = expression.operand
        if not isinstance(expression, _Operation) or expression.name != "Multiply":
            return None
        numbers, scales = expression.operands
        if not isinstance(scales, _Constant) or scales.kind not in _FLOATS:
            return None
        if len(scales.shape) < 2 or scales.shape != (*numbers.shape[:-1], 1):
            return None
        if isinstance(numbers, _Constant):
            bits = _SIGNED.get(numbers.kind)
        elif isinstance(numbers, _Operation) and numbers.name == "Subtract":
            bits = _bits_after(*numbers.operands)
        else:
            bits = None
        return None if bits is None else cls(numbers, scales, bits)


def _bits_after(numbers: _Expression, zeros: _Expression) -> Bits | None:
    """Bits of numbers, with a sign, from which zero points are subtracted; None where they are more than 8."""
    if not isinstance(numbers, _Constant) or not isinstance(zeros, _Constant):
        return None
    middle = {"u8": 128, "u4": 8}.get(numbers.kind)
    if middle is not None and math.prod(zeros.shape) == 1 and float(_whole(zeros).item()) == middle:
        return 8 if numbers.kind == "u8" else 4
    # Unsigned numbers of 4 bits and their zero points differ by at most 15.
    return 8 if numbers.kind == zeros.kind == "u4" else None


def is_weight(output: Any) -> bool:
    """Whether an output depends on constants alone, by the operations that `read_weight` knows."""
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return True
    if kind not in {"Convert", "Reshape", "Gather", *_ARITHMETIC}:
        return False
    return all(is_weight(node.input_value(number)) for number in range(node.get_input_size()))


def read_weight(output: Any, place: object) -> Weight:
    """The weight that an output is.

    Args:
        output: of a node of the graph, for which `is_weight`.
        place: the file, for messages.

    Raises:
        CheckpointError: it is of a type, or is made by an operation, that is not known.
    """
    expression = _expression(output, place)
    shape = expression.shape
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    if isinstance(expression, _Constant):
        expression = _Constant(expression.kind, shape, expression.content)
    name = output.get_node().get_friendly_name()
    if not math.prod(shape) or not shape or shape[0] != expression.shape[0]:
        raise CheckpointError(f"{place}: {name} has shape {list(expression.shape)}; expected a vector or a matrix")
    return Weight(node=name, expression=expression, shape=shape)


def _expression(output: Any, place: object) -> _Expression:
    node = output.get_node()
    kind, name = node.get_type_name(), node.get_friendly_name()
    shape = tuple(output.get_shape()) or (1,)
    if kind == "Constant":
        element = node.get_element_type().get_type_name()
        if element not in _FLOATS and element not in _CODES:
            raise CheckpointError(f"{place}: {name} is {element}; expected one of {', '.join((*_FLOATS, *_CODES))}")
        return _Constant(element, shape, node.data.reshape(-1).view(np.uint8))
    operands = [node.input_value(number) for number in range(node.get_input_size())]
    if kind == "Convert":
        return _expression(operands[0], place)
    first = _expression(operands[0], place)
    if kind in _ARITHMETIC:
        return _Operation(kind, (first, _expression(operands[1], place)), shape)
    if kind == "Reshape" and first.shape[:1] == shape[:1]:
        return _Reshape(first, shape)
    if kind == "Gather" and len(first.shape) == 1:
        return _Codebook(first, _expression(operands[1], place))
    raise CheckpointError(
        f"{place}: {name} is {kind} to shape {list(shape)}, which no known compression of weights uses"
    )


def _whole(expression: _Expression) -> Array:
    """All of a small expression."""
    return expression.rows(0, expression.shape[0])


@lru_cache
def _values(kind: str) -> Array:
    """What OpenVINO's own Convert makes of each byte: [256] values, or [256, 2] for types of 4 bits."""
    import openvino
    from openvino import opset13

    element = getattr(openvino.Type, kind)
    count = 1 << _CODES[kind]
    codes = np.arange(count, dtype=np.uint8)
    packed = codes if count == 256 else codes[0::2] | codes[1::2] << 4
    stored = openvino.Tensor(packed.view(np.int8) if kind == "i8" else packed, openvino.Shape([count]), element)
    decoded = openvino.Tensor(openvino.Type.f32, openvino.Shape([count]))
    opset13.convert(opset13.constant(stored), "f32").evaluate([decoded], [stored])
    values = decoded.data.copy()
    every = np.arange(256)
    return values if count == 256 else np.stack([values[every & 15], values[every >> 4]], axis=1)
