"""Which tensors of a network `--quantization` makes 8 or 4 bits of, and how.  Knows names and shapes, no numbers."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import torch

from persimmon.kernels import QuantizedFormat
from persimmon.model.checkpoint import SCORE, expected_shapes, scheme_of
from persimmon.model.config import PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.leftovers import EMBEDDING, HEAD

Quantization = Literal["int8", "int4"]

GROUP_SIZES = (32, 128)
"""Neighbouring inputs of a 4-bit matrix that may share a scale."""

DEFAULT_GROUP_SIZE = 32
"""Groups of 128 take 0.4 bits less for each weight, but lose more when numbers are only rounded to the nearest."""


def quantized_formats(
    config: PersimmonConfig,
    quantization: Quantization,
    group_size: int = DEFAULT_GROUP_SIZE,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> dict[str, QuantizedFormat]:
    """The formats of the tensors that are quantized, by name.

    They are the matrices of all layers, in 8 bits with a scale for each output or in 4 bits with a scale for each group
    of inputs, and the embedding and lm_head, in 8 bits with a scale for each row.  Norms, biases, a classifier's score
    and the projection of image patches stay as they are.

    Args:
        config: the network.
        quantization: bits of the layers' matrices.
        group_size: of 4-bit matrices, one of GROUP_SIZES.
        scale_dtype: of all scales.  Float16 is for readers that need it: it has no scale for weights beyond 65,504 *
            127, and few bits for one of weights below 1e-3.

    Raises:
        CheckpointError: groups do not divide the inputs of a matrix.
    """
    rows = QuantizedFormat(8, None, scale_dtype)
    layers = rows if quantization == "int8" else QuantizedFormat(4, group_size, scale_dtype)
    formats = {}
    for name, shape in expected_shapes(config).items():
        if name in (EMBEDDING, HEAD):
            formats[name] = rows
        elif name.startswith("model.layers.") and len(shape) == 2:
            if layers.group_size is not None and shape[1] % layers.group_size:
                raise CheckpointError(
                    f"{name} has {shape[1]} inputs, which groups of {layers.group_size} do not divide: use 8 bits"
                )
            formats[name] = layers
    return formats


def formats_of_config(config: PersimmonConfig, stored: torch.dtype) -> dict[str, QuantizedFormat]:
    """The formats of the tensors that a checkpoint's own config.json says are quantized, by name.

    Args:
        config: the network.
        stored: the dtype of scales.
    """
    schemes = {name: scheme_of(config, name) for name in expected_shapes(config) if name != SCORE}
    return {
        name: QuantizedFormat(scheme.bits, scheme.group_size, stored)
        for name, scheme in schemes.items()
        if scheme is not None
    }


def described(stored: Mapping[str, torch.dtype | QuantizedFormat], config: PersimmonConfig) -> str:
    """The formats of quantized tensors, like "int4 in groups of 32 and int8"; empty where none is quantized.

    Args:
        stored: dtypes and formats by name.
        config: the network.
    """
    numbers: Counter[str] = Counter()
    shapes = expected_shapes(config)
    for name, form in stored.items():
        if isinstance(form, QuantizedFormat):
            group = "" if form.group_size is None else f" in groups of {form.group_size}"
            numbers[f"int{form.bits}{group}"] += math.prod(shapes[name])
    return " and ".join(text for text, _ in numbers.most_common())
