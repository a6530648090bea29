"""A conversion -> the same one with matrices of 8 or 4 bits, in the layout of compressed-tensors.

Knows which modules are quantized, and what their tensors are called and hold in that layout: see
`persimmon.model.quantization.stored_matrices`.  How numbers are chosen is others' affair.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.model.convert.sources import TensorSource
from persimmon.model.convert.writer import CHUNK_BYTES, Conversion
from persimmon.model.errors import CheckpointError
from persimmon.model.leftovers import EMBEDDING, HEAD
from persimmon.model.quantization.rounding import quantize
from persimmon.model.quantization.scheme import DEFAULT_GROUP_SIZE, Quantization, quantized_formats

Part = Literal["weight_packed", "weight_scale", "weight_shape"]
PARTS: tuple[Part, ...] = ("weight_packed", "weight_scale", "weight_shape")


@dataclass(frozen=True)
class QuantizationRequest:
    """What to make of the matrices.

    Attributes:
        quantization: bits of the layers' matrices.
        group_size: of 4-bit matrices.
        vocabulary: whether the embedding and lm_head become 8 bits, a scale for each row; else they stay as they are.
        calibration: a file of texts, see `persimmon.model.convert.calibration_texts`; None to round to nearest.
    """

    quantization: Quantization
    group_size: int = DEFAULT_GROUP_SIZE
    vocabulary: bool = False
    calibration: Path | None = None


@dataclass(frozen=True)
class StoredPart:
    """One of the tensors of a quantized matrix.

    Attributes:
        shape: as stored, like dtype.
        dtype: int32, the type of scales, or int64.
        read: the rows from start to stop.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], torch.Tensor]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """As in `TensorSource`."""
        return self.read(start, stop)


