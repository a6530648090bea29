"""Checkpoints that read images: both spellings of their tensors, and what is made of them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.model.checkpoint import Checkpoint, dummy_parameters, expected_shapes
from persimmon.model.config import PersimmonConfig
from persimmon.model.convert import QuantizationRequest, convert_checkpoint
from persimmon.model.errors import CheckpointError
from persimmon.model.quantization.scheme import quantized_formats
from persimmon.model.tensor_names import PATCH_PROJECTION, stored_name
from persimmon.model.vocabulary import VOCABULARY_FILE, VocabularyMap
from tests.engine_harness import load_model, poisoned_cache, runner_of
from tests.fuyu import (
    BOS,
    SPECIAL_TOKENS,
    ImagePrompt,
    load_transformers,
    make_fuyu,
    random_image,
    transformers_logits,
    with_module_names,
)
from tests.model.checkpoints import DEMO, DEMO_END_OF_TEXT, DEMO_VOCAB_SIZE
from tests.model.convert.placeholders import Piece, tokenizer_model
from tests.model.test_patches import part

PATCH = 4 * 4 * 3
PROMPT = ImagePrompt.of([7, 8], random_image(2, 3, 1, PATCH), [BOS, 9, 10])
PATCH_WEIGHT = f"{PATCH_PROJECTION}.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fuyu(tmp_path_factory.mktemp("fuyu"), patch_size=4)


@pytest.fixture(scope="module")
def renamed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_module_names(checkpoint, tmp_path_factory.mktemp("renamed") / "fuyu")


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, PersimmonConfig.from_folder(folder))


def logits(folder: Path, prompt: ImagePrompt = PROMPT) -> torch.Tensor:
    model = load_model(folder)
    return runner_of(model, poisoned_cache(model, 4, 16)).logits([part(prompt, 0, len(prompt.token_ids), range(4))])[0]


def convert(source: Path, out: Path, **options: object) -> Path:
    settings = {"layout": "hugging_face", "dtype": None, "max_shard_bytes": 10**9, "print_line": lambda line: None}
    convert_checkpoint(str(source), out, **settings | options)  # type: ignore[arg-type]
    return out


def test_shapes_are_those_of_transformers(checkpoint: Path) -> None:
    config = PersimmonConfig.from_folder(checkpoint)
    shapes = {stored_name(name, config): shape for name, shape in expected_shapes(config).items()}
    assert shapes == {name: own.shape for name, own in load_file(checkpoint / "model.safetensors").items()}


def test_both_spellings_are_the_same_parameters(checkpoint: Path, renamed: Path, tmp_path: Path) -> None:
    sharded = make_fuyu(tmp_path / "sharded", patch_size=4, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    new, *others = (dict(opened(folder).parameters()) for folder in (checkpoint, renamed, sharded))
    for other in others:
        assert other.keys() == new.keys()
        assert all(torch.equal(other[name], new[name]) for name in new)  # type: ignore[arg-type]


def test_transformers_reads_the_other_spelling_as_the_server_does(renamed: Path) -> None:
    expected = transformers_logits(load_transformers(renamed), PROMPT)[-1]
    torch.testing.assert_close(logits(renamed), expected, rtol=0, atol=1e-4)


def test_a_missing_tensor_is_named_as_in_files(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    del tensors["language_model.model.layers.0.mlp.dense_h_to_4h.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"tensor language_model.model.layers.0.mlp.dense_h_to_4h.bias is missing$"
    ):
        opened(folder)


def test_a_tensor_in_both_spellings_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.vision_embed_tokens.bias"] = tensors["vision_embed_tokens.bias"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"vision_embed_tokens.bias is there twice, under two spellings"):
        opened(folder)


def test_a_projection_of_patches_in_fewer_bits_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    rows = len(tensors["vision_embed_tokens.weight"])
    tensors["vision_embed_tokens.weight"] = torch.ones(rows, PATCH, dtype=torch.int8)
    tensors["vision_embed_tokens.weight_scale"] = torch.ones(rows, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["model.vision_embed_tokens"], "weights": weights}
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = settings | {"config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="vision_embed_tokens is quantized; expected its weight in float32"):
        opened(folder)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_projection_of_patches_stays_as_it_is_under_quantization(checkpoint: Path, quantization: str) -> None:
    config = PersimmonConfig.from_folder(checkpoint)
    formats = quantized_formats(config, quantization)  # type: ignore[arg-type]
    parameters = dict(opened(checkpoint).parameters(formats))
    assert isinstance(parameters["lm_head.weight"], QuantizedMatrix)
    assert isinstance(parameters["model.layers.0.mlp.dense_h_to_4h.weight"], QuantizedMatrix)
    assert isinstance(parameters[PATCH_WEIGHT], torch.Tensor)


def test_dummies_have_one_too(checkpoint: Path) -> None:
    config = PersimmonConfig.from_folder(checkpoint)
    formats = {"model.layers.0.mlp.dense_h_to_4h.weight": QuantizedFormat(8, None, torch.bfloat16)}
    made = {name: tuple(own.shape) for name, own in dummy_parameters(config, torch.float32, "cpu", 0, formats)}
    assert made == expected_shapes(config)


def test_what_is_converted_is_read_by_transformers_and_the_server(
    checkpoint: Path, renamed: Path, tmp_path: Path
) -> None:
    out = convert(renamed, tmp_path / "out", dtype="bfloat16", max_shard_bytes=200_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    assert (out / "preprocessor_config.json").exists()
    written = {name for path in out.glob("*.safetensors") for name in load_file(path)}
    assert written == set(load_file(checkpoint / "model.safetensors"))
    expected = transformers_logits(load_transformers(out), PROMPT)[-1]
    assert PersimmonConfig.from_folder(out).dtype == "bfloat16"
    torch.testing.assert_close(logits(out), expected, rtol=0, atol=1e-4)


def test_what_is_converted_to_fewer_bits_names_modules_as_transformers_does(renamed: Path, tmp_path: Path) -> None:
    out = convert(renamed, tmp_path / "out", quantization=QuantizationRequest("int4", vocabulary=True))
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["ignore"] == ["model.vision_embed_tokens"]
    targets = [target for group in settings["config_groups"].values() for target in group["targets"]]
    assert sorted(targets) == ["Linear", "lm_head", "model.language_model.embed_tokens"]
    checkpoint = opened(out)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= checkpoint.matrices.keys()
    assert PATCH_WEIGHT in checkpoint.names.values()
    assert torch.isfinite(logits(out)).all()


def test_a_trimmed_vocabulary_keeps_what_images_are_made_of(checkpoint: Path, tmp_path: Path) -> None:
    """Forty-eight unused ids, then the demo's, then those of images, of which the files do not name all."""
    unused, folder = 48, shutil.copytree(checkpoint, tmp_path / "whole")
    tensors = load_file(folder / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        rows = tensors[name]
        tensors[name] = torch.cat([rows[:1], torch.zeros(unused, rows.shape[1]), rows[1:]])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    pieces = tokenizer_model(unused, Piece.CONTROL)
    pieces.pieces.extend(Piece(piece=name, score=0, type=Piece.CONTROL) for name in SPECIAL_TOKENS)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(pieces.SerializeToString())
    shutil.copyfile(DEMO / "tokenizer_config.json", folder / "tokenizer_config.json")
    values = json.loads((folder / "config.json").read_text())
    ends = {"bos_token_id": BOS + unused, "eos_token_id": DEMO_END_OF_TEXT + unused}
    for place in (values, values["text_config"]):
        place |= {"vocab_size": place["vocab_size"] + unused, **ends}
    values["image_token_id"] += unused
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text(json.dumps(ends))
    out = convert(folder, tmp_path / "trimmed", trim_vocab=True)
    config = PersimmonConfig.from_folder(out)
    assert config.vocab_size == DEMO_VOCAB_SIZE + 16
    vocabulary = VocabularyMap.from_folder(out, config)
    assert vocabulary is not None
    assert vocabulary.original(config) == PersimmonConfig.from_folder(folder)
    assert vocabulary.trimmed(vocabulary.original(config)) == config
    assert (out / VOCABULARY_FILE).exists()
    assert all(vocabulary.kept(own + unused) for own in SPECIAL_TOKENS.values())
    ids = [token_id + unused for token_id in PROMPT.token_ids]
    whole, rows = (ImagePrompt(own, PROMPT.spans, PROMPT.pixels) for own in (ids, vocabulary.to_rows(ids)))
    kept = torch.tensor(vocabulary.ids)
    torch.testing.assert_close(logits(out, rows), logits(folder, whole)[kept])
    expected = transformers_logits(load_transformers(out), rows)[-1]
    torch.testing.assert_close(logits(out, rows), expected, rtol=0, atol=1e-4)


def test_a_network_without_images_has_no_projection(checkpoint: Path) -> None:
    config = PersimmonConfig.from_folder(checkpoint)
    shapes = expected_shapes(config)
    text_only = expected_shapes(replace(config, vision=None))
    assert shapes.keys() - text_only.keys() == {PATCH_WEIGHT, f"{PATCH_PROJECTION}.bias"}
