"""A quantized network on the kernels of a GPU, interpreted: what plain torch computes from the same numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon.kernels import Kernels, QuantizedMatrix, fused, packed_projection, reference
from persimmon.kernels.fused import FusedKernels
from persimmon.kernels.invariant import InvariantKernels
from persimmon.kernels.packed_weight import PackedWeight
from persimmon.kernels.quantized import Bits, pack_int4
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.leftovers import EMBEDDING
from persimmon.model.persimmon import Persimmon, is_matrix
from persimmon.model.runner import Runner, SequenceInput
from tests.engine_harness import CPU, poisoned_cache, runner_of
from tests.fake_cuda.checkpoint import write_checkpoint
from tests.interpreter import keep_language_patched, multiply_as_matrix_units
from tests.model.fused_steps import GREEDY, limits

PROMPT = list(range(7, 27))
TABLE = [2, 0, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_language_patched()
    multiply_as_matrix_units(monkeypatch)


def quantized(weight: torch.Tensor, bits: Bits, group_size: int | None) -> QuantizedMatrix:
    rows, columns = weight.shape
    most = (1 << (bits - 1)) - 1
    grouped = weight.float().view(rows, -1, group_size or columns)
    scales = grouped.abs().amax(-1) / most
    integers = (grouped / scales[:, :, None]).round().to(torch.int8).view(rows, columns)
    return QuantizedMatrix(integers if bits == 8 else pack_int4(integers), scales, bits, group_size or columns)


def load(folder: Path, kernels: Kernels[Any, Any], bits: Bits) -> Persimmon:
    """Layers in groups of 32, of 8 bits and of those asked for in turn; embedding and lm_head a row at a time."""
    config = PersimmonConfig.from_folder(folder)
    tensors: dict[str, torch.Tensor | QuantizedMatrix] = {}
    for name, tensor in Checkpoint.open(folder, config).tensors():
        if name == EMBEDDING or name == "lm_head.weight":
            tensors[name] = quantized(tensor, 8, None)
        else:
            tensors[name] = quantized(tensor, bits, 32) if is_matrix(name) else tensor
    return Persimmon(config, tensors.items(), torch.float32, CPU, kernels)


def logits_and_token(runner: Runner) -> tuple[torch.Tensor, int]:
    """Logits of a prompt's end and of the token behind it, and the token drawn there."""
    steps = (SequenceInput(PROMPT, 0, TABLE, (GREEDY,)), SequenceInput([9], len(PROMPT), TABLE, (GREEDY,)))
    logits = torch.cat([runner.logits([step]) for step in steps])
    return logits, runner.run([steps[1]])[0]


def on_gpu(folder: Path, kernels: FusedKernels, bits: Bits) -> Runner:
    model = load(folder, kernels, bits)
    assert isinstance(model.layers[0].mlp_down.weight, PackedWeight)
    executor = FusedExecutor(kernels, (1,))
    executor.reserve(replace(limits(model.config, 4), max_model_len=64, quantized=True))
    return Runner(executor.start(model, poisoned_cache(model, 4, 16)))


@pytest.mark.parametrize(("bits", "dequantizes"), [(4, False), (8, True)])
def test_it_computes_what_plain_torch_computes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bits: Bits, dequantizes: bool
) -> None:
    if dequantizes:  # as steps of more tokens do
        monkeypatch.setattr(fused, "PACKED_STEP", 1)
    kernels = FusedKernels(CPU)
    logits, token = logits_and_token(on_gpu(folder, kernels, bits))
    model = load(folder, reference, bits)
    expected, expected_token = logits_and_token(runner_of(model, poisoned_cache(model, 4, 16), reference))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert token == expected_token


def test_batch_invariant_kernels_give_a_token_the_same_bits_in_any_chunk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "PACKED_STEP", 8)
    monkeypatch.setattr(packed_projection, "MAX_ROWS", 16)
    runner = on_gpu(folder, InvariantKernels(CPU), 4)
    whole = runner.logits([SequenceInput(PROMPT, 0, TABLE, (GREEDY,))])
    runner.logits([SequenceInput(PROMPT[:13], 0, TABLE, (GREEDY,))])
    cut = runner.logits([SequenceInput(PROMPT[13:], 13, TABLE, (GREEDY,))])
    assert torch.equal(cut, whole)
