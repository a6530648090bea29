"""Quantized matrices -> the tensors and the quantization_config that compressed-tensors has for them.

Knows what a matrix's tensors are called and hold in that layout, see `persimmon.model.quantization.stored_matrices`.
Does not choose numbers.
"""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.model.convert.sources import TensorSource
from persimmon.model.convert.writer import CHUNK_BYTES, Conversion
from persimmon.model.leftovers import EMBEDDING, HEAD
from persimmon.model.tensor_names import module_name

_PACKED, _INTEGERS, _MIXED = "pack-quantized", "int-quantized", "mixed-precision"


@dataclass(frozen=True)
class StoredPart:
    """One of the tensors of a quantized matrix.

    Attributes:
        shape: as stored, like dtype.
        dtype: int32 or int8, the type of scales, or int64.
        read: the rows from start to stop.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], torch.Tensor]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """As in `TensorSource`."""
        return self.read(start, stop)


def is_packed(name: str, form: QuantizedFormat) -> bool:
    """Whether numbers are packed into int32.

    8-bit numbers of the embedding and lm_head are not: Transformers cannot load a packed embedding
    (findings/transformers_packed_embedding.sh).

    Args:
        name: of the matrix.
        form: its format.
    """
    return form.bits == 4 or name not in (EMBEDDING, HEAD)


def stored_numbers(name: str, matrix: QuantizedMatrix) -> torch.Tensor:
    """Numbers as files hold them.

    Args:
        name: of the matrix.
        matrix: some of its rows.

    Returns:
        [out, in] int8; or packed, [out, in * bits / 32] int32: the numbers plus 2^(bits - 1), the first input in the
        lowest bits.
    """
    if not is_packed(name, matrix.format):
        return matrix.numbers
    return (matrix.numbers if matrix.bits == 4 else matrix.numbers.view(torch.uint8) ^ 0x80).view(torch.int32)


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
        numbers: rows of `stored_numbers`.
        scales: rows of weight_scale.
    """
    rows, columns = shape
    module = name.removesuffix(".weight")
    groups = 1 if form.group_size is None else columns // form.group_size
    scale = {f"{module}.weight_scale": StoredPart((rows, groups), form.scale_dtype, scales)}
    if not is_packed(name, form):
        return {f"{module}.weight": StoredPart((rows, columns), torch.int8, numbers), **scale}
    size = torch.tensor(shape)
    return {
        f"{module}.weight_packed": StoredPart((rows, columns * form.bits // 32), torch.int32, numbers),
        **scale,
        f"{module}.weight_shape": StoredPart((2,), torch.int64, lambda start, stop: size[start:stop]),
    }


@dataclass
class MadeMatrix:
    """A matrix that is made anew whenever its rows are read, some at a time.

    Attributes:
        name: of its weight.
        shape: (out, in).
        form: its format.
        make: the rows from start to stop.
    """

    name: str
    shape: tuple[int, ...]
    form: QuantizedFormat
    make: Callable[[int, int], QuantizedMatrix]
    _scales: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def parts(self) -> dict[str, StoredPart]:
        """Its tensors by their names."""
        return stored_parts(self.name, self.shape, self.form, self._stored_numbers, self._stored_scales)

    def _stored_numbers(self, start: int, stop: int) -> torch.Tensor:
        """Their scales are kept until they are read, as they are next."""
        self._scales = {rows: scales for rows, scales in self._scales.items() if rows[1] <= start}
        pieces = []
        for first, last in self._slices(start, stop):
            matrix = self.make(first, last)
            pieces.append(stored_numbers(self.name, matrix))
            self._scales[first, last] = matrix.scales
        return torch.cat(pieces)

    def _stored_scales(self, start: int, stop: int) -> torch.Tensor:
        kept, self._scales = self._scales, {}
        if (start, stop) == (0, self.shape[0]) and sum(map(len, kept.values())) == self.shape[0]:
            return torch.cat([kept[key] for key in sorted(kept)])
        return torch.cat([self.make(first, last).scales for first, last in self._slices(start, stop)])

    def _slices(self, start: int, stop: int) -> list[tuple[int, int]]:
        step = max(1, CHUNK_BYTES // (self.shape[1] * torch.float32.itemsize))
        return [(first, min(first + step, stop)) for first in range(start, stop, step)]


def with_quantized(
    conversion: Conversion, forms: Mapping[str, QuantizedFormat], parts: Mapping[str, Mapping[str, StoredPart]]
) -> Conversion:
    """The conversion with other tensors in place of some matrices, and a config.json that says so.

    Args:
        conversion: of a checkpoint that is not quantized.
        forms: the formats of these matrices, by name.
        parts: the tensors of each, see `stored_parts`.
    """
    values = json.loads(conversion.files["config.json"])
    values["quantization_config"] = _quantization_config(forms, conversion)
    tensors: dict[str, TensorSource] = {}
    for name, tensor in conversion.tensors.items():
        tensors |= parts.get(name, {name: tensor})
    return replace(
        conversion,
        tensors=tensors,
        files={**conversion.files, "config.json": json.dumps(values, indent=2).encode() + b"\n"},
        unchanged=frozenset(itertools.chain.from_iterable(parts.values())),
    )


def _quantization_config(forms: Mapping[str, QuantizedFormat], conversion: Conversion) -> dict[str, Any]:
    """The quantization_config of config.json.

    What most weights of layers are stored in is the format of the class Linear.  Other modules are named, since a name
    decides before a class does.

    Args:
        forms: of the quantized matrices, by name.
        conversion: has all tensors of the checkpoint, by the same names.
    """

    def module(name: str) -> str:
        return module_name(name.removesuffix(".weight"), conversion.config)

    tensors = conversion.tensors
    modules: dict[tuple[QuantizedFormat, bool], list[str]] = defaultdict(list)
    sizes: dict[tuple[QuantizedFormat, bool], int] = defaultdict(int)
    for name, form in forms.items():
        # Modules whose scales differ in type only have one scheme.
        kind = QuantizedFormat(form.bits, form.group_size, torch.bfloat16), is_packed(name, form)
        modules[kind].append(module(name))
        sizes[kind] += math.prod(tensors[name].shape) if name not in (EMBEDDING, HEAD) else 0
    most = max(sizes, key=sizes.__getitem__)
    groups = {
        f"group_{number}": _group(["Linear"] if kind == most and sizes[most] else modules[kind], *kind)
        for number, kind in enumerate(sorted(modules, key=lambda kind: kind != most))
    }
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [
            module(name)
            for name, tensor in tensors.items()
            if len(tensor.shape) == 2 and name != EMBEDDING and name not in forms
        ],
        "kv_cache_scheme": None,
    }


def _group(targets: list[str], form: QuantizedFormat, packed: bool) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": {
            "num_bits": form.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if form.group_size is None else "group",
            "group_size": form.group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": _PACKED if packed else _INTEGERS,
    }
