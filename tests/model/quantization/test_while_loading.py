"""--quantization: which tensors become 8 or 4 bits while a checkpoint is loaded, and what their numbers are."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persimmon import kernels
from persimmon.kernels import Kernels, QuantizedFormat, QuantizedMatrix, reference
from persimmon.model.checkpoint import Checkpoint, dummy_parameters, dummy_tensors, expected_shapes
from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.memory import plan_memory
from persimmon.model.persimmon import Persimmon
from persimmon.model.quantization import tensors as quantization
from persimmon.model.quantization.rounding import quantize
from persimmon.model.quantization.scheme import Quantization, quantized_formats
from persimmon.model.quantization.tensors import quantized
from tests.engine_harness import CPU
from tests.model.test_weights import logits_of

CONFIG = PersimmonConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
)
CLASSIFIER = replace(CONFIG, architecture=Architecture.SEQUENCE_CLASSIFICATION, labels=("bad", "good"))
ROWS = QuantizedFormat(8, None, torch.float16)
FORMATS = [ROWS, QuantizedFormat(8, 32, torch.float32), QuantizedFormat(4, 32, torch.bfloat16)]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_layers_tables_and_nothing_else_are_quantized(quantization: Quantization) -> None:
    formats = quantized_formats(CONFIG, quantization)
    matrices = {name for name, shape in expected_shapes(CONFIG).items() if len(shape) == 2}
    assert formats.keys() == matrices
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {formats[name] for name in tables} == {ROWS}
    layers = ROWS if quantization == "int8" else QuantizedFormat(4, 32, torch.float16)
    assert {formats[name] for name in matrices - tables} == {layers}


def test_a_classifiers_score_is_not_quantized() -> None:
    assert "score.weight" not in quantized_formats(CLASSIFIER, "int8")


@pytest.mark.parametrize(
    ("stored", "scales"),
    [(torch.float32, torch.float16), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16)],
)
def test_scales_have_the_checkpoints_own_16_bits(stored: torch.dtype, scales: torch.dtype) -> None:
    assert {form.scale_dtype for form in quantized_formats(CONFIG, "int4", 32, stored).values()} == {scales}


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(CheckpointError) as raised:
        quantized_formats(CONFIG, "int4", 128)
    assert str(raised.value) == (
        "model.layers.0.self_attn.query_key_value.weight has 64 inputs, which groups of 128 do not divide: use 8 bits"
    )
    assert quantized_formats(CONFIG, "int8", 128)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_zeros_and_the_largest_numbers_stay_finite(form: QuantizedFormat) -> None:
    assert bool((quantize(torch.zeros(2, 64), form).dequantized() == 0).all())
    largest = quantize(torch.full((2, 64), torch.finfo(torch.float16).max), form).dequantized()
    torch.testing.assert_close(largest, torch.full((2, 64), 65504.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_random_matrices_have_the_weights_of_a_new_network(form: QuantizedFormat) -> None:
    made = quantization.random_matrix((512, 1024), form, torch.Generator().manual_seed(3))
    again = quantization.random_matrix((512, 1024), form, torch.Generator().manual_seed(3))
    assert torch.equal(made.numbers, again.numbers)
    assert made.format == form
    weights = made.dequantized()
    assert weights.mean().abs().item() < 1e-4
    assert math.isclose(weights.std().item(), 0.02, rel_tol=0.01)
    assert made.integers.amax() == -made.integers.amin() == (127 if form.bits == 8 else 7)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("config", [CONFIG, CLASSIFIER, replace(CONFIG, tie_word_embeddings=True)])
def test_dummy_weights_are_made_in_the_formats(config: PersimmonConfig, quantization: Quantization) -> None:
    formats = quantized_formats(config, quantization)
    made = dict(dummy_parameters(config, torch.float32, CPU, 0, formats))
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == expected_shapes(config)
    kept = {name: tensor.format for name, tensor in made.items() if isinstance(tensor, QuantizedMatrix)}
    assert kept == formats
    Persimmon(config, made.items(), torch.float32, CPU, kernels.for_device(CPU))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_kernels_compute_what_plain_torch_does_on_the_widened_weights(
    random_checkpoint: Path, cpu_kernels: Kernels[Any, Any], quantization: Quantization
) -> None:
    config = PersimmonConfig.from_folder(random_checkpoint)
    formats = quantized_formats(config, quantization, 32, torch.float32)
    made = dict(quantized(Checkpoint.open(random_checkpoint, config).tensors(), formats))
    widened = {
        name: tensor.dequantized() if isinstance(tensor, QuantizedMatrix) else tensor for name, tensor in made.items()
    }
    own = Persimmon(config, made.items(), torch.float32, CPU, cpu_kernels)
    exact = Persimmon(config, widened.items(), torch.float32, CPU, reference)
    torch.testing.assert_close(logits_of(own, cpu_kernels), logits_of(exact, reference), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_memory_plan_counts_each_tensor_in_its_format(quantization: Quantization, tied: bool) -> None:
    config = replace(CONFIG, tie_word_embeddings=tied)
    formats = quantized_formats(config, quantization, 32, torch.float32)
    plan = plan_memory(
        config,
        available=1 << 30,
        dtype=torch.float32,
        device=CPU,
        block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=None,
        kv_cache_bytes=None,
        weight_bytes=reference.weight_bytes,
        stored=formats,
    )
    made = quantized(dummy_tensors(config, torch.float32, CPU, 0), formats)
    # The embedding's scales have the network's dtype, which is what its rows come out in.
    assert plan.weights == sum(tensor.nbytes for _, tensor in made) + 2 * config.vocab_size
