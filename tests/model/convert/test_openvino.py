"""From an export for OpenVINO to Hugging Face's layout: the network comes back; what does not fit is one line.

The same code was run on exports by optimum-intel; docs/guides/convert.md says which.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.convert import convert_checkpoint
from persimmon.model.errors import CheckpointError
from tests.model.convert.openvino_layout import Export, as_is, by_codebook, edit_config, in_4_bits, in_8_bits
from tests.model.convert.plain_checkpoint import plain_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return plain_checkpoint(tmp_path_factory.mktemp("original"))


def convert(source: Path, out: Path, dtype: str | None = None, **more: Any) -> list[str]:
    lines: list[str] = []
    given: dict[str, Any] = {"layout": "openvino", "dtype": dtype, "max_shard_bytes": 10**9, **more}
    convert_checkpoint(str(source), out, print_line=lines.append, **given)
    return lines


def parameters(folder: Path) -> dict[str, Any]:
    return dict(Checkpoint.open(folder, PersimmonConfig.from_folder(folder)).parameters())


@pytest.mark.parametrize("older", [False, True], ids=["newer", "older"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_not_compressed_comes_back_as_it_is(older, dtype, tmp_path):
    original = plain_checkpoint(tmp_path / "original", dtype=dtype)
    source = Export(original, anonymous=older, rotary_table=older).write(tmp_path / "export")
    assert convert(source, tmp_path / "out")[-1].startswith("Done")
    expected = load_file(original / "model.safetensors")
    actual = load_file(tmp_path / "out" / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert PersimmonConfig.from_folder(tmp_path / "out") == PersimmonConfig.from_folder(original)
    for file in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (original / file).read_bytes()


COMPRESSIONS = {
    "8 bits": in_8_bits(symmetric=False),
    "8 bits, symmetric": in_8_bits(symmetric=True),
    "4 bits": in_4_bits("u4", 32, "each"),
    "4 bits, symmetric": in_4_bits("i4", 64),
    "4 bits, one zero point": in_4_bits("u4", 16, "one"),
    "4 bits, rows": in_4_bits("i4", None),
    "4 bits, rows of odd length": in_4_bits("u4", None, "each"),
    "floating point of 4 bits": in_4_bits("f4e2m1", 32),
    "codebook": by_codebook,
}


@pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS)
def test_compressed_matrices_are_decoded_exactly(original, compress, tmp_path):
    export = Export(original, compress)
    source = export.write(tmp_path / "export")
    lines = convert(source, tmp_path / "out", "float32")
    assert "and 7 more become float32" in lines[0]
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, export.expected[name].float()), name


KEPT = {
    "8 bits, symmetric": (8, 8),
    "4 bits": (8, None),  # numbers less zero points are at most 15
    "4 bits, symmetric": (4, None),
    "4 bits, rows": (4, None),
}
"""Bits of matrices and of the embedding; None where it is stored in 16 bits.

