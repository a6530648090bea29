"""From llama.cpp's GGUF to Hugging Face's layout: network and tokenizer come back; what does not fit is one line."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from persimmon.kernels import QuantizedMatrix
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.convert import convert_checkpoint, writer
from persimmon.model.convert.gguf_file import GGUFFile
from persimmon.model.convert.gguf_tokenizer import tokenizer_model
from persimmon.model.errors import CheckpointError
from persimmon.model.tokenizer import Tokenizer
from tests.model.checkpoints import DEMO
from tests.model.convert.gguf_layout import make_gguf, vocabulary
from tests.model.convert.plain_checkpoint import plain_checkpoint

TEXT = "human: Hello  there\n\tüñ 世界 <0x41> |ENDOFTEXT|\n\nadept:"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return plain_checkpoint(folder)


def convert(source: Path, out: Path, dtype: str | None = None, max_shard_bytes: int = 10**9) -> list[str]:
    lines: list[str] = []
    convert_checkpoint(
        str(source), out, layout="gguf", dtype=dtype, max_shard_bytes=max_shard_bytes, print_line=lines.append
    )
    return lines


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Kind.F32, torch.float32), (Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)]
)
def test_the_network_comes_back(original, kind, dtype, tmp_path):
    source = make_gguf(original, tmp_path / "model.gguf", kind)
    assert convert(source, tmp_path / "out", max_shard_bytes=400_000)[-1].startswith("Done")
    expected = load_file(original / "model.safetensors")
    actual = {
        name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor.to(dtype)), name
    theirs = PersimmonConfig.from_folder(original)
    ours = PersimmonConfig.from_folder(tmp_path / "out")
    assert ours == PersimmonConfig(**(vars(theirs) | {"dtype": str(dtype).removeprefix("torch.")}))


@pytest.mark.parametrize(("kind", "form"), [(Kind.Q4_0, "int4, groups of 32"), (Kind.Q8_0, "int8, groups of 32")])
def test_symmetric_blocks_keep_their_numbers_and_scales(original, kind, form, tmp_path):
    source = make_gguf(original, tmp_path / "model.gguf", kind)
    lines = convert(source, tmp_path / "out")
    assert any(f"9 matrices keep their numbers and scales: {form}" in line for line in lines)
    assert any("model.embed_tokens.weight become float16, because no format" in line for line in lines)
    parameters = dict(Checkpoint.open(tmp_path / "out", PersimmonConfig.from_folder(tmp_path / "out")).parameters())
    for name, tensor in load_file(original / "model.safetensors").items():
        numbers, actual = tensor.float().numpy(), parameters[name]
        decoded = torch.from_numpy(
            gguf.dequantize(gguf.quantize(numbers, kind), kind) if numbers.ndim == 2 else numbers
        )
        if isinstance(actual, QuantizedMatrix):
            assert str(actual.format) == form
            assert torch.equal(actual.dequantized(), decoded), name
        else:
            assert torch.equal(actual, decoded.half()), name


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.Q5_0])
def test_quantized_matrices_are_decoded_where_a_type_is_asked_for(original, kind, tmp_path):
    source = make_gguf(original, tmp_path / "model.gguf", kind)
    lines = convert(source, tmp_path / "out", "float16")
    assert any("and 7 more become float16: persimmon serve --quantization" in line for line in lines)
    actual = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(original / "model.safetensors").items():
        numbers = tensor.float().numpy()
        decoded = gguf.dequantize(gguf.quantize(numbers, kind), kind) if numbers.ndim == 2 else numbers
        assert torch.equal(actual[name], torch.from_numpy(decoded).half()), name


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K])
def test_blocks_of_256_are_decoded(kind, tmp_path):
    original = plain_checkpoint(tmp_path / "original", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    generator = np.random.default_rng(0)
    blocks = {}
    for matrix, tensor in load_file(original / "model.safetensors").items():
        if tensor.ndim == 2:
            row_bytes = tensor.shape[1] // 256 * gguf.GGML_QUANT_SIZES[kind][1]
            # Below 60, so that no scale among the bytes is infinite.
            blocks[matrix] = generator.integers(0, 60, (len(tensor), row_bytes), dtype=np.uint8)
    convert(make_gguf(original, tmp_path / "model.gguf", kind, blocks=blocks), tmp_path / "out", "float32")
    actual = load_file(tmp_path / "out" / "model.safetensors")
    for matrix, stored in blocks.items():
        expected = torch.from_numpy(gguf.dequantize(stored, kind))
        assert expected.abs().max() > 0
        assert torch.equal(actual[matrix], expected), matrix


def test_half_of_each_head_is_turned_whatever_older_files_say(original, tmp_path):
    source = make_gguf(original, tmp_path / "model.gguf", changes={"persimmon.rope.dimension_count": 32})
    convert(source, tmp_path / "out")
    assert PersimmonConfig.from_folder(tmp_path / "out").rotary_dim == 16
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["layer_norm_eps"] == 1e-5
    assert values["rope_parameters"]["rope_theta"] == values["rope_theta"] == 25000.0


def test_the_older_script_wrote_neither_token_ids_nor_a_length(original, tmp_path):
    keys = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "persimmon.context_length")
    convert(make_gguf(original, tmp_path / "model.gguf", changes=dict.fromkeys(keys)), tmp_path / "out")
    config = PersimmonConfig.from_folder(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_ids, config.max_position_embeddings) == (1, (1,), 16384)


def test_the_tokenizer_comes_back(original, tmp_path):
    lines = convert(make_gguf(original, tmp_path / "model.gguf", padding=3), tmp_path / "out")
    assert any("does not say how text is normalized" in line for line in lines)
    ours, theirs = Tokenizer.from_folder(tmp_path / "out"), Tokenizer.from_folder(original)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.add_bos
    assert ours.encode(TEXT) == theirs.encode(TEXT)


def tokenizer_with_symbols(folder: Path) -> Path:
    """The demo's model with user-defined pieces among the others."""
    model = ModelProto.FromString((DEMO / "tokenizer.model").read_bytes())
    for token_id, piece in ((300, "human:"), (301, "\n\nadept:"), (302, " tree"), (303, "  ")):
        model.pieces[token_id].CopyFrom(ModelProto.SentencePiece(piece=piece, score=0, type=4))
    path = folder / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """SentencePiece with the model that the scripts read, and with the one that is made of what they write."""
    path = tokenizer_with_symbols(tmp_path_factory.mktemp("tokenizer"))
    metadata = {
        key: np.array(value) if key.endswith(("scores", "token_type")) else value
        for key, value in vocabulary(path).items()
    }
    metadata["tokenizer.ggml.tokens"] = [text.encode() for text in metadata["tokenizer.ggml.tokens"]]
    rebuilt = tokenizer_model(metadata, "model.gguf")
    return SentencePieceProcessor(str(path)), SentencePieceProcessor(model_proto=rebuilt.SerializeToString())


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["human:", "\n\nadept:", " tree", "  ", " the", "a", "ß", "世", "\x07"]) | st.text()))
def test_user_defined_pieces_come_back_although_files_call_them_normal(processors, parts):
    theirs, ours = processors
    text = "".join(parts).replace("\ud800", "")
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids)


