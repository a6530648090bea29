"""Weights in a format that no kernels of the project have: int8 with a scale for each output.

The network, the memory plan and the runner see what `Weight` shows and nothing of the format.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from persimmon.kernels import Kernels, Weight, reference
from persimmon.kernels.reference import ReferenceWeight
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.leftovers import EMBEDDING, HEAD
from persimmon.model.persimmon import Layer, Persimmon, is_matrix
from persimmon.model.runner import SequenceInput
from tests.engine_harness import CPU, poisoned_cache, runner_of
from tests.model.memory_plans import plan
from tests.model.rows import row_with


@dataclass(frozen=True)
class Int8Weight:
    """numbers [out, in] int8 times scales [out, 1] float32."""

    numbers: torch.Tensor
    scales: torch.Tensor
    format: str = "int8"

    @classmethod
    def of(cls, weight: torch.Tensor) -> "Int8Weight":
        scales = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-9) / 127
        return cls((weight.float() / scales).round().to(torch.int8), scales)

    @property
    def shape(self) -> tuple[int, int]:
        return self.numbers.shape[0], self.numbers.shape[1]

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scales.nbytes

    @property
    def dequantised(self) -> torch.Tensor:
        return self.numbers.float() * self.scales

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.dequantised, bias)


class Int8Kernels:
    """The reference with weights of its own."""

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def prepare_weight(self, weight: torch.Tensor, *, sparse_input: bool = False) -> ReferenceWeight:
        del sparse_input
        return Int8Weight.of(weight)

    def weight_bytes(self, shape: tuple[int, int], stored: torch.dtype) -> int:
        del stored
        return math.prod(shape) + 4 * shape[0]


def int8_kernels() -> Kernels[Any, Any]:
    kernels: Any = Int8Kernels()
    return kernels


def tensors_of(folder: Path) -> tuple[PersimmonConfig, dict[str, torch.Tensor]]:
    config = PersimmonConfig.from_folder(folder)
    return config, dict(Checkpoint.open(folder, config).tensors())


def logits_of(model: Persimmon, kernels: Kernels[Any, Any]) -> torch.Tensor:
    """Of a prompt, and of one token behind it."""
    runner = runner_of(model, poisoned_cache(model, 4, 16), kernels)
    greedy = (row_with(),)
    parts = (SequenceInput(range(5, 45), 0, [2, 0, 3], greedy), SequenceInput([7], 40, [2, 0, 3], greedy))
    return torch.cat([runner.logits([part]) for part in parts])


def weights_of(model: Persimmon) -> list[Weight]:
    def of(layer: Layer) -> list[Weight]:
        linears = (layer.query_key_value, layer.attention_out, layer.mlp_up, layer.mlp_down)
        return [linear.weight for linear in linears]

    return [weight for layer in model.layers for weight in of(layer)] + [model.head]


def test_the_network_runs_on_a_format_that_it_does_not_know(random_checkpoint: Path) -> None:
    config, tensors = tensors_of(random_checkpoint)
    own = int8_kernels()
    model = Persimmon(config, tensors.items(), torch.float32, CPU, own)
    assert {weight.format for weight in weights_of(model)} == {"int8"}
    exact = logits_of(Persimmon(config, tensors.items(), torch.float32, CPU, reference), reference)
    for name in filter(is_matrix, tensors):
        tensors[name] = Int8Weight.of(tensors[name]).dequantised
    rounded = Persimmon(config, tensors.items(), torch.float32, CPU, reference)
    torch.testing.assert_close(logits_of(model, own), logits_of(rounded, reference), rtol=1e-4, atol=1e-4)
    # The format matters: otherwise the network would have kept the numbers as they came.
    assert not torch.allclose(logits_of(model, own), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_an_embedding_of_16_bits_is_widened_row_by_row_unless_it_is_the_head(
    random_checkpoint: Path, cpu_kernels: Kernels[Any, Any], tied: bool
) -> None:
    config, tensors = tensors_of(random_checkpoint)
    config = replace(config, tie_word_embeddings=tied)
    narrow = {name: tensor.bfloat16() for name, tensor in tensors.items() if not (tied and name == HEAD)}
    wide = narrow | {EMBEDDING: narrow[EMBEDDING].float()}
    models = [Persimmon(config, each.items(), torch.float32, CPU, cpu_kernels) for each in (narrow, wide)]
    assert torch.equal(*(logits_of(model, cpu_kernels) for model in models))
    table = models[0]._embedding
    kept = torch.float32 if tied else cpu_kernels.stored_dtype(torch.bfloat16, torch.float32)
    assert isinstance(table, torch.Tensor)
    assert table.dtype == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True], ids=["own kernels", "int8"])
def test_the_memory_plan_counts_what_weights_say_they_take(
    random_checkpoint: Path, cpu_kernels: Kernels[Any, Any], int8: bool, dtype: torch.dtype
) -> None:
    kernels = int8_kernels() if int8 else cpu_kernels
    config, tensors = tensors_of(random_checkpoint)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    stored = kernels.stored_dtype(dtype, torch.float32)
    planned = plan(config, weight_bytes=kernels.weight_bytes, stored=dict.fromkeys(tensors, stored))
    model = Persimmon(config, tensors.items(), torch.float32, CPU, kernels)
    embedding = tensors[EMBEDDING].numel() * stored.itemsize
    others = sum(4 * tensor.numel() for name, tensor in tensors.items() if not is_matrix(name) and name != EMBEDDING)
    assert planned.weights == embedding + others + sum(weight.nbytes for weight in weights_of(model))
    for weight, name in zip(weights_of(model)[-2:], ("mlp.dense_4h_to_h", "lm_head"), strict=True):
        assert weight.shape == next(tuple(t.shape) for key, t in tensors.items() if key.endswith(f"{name}.weight"))


def test_scales_count_among_the_bytes_of_a_weight() -> None:
    from persimmon.kernels.cpu.native import NativeWeight

    numbers, scales = torch.zeros(8, 4, dtype=torch.int8), torch.ones(8)
    assert NativeWeight(numbers, (8, 4), "rows", scales=scales).nbytes == 8 * 4 + 8 * 4
