"""A product, its reduction over ranks and the residual: three operations that are together what one launch does."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon.kernels import Activation, Kernels, Linear, Residual, StepLimits, reference
from persimmon.kernels.cpu import library
from persimmon.kernels.cpu.native import NativeKernels
from persimmon.kernels.fused import FusedKernels
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.executor import NativeExecutor, TorchExecutor
from persimmon.model.persimmon import Persimmon
from persimmon.model.recorded_network import RecordedNetwork
from persimmon.model.runner import Runner, SequenceInput
from persimmon.model.shard import ONLY, Shard
from tests.engine_harness import CPU, poisoned_cache
from tests.model.checkpoints import make_checkpoint
from tests.model.rows import row_with

HIDDEN, INNER = 64, 192
LIMITS = StepLimits(
    max_num_seqs=8,
    max_num_batched_tokens=128,
    max_model_len=128,
    num_heads=2,
    head_dim=32,
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    vocab_size=130,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("one-layer"),
        num_hidden_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        intermediate_size=INNER,
        vocab_size=130,
    )


@pytest.fixture(params=["plain torch", "C kernels", "fused kernels"])
def operations(request: pytest.FixtureRequest) -> Kernels[Any, Any]:
    if request.param == "plain torch":
        return reference
    if request.param == "fused kernels":
        fused = FusedKernels(CPU)
        fused.reserve(LIMITS)
        return fused
    if not library.builds():
        pytest.skip("no build of the C kernels for this processor")
    return NativeKernels(library.builds()[0])


@dataclass
class OneRank:
    """A single rank, whose sums are what a function makes of its own part."""

    total: Callable[[torch.Tensor], torch.Tensor]
    shard: Shard = ONLY

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        return self.total(part)

    def gather(self, part: torch.Tensor, config: PersimmonConfig) -> torch.Tensor:
        return part

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def load(
    folder: Path, operations: Kernels[Any, Any], total: Callable[[torch.Tensor], torch.Tensor] | None
) -> Persimmon:
    config = PersimmonConfig.from_folder(folder)
    tensors = Checkpoint.open(folder, config).tensors()
    ranks = None if total is None else OneRank(total)
    return Persimmon(config, tensors, torch.float32, CPU, operations, ranks=ranks)


def logits_of(model: Persimmon, operations: Kernels[Any, Any]) -> torch.Tensor:
    """Of a prompt of more tokens than a small step of a GPU has, and of a few behind it."""
    runner = Runner(TorchExecutor(operations).start(model, poisoned_cache(model, 8, 16)))
    table, greedy = [5, 0, 3, 1, 2, 7], (row_with(),)
    parts = [SequenceInput(range(2, 72), 0, table, greedy), SequenceInput([9, 8, 7], 70, table, greedy)]
    return torch.cat([runner.logits([part]) for part in parts])


def test_three_operations_are_the_one_that_does_them_all(checkpoint: Path, operations: Kernels[Any, Any]) -> None:
    reduced: list[tuple[int, ...]] = []

    def alone(product: torch.Tensor) -> torch.Tensor:
        reduced.append(tuple(product.shape))
        return product

    together = logits_of(load(checkpoint, operations, None), operations)
    apart = logits_of(load(checkpoint, operations, alone), operations)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-4)
    # The embeddings, attention's product and the MLP's, of each step.
    assert reduced == [(70, HIDDEN)] * 3 + [(3, HIDDEN)] * 3


def test_what_is_reduced_is_what_enters_the_residual_stream(checkpoint: Path, operations: Kernels[Any, Any]) -> None:
    nothing = logits_of(load(checkpoint, operations, torch.zeros_like), operations)
    other = logits_of(load(checkpoint, reference, torch.zeros_like), reference)
    torch.testing.assert_close(nothing, other, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(nothing, logits_of(load(checkpoint, operations, None), operations), atol=1e-2)


@pytest.mark.parametrize("sparse", [False, True])
def test_ranks_with_half_of_the_columns_each_sum_to_the_product(operations: Kernels[Any, Any], sparse: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, bias, inputs, x = (
        torch.randn(shape, generator=generator) for shape in ((HIDDEN, INNER), (HIDDEN,), (5, INNER), (5, HIDDEN))
    )
    plan = operations.plan_attention(
        [[0]], [0], [5], num_blocks=1, num_heads=2, block_size=16, dtype=torch.float32, device=CPU
    )

    def linear(columns: slice, bias: torch.Tensor | None) -> Linear[Any]:
        part = operations.prepare_weight(weight[:, columns].contiguous(), sparse_input=sparse)
        return Linear(part, None if bias is None else operations.prepare_bias(bias))

    whole = Residual(x.clone())
    operations.add_product_(whole, Activation(inputs), linear(slice(None), bias), plan)
    halves = [(slice(0, INNER // 2), bias), (slice(INNER // 2, INNER), None)]
    parts = [
        operations.product(Activation(inputs[:, columns].contiguous()), linear(columns, own)) for columns, own in halves
    ]
    summed = Residual(x.clone())
    operations.add_(summed, parts[0] + parts[1], plan)
    # A kernel may leave the addition to the LayerNorm that comes next.
    added = summed.values if summed.pending is None else summed.values + summed.pending
    torch.testing.assert_close(added, whole.values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.values, x + inputs @ weight.t() + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not library.builds(), reason="no build of the C kernels for this processor")
@pytest.mark.parametrize("tokens", [1, 18, 90])  # more than buffers are first made for
def test_programs_between_the_sums_are_the_operations_one_by_one(checkpoint: Path, tokens: int) -> None:
    native = NativeKernels(library.builds()[0])
    model = load(checkpoint, native, lambda product: product.clamp(min=0))
    cache = poisoned_cache(model, 6, 16)
    with pytest.raises(ValueError, match="sum between operations"):
        RecordedNetwork(model, cache, native)
    part = SequenceInput(range(2, 2 + tokens), 0, [1, 0, 4, 2, 5, 3], (row_with(),))
    ours = Runner(NativeExecutor(native).start(model, cache)).logits([part])
    assert torch.equal(ours, Runner(TorchExecutor(native).start(model, cache)).logits([part]))
    once = load(checkpoint, native, None)
    assert not torch.allclose(ours, Runner(NativeExecutor(native).start(once, cache)).logits([part]), atol=1e-2)
