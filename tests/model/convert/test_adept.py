"""From Adept's layout to Hugging Face's: the network it was made of comes back; what does not fit is one line."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.convert import convert_checkpoint
from persimmon.model.errors import CheckpointError
from persimmon.model.tokenizer import Tokenizer
from tests.model.checkpoints import make_checkpoint
from tests.model.convert.adept_layout import WEIGHTS, as_tar, make_release


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint in Hugging Face layout, in the type of Adept's release."""
    folder = tmp_path_factory.mktemp("original")
    return make_checkpoint(folder, num_hidden_layers=2, num_attention_heads=4, dtype=torch.bfloat16)


def convert(source: Path, out: Path, dtype: str | None = None, max_shard_bytes: int = 10**9) -> Path:
    convert_checkpoint(
        str(source), out, layout="adept", dtype=dtype, max_shard_bytes=max_shard_bytes, print_line=lambda _: None
    )
    return out


def assert_same_tensors(out: Path, original: Path) -> None:
    expected = load_file(original / "model.safetensors")
    actual = dict(Checkpoint.open(out, PersimmonConfig.from_folder(out)).tensors())
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
        assert actual[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("packed", [True, False], ids=["tar", "folder"])
@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_network_comes_back(original, packed, new_format, ranks, tmp_path):
    source = make_release(original, tmp_path / "release", ranks=ranks, new_format=new_format)
    if packed:
        source = as_tar(source)
        shutil.rmtree(tmp_path / "release")
    out = convert(source, tmp_path / "out", max_shard_bytes=300_000)
    assert_same_tensors(out, original)


@pytest.mark.parametrize("ranks", [1, 2])
def test_transformers_loads_the_result_with_the_same_logits(original, ranks, tmp_path):
    from transformers import PersimmonForCausalLM

    out = convert(make_release(original, tmp_path / "release", ranks=ranks), tmp_path / "out")
    ids = torch.tensor([[5, 7, 1, 300, 42, 9, 9]])
    with torch.no_grad():
        expected, actual = (PersimmonForCausalLM.from_pretrained(folder)(ids).logits for folder in (original, out))
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


def test_the_config_is_the_original_ones(original, tmp_path):
    from transformers import AutoConfig

    out = convert(make_release(original, tmp_path / "release"), tmp_path / "out")
    assert PersimmonConfig.from_folder(out) == PersimmonConfig.from_folder(original)
    ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (out, original))
    for key in ("rope_parameters", "vocab_size", "eos_token_id", "dtype", "qk_layernorm", "tie_word_embeddings"):
        assert ours[key] == theirs[key], key
    # Versions of Transformers that know no rope_parameters read these.
    values = json.loads((out / "config.json").read_text())
    assert (values["rope_theta"], values["partial_rotary_factor"]) == (25000.0, 0.5)


def test_the_tokenizer_is_adepts_and_texts_begin_with_end_of_text(original, tmp_path):
    out = convert(make_release(original, tmp_path / "release"), tmp_path / "out")
    ours, theirs = Tokenizer.from_folder(out), Tokenizer.from_folder(original)
    assert ours.add_bos
    assert ours.encode("human: Hello\n\nadept:") == theirs.encode("human: Hello\n\nadept:")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == theirs.bos_token_id


def test_the_type_can_be_changed_on_the_way(original, tmp_path):
    out = convert(make_release(original, tmp_path / "release", ranks=2), tmp_path / "out", "float32")
    expected = load_file(original / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, expected[name].float())
    assert PersimmonConfig.from_folder(out).dtype == "float32"


@pytest.mark.parametrize(
    "part", ["iter_0001000", "iter_0001000/mp_rank_00", "."], ids=["iteration", "rank", "whole release"]
)
def test_any_folder_above_the_weights_can_be_named(original, part, tmp_path):
    release = make_release(original, tmp_path / "release")
    shutil.copyfile(release / "adept_vocab.model", release / "iter_0001000" / "adept_vocab.model")
    assert_same_tensors(convert(release / part, tmp_path / "out"), original)


def test_a_vocabulary_beside_the_tar_is_found(original, tmp_path):
    release = make_release(original, tmp_path / "release")
    shutil.move(release / "adept_vocab.model", tmp_path / "adept_vocab.model")
    assert_same_tensors(convert(as_tar(release), tmp_path / "out"), original)


def test_of_several_iterations_the_latest_is_taken(original, tmp_path):
    other = make_checkpoint(
        tmp_path / "other", seed=1, num_hidden_layers=2, num_attention_heads=4, dtype=torch.bfloat16
    )
    release = make_release(other, tmp_path / "release", iteration=2000)
    make_release(original, release, iteration=1000)
    assert_same_tensors(convert(as_tar(release), tmp_path / "out"), original)