@dataclass
class _Rounded:
    """A matrix that is rounded to nearest whenever its rows are read.

    Attributes:
        name: of its weight, for messages.
        source: the weight.
        form: what it becomes.
    """

    name: str
    source: TensorSource
    form: QuantizedFormat
    _scales: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def packed(self, start: int, stop: int) -> torch.Tensor:
        """Rows of weight_packed.  Their scales are kept until they are read, as they are next."""
        self._scales = {rows: scales for rows, scales in self._scales.items() if rows[1] <= start}
        pieces = []
        for first, last in self._slices(start, stop):
            matrix = self._matrix(first, last)
            pieces.append(packed(matrix))
            self._scales[first, last] = matrix.scales
        return torch.cat(pieces)

    def scales(self, start: int, stop: int) -> torch.Tensor:
        """Rows of weight_scale."""
        kept, self._scales = self._scales, {}
        rows = self.source.shape[0]
        if (start, stop) == (0, rows) and sum(map(len, kept.values())) == rows:
            return torch.cat([kept[key] for key in sorted(kept)])
        return torch.cat([self._matrix(first, last).scales for first, last in self._slices(start, stop)])

    def _slices(self, start: int, stop: int) -> list[tuple[int, int]]:
        step = max(1, CHUNK_BYTES // (self.source.shape[1] * self.source.dtype.itemsize))
        return [(first, min(first + step, stop)) for first in range(start, stop, step)]

    def _matrix(self, start: int, stop: int) -> QuantizedMatrix:
        try:
            return quantize(self.source.rows(start, stop), self.form, first_row=start)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {self.name}: {error}") from error


def packed(matrix: QuantizedMatrix) -> torch.Tensor:
    """[out, in * bits / 32] int32, the numbers plus 2^(bits - 1), the first input in the lowest bits."""
    return (matrix.numbers if matrix.bits == 4 else matrix.numbers.view(torch.uint8) ^ 0x80).view(torch.int32)


def formats(conversion: Conversion, request: QuantizationRequest) -> dict[str, QuantizedFormat]:
    """The formats of the tensors that are quantized, by name.

    Raises:
        CheckpointError: groups do not divide the inputs of a matrix, or lm_head shares a quantized embedding.
    """
    source, config = conversion.origin["source"], conversion.config
    if request.vocabulary and config.generates and config.tie_word_embeddings:
        raise CheckpointError(
            f"{source}: its lm_head shares the embedding (tie_word_embeddings), which readers of compressed-tensors "
            f"do not share quantized: leave out --quantize-vocab"
        )
    for name, (_, columns) in ((n, t.shape) for n, t in conversion.tensors.items() if len(t.shape) == 2):
        if columns % 8:
            raise CheckpointError(f"{source}: {name} has {columns} inputs; expected a multiple of 8")
    stored = conversion.dtype or _dtype(conversion.tensors)
    forms = quantized_formats(config, request.quantization, request.group_size, stored)
    if not request.vocabulary:
        forms = {name: form for name, form in forms.items() if name not in (EMBEDDING, HEAD)}
    return forms


def quantize_conversion(
    conversion: Conversion, request: QuantizationRequest, forms: Mapping[str, QuantizedFormat]
) -> Conversion:
    """The conversion with quantized matrices, each rounded to nearest, and a config.json that says so.

    Args:
        conversion: of a checkpoint.
        request: what is quantized.
        forms: the formats, see `formats`.
    """
    tensors: dict[str, TensorSource] = {}
    for name, tensor in conversion.tensors.items():
        if name not in forms:
            tensors[name] = tensor
            continue
        rounded = _Rounded(name, tensor, forms[name])
        tensors |= stored_parts(name, tensor.shape, forms[name], rounded.packed, rounded.scales)
    values = json.loads(conversion.files["config.json"])
    values["quantization_config"] = quantization_config(
        request, [name for name in (HEAD, "score.weight") if name in tensors]
    )
    origin = {
        **conversion.origin,
        "quantize": [request.quantization, request.group_size, request.vocabulary],
    }
    return replace(
        conversion,
        origin=origin,
        tensors=tensors,
        files={**conversion.files, "config.json": json.dumps(values, indent=2).encode() + b"\n"},
        unchanged=frozenset(tensors.keys() - conversion.tensors.keys()),
    )


def stored_parts(
    name: str,
    shape: tuple[int, ...],
    form: QuantizedFormat,
    numbers: Callable[[int, int], torch.Tensor],
    scales: Callable[[int, int], torch.Tensor],
) -> dict[str, StoredPart]:
    """The tensors of a matrix by their names.

    Args:
        name: of its weight.
        shape: (out, in).
        form: its format.
        numbers: rows of weight_packed.
        scales: rows of weight_scale.
    """
    rows, columns = shape
    module = name.removesuffix(".weight")
    groups = 1 if form.group_size is None else columns // form.group_size
    size = torch.tensor(shape)
    return {
        f"{module}.weight_packed": StoredPart((rows, columns * form.bits // 32), torch.int32, numbers),
        f"{module}.weight_scale": StoredPart((rows, groups), form.scale_dtype, scales),
        f"{module}.weight_shape": StoredPart((2,), torch.int64, lambda start, stop: size[start:stop]),
    }


def quantization_config(request: QuantizationRequest, unquantized: list[str]) -> dict[str, Any]:
    """The quantization_config of config.json.

    Args:
        request: what is quantized.
        unquantized: weights of Linear modules that are not.
    """
    bits = 8 if request.quantization == "int8" else 4
    groups = {"group_0": _group(["Linear"], bits, request.group_size if bits == 4 else None)}
    if request.vocabulary:
        # A name decides before a class does.
        groups["group_1"] = _group(["re:.*embed_tokens", "re:.*lm_head"], 8, None)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name.removesuffix(".weight") for name in unquantized],
        "kv_cache_scheme": None,
    }


def _group(targets: list[str], bits: int, group_size: int | None) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if group_size is None else "group",
            "group_size": group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }


def _dtype(tensors: Mapping[str, TensorSource]) -> torch.dtype:
    """That of most numbers."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(sizes, key=sizes.__getitem__)
