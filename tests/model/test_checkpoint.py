"""Checkpoint: the tensors are those that were written, in every format; damage is one line naming file and tensor."""

import gc
import json
import os
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from persimmon.model.checkpoint import Checkpoint, dummy_parameters, dummy_tensors, expected_shapes
from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.errors import CheckpointError
from tests.model.checkpoints import DEMO, make_checkpoint

CONFIG = PersimmonConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
)
CLASSIFIER = replace(CONFIG, architecture=Architecture.SEQUENCE_CLASSIFICATION, labels=("bad", "good", "odd"))
QKV = "model.layers.1.self_attn.query_key_value.weight"
Tensors = dict[str, torch.Tensor]
Writer = Callable[[Path, Tensors], None]


def random_tensors(config: PersimmonConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Tensors:
    return dict(dummy_tensors(config, dtype, "cpu", seed=0))


def halves(tensors: Tensors, ending: str) -> dict[str, Tensors]:
    """Two shards, by file name.  Neighbours go to different ones, because the order is not guaranteed."""
    names = list(tensors)
    return {
        f"{ending.partition('.')[0]}-{number + 1:05}-of-00002.{ending.partition('.')[2]}": {
            name: tensors[name] for name in names[number::2]
        }
        for number in range(2)
    }


def write_index(folder: Path, name: str, shards: dict[str, Tensors]) -> None:
    weight_map = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def write_safetensors(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_sharded_safetensors(folder: Path, tensors: Tensors) -> None:
    shards = halves(tensors, "model.safetensors")
    for name, shard in shards.items():
        save_file(shard, folder / name)
    write_index(folder, "model.safetensors.index.json", shards)


def write_pickled(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def write_sharded_pickled(folder: Path, tensors: Tensors) -> None:
    shards = halves(tensors, "pytorch_model.bin")
    for name, shard in shards.items():
        torch.save(shard, folder / name)
    write_index(folder, "pytorch_model.bin.index.json", shards)


def write_old_pickled(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


WRITERS = [write_safetensors, write_sharded_safetensors, write_pickled, write_sharded_pickled, write_old_pickled]
every_format = pytest.mark.parametrize("write", WRITERS)


def error(folder: Path, config: PersimmonConfig = CONFIG) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# What is read.


@pytest.mark.parametrize("shard_size", ["50GB", "200KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_checkpoint_that_transformers_wrote_is_read(tmp_path: Path, dtype: torch.dtype, shard_size: str) -> None:
    from transformers import PersimmonForCausalLM

    make_checkpoint(tmp_path, hidden_size=32, intermediate_size=96, dtype=dtype, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard_size == "50GB"
    checkpoint = Checkpoint.open(tmp_path, PersimmonConfig.from_folder(tmp_path))
    theirs = PersimmonForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = {name: parameter.detach() for name, parameter in theirs.named_parameters()}
    assert_same(dict(checkpoint.tensors()), expected)
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in expected.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_layernorm": False},
        {"tie_word_embeddings": True},
        {"architecture": "PersimmonForSequenceClassification"},
        {"architecture": "PersimmonForSequenceClassification", "settings": {"num_labels": 3}},
        {"architecture": "PersimmonForSequenceClassification", "tie_word_embeddings": True},
        {"architecture": "PersimmonForTokenClassification", "settings": {"id2label": {0: "a"}}},
        {"architecture": "PersimmonForTokenClassification", "settings": {"token_classification_bias": False}},
    ],
    ids=str,
)
def test_expected_shapes_are_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_checkpoint(tmp_path, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, **changes)
    written = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert expected_shapes(PersimmonConfig.from_folder(tmp_path)) == written


def test_expected_shapes_of_the_8b_model_hold_9_4_billion_parameters() -> None:
    config = PersimmonConfig(
        vocab_size=262144,
        hidden_size=4096,
        intermediate_size=16384,
        num_hidden_layers=36,
        num_attention_heads=64,
        max_position_embeddings=16384,
    )
    shapes = expected_shapes(config)
    assert len(shapes) == 36 * 16 + 4
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 9_397_175_296
    assert shapes["model.layers.35.self_attn.q_layernorm.bias"] == (64,)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_those_that_were_written(tmp_path: Path, write: Writer, dtype: torch.dtype) -> None:
    tensors = random_tensors(dtype=dtype)
    write(tmp_path, tensors)
    checkpoint = Checkpoint.open(tmp_path, CONFIG)
    assert_same(dict(checkpoint.tensors()), tensors)
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_dtypes_may_be_mixed(tmp_path: Path) -> None:
    tensors = random_tensors(dtype=torch.float16)
    tensors["model.final_layernorm.weight"] = torch.ones(16, dtype=torch.float32)
    write_safetensors(tmp_path, tensors)
    assert_same(dict(Checkpoint.open(tmp_path, CONFIG).tensors()), tensors)


def test_the_largest_parameters_come_first_while_little_else_is_in_memory(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_shard_size="200KB")
    config = PersimmonConfig.from_folder(tmp_path)
    checkpoint = Checkpoint.open(tmp_path, config)
    names = [name for name, _ in checkpoint.parameters()]
    assert set(names[:2]) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert sorted(names) == sorted(expected_shapes(config))
    dummies = [name for name, _ in dummy_parameters(config, torch.float32, "cpu", 0, {})]
    assert dummies[:2] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert sorted(dummies) == sorted(names)


def test_tensors_come_shard_by_shard_in_the_order_they_lie(tmp_path: Path) -> None:
    write_sharded_pickled(tmp_path, random_tensors())
    names = list(expected_shapes(CONFIG))
    assert [name for name, _ in Checkpoint.open(tmp_path, CONFIG).tensors()] == names[0::2] + names[1::2]


def test_pickled_parameters_come_without_gradients(tmp_path: Path) -> None:
    write_pickled(tmp_path, {name: torch.nn.Parameter(tensor) for name, tensor in random_tensors().items()})
    assert not any(tensor.requires_grad for _, tensor in Checkpoint.open(tmp_path, CONFIG).tensors())


def test_safetensors_are_preferred_to_pickled_files(tmp_path: Path) -> None:
    tensors = random_tensors()
    write_sharded_safetensors(tmp_path, tensors)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert_same(dict(Checkpoint.open(tmp_path, CONFIG).tensors()), tensors)


def test_single_file_is_preferred_to_shards_as_in_transformers(tmp_path: Path) -> None:
    tensors = random_tensors()
    write_sharded_safetensors(tmp_path, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    write_safetensors(tmp_path, tensors)
    assert_same(dict(Checkpoint.open(tmp_path, CONFIG).tensors()), tensors)


def test_demo_checkpoint_is_complete() -> None:
    checkpoint = Checkpoint.open(DEMO, PersimmonConfig.from_folder(DEMO))
    assert {tensor.dtype for _, tensor in checkpoint.tensors()} == {torch.float16}


# What it costs.


@pytest.mark.parametrize("write", [write_safetensors, write_sharded_safetensors])
def test_tensors_are_held_one_at_a_time(tmp_path: Path, write: Writer) -> None:
    write(tmp_path, random_tensors())
    alive: weakref.ReferenceType[torch.Tensor] | None = None
    for _, tensor in Checkpoint.open(tmp_path, CONFIG).tensors():
        assert alive is None or alive() is None
        alive = weakref.ref(tensor)
        del tensor


def test_reading_takes_the_memory_of_one_tensor_not_of_the_file(tmp_path: Path) -> None:
    config = replace(CONFIG, hidden_size=512, intermediate_size=8192, num_hidden_layers=6)
    write_safetensors(tmp_path, random_tensors(config))  # 216 MiB in tensors of at most 16 MiB
    checkpoint = Checkpoint.open(tmp_path, config)
    assert checkpoint.total_bytes > 200 * 2**20
    gc.collect()
    resident = psutil.Process().memory_info
    before = peak = resident().rss
    for _, tensor in checkpoint.tensors():
        tensor.sum()  # a mapped tensor takes no memory before it is touched
        peak = max(peak, resident().rss)
        del tensor
    assert peak - before < 96 * 2**20


# What is refused.


def test_folder_without_weights_is_told_what_is_needed(tmp_path: Path) -> None:
    assert error(tmp_path) == (
        f"{tmp_path}: no weights; expected one of model.safetensors, model.safetensors.index.json, "
        "pytorch_model.bin, pytorch_model.bin.index.json"
    )


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def listing(folder: Path) -> Path:
    """The file that lists all tensors: the index, or the only weight file."""
    return next(iter([*folder.glob("*.index.json"), *folder.iterdir()]))


@every_format
def test_missing_tensor_is_named(tmp_path: Path, write: Writer) -> None:
    write(tmp_path, without(random_tensors(), QKV))
    assert error(tmp_path) == f"{listing(tmp_path)}: tensor {QKV} is missing"


@every_format
def test_many_missing_tensors_are_counted(tmp_path: Path, write: Writer) -> None:
    write(tmp_path, random_tensors())
    first = "model.layers.2.input_layernorm.weight"
    message = error(tmp_path, replace(CONFIG, num_hidden_layers=4))
    assert message == f"{listing(tmp_path)}: tensor {first} is missing (and 31 more)"


@every_format
def test_unexpected_tensor_is_named_with_its_file(tmp_path: Path, write: Writer) -> None:
    write(tmp_path, random_tensors() | {"model.layers.0.mlp.gate.weight": torch.ones(2)})
    message = error(tmp_path)
    assert message.endswith(": tensor model.layers.0.mlp.gate.weight is unexpected")
    assert Path(message.partition(":")[0]).is_file()


def test_norms_of_queries_and_keys_are_unexpected_where_config_json_has_none(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_tensors())
    name = "model.layers.0.self_attn.k_layernorm.bias"
    message = error(tmp_path, replace(CONFIG, qk_layernorm=False))
    assert message == f"{tmp_path}/model.safetensors: tensor {name} is unexpected (and 7 more)"


def test_classifier_has_a_score_and_no_output_projection(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_tensors())
    path = tmp_path / "model.safetensors"
    assert error(tmp_path, CLASSIFIER) == f"{path}: tensor score.weight is missing"
    write_safetensors(tmp_path, random_tensors() | {"score.weight": torch.ones(3, 16)})
    checkpoint = Checkpoint.open(tmp_path, CLASSIFIER)
    assert checkpoint.notes == ("lm_head.weight is ignored: PersimmonForSequenceClassification does not use it",)
    assert checkpoint.names.keys() == expected_shapes(CLASSIFIER).keys()
    write_safetensors(tmp_path, random_tensors(CLASSIFIER))
    assert Checkpoint.open(tmp_path, CLASSIFIER).names.keys() == expected_shapes(CLASSIFIER).keys()
    assert error(tmp_path, CONFIG) == f"{path}: tensor lm_head.weight is missing"


def test_score_of_another_number_of_labels_is_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_tensors(CLASSIFIER))
    message = error(tmp_path, replace(CLASSIFIER, labels=("bad", "good")))
    assert message.endswith(": tensor score.weight has shape [3, 16], config.json needs [2, 16]")


def test_bias_of_the_score_is_a_token_classifiers(tmp_path: Path) -> None:
    tokens = replace(CLASSIFIER, architecture=Architecture.TOKEN_CLASSIFICATION)
    write_safetensors(tmp_path, random_tensors(CLASSIFIER))
    assert error(tmp_path, tokens).endswith(": tensor score.bias is missing")
    write_safetensors(tmp_path, random_tensors(tokens))
    assert error(tmp_path, CLASSIFIER).endswith(": tensor score.bias is unexpected")
    assert error(tmp_path, replace(tokens, token_classification_bias=False)).endswith(
        ": tensor score.bias is unexpected"
    )


@every_format
def test_wrong_shape_is_named_with_the_right_one(tmp_path: Path, write: Writer) -> None:
    write(tmp_path, random_tensors() | {QKV: torch.ones(48, 15)})
    assert f": tensor {QKV} has shape [48, 15], config.json needs [48, 16]" in error(tmp_path)


@every_format
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float64])
def test_tensor_that_is_no_plain_float_is_named(tmp_path: Path, write: Writer, dtype: torch.dtype) -> None:
    write(tmp_path, random_tensors() | {QKV: torch.zeros(48, 16).to(dtype)})
    message = error(tmp_path)
    assert f": tensor {QKV} is " in message
    assert message.endswith("; expected one of float32, float16, bfloat16")


@pytest.mark.parametrize("write", [write_safetensors, write_pickled])
def test_tensor_of_eight_bits_is_named(tmp_path: Path, write: Writer) -> None:
    write(tmp_path, random_tensors() | {QKV: torch.zeros(48, 16).to(torch.float8_e4m3fn)})
    assert f": tensor {QKV} is " in error(tmp_path)


@pytest.mark.parametrize("write", [write_sharded_safetensors, write_sharded_pickled])
def test_missing_shard_is_named(tmp_path: Path, write: Writer) -> None:
    write(tmp_path, random_tensors())
    shard = next(tmp_path.glob("*-00002-of-00002.*"))
    shard.unlink()
    assert error(tmp_path) == f"{shard} is missing, although {listing(tmp_path).name} names it"


@pytest.mark.parametrize("write", [write_sharded_safetensors, write_sharded_pickled])
def test_all_missing_shards_are_counted(tmp_path: Path, write: Writer) -> None:
    write(tmp_path, random_tensors())
    for shard in tmp_path.glob("*-of-00002.*"):
        shard.unlink()
    assert error(tmp_path).endswith(".index.json names it (and 1 more)")


@pytest.mark.parametrize("write", [write_sharded_safetensors, write_sharded_pickled])
def test_tensor_that_its_shard_lacks_is_named(tmp_path: Path, write: Writer) -> None:
    write(tmp_path, random_tensors())
    index = listing(tmp_path)
    content = json.loads(index.read_text())
    right = content["weight_map"][QKV]
    wrong = next(shard for shard in content["weight_map"].values() if shard != right)
    content["weight_map"][QKV] = wrong
    index.write_text(json.dumps(content))
    assert error(tmp_path) == f"{tmp_path / wrong}: tensor {QKV} is missing, although {index.name} places it here"


def test_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    shards = halves(random_tensors(), "model.safetensors")
    first, second = shards
    shards[second][QKV] = shards[first][QKV] = torch.ones(48, 16)
    for name, shard in shards.items():
        save_file(shard, tmp_path / name)
    write_index(tmp_path, "model.safetensors.index.json", shards)
    assert error(tmp_path) == f"{tmp_path / second}: tensor {QKV} is also in {first}"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"lm_head.weight": 3}}',
        '{"weight_map": {"lm_head.weight": "../elsewhere/model.safetensors"}}',
        '{"weight_map": {"lm_head.weight": "/etc/model.safetensors"}}',
    ],
)
def test_index_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    assert error(tmp_path).startswith(str(path))


