"""Exports for OpenVINO: what tests convert from.

Graphs of the operations that optimum-intel's exports of Persimmon have between the tokens and the logits, with weights
compressed as NNCF does it.  Knows nothing of the code that converts.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from safetensors.torch import load_file

from persimmon.model.config import PersimmonConfig

Compress = Callable[[torch.Tensor], tuple[Any, torch.Tensor]]
"""Makes of a matrix the output of a graph, and the values that this output stands for."""


def as_is(matrix: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Stored in its own type."""
    kind = {torch.float16: ov.Type.f16, torch.bfloat16: ov.Type.bf16, torch.float32: ov.Type.f32}[matrix.dtype]
    node = stored(kind, matrix.shape, matrix.contiguous().view(torch.uint8).numpy())
    return (node if kind == ov.Type.f32 else ops.convert(node, "f32")), matrix


def in_8_bits(*, symmetric: bool) -> Compress:
    """A scale for each row, and a zero point."""

    def compress(matrix: torch.Tensor) -> tuple[Any, torch.Tensor]:
        generator = np.random.default_rng(len(matrix))
        scales = generator.uniform(0.001, 0.01, (len(matrix), 1)).astype(np.float16)
        numbers = generator.integers(0, 256, matrix.shape, dtype=np.uint8)
        zeros = generator.integers(0, 256, scales.shape, dtype=np.uint8)
        if symmetric:
            values = numbers.view(np.int8).astype(np.float32)
            node = ops.convert(ops.constant(numbers.view(np.int8)), "f16")
        else:
            values = numbers.astype(np.float32) - zeros
            node = ops.subtract(ops.convert(ops.constant(numbers), "f16"), ops.convert(ops.constant(zeros), "f16"))
        values = values * scales.astype(np.float32)
        return ops.convert(ops.multiply(node, ops.constant(scales)), "f32"), torch.from_numpy(values)

    return compress


