"""Writes checkpoints of random 8-bit and 4-bit integers, in the layout of `persimmon convert --quantize-vocab`.

Some rows are made at a time, so that a large model's shape takes little memory.  Knows no server.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.model.checkpoint import expected_shapes
from persimmon.model.config import PersimmonConfig
from persimmon.model.convert.compressed_layout import MadeMatrix, with_quantized
from persimmon.model.convert.writer import Conversion, write
from persimmon.model.quantization.scheme import Quantization, quantized_formats
from persimmon.model.quantization.tensors import random_matrix

_SHARD_BYTES = 5 * 10**9
_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class _RandomTensor:
    """A norm, a bias or a matrix, drawn as `persimmon.model.checkpoint.dummy_tensors` draws them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = _DTYPE

    def rows(self, start: int, stop: int) -> torch.Tensor:
        mean, deviation = (1.0, 0.1) if self.name.endswith("layernorm.weight") else (0.0, 0.02)
        drawn = torch.randn(stop - start, *self.shape[1:], generator=_generator(self.name, start))
        return (drawn * deviation + mean).to(self.dtype)


def write_quantized_checkpoint(source: Path, out: Path, quantization: Quantization) -> None:
    """Writes a checkpoint of random numbers.

    Args:
        source: a folder with config.json of the network, which is not quantized, and what else it needs but weights.
        out: a new folder, which gets the same files, the weights and their quantization_config.
        quantization: bits of the layers' matrices; embedding and lm_head have 8.

    Raises:
        CheckpointError: the disk is too small, or cannot be written.
    """
    config = PersimmonConfig.from_folder(source)
    tensors = {name: _RandomTensor(name, shape) for name, shape in expected_shapes(config).items()}
    forms = quantized_formats(config, quantization, scale_dtype=_DTYPE)
    parts = {name: _random_matrix(name, tensors[name].shape, form).parts() for name, form in forms.items()}
    conversion = Conversion(
        origin={"source": "random integers", "quantize": quantization},
        config=config,
        tensors=tensors,
        dtype=None,
        max_shard_bytes=_SHARD_BYTES,
        files={path.name: path.read_bytes() for path in source.iterdir()},
    )
    write(with_quantized(conversion, forms, parts), out, print)


def _random_matrix(name: str, shape: tuple[int, ...], form: QuantizedFormat) -> MadeMatrix:
    def make(start: int, stop: int) -> QuantizedMatrix:
        return random_matrix((stop - start, shape[1]), form, _generator(name, start))

    return MadeMatrix(name=name, shape=shape, form=form, make=make)


def _generator(name: str, row: int) -> torch.Generator:
    """Draws the same numbers whenever the same rows are asked for: what was written is compared with them."""
    return torch.Generator().manual_seed(zlib.crc32(f"{name} {row}".encode()))