def test_without_args_the_shapes_say_what_the_network_is(original, tmp_path):
    out = convert(make_release(original, tmp_path / "release", with_args=False), tmp_path / "out")
    config, expected = PersimmonConfig.from_folder(out), PersimmonConfig.from_folder(original)
    assert (config.num_attention_heads, config.num_hidden_layers) == (4, 2)
    assert (config.rope_theta, config.partial_rotary_factor) == (25000.0, 0.5)
    assert config.max_position_embeddings == 16384
    assert config.intermediate_size == expected.intermediate_size
    assert_same_tensors(out, original)


def test_stored_rotary_frequencies_are_left_out(original, tmp_path):
    release = make_release(original, tmp_path / "release", ranks=2, with_rotary_frequencies=True)
    assert_same_tensors(convert(release, tmp_path / "out"), original)


def test_without_a_head_of_its_own_the_embeddings_are_tied(tmp_path):
    tied = make_checkpoint(tmp_path / "tied", num_hidden_layers=1, tie_word_embeddings=True, dtype=torch.bfloat16)
    out = convert(make_release(tied, tmp_path / "release"), tmp_path / "out")
    assert PersimmonConfig.from_folder(out).tie_word_embeddings
    assert_same_tensors(out, tied)


def test_without_norms_of_queries_and_keys_the_args_give_the_heads(tmp_path):
    plain = make_checkpoint(tmp_path / "plain", num_hidden_layers=1, qk_layernorm=False, dtype=torch.bfloat16)
    out = convert(make_release(plain, tmp_path / "release", ranks=2), tmp_path / "out")
    assert PersimmonConfig.from_folder(out) == PersimmonConfig.from_folder(plain)
    assert_same_tensors(out, plain)
    with pytest.raises(CheckpointError, match="number of heads is unknown"):
        convert(make_release(plain, tmp_path / "no args", with_args=False), tmp_path / "other")


