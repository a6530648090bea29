"""Files that are not what their names say: one line at once, without waiting for them or reading them whole."""

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.convert import convert_checkpoint
from persimmon.model.errors import CheckpointError
from persimmon.model.json_object import JsonObject
from persimmon.model.regular_file import read_small
from persimmon.model.tokenizer import Tokenizer
from tests.model.checkpoints import DEMO, make_checkpoint

TEBIBYTE = 1 << 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(
        tmp_path / "checkpoint", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1
    )


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    parent = os.open(path.parent, os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{parent}/{path.name}")  # the whole path is often too long for a socket
    finally:
        os.close(parent)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.mkdir()


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


KINDS: dict[Callable[[Path], None], str] = {
    a_fifo: "is a FIFO; expected a regular file",
    a_socket: "is a socket; expected a regular file",
    a_device: "is a device; expected a regular file",
    a_folder: "is a folder; expected a regular file",
    a_link_to_itself: "cannot be read: Too many levels of symbolic links",
    a_link_to_nothing: "is a link to nowhere, which does not exist",
}


def error(folder: Path) -> str:
    """What is wrong with a checkpoint, for the server and for convert alike."""
    messages = []
    for read in (_open, _convert):
        with pytest.raises(CheckpointError) as caught:
            read(folder)
        messages.append(str(caught.value))
        assert messages[-1].isprintable()
        assert len(messages[-1]) < 5000
    assert messages[0].split(" ")[0] == messages[1].split(" ")[0], "both name the same file"
    return messages[0]


def _open(folder: Path) -> None:
    Checkpoint.open(folder, PersimmonConfig.from_folder(folder))


def _convert(folder: Path) -> None:
    out = folder.parent / "out"
    convert_checkpoint(
        str(folder), out, layout="hugging_face", dtype=None, max_shard_bytes=10**9, print_line=lambda _: None
    )


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_tokenizer_that_is_not_a_regular_file_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "demo", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / "tokenizer.model").unlink()
    make(folder / "tokenizer.model")
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(folder)
    assert str(caught.value) == f"{folder / 'tokenizer.model'} {KINDS[make]}"


def test_a_huge_tokenizer_is_not_read(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "demo", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    os.truncate(folder / "tokenizer.model", TEBIBYTE)
    with pytest.raises(CheckpointError, match=f"tokenizer.model has {TEBIBYTE:,} bytes; expected at most"):
        Tokenizer.from_folder(folder)


def test_a_file_of_more_tensors_than_any_network_has_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persimmon.model.weight_files.MAX_TENSORS", 10)
    with pytest.raises(CheckpointError, match=r"model.safetensors holds \d+ tensors; at most 10 are read"):
        _open(folder)


def test_an_index_of_more_shards_than_any_network_has_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"t{n}": f"{n}.safetensors" for n in range(10_001)}}))
    with pytest.raises(CheckpointError, match=r"index.json names 10,001 files; at most 10,000 are read"):
        _open(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "adapter_config.json", "model.safetensors"])
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_is_not_a_regular_file_is_named(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert error(folder) == f"{folder / name} {KINDS[make]}"


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_shard_that_is_not_a_regular_file_is_named(folder: Path, make: Callable[[Path], None]) -> None:
    (folder / "model.safetensors").unlink()
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    make(folder / shard)
    assert error(folder) == f"{folder / shard} {KINDS[make]}"


@pytest.mark.parametrize(
    "name", ["..", ".", "", "/etc/hostname", "../other/model.safetensors", "a\0b", "x/../y", 3, None]
)
def test_an_index_leads_to_no_other_folder(folder: Path, name: object) -> None:
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert error(folder).startswith(f"{index}: weight_map is ")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "content",
    [
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[" * 1_000_000,
        b'{"a": ' + b"1" * 10_000 + b"}",
        b'{"a": "' + b"\xff",
    ],
    ids=["objects", "lists", "digits", "bytes"],
)
def test_json_that_cannot_be_parsed_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    assert error(folder).startswith(f"{folder / name} is not valid")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_huge_json_file_is_not_read(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).touch()
    os.truncate(folder / name, TEBIBYTE)
    assert error(folder).startswith(f"{folder / name} has {TEBIBYTE:,} bytes; expected at most ")


def test_the_limit_of_a_small_file_is_its_last_byte(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345"
    with pytest.raises(CheckpointError, match="has 5 bytes; expected at most 4"):
        read_small(path, 4)
    assert read_small(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("beginning", [b"", struct.pack("<Q", 2**62), struct.pack("<Q", 20) + b'{"a":', b"PK\x03\x04"])
def test_sparse_weights_are_refused(folder: Path, name: str, beginning: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(beginning)
    os.truncate(folder / name, 2 * TEBIBYTE)
    assert error(folder).startswith(f"{folder / name} is ")


def test_tensors_far_larger_than_config_json_says_are_named(folder: Path) -> None:
    rows = TEBIBYTE // 128
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [rows, 32], "data_offsets": [0, TEBIBYTE]}})
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    os.truncate(path, path.stat().st_size + TEBIBYTE)
    with pytest.raises(CheckpointError, match=r"is missing|is too large to be mapped"):  # as the system allows
        _open(folder)


def test_names_in_messages_are_printable_and_cut(folder: Path) -> None:
    name = "\x1b[31m\n" + "x" * 1_000_000
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match="is missing"):
        _open(folder)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert r"\x1b[31m\n" in error(folder)


def test_a_value_nested_as_deeply_as_json_allows_is_named(tmp_path: Path) -> None:
    nested = "[" * 900 + "]" * 900
    file = JsonObject.parse(tmp_path / "config.json", f'{{"vocab_size": {nested}}}'.encode())
    with pytest.raises(CheckpointError, match=r"vocab_size is .*; expected a positive integer"):
        file.positive_integer("vocab_size")
