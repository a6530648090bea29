"""Images become the same patches and tokens as in Transformers' FuyuProcessor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from persimmon.model.images import ImageReader, ImageSettings
from tests.model.images import files

READER = ImageReader(ImageSettings())
QUESTION = "What is this?\n"

SIZES = {
    "one pixel": (1, 1),
    "one row": (1, 1920),
    "one column": (1080, 1),
    "one patch": (30, 30),
    "a pixel more than a patch": (31, 29),
    "a pixel less than a patch": (29, 31),
    "full patches": (60, 120),
    "odd": (347, 613),
    "the target": (1080, 1920),
    "a pixel higher than the target": (1081, 1920),
    "a pixel wider than the target": (1080, 1921),
    "a pixel smaller than the target": (1079, 1919),
    "twice the target": (2160, 3840),
    "high": (2500, 300),
    "wide": (300, 2500),
    "very high": (4000, 17),
    "very wide": (7, 4001),
    "high and wide": (1500, 2300),
}

# Transformers reads these rightly, where it gets the path of a file.
FILES: Mapping[str, bytes] = {
    **{f"PNG, {name}": files.file(files.image(*size), compress_level=1) for name, size in SIZES.items()},
    "JPEG": files.file(files.image(200, 333), "JPEG"),
    "large JPEG": files.file(files.image(1700, 2400), "JPEG"),
    "progressive JPEG": files.file(files.image(100, 100), "JPEG", progressive=True),
    "greyscale JPEG": files.file(files.image(71, 95, "L"), "JPEG"),
    "CMYK JPEG": files.file(files.image(64, 48, "CMYK"), "JPEG"),
    "several pictures in a JPEG": files.file(
        files.image(50, 70), "MPO", save_all=True, append_images=[files.image(50, 70, seed=1)]
    ),
    **{f"JPEG turned by {turn}": files.oriented(files.image(50, 110, seed=turn), turn) for turn in range(1, 9)},
    "large JPEG turned": files.oriented(files.image(900, 2500), 6),
    "lossy WebP": files.file(files.image(123, 77), "WEBP"),
    "lossless WebP": files.file(files.image(123, 77), "WEBP", lossless=True),
    "GIF": files.file(files.image(90, 45).quantize(64), "GIF"),
    "animated GIF": files.file(
        files.image(40, 45).quantize(64),
        "GIF",
        save_all=True,
        append_images=[files.image(40, 45, seed=1).quantize(64)],
    ),
    "greyscale PNG": files.file(files.image(50, 20, "L")),
    "PNG with a palette": files.file(files.image(50, 20).quantize(200)),
    "PNG with two colors": files.file(files.image(50, 20, "L").convert("1")),
}

# Of these it would show something else: it gets what is seen.
TRANSPARENT = {
    "PNG with alpha": files.image(100, 61, "RGBA"),
    "large PNG with alpha": files.image(1200, 1000, "RGBA"),
    "greyscale PNG with alpha": files.image(40, 95, "LA"),
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Any:
    """Transformers', without torchvision, which nothing else needs."""
    from transformers import FuyuProcessor, PreTrainedTokenizerFast
    from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tokenizer())
    return FuyuProcessor(image_processor=FuyuImageProcessorPil(), tokenizer=tokenizer)


def _tokenizer() -> Any:
    """Fuyu-8B's kind of vocabulary, in small."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    names = ["<unk>", "<s>", "|SPEAKER|", "|NEWLINE|", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokenizer = Tokenizer(models.Unigram([(name, 0.0) for name in names], unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>")])
    return tokenizer


def check(processor: Any, sent: bytes, reference: Any) -> None:
    """Asserts that the patches and tokens of a file are those that Transformers makes of a path or an image."""
    expected = processor(images=reference, text=QUESTION, return_tensors="pt")
    patches = READER.read(sent)
    pixels = np.frombuffer(b"".join(patches.pixels), np.uint8).reshape(-1, 2700)
    normalized = (pixels.astype(np.float64) / 255 - 0.5) / 0.5
    theirs = expected["image_patches"].numpy().reshape(-1, 2700)  # of one patch, they lack a dimension
    assert theirs.shape == normalized.shape
    assert np.abs(theirs - normalized).max() < 1e-6  # one step of a pixel is 0.008
    vocabulary = processor.tokenizer.get_vocab()
    token_ids = patches.token_ids(vocabulary["|SPEAKER|"], vocabulary["|NEWLINE|"])
    rest = processor.tokenizer(QUESTION + "<0x04>", add_special_tokens=False)["input_ids"]
    assert expected["input_ids"][0].tolist() == [*token_ids, vocabulary["<s>"], *rest]


@pytest.mark.parametrize("name", FILES)
def test_files_become_the_patches_and_tokens_that_transformers_makes(processor, tmp_path: Path, name: str):
    path = tmp_path / "image"
    path.write_bytes(FILES[name])
    check(processor, FILES[name], str(path))


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_images_become_those_of_what_is_seen(processor, name: str):
    picture = TRANSPARENT[name]
    transparent = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    check(processor, files.file(picture), Image.alpha_composite(white, transparent).convert("RGB"))


def test_the_scale_is_that_of_transformers(processor):
    picture = files.image(1500, 2300)
    expected = processor.image_processor(picture, return_tensors="pt")["image_scale_factors"]
    assert READER.read(files.file(picture, compress_level=1)).scale == pytest.approx(float(expected[0][0]), rel=1e-6)
