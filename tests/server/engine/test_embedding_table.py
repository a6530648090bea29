"""--embedding-table file: rows are looked up where they lie in the checkpoint's file; what cannot be is one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from persimmon import kernels
from persimmon.kernels import KernelsUnavailableError, QuantizedMatrix
from persimmon.kernels.cpu import library
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.convert import convert_checkpoint
from persimmon.model.convert.quantize import QuantizationRequest
from persimmon.model.errors import CheckpointError
from persimmon.model.leftovers import EMBEDDING
from persimmon.server.config import read_settings
from persimmon.server.engine.loading import LoadedModel, load_model
from persimmon.server.engine.model_setup import embedding_in_file
from tests.engine_harness import CPU
from tests.model.checkpoints import make_checkpoint
from tests.model.forward_pass import hidden_states

TOKENS = [1, 100, 200, 100, 7, 4095]

needs_c_kernels = pytest.mark.skipif(not library.builds(), reason="plain torch widens a 16-bit embedding")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("16-bit"), num_hidden_layers=1, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """Its embedding has 8 bits."""
    folder = tmp_path_factory.mktemp("converted") / "int4"
    request = QuantizationRequest("int4", vocabulary=True)
    given: dict[str, Any] = {"dtype": None, "max_shard_bytes": 10**9, "print_line": lambda line: None}
    convert_checkpoint(str(checkpoint), folder, layout="hugging_face", quantization=request, **given)
    return folder


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, PersimmonConfig.from_folder(folder))


def served(folder: Path, lines: list[str] | None = None, **flags: str) -> LoadedModel:
    small = {"max_model_len": "64", "kv_cache_memory": "4MiB", "max_num_batched_tokens": "64", "dtype": "float32"}
    print_line: Callable[[str], None] = (lambda line: None) if lines is None else lines.append
    return load_model(read_settings(small | flags), folder, print_line)


def file_at(tensor: torch.Tensor) -> str:
    """The file whose mapping a tensor lies in; empty for memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.split(maxsplit=5)[5] if len(line.split()) > 5 else ""
    raise LookupError(tensor.data_ptr())


@needs_c_kernels
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_rows_are_those_of_the_file_and_take_no_memory_of_the_plan(checkpoint: Path, quantization: str) -> None:
    lines: list[str] = []
    in_memory = served(checkpoint, quantization=quantization)
    in_file = served(checkpoint, lines, quantization=quantization, embedding_table="file")
    table = in_file.executor.model._embedding
    assert isinstance(table, torch.Tensor)
    assert file_at(table) == str(checkpoint / "model.safetensors")
    assert torch.equal(table, load_file(checkpoint / "model.safetensors")[EMBEDDING])
    in_plan = in_memory.executor.model._embedding.nbytes
    assert in_memory.plan.weights - in_file.plan.weights == in_plan
    assert "the embedding, 1.0 MiB, stays in its file" in "".join(lines)
    states = [hidden_states(loaded.executor.model, TOKENS) for loaded in (in_memory, in_file)]
    # --quantization would round the rows, so answers may differ, and with them system_fingerprint.
    assert torch.equal(*states) == (quantization == "none")
    assert (in_file.weights == in_memory.weights) == (quantization == "none")


def test_rows_of_8_bits_are_used_as_a_converted_checkpoint_stores_them(quantized: Path) -> None:
    in_memory, in_file = served(quantized), served(quantized, embedding_table="file")
    table = in_file.executor.model._embedding
    assert isinstance(table, QuantizedMatrix)
    assert file_at(table.numbers) == str(quantized / "model.safetensors")
    assert torch.equal(*(hidden_states(loaded.executor.model, TOKENS) for loaded in (in_memory, in_file)))
    assert in_memory.plan.weights - in_file.plan.weights == table.numbers.nbytes
    assert in_memory.weights == in_file.weights


def test_a_pickled_file_can_be_mapped_too(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    table = opened(tmp_path).mapped_embedding()
    assert isinstance(table, torch.Tensor)
    assert torch.equal(table, tensors[EMBEDDING])
    assert file_at(table) == str(tmp_path / "pytorch_model.bin")


class TestRefusals:
    def test_of_an_embedding_that_is_read_whole_as_lm_head(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, num_hidden_layers=1, tie_word_embeddings=True)
        with pytest.raises(
            CheckpointError, match=r"tie_word_embeddings each step reads the whole.*leave the flag out$"
        ):
            served(folder, embedding_table="file")

    def test_of_a_gpu(self, checkpoint: Path) -> None:
        operations = kernels.for_device(CPU)
        with pytest.raises(KernelsUnavailableError, match=r"which a GPU cannot read"):
            embedding_in_file(opened(checkpoint), operations, torch.bfloat16, torch.device("cuda"))

    def test_of_a_type_that_would_have_to_be_converted(self, checkpoint: Path) -> None:
        refusal = r"the file's embedding is bfloat16, .* activations are float16: use --dtype bfloat16"
        with pytest.raises(KernelsUnavailableError, match=refusal):
            served(checkpoint, embedding_table="file", dtype="float16")

    def test_of_numbers_at_an_odd_address(self, checkpoint: Path, tmp_path: Path) -> None:
        content = (checkpoint / "model.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        (tmp_path / "model.safetensors").write_bytes(
            (size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :]
        )
        (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
        with pytest.raises(CheckpointError, match=r"begins at byte [0-9,]+, not at a multiple of 2: use --emb"):
            opened(tmp_path).mapped_embedding()

    def test_of_rows_packed_into_words(self, quantized: Path, tmp_path: Path) -> None:
        values = json.loads((quantized / "config.json").read_text())
        for group in values["quantization_config"]["config_groups"].values():
            group["format"] = "pack-quantized"
        (tmp_path / "config.json").write_text(json.dumps(values))
        tensors = load_file(quantized / "model.safetensors")
        for module in ("model.embed_tokens", "lm_head"):
            numbers = tensors.pop(f"{module}.weight")
            tensors[f"{module}.weight_packed"] = (numbers.view(torch.uint8) ^ 0x80).view(torch.int32)
            tensors[f"{module}.weight_shape"] = torch.tensor(numbers.shape)
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"packed into int32 .*: use --embedding-table memory$"):
            opened(tmp_path).mapped_embedding()
