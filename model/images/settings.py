"""ImageSettings: how a checkpoint wants images prepared, read from its files and checked.

Knows the keys of Transformers' FuyuImageProcessor, and decodes nothing.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persimmon.model.config import VisionConfig
from persimmon.model.json_object import JsonObject

PROCESSOR_FILE = "processor_config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"

_PROCESSORS = ("FuyuImageProcessor", "FuyuImageProcessorFast")
_BILINEAR = 2


@dataclass(frozen=True)
class ImageSettings:
    """What of the preparation differs between checkpoints.  The defaults are Fuyu-8B's.

    Attributes:
        patch_size: height and width of a patch, in pixels.
        max_height: of an image, in pixels; a higher one is made smaller.
        max_width: of an image, in pixels.
        padding_value: of the pixels that fill the last patches up, 0 to 255.
    """

    patch_size: int = 30
    max_height: int = 1080
    max_width: int = 1920
    padding_value: int = 1

    @classmethod
    def from_folder(cls, folder: Path, vision: VisionConfig) -> "ImageSettings":
        """Reads "image_processor" of processor_config.json, or else preprocessor_config.json, as Transformers does.

        Args:
            folder: a checkpoint.  Both files are optional, as are all their keys.
            vision: what its config.json says of patches.

        Raises:
            CheckpointError: a file is damaged, or asks for a preparation that is not Fuyu's.
        """
        file = _image_processor(folder)
        kind = file.text("image_processor_type")
        if kind is not None and kind not in _PROCESSORS:
            raise file.error("image_processor_type", f"one of {', '.join(_PROCESSORS)}")
        _check_fixed(file)
        patch_size = vision.patch_size
        height, width = _sides(file, "patch_size", (patch_size, patch_size))
        if not height == width == patch_size:
            raise file.error("patch_size", f"height and width {patch_size}, the patch_size in config.json")
        max_height, max_width = _sides(file, "size", (cls.max_height, cls.max_width))
        if max_height % patch_size or max_width % patch_size:
            raise file.error("size", f"multiples of the patch size {patch_size}")
        return cls(patch_size, max_height=max_height, max_width=max_width, padding_value=_padding_value(file))


def _image_processor(folder: Path) -> JsonObject:
    if (processor := JsonObject.read(folder / PROCESSOR_FILE)) is not None:
        nested = processor.table("image_processor")
        if nested is not None:
            return nested
    return JsonObject.read(folder / PREPROCESSOR_FILE) or JsonObject(folder / PREPROCESSOR_FILE, {})


def _check_fixed(file: JsonObject) -> None:
    """Raises CheckpointError where a key asks for anything but what is always done."""
    for key in ("do_resize", "do_pad", "do_rescale", "do_normalize"):
        if not file.flag(key, default=True):
            raise file.error(key, "true")
    if file.text("padding_mode") not in (None, "constant"):
        raise file.error("padding_mode", "'constant'")
    if file.values.get("resample") not in (None, _BILINEAR):
        raise file.error("resample", f"{_BILINEAR}, bilinear")
    scale = file.positive_number("rescale_factor")
    if scale is not None and not math.isclose(scale, 1 / 255, rel_tol=1e-6):
        raise file.error("rescale_factor", "1/255")
    for key in ("image_mean", "image_std"):
        value = file.values.get(key)
        if value not in (None, 0.5, [0.5, 0.5, 0.5]):
            raise file.error(key, "0.5 for all channels")


def _sides(file: JsonObject, key: str, default: tuple[int, int]) -> tuple[int, int]:
    """The height and width that a key holds."""
    table = file.table(key)
    return default if table is None else (table.positive_integer("height"), table.positive_integer("width"))


def _padding_value(file: JsonObject) -> int:
    value: Any = file.values.get("padding_value")
    if value is None:
        return ImageSettings.padding_value
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(256):
        raise file.error("padding_value", "a whole number from 0 to 255")
    return int(value)
