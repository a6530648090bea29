"""Tensors that config.json does not ask for: used or ignored as in Transformers, and reported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.convert import convert_checkpoint
from persimmon.model.errors import CheckpointError
from tests.model.checkpoints import make_checkpoint
from tests.model.transformers_reference import load

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], None]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BUFFERS = ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq")


def equal_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def other_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()


def head_only(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def rotary_buffers(tensors: Tensors) -> None:
    tensors.update({name: torch.full((4,), 7.0) for name in BUFFERS})


CHANGES: dict[Change, str] = {
    equal_head: "lm_head.weight is ignored: it equals the embedding",
    other_head: "lm_head.weight is used: it differs from the embedding",
    head_only: "lm_head.weight is also used as the embedding",
    rotary_buffers: "rotary_emb.inv_freq (and 1 more) is ignored",
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("tied"),
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        tie_word_embeddings=True,
    )


def changed(folder: Path, out: Path, change: Change, kind: str) -> Path:
    """A copy with other tensors: in safetensors, in safetensors with an index, or pickled."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    out.mkdir()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, out)
    if kind == "safetensors":
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
    elif kind == "pickled":
        torch.save(tensors, out / "pytorch_model.bin")
    else:
        shards = {f"model-0000{part + 1}-of-00002.safetensors": sorted(tensors)[part::2] for part in range(2)}
        for shard, names in shards.items():
            save_file({name: tensors[name] for name in names}, out / shard, {"format": "pt"})
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        (out / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        )
    return out


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, PersimmonConfig.from_folder(folder))


def assert_as_in_transformers(folder: Path) -> None:
    theirs = dict(load(folder).named_parameters())
    checkpoint = opened(folder)
    ours = dict(checkpoint.tensors())
    if checkpoint.config.tie_word_embeddings:
        assert HEAD not in ours
        assert HEAD not in theirs
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("kind", ["safetensors", "shards", "pickled"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_network_is_the_one_that_transformers_loads(tied: Path, tmp_path: Path, change: Change, kind: str) -> None:
    folder = changed(tied, tmp_path / "changed", change, kind)
    assert_as_in_transformers(folder)
    (note,) = opened(folder).notes
    assert CHANGES[change] in note


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_converted_is_the_network_that_transformers_loads(tied: Path, tmp_path: Path, change: Change) -> None:
    folder = changed(tied, tmp_path / "changed", change, "pickled")
    lines: list[str] = []
    out = tmp_path / "out"
    convert_checkpoint(
        str(folder), out, layout="hugging_face", dtype=None, max_shard_bytes=10**9, print_line=lines.append
    )
    assert sum(CHANGES[change] in line for line in lines) == 1
    assert_as_in_transformers(out)
    assert opened(out).notes == ()
    theirs, ours = load(folder), load(out)
    ids = torch.tensor([[5, 7, 1, 33, 42]])
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_a_checkpoint_without_leftovers_has_no_notes(tied: Path) -> None:
    assert opened(tied).notes == ()


def test_a_head_in_another_type_is_compared_by_its_numbers(tied: Path, tmp_path: Path) -> None:
    def wider(tensors: Tensors) -> None:
        tensors[EMBEDDING] = tensors[EMBEDDING].half()
        tensors[HEAD] = tensors[EMBEDDING].float()

    def wider_and_other(tensors: Tensors) -> None:
        wider(tensors)
        tensors[HEAD][0, 0] += 1

    assert opened(changed(tied, tmp_path / "same", wider, "safetensors")).config.tie_word_embeddings
    assert not opened(changed(tied, tmp_path / "other", wider_and_other, "safetensors")).config.tie_word_embeddings


def test_a_head_of_another_shape_is_refused(tied: Path, tmp_path: Path) -> None:
    def smaller(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING][:8].clone()

    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \[8, 32\], config.json needs \[64, 32\]"):
        opened(changed(tied, tmp_path / "changed", smaller, "safetensors"))


def test_a_classifier_has_no_use_for_a_head(tmp_path: Path) -> None:
    classifier = make_checkpoint(
        tmp_path / "classifier",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        architecture="PersimmonForSequenceClassification",
    )
    folder = changed(classifier, tmp_path / "changed", equal_head, "safetensors")
    assert opened(folder).notes == ("lm_head.weight is ignored: PersimmonForSequenceClassification does not use it",)
    assert opened(folder).names.keys() == opened(classifier).names.keys()