Groups of 64 and of whole rows become groups of 32 or 128 that share a scale.
"""


@pytest.mark.parametrize("kind", KEPT)
def test_symmetric_matrices_keep_their_numbers_and_scales(original, kind, tmp_path):
    export = Export(original, COMPRESSIONS[kind])
    convert(export.write(tmp_path / "export"), tmp_path / "out")
    for name, actual in parameters(tmp_path / "out").items():
        expected, bits = export.expected[name], KEPT[kind][1 if name == "model.embed_tokens.weight" else 0]
        if bits is None or expected.ndim == 1:
            assert torch.equal(actual, expected.half()), name
        else:
            assert actual.bits == bits, name
            assert torch.equal(actual.dequantized(), expected), name


@pytest.mark.parametrize("kind", ["8 bits", "4 bits, one zero point", "floating point of 4 bits", "codebook"])
def test_other_compressed_matrices_are_stored_in_16_bits(original, kind, tmp_path):
    export = Export(original, COMPRESSIONS[kind])
    lines = convert(export.write(tmp_path / "export"), tmp_path / "out")
    assert "because no format that is read holds their numbers as they are: persimmon serve --quantization" in lines[0]
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, export.expected[name].half()), name
    assert PersimmonConfig.from_folder(tmp_path / "out").dtype == "float16"


def test_a_zero_point_in_the_middle_is_symmetric(original, tmp_path):
    """As older NNCF wrote symmetric matrices of 4 bits."""
    export = Export(original, in_4_bits("u4", 32, "middle"))
    lines = convert(export.write(tmp_path / "export"), tmp_path / "out")
    assert "9 matrices keep their numbers and scales: int4, groups of 32" in lines[0]
    head = parameters(tmp_path / "out")["lm_head.weight"]
    assert torch.equal(head.dequantized(), export.expected["lm_head.weight"])


def test_a_kept_embedding_that_was_trimmed_has_the_rows_that_are_left(tmp_path):
    original = plain_checkpoint(tmp_path / "original", vocab_size=4160)
    export = Export(original, in_8_bits(symmetric=True))
    source = export.write(tmp_path / "export")
    convert(source, tmp_path / "out", drop_ids=[range(4100, 4132)])
    made, kept = parameters(tmp_path / "out"), [*range(4100), *range(4132, 4160)]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(made[name].dequantized(), export.expected[name][kept])


def test_a_shared_embedding_is_stored_in_16_bits(tmp_path):
    original = plain_checkpoint(tmp_path / "original", tie_word_embeddings=True)
    export = Export(original, in_8_bits(symmetric=True))
    convert(export.write(tmp_path / "export"), tmp_path / "out")
    made, name = parameters(tmp_path / "out"), "model.embed_tokens.weight"
    assert torch.equal(made[name], export.expected[name].half())
    assert "lm_head.weight" not in made


@pytest.mark.parametrize(
    "settings", [{"qk_layernorm": False}, {"partial_rotary_factor": 1.0}, {"tie_word_embeddings": True}]
)
def test_networks_that_differ_in_a_setting_come_back(settings, tmp_path):
    original = plain_checkpoint(tmp_path / "original", **settings)
    convert(Export(original).write(tmp_path / "export"), tmp_path / "out")
    assert PersimmonConfig.from_folder(tmp_path / "out") == PersimmonConfig.from_folder(original)
    expected = load_file(original / "model.safetensors")
    actual = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(actual[name], expected[name]) for name in actual.keys() | expected.keys())


@pytest.mark.parametrize(
    ("twist", "named"),
    [
        ("split", r"Reshape .* is not as in Persimmon's network; expected a Reshape to \[\.\., 2, 3, 32\]"),
        ("scale", "Multiply .* expected attention's output"),
        ("gelu", "expected its output to enter one Relu, not Gelu"),
        ("residual", "expected its output to enter"),
        ("norm", "MVN .* expected its output to enter one Multiply, not MatMul"),
    ],
)
def test_an_operation_that_is_not_persimmons_is_named(original, twist, named, tmp_path):
    source = Export(original, twist=twist).write(tmp_path / "export")
    with pytest.raises(CheckpointError, match=named) as raised:
        convert(source, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_theta": 10000.0}, "other angles than those of rope_theta 10000"),
        ({"partial_rotary_factor": 0.25}, "not the first 8 dimensions are turned"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps in config.json is 1e-06"),
        ({"num_attention_heads": 4}, r"expected a Reshape to \[\.\., 4, 3, 16\]"),
        ({"num_hidden_layers": 3}, r"tensor model\.layers\.2\..* is missing"),
        ({"num_hidden_layers": 1}, r"tensor model\.layers\.1\..* is unexpected"),
        ({"vocab_size": 4097}, r"embed_tokens\.weight has shape \[4096, 64\]; expected \[4097, 64\]"),
        ({"qk_layernorm": False}, "expected its output to enter one Transpose, not MVN"),
        ({"model_type": "llama"}, "persimmon"),
    ],
)
def test_a_config_of_another_network_is_refused(original, changes, named, tmp_path):
    source = Export(original).write(tmp_path / "export")
    edit_config(source, **changes)
    with pytest.raises(CheckpointError, match=named) as raised:
        convert(source, tmp_path / "out")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("openvino_model.bin", None, "openvino_model.bin"),
        ("openvino_model.xml", None, "openvino_model.xml"),
        ("openvino_model.xml", b"<net", "openvino_model.xml cannot be read by OpenVINO"),
        ("openvino_model.bin", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("openvino_model.bin", b"\0" * 64, "cannot be read by OpenVINO"),
    ],
)
def test_a_folder_that_is_not_whole_is_one_line(original, name, content, named, tmp_path):
    source = Export(original).write(tmp_path / "export")
    if content is None:
        (source / name).unlink()
    else:
        (source / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=named) as raised:
        convert(source, tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_a_tokenizer_that_is_not_unigram_is_reported(original, tmp_path):
    source = Export(original).write(tmp_path / "export")
    (source / "tokenizer.model").unlink()
    assert not any("Unigram" in line for line in convert(source, tmp_path / "unigram"))
    values = json.loads((source / "tokenizer.json").read_text())
    values["model"]["type"] = "BPE"
    (source / "tokenizer.json").write_text(json.dumps(values))
    assert any("kind BPE, and Persimmon's is Unigram" in line for line in convert(source, tmp_path / "out"))


def test_without_the_package_the_extra_is_named(original, tmp_path, monkeypatch):
    source = Export(original, as_is).write(tmp_path / "export")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(CheckpointError, match=r"persimmon-server\[openvino\]"):
        convert(source, tmp_path / "out")