def in_4_bits(kind: str, group: int | None, zero: str = "none") -> Compress:
    """Groups of a row, or whole rows.

    Args:
        kind: OpenVINO's type of the numbers.
        group: numbers that share a scale; None for a row.
        zero: "none", "each" for one per group, "one" for all together, as older NNCF wrote it, or "middle": one of 8.
    """

    def compress(matrix: torch.Tensor) -> tuple[Any, torch.Tensor]:
        generator = np.random.default_rng(len(matrix))
        rows, columns = matrix.shape
        shape = (rows, columns) if group is None else (rows, columns // group, group)
        codes = generator.integers(0, 16, shape, dtype=np.uint8)
        scales = generator.uniform(0.01, 0.1, (*shape[:-1], 1)).astype(np.float16)
        values = CODES_OF[kind][codes]
        node = ops.convert(packed(codes, kind), "f16")
        if zero != "none":
            zeros = generator.integers(0, 16, scales.shape if zero == "each" else (1,) * len(shape), dtype=np.uint8)
            if zero == "middle":
                zeros[:] = 8
            values = values - CODES_OF[kind][zeros]
            node = ops.subtract(node, ops.convert(packed(zeros, kind), "f16"))
        node = ops.multiply(node, ops.constant(scales))
        values = (values * scales.astype(np.float32)).reshape(rows, columns)
        if group is not None:
            node = ops.reshape(node, np.array([rows, columns]), special_zero=False)
        return ops.convert(node, "f32"), torch.from_numpy(values)

    return compress


def by_codebook(matrix: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Sixteen values, chosen by numbers, in groups of 32."""
    generator = np.random.default_rng(len(matrix))
    codes = generator.integers(0, 16, (len(matrix), matrix.shape[1] // 32, 32), dtype=np.uint8)
    book = generator.uniform(-1, 1, 16).astype(np.float16)
    scales = generator.uniform(0.01, 0.1, (*codes.shape[:-1], 1)).astype(np.float16)
    chosen = ops.gather(ops.constant(book), ops.convert(packed(codes, "u4"), "u8"), ops.constant(0))
    node = ops.reshape(ops.multiply(chosen, ops.constant(scales)), np.array(matrix.shape), special_zero=False)
    values = book.astype(np.float32)[codes] * scales.astype(np.float32)
    return ops.convert(node, "f32"), torch.from_numpy(values.reshape(matrix.shape))


def packed(codes: np.ndarray[Any, Any], kind: str) -> Any:
    """A constant of a type of 4 bits: the element with the even number is in the low half of a byte."""
    flat = np.append(codes.reshape(-1), np.zeros(codes.size % 2, np.uint8))
    return stored(getattr(ov.Type, kind), codes.shape, flat[0::2] | flat[1::2] << 4)


def stored(kind: Any, shape: Sequence[int], content: np.ndarray[Any, Any]) -> Any:
    """A constant that holds a copy of its bytes."""
    tensor = ov.Tensor(kind, ov.Shape(shape))
    np.copyto(tensor.data.reshape(-1).view(np.uint8), content.reshape(-1))
    return ops.constant(tensor)


_UNSIGNED = np.arange(16, dtype=np.float32)
CODES_OF = {
    "u4": _UNSIGNED,
    "i4": np.where(_UNSIGNED < 8, _UNSIGNED, _UNSIGNED - 16),
    # The values of OCP's Microscaling Formats, E2M1.
    "f4e2m1": np.array([*(halves := (0, 0.5, 1, 1.5, 2, 3, 4, 6)), *(-half for half in halves)], dtype=np.float32),
}


class Export:
    """Writes a checkpoint of Hugging Face layout as an export.

    Args:
        original: the checkpoint, in one safetensors file.
        compress: what becomes of matrices.
        anonymous: whether biases have the shape [1, 1, size], like norms, as in older exports.
        rotary_table: whether cosines come from a table for all positions, as in older exports.
        twist: a change of the graph: "split", "scale", "gelu", "residual" or "norm".
    """

    def __init__(
        self,
        original: Path,
        compress: Compress = as_is,
        *,
        anonymous: bool = False,
        rotary_table: bool = False,
        twist: str = "",
    ) -> None:
        self._original = original
        self._config = PersimmonConfig.from_folder(original)
        self._stored = load_file(original / "model.safetensors")
        self._compress = compress
        self._anonymous = anonymous
        self._rotary_table = rotary_table
        self._twist = twist
        self.expected: dict[str, torch.Tensor] = {}

    def write(self, folder: Path) -> Path:
        """Writes the folder, and notes in `expected` what each tensor stands for."""
        folder.mkdir(parents=True, exist_ok=True)
        ov.save_model(self._model(), folder / "openvino_model.xml", compress_to_fp16=False)
        for path in self._original.iterdir():
            if path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)
        return folder

    def _model(self) -> Any:
        config = self._config
        tokens = ops.parameter([-1, -1], ov.Type.i64, name="input_ids")
        tokens.output(0).set_names({"input_ids"})
        positions = ops.parameter([-1, -1], ov.Type.i64, name="position_ids")
        positions.output(0).set_names({"position_ids"})
        table = self._matrix("model.embed_tokens.weight")
        hidden = ops.gather(table, ops.convert(tokens, "i32"), ops.constant(0))
        angles = self._angles(positions)
        for layer in range(config.num_hidden_layers):
            hidden = self._layer(hidden, f"model.layers.{layer}", angles)
        normed = self._norm(hidden, "model.final_layernorm", 3)
        tied = config.tie_word_embeddings
        head = table if tied else self._matrix("lm_head.weight")
        logits = ops.matmul(normed, head, transpose_a=False, transpose_b=True)
        return ov.Model([ops.result(logits)], [tokens, positions], "Model0")

    def _layer(self, hidden: Any, name: str, angles: tuple[Any, Any]) -> Any:
        config, twist = self._config, self._twist if name.endswith(".1") else ""
        attention = f"{name}.self_attn"
        fused = self._linear(self._norm(hidden, f"{name}.input_layernorm", 3), f"{attention}.query_key_value")
        heads = (3, config.num_attention_heads) if twist == "split" else (config.num_attention_heads, 3)
        fused = ops.reshape(fused, np.array([0, 0, *heads, config.head_dim]), special_zero=True)
        parts = [ops.gather(fused, ops.constant(index), ops.constant(3)) for index in (0, 1, -1)]
        if config.qk_layernorm:
            parts[0] = self._norm(parts[0], f"{attention}.q_layernorm", 4)
            parts[1] = self._norm(parts[1], f"{attention}.k_layernorm", 4)
        query, key, value = (ops.transpose(part, np.array([0, 2, 1, 3])) for part in parts)
        query, key = (self._turned(part, angles) for part in (query, key))
        mixed = ops.scaled_dot_product_attention(query, key, value, causal=True)
        mixed = ops.reshape(ops.transpose(mixed, np.array([0, 2, 1, 3])), np.array([0, 0, config.hidden_size]), True)
        if twist == "scale":
            mixed = ops.multiply(mixed, ops.constant(np.ones((1, 1, config.hidden_size), np.float32)))
        dense = self._linear(mixed, f"{attention}.dense")
        hidden = ops.add(dense, hidden) if twist != "residual" else dense
        inner = self._linear(self._norm(hidden, f"{name}.post_attention_layernorm", 3), f"{name}.mlp.dense_h_to_4h")
        if twist == "gelu":
            squared = ops.gelu(inner, "tanh")
        else:
            relu = ops.relu(inner)
            squared = ops.multiply(relu, relu) if self._anonymous else ops.power(relu, ops.constant(np.float32(2)))
        return ops.add(self._linear(squared, f"{name}.mlp.dense_4h_to_h"), hidden)

    def _angles(self, positions: Any) -> tuple[Any, Any]:
        config = self._config
        exponents = np.arange(0, config.rotary_dim, 2) / config.rotary_dim
        frequencies = (config.rope_theta**-exponents).astype(np.float32)
        if self._rotary_table:
            turns = np.outer(np.arange(config.max_position_embeddings, dtype=np.float32), np.tile(frequencies, 2))
            rows = [ops.gather(ops.constant(of(turns)), positions, ops.constant(0)) for of in (np.cos, np.sin)]
        else:
            column = ops.constant(frequencies.reshape(1, -1, 1))
            row = ops.convert(ops.unsqueeze(positions, ops.constant(1)), "f32")
            half = ops.transpose(ops.matmul(column, row, False, False), np.array([0, 2, 1]))
            rows = [of(ops.concat([half, half], -1)) for of in (ops.cos, ops.sin)]
        cosines, sines = (ops.unsqueeze(row, ops.constant(1)) for row in rows)
        return cosines, sines

    def _turned(self, part: Any, angles: tuple[Any, Any]) -> Any:
        config = self._config
        width, half = config.rotary_dim, config.rotary_dim // 2

        def columns(of: Any, start: int, stop: int) -> Any:
            bounds = (np.array([bound]) for bound in (start, stop, 1, 3))
            return ops.slice(of, *map(ops.constant, bounds))

        front = columns(part, 0, width)
        turned = ops.concat(
            [ops.multiply(columns(front, half, width), ops.constant(np.float32(-1))), columns(front, 0, half)], -1
        )
        front = ops.add(ops.multiply(front, angles[0]), ops.multiply(turned, angles[1]))
        return ops.concat([front, columns(part, width, config.head_dim)], -1)

    def _norm(self, hidden: Any, name: str, dimensions: int) -> Any:
        normed = ops.mvn(hidden, ops.constant(np.array([-1])), True, self._config.layer_norm_eps, "inside_sqrt")
        if self._twist == "norm" and name.endswith("final_layernorm"):
            return normed
        weight, bias = (self._vector(f"{name}.{kind}", dimensions) for kind in ("weight", "bias"))
        return ops.add(ops.multiply(normed, weight), bias)

    def _linear(self, hidden: Any, name: str) -> Any:
        product = ops.matmul(hidden, self._matrix(f"{name}.weight"), transpose_a=False, transpose_b=True)
        return ops.add(product, self._vector(f"{name}.bias", 3 if self._anonymous else 1))

    def _matrix(self, name: str) -> Any:
        node, values = self._compress(self._stored[name])
        self.expected[name] = values
        return node

    def _vector(self, name: str, dimensions: int) -> Any:
        vector = self._stored[name]
        self.expected[name] = vector
        return as_is(vector.reshape([1] * (dimensions - 1) + [-1]))[0]


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes keys of config.json, also of its rotary table."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values |= changes
    values["rope_parameters"] |= {key: value for key, value in changes.items() if key in values["rope_parameters"]}
    path.write_text(json.dumps(values))
