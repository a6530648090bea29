"""What is seen of images, where Transformers' processor shows something else, and which images are refused."""

import hashlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from persimmon.model.images import ImageError, ImageLimits, ImagePatches, ImageReader, ImageSettings, decoding
from tests.model.images import files

# Pillow's, of damaged EXIF data; pytest undoes what the server does about them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

READER = ImageReader(ImageSettings())
WHITE = 255


def seen(patches: ImagePatches, size: int = 30) -> np.ndarray:
    """The image that patches show, uint8 [height, width, 3], without its padding."""
    rows = np.stack([np.frombuffer(row, np.uint8).reshape(-1, size, size, 3) for row in patches.pixels])
    whole = rows.swapaxes(1, 2).reshape(patches.rows * size, patches.columns * size, 3)
    return whole[: patches.height, : patches.width]


def read(data: bytes) -> np.ndarray:
    return seen(READER.read(data))


def test_an_image_becomes_rows_of_patches_that_are_filled_up_at_the_right_and_below():
    pixels = files.noise(65, 40, 3)
    patches = READER.read(files.file(Image.fromarray(pixels)))
    assert (patches.rows, patches.columns, patches.height, patches.width, patches.scale) == (3, 2, 65, 40, 1.0)
    assert [len(row) for row in patches.pixels] == [2 * 2700] * 3
    full = np.full((90, 60, 3), 1, np.uint8)  # not 255: see docs/design/images.md
    full[:65, :40] = pixels
    second_of_first_row = patches.pixels[0][2700:]
    assert second_of_first_row == full[:30, 30:].tobytes()
    assert patches.pixels[2][:2700] == full[60:, :30].tobytes()


def test_patches_know_their_tokens_and_digests():
    patches = READER.read(files.file(files.image(65, 40)))
    assert patches.num_tokens == 9
    assert patches.token_ids(image_token_id=7, newline_id=9) == [7, 7, 9] * 3
    assert patches.digests == tuple(hashlib.blake2b(row, digest_size=16).digest() for row in patches.pixels)
    assert len(set(patches.digests)) == 3


def test_another_file_with_the_same_pixels_has_the_same_digests():
    picture = files.image(40, 70)
    assert READER.read(files.file(picture)).digests == READER.read(files.file(picture, "WEBP", lossless=True)).digests


def test_a_large_image_is_resized_to_fit_and_says_by_how_much():
    patches = READER.read(files.file(files.image(2160, 1000, "L")))
    assert (patches.rows, patches.columns) == (36, 17)
    assert (patches.height, patches.width, patches.scale) == (2160, 1000, 0.5)


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    decoded = []

    in_rgb = decoding._in_rgb

    def recorded(image: Image.Image) -> Image.Image:
        decoded.append(image.size)
        return in_rgb(image)

    monkeypatch.setattr(decoding, "_in_rgb", recorded)
    monkeypatch.setattr(decoding, "_LARGE_PIXELS", 1000)
    large, small = files.file(files.image(40, 30)), files.file(files.image(20, 30))
    with ThreadPoolExecutor(2) as threads:
        with decoding._decoding_large:
            first = threads.submit(READER.read, large)
            threads.submit(READER.read, small).result()
            assert (30, 20) in decoded
            assert (30, 40) not in decoded
        assert first.result().num_tokens == 4
    assert (30, 40) in decoded


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_transparent_parts_are_white(mode: str, kind: str):
    picture = files.image(33, 45, mode)
    data = files.file(picture, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    rgba = np.asarray(picture.convert("RGBA")).astype(int)
    color, alpha = rgba[..., :3], rgba[..., 3:]
    expected = (color * alpha + WHITE * (255 - alpha)) / 255
    assert np.abs(read(data) - expected).max() <= 0.51
    assert alpha.min() < 50 < 200 < alpha.max()


def test_the_transparent_color_of_a_palette_is_white():
    picture = Image.new("P", (2, 1))
    picture.putpalette([200, 0, 0, 0, 200, 0])
    picture.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        assert read(files.file(picture, kind, transparency=0)).tolist() == [[[255, 255, 255], [0, 200, 0]]]


def test_greyscale_of_16_bits_keeps_its_greys():
    stored = np.array([[0, 255, 256, 1000, 32768, 65535]], np.uint16)
    data = files.file(Image.fromarray(stored), transparency=1000)
    assert read(data)[0, :, 0].tolist() == [0, 0, 1, WHITE, 128, 255]


def test_the_first_frame_of_an_animation_is_read():
    first, second = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    for kind in ("GIF", "PNG", "WEBP"):
        data = files.file(first, kind, save_all=True, append_images=[second], lossless=True)
        assert read(data)[20, 20].tolist() == [255, 0, 0], kind


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_image_is_turned_upright(kind: str):
    picture = files.image(20, 50)
    settings = {"lossless": True} if kind == "WEBP" else {}
    exif = Image.Exif()
    exif[274] = 6
    patches = READER.read(files.file(picture, kind, exif=exif, **settings))
    assert (patches.height, patches.width) == (50, 20)
    assert np.array_equal(seen(patches), np.rot90(np.asarray(picture), -1))


@pytest.mark.parametrize("exif", [b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 30, b"nothing"])
def test_damaged_orientation_is_ignored_without_a_warning(tmp_path: Path, exif: bytes):
    picture = files.image(20, 50)
    data = files.file(picture, exif=b"Exif\0\0" + exif)
    assert np.array_equal(read(data), np.asarray(picture))
    # In a process of its own: pytest has warnings for itself.
    (tmp_path / "image").write_bytes(data)
    program = (
        "import pathlib, sys; from persimmon.model.images import ImageReader, ImageSettings; "
        "ImageReader(ImageSettings()).read(pathlib.Path(sys.argv[1]).read_bytes())"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "always", "-c", program, tmp_path / "image"], capture_output=True, text=True, check=True
    )
    assert ended.stderr == ""