def test_the_original_tokenizer_next_to_the_file_is_used(original, tmp_path):
    model = ModelProto.FromString((DEMO / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = False  # which no piece shows
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    source = make_gguf(original, tmp_path / "model.gguf", padding=2)
    lines = convert(source, tmp_path / "out")
    assert any("has the file's pieces" in line for line in lines)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.SerializeToString()
    tokenizer_with_symbols(tmp_path)
    with pytest.raises(CheckpointError, match="has other pieces"):
        convert(source, tmp_path / "other")


def test_a_stopped_conversion_goes_on(original, tmp_path, monkeypatch):
    source = make_gguf(original, tmp_path / "model.gguf", Kind.Q8_0)
    write_shard = writer._write_shard
    written: list[str] = []

    def stop_at_the_second(*arguments: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(arguments[1].name)
        write_shard(*arguments)

    monkeypatch.setattr(writer, "_write_shard", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", max_shard_bytes=400_000)
    monkeypatch.setattr(writer, "_write_shard", write_shard)
    lines = convert(source, tmp_path / "out", max_shard_bytes=400_000)
    assert sum("kept and verified" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"general.architecture": "llama"}, "architecture is 'llama'; expected 'persimmon'"),
        ({"persimmon.embedding_length": None}, r"embedding_length is None; expected a positive number"),
        ({"persimmon.attention.head_count_kv": 1}, "head_count_kv is 1"),
        ({"persimmon.rope.dimension_count": 8}, "dimension_count is 8; expected 16"),
        ({"persimmon.block_count": 1}, r"tensor model\.layers\.1\..* is unexpected"),
        ({"persimmon.block_count": 3}, r"tensor model\.layers\.2\..* is missing"),
        ({"persimmon.feed_forward_length": 512}, "dense_h_to_4h.*has shape"),
        ({"split.count": 2}, "one of 2 parts"),
        ({"tokenizer.ggml.model": "gpt2"}, "kind 'gpt2'; expected 'llama'"),
        ({"tokenizer.ggml.tokens": None}, "no vocabulary"),
        ({"tokenizer.ggml.scores": [0.0]}, "4,096 pieces do not have as many scores"),
        ({"tokenizer.ggml.scores": [-float(rank) for rank in range(4096)]}, "ranks, as of BPE"),
        ({"tokenizer.ggml.token_type": [9] * 4096}, "unknown type 9"),
        ({"tokenizer.ggml.bos_token_id": 9999}, "bos_token_id is 9999; expected one of the 4,096 pieces"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "add_bos_token is yes; expected true or false"),
    ],
)
def test_a_file_that_is_not_persimmons_is_one_line(original, changes, named, tmp_path):
    source = make_gguf(original, tmp_path / "model.gguf", changes=changes)
    with pytest.raises(CheckpointError, match=named) as raised:
        convert(source, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def rewritten(content: bytes, offset: int, code: str, value: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(f"<{code}", changed, offset, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: b"PK" + content[2:], "not a GGUF file"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (lambda content: rewritten(content, 4, "I", 1), "has version 1"),
        (lambda content: rewritten(content, 4, "I", 3 << 24), "is big-endian"),
        (lambda content: rewritten(content, 16, "Q", 1 << 60), "truncated or damaged"),
        (lambda content: content[:1000], "ends within its header"),
        (lambda content: content[:-1000], "reaches beyond its end"),
    ],
)
def test_a_damaged_file_is_one_line(original, change, named, tmp_path):
    source = make_gguf(original, tmp_path / "model.gguf")
    source.write_bytes(change(source.read_bytes()))
    with pytest.raises(CheckpointError, match=named) as raised:
        GGUFFile.read(source)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def small_header(original, tmp_path_factory):
    """The beginning of a file with few pieces, and its length."""
    short = {
        "tokenizer.ggml.tokens": ["<unk>", "a"],
        "tokenizer.ggml.scores": [0.0, -1.5],
        "tokenizer.ggml.token_type": [2, 1],
    }
    content = make_gguf(original, tmp_path_factory.mktemp("small") / "model.gguf", changes=short).read_bytes()
    return content[:4096], len(content)


@settings(max_examples=60)
@given(st.data())
def test_any_other_byte_in_a_header_is_read_or_refused(small_header, tmp_path_factory, data):
    header, length = small_header
    path = tmp_path_factory.mktemp("changed") / "model.gguf"
    offset = data.draw(st.integers(4, len(header) - 8))
    value = data.draw(st.integers(0, 255) | st.sampled_from([1 << 31, 1 << 40, 1 << 63]))
    with path.open("wb") as file:
        file.write(rewritten(header, offset, "B" if value < 256 else "Q", value))
        file.truncate(length)
    try:
        GGUFFile.read(path)
    except CheckpointError as error:
        lines = str(error).splitlines()
    else:
        lines = []
    assert len(lines) <= 1


def test_without_the_package_the_extra_is_named(original, tmp_path, monkeypatch):
    source = make_gguf(original, tmp_path / "model.gguf")
    for name in [name for name in sys.modules if name.split(".")[0] == "gguf"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"persimmon-server\[gguf\]"):
        convert(source, tmp_path / "out")


def test_a_vector_in_blocks_and_an_unknown_type_are_refused(original, tmp_path):
    source = make_gguf(original, tmp_path / "model.gguf")
    content = source.read_bytes()
    place = content.index(b"blk.0.attn_norm.bias") + len(b"blk.0.attn_norm.bias") + 4 + 8
    for number, named in ((8, "attn_norm.bias of shape .* is Q8_0"), (99, "unknown type 99")):
        source.write_bytes(rewritten(content, place, "I", number))
        with pytest.raises(CheckpointError, match=named):
            convert(source, tmp_path / "out")
    place = content.index(b"output.weight") + len(b"output.weight") + 4 + 16
    source.write_bytes(rewritten(content, place, "I", Kind.Q8_1))
    with pytest.raises(CheckpointError, match="Q8_1, which the gguf package cannot decode"):
        convert(source, tmp_path / "out")


def test_a_template_in_the_file_is_kept(original, tmp_path):
    source = make_gguf(original, tmp_path / "model.gguf", changes={"tokenizer.chat_template": "{{ messages }}"})
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
