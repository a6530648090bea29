"""From Hugging Face layout to safetensors: same numbers in every format; cut off, it goes on; damage is one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.convert import convert_checkpoint, writer
from persimmon.model.errors import CheckpointError
from tests.model.checkpoints import DEMO, make_checkpoint

Tensors = dict[str, torch.Tensor]


def tensors_of(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint in safetensors, float32."""
    return make_checkpoint(tmp_path_factory.mktemp("original"), num_hidden_layers=2)


def pickled(original: Path, folder: Path, *, shards: int = 1, new_format: bool = True) -> Path:
    """The same checkpoint in .bin files."""
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = tensors_of(original)
    names = list(tensors)
    parts = {f"pytorch_model-{part + 1:05}-of-{shards:05}.bin": names[part::shards] for part in range(shards)}
    if shards == 1:
        parts = {"pytorch_model.bin": names}
    else:
        weight_map = {name: file for file, part in parts.items() for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, part in parts.items():
        contents = {name: tensors[name] for name in part}
        torch.save(contents, folder / file, _use_new_zipfile_serialization=new_format)
    return folder


def convert(source: Path, out: Path, dtype: str | None = None, max_shard_bytes: int = 10**9) -> list[str]:
    lines: list[str] = []
    convert_checkpoint(
        str(source), out, layout="hugging_face", dtype=dtype, max_shard_bytes=max_shard_bytes, print_line=lines.append
    )
    return lines


def assert_equal(actual: Tensors, expected: Tensors, dtype: torch.dtype | None = None) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor.to(dtype or tensor.dtype)), name
        assert actual[name].dtype == (dtype or tensor.dtype), name


@pytest.mark.parametrize(("shards", "new_format"), [(1, True), (3, True), (1, False), (3, False)])
def test_pickled_weights_become_the_same_safetensors(original, shards, new_format, tmp_path):
    source = pickled(original, tmp_path / "in", shards=shards, new_format=new_format)
    convert(source, tmp_path / "out")
    assert_equal(tensors_of(tmp_path / "out"), tensors_of(original))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_type_is_the_one_asked_for_and_config_says_so(original, dtype, tmp_path):
    convert(original, tmp_path / "out", dtype)
    assert_equal(tensors_of(tmp_path / "out"), tensors_of(original), getattr(torch, dtype))
    assert PersimmonConfig.from_folder(tmp_path / "out").dtype == dtype


