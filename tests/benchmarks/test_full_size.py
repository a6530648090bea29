"""The 8B model's shape: what a token reads, what is written to be served, and the table."""

import json
from pathlib import Path

import pytest

from benchmarks.checkpoint import DEMO, TOKENIZER_FILES
from benchmarks.full_size import CONFIG_8B, DEMO_TOKENS, Figures, checkpoint_for, read_bytes, table, write_tokenizer
from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.quantization.scheme import Quantization, quantized_formats
from persimmon.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PersimmonConfig:
    folder = tmp_path_factory.mktemp("8b")
    (folder / "config.json").write_text(json.dumps(CONFIG_8B))
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((DEMO / name).read_bytes())
    return PersimmonConfig.from_folder(folder)


@pytest.mark.parametrize(("precision", "gigabytes"), [("bfloat16", 16.6), ("int8", 8.3), ("int4", 5.15)])
def test_a_token_reads_all_weights_but_the_embedding(config: PersimmonConfig, precision: str, gigabytes: float) -> None:
    assert read_bytes(config, precision) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_written_checkpoint_holds_what_a_converted_one_does(tmp_path: Path, precision: Quantization) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    (source / "config.json").write_text(json.dumps(CONFIG_8B | shape | {"num_attention_heads": 2}))
    with checkpoint_for(precision, "file", source, tmp_path) as folder:
        checkpoint = Checkpoint.open(folder, PersimmonConfig.from_folder(folder))
        formats = quantized_formats(PersimmonConfig.from_folder(source), precision)
        assert {name: form for name, form in checkpoint.stored.items() if isinstance(form, QuantizedFormat)} == formats
        assert isinstance(checkpoint.mapped_embedding(), QuantizedMatrix)
    assert not folder.exists()


@pytest.mark.parametrize("size", [DEMO_TOKENS, DEMO_TOKENS + 100])
def test_the_tokenizer_has_the_asked_size(tmp_path: Path, size: int) -> None:
    write_tokenizer(tmp_path, size)
    assert Tokenizer.from_folder(tmp_path).vocab_size == size


def test_the_table_has_a_row_for_each_precision() -> None:
    own = Figures(
        precision="int4",
        kv_cache_dtype="int8",
        embedding_table="file",
        flags="",
        start_s=31.2,
        resident_gb=6.46,
        tokens_per_s=4.321,
        read_gb=5.1,
        bandwidth_tokens_per_s=5.012,
        prompt_tokens_per_s={128: 40.04},
    )
    lines = table([own, own]).splitlines()
    assert "| prompt of 128, tokens/s |" in lines[0]
    assert lines[2:] == ["| int4 | int8 | file | 6.5 | 4.32 | 5.01 | 40.0 | 31 |"] * 2
