"""--quantization: which tensors become 8 or 4 bits while a checkpoint is loaded, and what their numbers are."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from persimmon import kernels
from persimmon.kernels import Kernels, QuantizedFormat, QuantizedMatrix, reference
from persimmon.kernels.fused import FusedKernels
from persimmon.model.checkpoint import Checkpoint, dummy_parameters, expected_shapes
from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.leftovers import EMBEDDING
from persimmon.model.persimmon import Persimmon
from persimmon.model.quantization import tensors
from persimmon.model.quantization.rounding import quantize
from persimmon.model.quantization.scheme import Quantization, described, quantized_formats
from tests.engine_harness import CPU
from tests.model.memory_plans import plan
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
ROWS = QuantizedFormat(8, None, torch.bfloat16)
FORMATS = [ROWS, QuantizedFormat(8, 32, torch.float32), QuantizedFormat(4, 32, torch.float16)]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_layers_tables_and_nothing_else_are_quantized(quantization: Quantization) -> None:
    formats = quantized_formats(CONFIG, quantization)
    matrices = {name for name, shape in expected_shapes(CONFIG).items() if len(shape) == 2}
    assert formats.keys() == matrices
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {formats[name] for name in tables} == {ROWS}
    layers = ROWS if quantization == "int8" else QuantizedFormat(4, 32, torch.bfloat16)
    assert {formats[name] for name in matrices - tables} == {layers}


def test_a_classifiers_score_is_not_quantized() -> None:
    assert "score.weight" not in quantized_formats(CLASSIFIER, "int8")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tiny_and_huge_weights_are_as_exact_as_others(
    random_checkpoint: Path, tmp_path: Path, stored: torch.dtype, quantization: Quantization
) -> None:
    """Float16 has no scale for most of these magnitudes."""
    folder = shutil.copytree(random_checkpoint, tmp_path / "folder")
    weights = load_file(folder / "model.safetensors")
    for name, magnitude in zip(MATRICES, (1e-6, 1e-4, 1e3), strict=True):
        weights[name] *= magnitude if stored == torch.float16 else magnitude**5
    save_file({name: tensor.to(stored) for name, tensor in weights.items()}, folder / "model.safetensors")
    config = PersimmonConfig.from_folder(folder)
    checkpoint = Checkpoint.open(folder, config)
    made = dict(checkpoint.parameters(quantized_formats(config, quantization)))
    for name, original in checkpoint.tensors():
        matrix = made[name]
        if isinstance(matrix, QuantizedMatrix):
            steps = (matrix.dequantized() - original.float()) / matrix.scales.float().repeat_interleave(
                matrix.group_size, dim=1
            )
            # What is cut off is at most a tenth of 15 steps beyond half of one.
            assert steps.square().mean() < 0.15, name


MATRICES = (
    "model.layers.0.self_attn.query_key_value.weight",
    "model.layers.0.mlp.dense_h_to_4h.weight",
    "model.layers.1.mlp.dense_4h_to_h.weight",
)


@pytest.mark.parametrize(
    ("quantization", "expected"), [("int8", "int8"), ("int4", "int4 in groups of 32 and int8"), (None, "")]
)
def test_the_formats_are_described_by_how_many_weights_have_them(
    quantization: Quantization | None, expected: str
) -> None:
    formats = quantized_formats(CONFIG, quantization) if quantization else {}
    assert described({**dict.fromkeys(expected_shapes(CONFIG), torch.float16), **formats}, CONFIG) == expected


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
    made = tensors.random_matrix((512, 1024), form, torch.Generator().manual_seed(3))
    again = tensors.random_matrix((512, 1024), form, torch.Generator().manual_seed(3))
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
    formats = quantized_formats(config, quantization)
    made = dict(Checkpoint.open(random_checkpoint, config).parameters(formats))
    widened = {
        name: tensor.dequantized() if isinstance(tensor, QuantizedMatrix) else tensor for name, tensor in made.items()
    }
    own = Persimmon(config, made.items(), torch.float32, CPU, cpu_kernels)
    exact = Persimmon(config, widened.items(), torch.float32, CPU, reference)
    torch.testing.assert_close(logits_of(own, cpu_kernels), logits_of(exact, reference), rtol=5e-3, atol=5e-3)


def planned_weights(
    config: PersimmonConfig, dtype: torch.dtype, stored: Mapping[str, QuantizedFormat], operations: Kernels[Any, Any]
) -> int:
    """Bytes of the parameters in the memory plan."""
    sizes = {"weight_bytes": operations.weight_bytes, "tied_bytes": operations.tied_bytes}
    return plan(config, dtype=dtype, stored=stored, **sizes).weights


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_memory_plan_counts_each_tensor_in_its_format(quantization: Quantization, tied: bool) -> None:
    config = replace(CONFIG, tie_word_embeddings=tied)
    formats = quantized_formats(config, quantization)
    made = dict(dummy_parameters(config, torch.float32, CPU, 0, formats))
    # The embedding's scales have the network's dtype, which is what its rows come out in.
    expected = sum(tensor.nbytes for tensor in made.values()) + 2 * config.vocab_size
    assert planned_weights(config, torch.float32, formats, reference) == expected


def test_the_memory_plan_counts_the_head_that_a_gpu_packs_of_a_tied_table() -> None:
    config, operations = replace(CONFIG, tie_word_embeddings=True), FusedKernels(CPU)
    shape, form = (config.vocab_size, config.hidden_size), QuantizedFormat(8, None, torch.float16)
    table = QuantizedMatrix.empty(shape, form)
    dense = planned_weights(config, torch.float16, {}, operations)
    quantized = planned_weights(config, torch.float16, {EMBEDDING: form}, operations)
    assert quantized - dense == table.nbytes + operations.tied_weight(table).nbytes - 2 * math.prod(shape)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_tensors_are_quantized_a_few_rows_at_a_time_as_they_are_at_once(
    random_checkpoint: Path, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "_NUMBERS_AT_ONCE", 7 * 128)
    config = PersimmonConfig.from_folder(random_checkpoint)
    checkpoint = Checkpoint.open(random_checkpoint, config)
    formats = quantized_formats(config, quantization)
    original, made = dict(checkpoint.tensors()), dict(checkpoint.parameters(formats))
    assert made.keys() == original.keys()
    for name, tensor in made.items():
        if isinstance(tensor, QuantizedMatrix):
            whole = quantize(original[name], formats[name])
            assert torch.equal(tensor.numbers, whole.numbers)
            assert torch.equal(tensor.scales, whole.scales)
        else:
            assert name not in formats
            assert torch.equal(tensor, original[name])


def test_the_largest_matrices_come_first(random_checkpoint: Path) -> None:
    config = PersimmonConfig.from_folder(random_checkpoint)
    checkpoint, formats = Checkpoint.open(random_checkpoint, config), quantized_formats(config, "int4")
    for made in (checkpoint.parameters(formats), dummy_parameters(config, torch.float32, CPU, 0, formats)):
        sizes = [math.prod(tensor.shape) for _, tensor in made if isinstance(tensor, QuantizedMatrix)]
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == len(formats)


def test_a_weight_that_cannot_be_quantized_is_named_with_its_row(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_checkpoint, tmp_path / "folder")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][4000, 7] = torch.inf
    save_file(weights, folder / "model.safetensors")
    config = PersimmonConfig.from_folder(folder)
    read = Checkpoint.open(folder, config).parameters(quantized_formats(config, "int8"))
    with pytest.raises(CheckpointError) as raised:
        list(read)
    assert str(raised.value) == (
        f"{folder}/model.safetensors: tensor lm_head.weight: row 4000 has the weight inf; only finite numbers can be "
        f"quantized"
    )


PEAK = """
import sys
from pathlib import Path