def test_the_smallest_image_is_one_patch():
    patches = READER.read(files.file(files.image(1, 1)))
    assert (patches.rows, patches.columns, patches.height, patches.width) == (1, 1, 1, 1)


PNG = files.file(files.image(64, 64))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the image is empty: it has 0 bytes; expected PNG, JPEG, WebP or GIF"),
        (b"<html>", "the data, 6 bytes, is not an image in one of the formats PNG, JPEG, WebP or GIF"),
        (files.file(files.image(9, 9), "BMP"), "is not an image in one of the formats PNG, JPEG, WebP or GIF"),
        (files.file(files.image(9, 9), "TIFF"), "is not an image in one of the formats PNG, JPEG, WebP or GIF"),
        (PNG[:-3000], "the PNG image is damaged: "),
        (PNG[:20], "the PNG image is damaged: "),
        (PNG[:1000] + b"damage" + PNG[1006:], "the PNG image is damaged: "),
        (files.file(files.image(64, 64), "JPEG")[:900], "the JPEG image is damaged: image file is truncated"),
        (files.file(files.image(64, 64), "JPEG")[:3], "the JPEG image is damaged: "),
        (files.file(files.image(64, 64), "WEBP")[:400], "the WebP image is damaged: "),
        (files.file(files.image(64, 64), "GIF")[:900], "the GIF image is damaged: image file is truncated"),
        (files.file(files.image(64, 64), "GIF")[:6], "the GIF image is damaged: "),
        (files.png_of_size(30, 30), "the PNG image is damaged: "),
        (files.png_of_size(0, 30), "the PNG image is damaged: "),
        (
            files.file(files.image(1, 4000)),
            "the image has 4000 x 1 pixels, of which none are left in one direction when it is resized to fit into "
            "1920 x 1080; send one that is less narrow",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_reason(data: bytes, message: str):
    with pytest.raises(ImageError, match=re.escape(message)) as raised:
        READER.read(data)
    assert "\n" not in str(raised.value)


def test_too_many_bytes_are_refused():
    reader = ImageReader(ImageSettings(), ImageLimits(max_bytes=len(PNG) - 1))
    with pytest.raises(ImageError, match=f"the image has {len(PNG):,} bytes; expected at most {len(PNG) - 1:,}"):
        reader.read(PNG)
    ImageReader(ImageSettings(), ImageLimits(max_bytes=len(PNG))).read(PNG)


@pytest.mark.parametrize("side", [8001, 60_000])
def test_too_many_pixels_are_refused_before_any_is_decoded(side: int):
    # The file has none: an image that was decoded would be damaged.
    with pytest.raises(ImageError) as raised:
        READER.read(files.png_of_size(side, 8000))
    assert str(raised.value) == f"the image has 8000 x {side} = {8000 * side:,} pixels; expected 1 to 64,000,000"


def test_damaged_files_never_raise_anything_else():
    generator = np.random.default_rng(0)
    refused = 0
    for kind, settings in (("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("GIF", {}), ("JPEG", {"progressive": True})):
        exif = {"exif": Image.Exif()} if kind != "GIF" else {}
        if exif:
            exif["exif"][274] = 6
        whole = files.file(files.image(40, 60), kind, **settings, **exif)
        for _ in range(150):
            data = bytearray(whole)
            for place in generator.integers(0, min(len(data), int(generator.choice([60, 400, 10**6]))), 3):
                data[place] = generator.integers(256)
            try:
                READER.read(bytes(data[: len(data) - int(generator.choice([0, 0, 7, 500]))]))
            except ImageError:
                refused += 1
    assert refused > 100


def test_several_threads_may_read_at_once():
    data = [files.file(files.image(300 + 10 * i, 400, seed=i), "JPEG") for i in range(8)]
    one_by_one = [READER.read(each) for each in data]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(READER.read, data * 3)) == one_by_one * 3


def test_pillow_is_imported_only_where_images_are_read():
    program = (
        "import sys; from persimmon.model.images import ImageReader, ImageSettings; print('PIL' in sys.modules); "
        "ImageReader(ImageSettings()); print('PIL' in sys.modules, 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False", "True", "False"]