def test_a_conversion_of_a_tar_goes_on_where_it_was(original, tmp_path):
    source = as_tar(make_release(original, tmp_path / "release", ranks=2))
    out = convert(source, tmp_path / "whole", max_shard_bytes=300_000)
    # What an interrupted run leaves: its marker, and the shards that were complete.
    part = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        from persimmon.model.convert import writer

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(writer, "_write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, part, max_shard_bytes=300_000)
    first = min(out.glob("*.safetensors"))
    shutil.copyfile(first, part / first.name)
    kept = (part / first.name).stat().st_mtime_ns
    assert_same_tensors(convert(source, part, max_shard_bytes=300_000), original)
    assert (part / first.name).stat().st_mtime_ns == kept


class Malicious:
    """Pickles as a call of os.system."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_nothing_in_a_release_is_executed(original, new_format, tmp_path):
    target = tmp_path / "executed"
    release = make_release(original, tmp_path / "release", new_format=new_format, extra=Malicious(target))
    out = convert(as_tar(release), tmp_path / "out")
    assert_same_tensors(out, original)
    assert not target.exists()
    with pytest.raises((ModuleNotFoundError, pickle.UnpicklingError)):  # torch would have needed Adept's own classes
        torch.load(release / "iter_0001000" / "mp_rank_00" / WEIGHTS, weights_only=False)


def rewrite(release: Path, change: Any, rank: int = 0) -> Path:
    path = release / "iter_0001000" / f"mp_rank_{rank:02d}" / WEIGHTS
    contents = torch.load(path, weights_only=False)
    change(contents)
    torch.save(contents, path)
    return release


def encoder(contents: Any) -> Any:
    return contents["model"]["language_model"]["encoder"]


def set_norm(contents: Any) -> None:
    encoder(contents)["layers.1.self_attention.q_layernorm.bias"] += 1


def set_row_parallel_bias(contents: Any) -> None:
    encoder(contents)["layers.1.mlp.dense_4h_to_h.bias"] += 1


def drop_tensor(contents: Any) -> None:
    del encoder(contents)["layers.1.mlp.dense_h_to_4h.bias"]


def change_shape(contents: Any) -> None:
    encoder(contents)["layers.1.mlp.dense_h_to_4h.bias"] = torch.zeros(7, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (set_norm, r"self_attn\.q_layernorm\.bias differs from the first rank's"),
        (set_row_parallel_bias, r"dense_4h_to_h\.bias differs from the first rank's"),
        (drop_tensor, r"dense_h_to_4h\.bias is missing either here or in the first rank"),
        (change_shape, r"dense_h_to_4h\.bias is \[7\]"),
    ],
)
def test_ranks_that_do_not_fit_together_are_refused(original, change, named, tmp_path):
    release = make_release(original, tmp_path / "release", ranks=2, model_type=None)
    with pytest.raises(CheckpointError, match=named) as raised:
        convert(rewrite(release, change, rank=1), tmp_path / "out")
    assert "mp_rank_01" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def add_position_embeddings(contents: Any) -> None:
    contents["model"]["language_model"]["embedding"]["position_embeddings"] = {"weight": torch.zeros(2, 2)}


def drop_embedding(contents: Any) -> None:
    del contents["model"]["language_model"]["embedding"]


def drop_layer(contents: Any) -> None:
    for key in [key for key in encoder(contents) if key.startswith("layers.0.")]:
        del encoder(contents)[key]


def not_a_tensor(contents: Any) -> None:
    encoder(contents)["layers.0.extra"] = "text"


def no_model(contents: Any) -> None:
    del contents["model"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (add_position_embeddings, r"language_model\.embedding\.position_embeddings\.weight is unexpected"),
        (drop_embedding, r"model\.embed_tokens\.weight.* is missing"),
        (drop_layer, r"model\.layers\.0\..* is missing"),
        (drop_tensor, r"model\.layers\.1\.mlp\.dense_h_to_4h\.bias is missing"),
        (not_a_tensor, r"layers\.0\.extra is a str; expected a tensor"),
        (no_model, r"no tensors under the key 'model'"),
    ],
)
def test_a_file_of_another_network_is_one_line_with_its_key(original, change, named, tmp_path):
    release = make_release(original, tmp_path / "release", model_type=None)
    with pytest.raises(CheckpointError, match=named) as raised:
        convert(rewrite(release, change), tmp_path / "out")
    assert WEIGHTS in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("pos_emb", "learned"),
        ("sq_relu", False),
        ("qk_layernorm", "weights_per_attention_head_and_layer"),
        ("num_layers", 36),
        ("hidden_size", 4096),
        ("num_attention_heads", 64),
        ("padded_vocab_size", 262144),
        ("rotary_pct", 7),
        ("rotary_emb_base", "many"),
        ("layernorm_epsilon", -1.0),
        ("tensor_model_parallel_size", 8),
        ("untie_embeddings", False),
    ],
)
def test_args_that_contradict_the_tensors_are_refused(original, setting, value, tmp_path):
    release = make_release(original, tmp_path / "release", **{setting: value})
    with pytest.raises(CheckpointError) as raised:
        convert(release, tmp_path / "out")
    assert "\n" not in str(raised.value)


def pipeline(release: Path) -> Path:
    (release / "iter_0001000" / "mp_rank_00").rename(release / "iter_0001000" / "mp_rank_00_000")
    return release


def missing_rank(release: Path) -> Path:
    (release / "iter_0001000" / "mp_rank_00").rename(release / "iter_0001000" / "mp_rank_01")
    return release


def no_vocabulary(release: Path) -> Path:
    (release / "adept_vocab.model").unlink()
    return release


def damaged_vocabulary(release: Path) -> Path:
    (release / "adept_vocab.model").write_bytes(b"\xff" * 100)
    return release


def empty(release: Path) -> Path:
    shutil.rmtree(release / "iter_0001000")
    return release


def compressed(release: Path) -> Path:
    return as_tar(release, "w:gz")


def truncated(release: Path) -> Path:
    path = as_tar(release)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    return path


def absent(release: Path) -> Path:
    return release / "nothing-here"


def several(release: Path) -> Path:
    shutil.copytree(release / "iter_0001000", release / "iter_0002000")
    (release / "latest_checkpointed_iteration.txt").unlink()
    return release


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (pipeline, "pipeline"),
        (missing_rank, r"ranks are missing; found only \[1\]"),
        (no_vocabulary, r"no adept_vocab\.model"),
        (damaged_vocabulary, r"adept_vocab\.model.*not a SentencePiece model"),
        (empty, "mp_rank_00/model_optim_rng.pt"),
        (compressed, "tar -xf"),
        (truncated, r"release\.tar"),
        (absent, "nothing-here"),
        (several, "several checkpoints"),
    ],
)
def test_a_release_that_is_not_whole_is_one_line(original, damage, named, tmp_path):
    source = damage(make_release(original, tmp_path / "release"))
    with pytest.raises(CheckpointError, match=named) as raised:
        convert(source, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