def test_the_older_key_of_the_type_is_kept(original, tmp_path):
    source = shutil.copytree(original, tmp_path / "in")
    values = json.loads((source / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    (source / "config.json").write_text(json.dumps(values))
    convert(source, tmp_path / "out", "float16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == values | {"torch_dtype": "float16"}


def test_shards_hold_as_much_as_asked_for_and_have_an_index(original, tmp_path):
    limit = 600_000
    convert(original, tmp_path / "out", max_shard_bytes=limit)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        tensors = load_file(shard)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= limit or len(tensors) == 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    expected = tensors_of(original)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert index["weight_map"].keys() == expected.keys()
    assert_equal(dict(Checkpoint.open(tmp_path / "out", PersimmonConfig.from_folder(original)).tensors()), expected)


def test_transformers_loads_the_result_with_the_same_logits(original, tmp_path):
    from transformers import PersimmonForCausalLM

    convert(pickled(original, tmp_path / "in"), tmp_path / "out", max_shard_bytes=600_000)
    ids = torch.tensor([[5, 7, 1, 300, 42]])
    with torch.no_grad():
        expected, actual = (
            PersimmonForCausalLM.from_pretrained(folder)(ids).logits for folder in (original, tmp_path / "out")
        )
    assert torch.equal(actual, expected)


def test_tokenizer_and_generation_files_come_along_and_others_do_not(original, tmp_path):
    source = pickled(original, tmp_path / "in")
    for name in ("LICENSE", "optimizer.pt", "training_args.bin", "model.h5", "chat_template.jinja"):
        (source / name).write_text("x")
    convert(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json", "tokenizer.json"),
        *("LICENSE", "chat_template.jinja", "model.safetensors"),
    }


def test_stored_rotary_frequencies_are_left_out(original, tmp_path):
    source = pickled(original, tmp_path / "in")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    torch.save(tensors_of(original) | extra, source / "pytorch_model.bin")
    convert(source, tmp_path / "out")
    assert_equal(tensors_of(tmp_path / "out"), tensors_of(original))


class StoppedError(Exception):
    """The machine goes off."""


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    written = iter(range(shards))
    write_shard = writer._write_shard

    def stopping(*arguments):
        if next(written, None) is None:
            raise StoppedError
        write_shard(*arguments)

    monkeypatch.setattr(writer, "_write_shard", stopping)


def test_a_conversion_that_was_cut_off_keeps_its_shards_and_goes_on(original, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StoppedError):
            convert(original, out, max_shard_bytes=600_000)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert len(kept) == 2
    lines = convert(original, out, max_shard_bytes=600_000)
    assert sum("kept" in line for line in lines) == 2
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert_equal(tensors_of(out), tensors_of(original))
    assert not (out / writer.MARKER).exists()


def test_a_shard_that_is_damaged_is_written_again(original, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(StoppedError):
            convert(original, out, max_shard_bytes=600_000)
    first, second = sorted(out.glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:1000])
    lines = convert(original, out, max_shard_bytes=600_000)
    assert not any("kept" in line for line in lines)
    assert_equal(tensors_of(out), tensors_of(original))


def test_a_conversion_stopped_within_a_shard_leaves_nothing_that_could_be_served(original, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stop(*_):
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_difference", stop)
        with pytest.raises(StoppedError):
            convert(original, out)
    assert not list(out.glob("*.safetensors"))
    assert not (out / "config.json").exists()
    convert(original, out)
    assert not list(out.glob("*.partial"))
    assert_equal(tensors_of(out), tensors_of(original))


def test_other_settings_do_not_go_on_with_an_unfinished_conversion(original, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(StoppedError):
            convert(original, tmp_path / "out", max_shard_bytes=600_000)
    with pytest.raises(CheckpointError, match="unfinished conversion of another source"):
        convert(original, tmp_path / "out", "float16", max_shard_bytes=600_000)


def test_what_was_written_is_compared_with_the_source(original, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_bytes", lambda rows: torch.zeros_like(rows).view(torch.uint8).numpy().data)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight read back differs from what was written"):
        convert(original, tmp_path / "out")


def test_a_folder_with_something_else_in_it_is_left_alone(original, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        convert(original, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_is_not_converted_onto_itself(original):
    with pytest.raises(CheckpointError, match="not empty"):
        convert(original, original)


def test_a_disk_without_room_is_found_before_anything_is_written(original, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(CheckpointError, match=r"the conversion needs .* MiB, but its disk has only 97\.7 KiB free"):
        convert(original, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_value_too_large_for_the_new_type_is_an_error(original, tmp_path):
    source = pickled(original, tmp_path / "in")
    tensors = tensors_of(original)
    tensors["model.final_layernorm.bias"][3] = -70000.0
    torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.final_layernorm\.bias has the value 70000, more than float16"):
        convert(source, tmp_path / "out", "float16")


def test_little_of_a_tensor_is_in_memory_at_once(original, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 10_000)
    sizes = []
    to_bytes = writer._bytes

    def counted(rows: torch.Tensor) -> memoryview:
        sizes.append(rows.nbytes)
        return to_bytes(rows)

    monkeypatch.setattr(writer, "_bytes", counted)
    convert(pickled(original, tmp_path / "in"), tmp_path / "out")
    assert max(sizes) <= 10_000
    assert_equal(tensors_of(tmp_path / "out"), tensors_of(original))


MEASURED = """
import pathlib, resource, sys, torch
from persimmon.model.convert import convert_checkpoint
torch.rand(1000, 1000).half().float()  # what PyTorch itself takes at its first steps
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_checkpoint(
    sys.argv[1], pathlib.Path(sys.argv[2]), layout="hugging_face", dtype="float32",
    max_shard_bytes=10**9, print_line=lambda _: None,
)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_memory_stays_far_below_the_size_of_a_shard(tmp_path):
    source = make_checkpoint(
        tmp_path / "original", vocab_size=150_000, hidden_size=256, num_hidden_layers=1, dtype=torch.float16
    )
    legacy = pickled(source, tmp_path / "in", new_format=False)  # the format that torch.load reads as a whole
    command = [sys.executable, "-c", MEASURED, str(legacy), str(tmp_path / "out")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    shard = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert shard > 300_000_000
    assert grown < shard / 2


def drop_tensor(tensors: Tensors) -> None:
    del tensors["model.layers.1.mlp.dense_h_to_4h.bias"]


def add_tensor(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.dense_h_to_4h.bias"] = torch.zeros(512)


def change_shape(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = torch.zeros(4095, 128)


def change_type(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].double()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (drop_tensor, r"model\.layers\.1\.mlp\.dense_h_to_4h\.bias is missing"),
        (add_tensor, r"pytorch_model\.bin: tensor model\.layers\.2\.mlp\.dense_h_to_4h\.bias is unexpected"),
        (change_shape, r"lm_head\.weight has shape \[4095, 128\]; expected \[4096, 128\]"),
        (change_type, r"lm_head\.weight is float64"),
    ],
)
def test_tensors_of_another_network_are_refused_before_anything_is_written(original, damage, named, tmp_path):
    source = pickled(original, tmp_path / "in")
    tensors = tensors_of(original)
    damage(tensors)
    torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=named) as raised:
        convert(source, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_pickled_file_of_something_else_is_refused(original, tmp_path):
    source = pickled(original, tmp_path / "in")
    torch.save({"model": {"a": torch.zeros(1)}}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds a dict under 'model'"):
        convert(source, tmp_path / "out")


def test_a_missing_shard_is_named(original, tmp_path):
    source = pickled(original, tmp_path / "in", shards=3)
    (source / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00003\.bin is missing"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("nowhere")], ids=["FIFO", "link"])
def test_a_tokenizer_that_cannot_be_copied_is_named(original, make, tmp_path):
    source = shutil.copytree(original, tmp_path / "in")
    (source / "tokenizer.model").unlink()
    make(source / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is a (FIFO|link to nowhere)"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_index_that_leads_out_of_the_folder_is_refused(original, tmp_path):
    source = pickled(original, tmp_path / "in", shards=2)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.bin"}}))
    with pytest.raises(CheckpointError, match="weight_map"):
        convert(source, tmp_path / "out")


def test_damaged_safetensors_are_one_line(original, tmp_path):
    source = shutil.copytree(original, tmp_path / "in")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged") as raised:
        convert(source, tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_what_serve_refuses_is_not_done(original: Path, tmp_path: Path) -> None:
    def last_line(name: str, **files: str | None) -> str:
        source = tmp_path / name
        shutil.copytree(original, source)
        for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(DEMO / file, source)
        for file, content in files.items():
            path = source / file.replace("__", ".")
            if content is None:
                path.unlink()
            else:
                path.write_text(content)
        lines = convert(source, tmp_path / f"{name}-out")
        assert lines[-1].startswith("Done") or lines[0].startswith("persimmon serve will refuse the result: ")
        return lines[-1]

    assert last_line("whole").startswith("Done: ")
    assert last_line("saved_by_transformers_5", tokenizer__model=None).startswith("Done: ")
    assert "refuses it: " in last_line("none", tokenizer__model=None, tokenizer__json=None)
    assert "chat_template.jinja" in last_line("template", chat_template__jinja="{% if %}")
    assert "tokenizer.json" in last_line("damaged", tokenizer__json="{")


def test_the_tokenizers_files_and_all_templates_travel_with_the_weights(original: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(original, source)
    (source / "additional_chat_templates").mkdir()
    files = {
        "tokenizer.json": (DEMO / "tokenizer.json").read_text(),
        "tokenizer_config.json": (DEMO / "tokenizer_config.json").read_text(),
        "special_tokens_map.json": "{}",
        "added_tokens.json": "{}",
        "chat_template.jinja": "{{ messages[0].content }}",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    }
    for name, content in files.items():
        (source / name).write_text(content)
    convert(source, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files