import torch

from persimmon import kernels
from persimmon.kernels.fused import FusedKernels
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.persimmon import Persimmon
from persimmon.model.quantization.scheme import quantized_formats


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def load(folder, choice):
    config = PersimmonConfig.from_folder(folder)
    parameters = Checkpoint.open(folder, config).parameters(quantized_formats(config, choice))
    return Persimmon(config, parameters, torch.float32, torch.device("cpu"), operations)


torch.set_num_threads(1)
operations = kernels.for_device(torch.device("cpu"))
small, large = map(Path, sys.argv[1:3])
load(small, sys.argv[3])  # code that runs becomes resident, and memory is taken once, however large a model is
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = status("VmRSS")
model = load(large, sys.argv[3])
print(status("VmHWM") - before, status("VmRSS") - before)
"""


def write_zeros(folder: Path, config: PersimmonConfig) -> None:
    """A checkpoint of zeros in float32, in a file that takes no room on the disk."""
    folder.mkdir()
    header, offset = {}, 0
    for name, shape in expected_shapes(config).items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + offset)
    values = {key: getattr(config, key) for key in SHAPE_KEYS}
    (folder / "config.json").write_text(json.dumps({"architectures": [config.architecture], **values}))


SHAPE_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)


@pytest.mark.parametrize("choice", ["int8", "int4"])
def test_quantizing_takes_little_more_memory_than_the_result(choice: Quantization, tmp_path: Path) -> None:
    # Layers dominate, as in the 8B model: lm_head is held twice for a moment, as it comes and as it is laid out.
    config = replace(CONFIG, vocab_size=8192, hidden_size=1024, intermediate_size=1024, num_hidden_layers=12)
    small, large = tmp_path / "small", tmp_path / "large"
    write_zeros(small, replace(config, num_hidden_layers=1))
    write_zeros(large, config)
    command = [sys.executable, "-c", PEAK, str(small), str(large), choice]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, result = map(int, run.stdout.split())
    formats = quantized_formats(config, choice)
    shapes = {name: (shape[0], shape[-1]) for name, shape in expected_shapes(config).items()}
    weights = sum(formats[name].nbytes(shape) for name, shape in shapes.items() if name in formats)
    assert 0.95 * weights < result
    assert peak < 1.15 * weights
