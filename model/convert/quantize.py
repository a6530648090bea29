"""A conversion -> the same one with matrices of 8 or 4 bits, in the layout of compressed-tensors.

Knows which modules are quantized.  Neither chooses numbers nor knows their layout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from persimmon.kernels import KernelsUnavailableError, QuantizedFormat, QuantizedMatrix
from persimmon.model.convert.compressed_layout import MadeMatrix, with_quantized
from persimmon.model.convert.sources import TensorSource
from persimmon.model.convert.writer import Conversion
from persimmon.model.errors import CheckpointError
from persimmon.model.leftovers import EMBEDDING, HEAD
from persimmon.model.quantization.rounding import quantize
from persimmon.model.quantization.scheme import DEFAULT_GROUP_SIZE, Quantization, quantized_formats
from persimmon.model.tensor_names import PATCH_PROJECTION


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
        if columns % 8 and not name.startswith(PATCH_PROJECTION):
            raise CheckpointError(f"{source}: {name} has {columns} inputs; expected a multiple of 8")
    # Transformers and vLLM give scales the network's own type.
    stored = conversion.dtype or _dtype(conversion.tensors)
    scale_dtype = torch.float16 if stored == torch.float16 else torch.bfloat16
    forms = quantized_formats(config, request.quantization, request.group_size, scale_dtype)
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
    parts = {name: _rounded(name, conversion.tensors[name], form).parts() for name, form in forms.items()}
    made = with_quantized(conversion, forms, parts)
    settings = [request.quantization, request.group_size, request.vocabulary]
    return replace(made, origin={**conversion.origin, "quantize": settings})


def _rounded(name: str, source: TensorSource, form: QuantizedFormat) -> MadeMatrix:
    def make(start: int, stop: int) -> QuantizedMatrix:
        try:
            return quantize(source.rows(start, stop), form, first_row=start)
        except (CheckpointError, KernelsUnavailableError) as error:
            raise CheckpointError(f"tensor {name}: {error}") from error

    return MadeMatrix(name=name, shape=source.shape, form=form, make=make)


def _dtype(tensors: Mapping[str, TensorSource]) -> torch.dtype:
    """That of most numbers."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(sizes, key=sizes.__getitem__)
