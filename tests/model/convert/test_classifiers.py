"""Classifiers keep their head and labels when they are converted, and Transformers' scores with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from persimmon.model.config import PersimmonConfig
from persimmon.model.convert import convert_checkpoint
from persimmon.model.errors import CheckpointError
from tests.model.checkpoints import make_checkpoint

ARCHITECTURES = ["PersimmonForSequenceClassification", "PersimmonForTokenClassification"]
LABELS = {0: "bad", 1: "good", 2: "odd"}


def convert(source: Path, out: Path, dtype: str | None = None) -> None:
    convert_checkpoint(
        str(source), out, layout="hugging_face", dtype=dtype, max_shard_bytes=400_000, print_line=lambda _: None
    )


@pytest.fixture(params=ARCHITECTURES)
def pickled(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A classifier in pytorch_model.bin."""
    original = make_checkpoint(
        tmp_path / "original", num_hidden_layers=1, architecture=request.param, settings={"id2label": LABELS}
    )
    folder = tmp_path / "in"
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(original / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def transformers_scores(folder: Path) -> torch.Tensor:
    import transformers  # takes seconds

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model: Any = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        scores: torch.Tensor = model(torch.tensor([[5, 7, 1, 300, 42]])).logits
    return scores


def test_converted_classifier_has_the_same_scores_in_transformers(pickled: Path, tmp_path: Path) -> None:
    convert(pickled, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert torch.equal(transformers_scores(tmp_path / "out"), transformers_scores(pickled.parent / "original"))


def test_converted_classifier_is_the_same_network_in_another_type(pickled: Path, tmp_path: Path) -> None:
    convert(pickled, tmp_path / "out", "bfloat16")
    before, after = PersimmonConfig.from_folder(pickled), PersimmonConfig.from_folder(tmp_path / "out")
    assert (before.dtype, after.dtype) == ("float32", "bfloat16")
    assert (after.architecture, after.labels) == (before.architecture, ("bad", "good", "odd"))
    torch.testing.assert_close(
        transformers_scores(tmp_path / "out"), transformers_scores(pickled.parent / "original"), rtol=0, atol=0.2
    )


def test_classifier_without_its_head_is_refused(pickled: Path, tmp_path: Path) -> None:
    tensors = torch.load(pickled / "pytorch_model.bin")
    del tensors["score.weight"]
    torch.save(tensors, pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"tensor score\.weight is missing"):
        convert(pickled, tmp_path / "out")