def test_index_without_shards_misses_every_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {}}')
    assert error(tmp_path) == f"{path}: tensor model.embed_tokens.weight is missing (and 35 more)"


@every_format
@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, -1])
def test_truncated_file_is_named_with_its_size(tmp_path: Path, write: Writer, kept: float) -> None:
    write(tmp_path, random_tensors())
    path = max(tmp_path.glob("*model*[st0-9n]"), key=lambda path: path.suffix != ".json")
    size = path.stat().st_size
    kept = int(size * kept) if isinstance(kept, float) else kept % size
    os.truncate(path, kept)
    assert error(tmp_path).startswith(f"{path} is truncated or damaged ({kept:,} bytes; ")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"<html>404 Not Found</html>", bytes(4096), b"PK\x03\x04" + bytes(500)])
def test_file_of_something_else_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert error(tmp_path).startswith(f"{tmp_path / name} is ")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointer_is_recognized(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22\nsize 5\n"
    (tmp_path / name).write_text(pointer)
    assert "is a Git LFS pointer, not the weights: run `git lfs pull`" in error(tmp_path)


class CreatesFile:
    """Unpickled by an ordinary loader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], int], tuple[Path]]:
        return _create, (self.path,)


def _create(path: Path) -> int:
    return path.write_text("code has run")


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_code_is_refused_and_does_not_run(tmp_path: Path, new_format: bool) -> None:
    proof = tmp_path / "proof"
    contents = random_tensors() | {"evil": CreatesFile(proof)}
    path = tmp_path / "pytorch_model.bin"
    torch.save(contents, path, _use_new_zipfile_serialization=new_format)
    assert f"{path} is refused: it contains more than plain tensors" in error(tmp_path)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "the payload has to be one that works"


def test_plain_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(CreatesFile(proof), protocol=2))
    assert error(tmp_path).startswith(f"{path} is ")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list; expected tensors by name"),
        ({"model": {"lm_head.weight": torch.ones(1)}}, "holds a dict under 'model'; expected tensors by name"),
        ({3: torch.ones(1)}, "holds a Tensor under 3; expected tensors by name"),
    ],
)
def test_pickled_file_has_to_hold_tensors_by_name(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert error(tmp_path) == f"{tmp_path}/pytorch_model.bin {message}"


@every_format
def test_file_that_vanishes_after_it_was_checked_is_named(tmp_path: Path, write: Writer) -> None:
    write(tmp_path, random_tensors())
    checkpoint = Checkpoint.open(tmp_path, CONFIG)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file or directory"):
        list(checkpoint.tensors())


# Dummy weights.


def test_dummy_tensors_are_those_of_the_network() -> None:
    tensors = random_tensors(dtype=torch.bfloat16)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_shapes(CONFIG)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_large_dummy_tensors_have_no_two_rows_alike() -> None:
    config = replace(CONFIG, vocab_size=6000, hidden_size=256)
    table = next(tensor for name, tensor in dummy_tensors(config, torch.float32, "cpu", seed=1) if len(tensor) == 6000)
    assert table.numel() > 1 << 20
    assert len(table.unique(dim=0)) == 6000
    assert abs(table.std().item() - 0.02) < 1e-4


def test_dummy_tensors_follow_from_the_seed() -> None:
    assert_same(random_tensors(), random_tensors())
    other = dict(dummy_tensors(CONFIG, torch.float32, "cpu", seed=2**63 - 1))
    assert not any(torch.equal(tensor, other[name]) for name, tensor in random_tensors().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dummy_tensors_are_sane(dtype: torch.dtype) -> None:
    for name, tensor in dummy_tensors(replace(CONFIG, hidden_size=256), dtype, "cpu", seed=1):
        mean = 1.0 if name.endswith("layernorm.weight") else 0.0
        assert abs(tensor.float().mean() - mean) < 0.1, name
        assert 0.005 < tensor.float().std() < 0.2, name
