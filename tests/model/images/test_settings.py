"""How images are to be prepared, as a checkpoint's files say it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from persimmon.model.config import VisionConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.images import ImageSettings

# As Transformers writes it.
FUYU: dict[str, Any] = {
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": 0.5,
    "image_processor_type": "FuyuImageProcessor",
    "image_std": 0.5,
    "padding_mode": "constant",
    "padding_value": 1.0,
    "patch_size": {"height": 30, "width": 30},
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 1080, "width": 1920},
}


def settings_of(folder: Path, content: object, name: str = "preprocessor_config.json", **vision: int) -> ImageSettings:
    (folder / name).write_text(json.dumps(content))
    return ImageSettings.from_folder(folder, VisionConfig(**vision))


def test_without_files_the_settings_are_those_of_fuyu(tmp_path):
    expected = ImageSettings(patch_size=30, max_height=1080, max_width=1920, padding_value=1)
    assert ImageSettings.from_folder(tmp_path, VisionConfig()) == expected
    assert settings_of(tmp_path, FUYU) == expected
    assert settings_of(tmp_path, {"size": None}) == expected


def test_size_patches_and_padding_are_read(tmp_path):
    content = FUYU | {
        "patch_size": {"height": 16, "width": 16},
        "size": {"height": 160, "width": 320},
        "padding_value": 0,
        "image_mean": [0.5, 0.5, 0.5],
    }
    expected = ImageSettings(patch_size=16, max_height=160, max_width=320, padding_value=0)
    assert settings_of(tmp_path, content, patch_size=16) == expected


def test_the_part_of_processor_config_counts_first(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_pad": False}))
    nested = {"image_processor": {"size": {"height": 60, "width": 90}}}
    assert settings_of(tmp_path, nested, "processor_config.json").max_width == 90
    with pytest.raises(CheckpointError, match="do_pad"):
        settings_of(tmp_path, {"processor_class": "FuyuProcessor"}, "processor_config.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_processor_type", "ViTImageProcessor", "expected one of FuyuImageProcessor, FuyuImageProcessorFast"),
        ("do_resize", False, "do_resize is False; expected true"),
        ("do_pad", False, "do_pad is False; expected true"),
        ("do_rescale", False, "do_rescale is False; expected true"),
        ("do_normalize", "yes", "do_normalize is 'yes'; expected true or false"),
        ("padding_mode", "reflect", "padding_mode is 'reflect'; expected 'constant'"),
        ("padding_value", 0.5, "padding_value is 0.5; expected a whole number from 0 to 255"),
        ("padding_value", 256, "padding_value is 256; expected a whole number from 0 to 255"),
        ("resample", 3, "resample is 3; expected 2, bilinear"),
        ("rescale_factor", 1.0, "rescale_factor is 1.0; expected 1/255"),
        ("image_mean", [0.4, 0.5, 0.5], "image_mean is [0.4, 0.5, 0.5]; expected 0.5 for all channels"),
        ("image_std", 1, "image_std is 1; expected 0.5 for all channels"),
        ("patch_size", {"height": 30, "width": 15}, "expected height and width 30, the patch_size in config.json"),
        ("patch_size", 30, "patch_size is 30; expected an object"),
        ("size", {"height": 1080}, "size.width is missing"),
        ("size", {"height": 1000, "width": 1920}, "expected multiples of the patch size 30"),
    ],
)
def test_another_preparation_is_refused_by_name(tmp_path, key: str, value: object, message: str):
    with pytest.raises(CheckpointError, match=re.escape(message)) as raised:
        settings_of(tmp_path, FUYU | {key: value})
    assert str(tmp_path / "preprocessor_config.json") in str(raised.value)
