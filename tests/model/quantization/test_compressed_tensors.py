"""Checkpoints that compressed-tensors wrote: the same numbers as its own, Transformers' tokens, and what is refused."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from persimmon import kernels
from persimmon.kernels import QuantizedMatrix, reference
from persimmon.kernels.quantized import unpack_int4
from persimmon.model.checkpoint import Checkpoint, expected_shapes
from persimmon.model.config import PersimmonConfig
from persimmon.model.quantization.stored_matrices import unpacked
from tests.engine_harness import CPU, Harness, blocks_for, load_model
from tests.model import transformers_reference
from tests.model.forward_pass import hidden_states
from tests.model.quantization.compressed import (
    TOKEN_INPUTS,
    load_decompressed,
    quantization,
    weights,
    write_compressed,
)

LINEAR = ["Linear"]
NEW_TOKENS = 12
LAYER = "model.layers.{}.mlp.dense_h_to_4h.weight"

CASES: Mapping[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "int8": (quantization({"targets": LINEAR, "weights": weights()}), {}, {"lm_head.weight": "int8"}),
    "int8 in groups, float16": (
        quantization({"targets": LINEAR, "weights": weights(group_size=128)}, ignore=("lm_head",)),
        {"dtype": torch.float16},
        {"lm_head.weight": "float16", LAYER.format(0): "int8"},
    ),
    "int4 in groups of 32": (
        quantization({"targets": LINEAR, "weights": weights(4, group_size=32)}, ignore=("lm_head",)),
        {},
        {"lm_head.weight": "float32", LAYER.format(0): "int4", "model.embed_tokens.weight": "float32"},
    ),
    "int4 in groups of 128, bfloat16": (
        quantization({"targets": LINEAR, "weights": weights(4, group_size=128)}),
        {"dtype": torch.bfloat16},
        {"lm_head.weight": "int4", LAYER.format(1): "int4"},
    ),
    "int8 tables": (
        quantization(
            {"targets": ["re:.*mlp.*", "re:.*self_attn.*"], "weights": weights(4, group_size=32)},
            {"targets": ["lm_head", "Embedding"], "weights": weights(), "format": "int-quantized"},
        ),
        {},
        {"lm_head.weight": "int8", LAYER.format(0): "int4", "model.embed_tokens.weight": "int8"},
    ),
    "int-quantized": (
        quantization(
            {"targets": LINEAR, "weights": weights(), "input_activations": None, "format": "int-quantized"},
            ignore=("re:.*layers[.]1[.].*",),
        ),
        {},
        {LAYER.format(0): "int8", LAYER.format(1): "float32"},
    ),
    "two formats": (
        quantization(
            {"targets": ["model.layers.0.mlp.dense_h_to_4h"], "weights": weights(), "format": "int-quantized"},
            {"targets": LINEAR, "weights": weights(4, group_size=32)},
        ),
        {},
        {LAYER.format(0): "int8", LAYER.format(1): "int4"},
    ),
    "tied int8 embedding": (
        quantization(
            {"targets": ["Embedding", "Linear"], "weights": weights(), "format": "int-quantized"}, ignore=("lm_head",)
        ),
        {"tie_word_embeddings": True},
        {"model.embed_tokens.weight": "int8"},
    ),
    "several files": (
        quantization({"targets": LINEAR, "weights": weights(4, group_size=32)}),
        {"max_shard_size": "100KB"},
        {},
    ),
    "classifier": (
        quantization({"targets": LINEAR, "weights": weights()}),
        {"architecture": "PersimmonForSequenceClassification", "settings": {"num_labels": 3}},
        {LAYER.format(0): "int8"},
    ),
}


@dataclass(frozen=True)
class Case:
    """A checkpoint, what types some of its tensors have, and Transformers' network with its weights decompressed."""

    folder: Path
    kinds: Mapping[str, str]
    theirs: Any


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    config, checkpoint, kinds = CASES[request.param]
    folder = write_compressed(tmp_path_factory.mktemp("compressed"), config, **checkpoint)
    return Case(folder, kinds, load_decompressed(folder))


def test_numbers_are_those_that_compressed_tensors_decompresses(case: Case) -> None:
    folder = case.folder
    checkpoint = Checkpoint.open(folder, PersimmonConfig.from_folder(folder))
    read = dict(checkpoint.parameters())
    assert read.keys() == expected_shapes(checkpoint.config).keys()
    kinds = {
        key: f"int{value.bits}" if isinstance(value, QuantizedMatrix) else str(value.dtype).removeprefix("torch.")
        for key, value in read.items()
    }
    assert {key: kinds[key] for key in case.kinds} == case.kinds
    assert any(kind.startswith("int") for kind in kinds.values())
    theirs = dict(case.theirs.named_parameters())
    for key, value in read.items():
        own = value.dequantized() if isinstance(value, QuantizedMatrix) else value.float()
        assert torch.equal(own, theirs[key].detach().float()), key
    stored = {key: value.format if isinstance(value, QuantizedMatrix) else value.dtype for key, value in read.items()}
    expected = checkpoint.stored
    assert stored == ({**expected, "score.weight": torch.float32} if "score.weight" in expected else expected)


def test_greedy_tokens_equal_transformers(case: Case) -> None:
    if not PersimmonConfig.from_folder(case.folder).generates:
        pytest.skip("a classifier generates nothing")
    model = load_model(case.folder, operations=reference)
    prompts = [random.Random(length).choices(range(2, 96), k=length) for length in (5, 40, 12)]
    answers = transformers_reference.continue_greedily(case.theirs, prompts, NEW_TOKENS).without_near_ties()
    assert len(answers.prompts) >= 2
    blocks = blocks_for([len(prompt) + NEW_TOKENS for prompt in answers.prompts], 16)
    harness = Harness(model, operations=reference, num_blocks=blocks, block_size=16)
    assert harness.outputs(answers.prompts, NEW_TOKENS) == answers.outputs


def test_a_classifiers_scores_equal_transformers(tmp_path: Path) -> None:
    config, checkpoint, _ = CASES["classifier"]
    exact = kernels.for_device(CPU, quantized_activations="float")
    model = load_model(write_compressed(tmp_path, config, **checkpoint), operations=exact)
    with torch.inference_mode():
        expected = load_decompressed(tmp_path)(torch.tensor([[5, 9, 17]])).logits[0]
    torch.testing.assert_close(model.scores(hidden_states(model, [5, 9, 17]))[-1], expected, rtol=1e-4, atol=1e-4)


@given(
    st.sampled_from([4, 8]),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(0, 2**32),
)
def test_packed_numbers_are_unpacked_as_they_were(bits: int, rows: int, pairs: int, seed: int) -> None:
    limit, columns = 1 << (bits - 1), 2 * pairs
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-limit, limit, (rows, columns), dtype=torch.int8, generator=generator)
    numbers = unpacked(pack_to_int32(integers, bits), bits, columns)
    assert torch.equal(numbers if bits == 8 else unpack_int4(numbers), integers)


def test_8_bit_activations_are_a_remark(tmp_path: Path) -> None:
    config = quantization({"targets": LINEAR, "weights": weights(), "input_activations": TOKEN_INPUTS})
    write_compressed(tmp_path, config)
    checkpoint = Checkpoint.open(tmp_path, PersimmonConfig.from_folder(tmp_path))
    assert checkpoint.notes == (
        "config.json asks for 8-bit activations in 9 matrices: weights are used as they are, and "
        "--quantized-activations decides whether activations are rounded",
    )
    assert load_model(tmp_path, operations=reference).head.format == "int8, a scale for each output"
