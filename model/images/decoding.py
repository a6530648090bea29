"""The bytes of an image as RGB pixels, by Pillow, in the way in which a person sees them.

Knows formats, transparency and orientation; nothing of patches.  ImageReader imports it, and only where a model reads
images.
"""

import contextlib
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from persimmon.model.images.errors import ImageError

# Pillow warns of damaged EXIF data and large sizes.  They are a client's, and nothing for the server's log.
warnings.filterwarnings("ignore", module=r"PIL\.")

ALLOWED = "PNG, JPEG, WebP or GIF"
BILINEAR = Image.Resampling.BILINEAR

_LARGE_PIXELS = 8_000_000
_decoding_large = threading.Lock()
"""Held while an image of more pixels is decoded: Pillow keeps several copies, and a small file may have many pixels."""

# Not Image.open, whose error does not say of which format a damaged image is.
_CLASSES: dict[str, Callable[[io.BytesIO], ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WebP": WebPImageFile,
    "GIF": GifImageFile,
}

_DAMAGED = (
    EOFError,
    IndexError,
    KeyError,
    OSError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow raises for damaged files."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """An image's pixels, upright; the first frame of an animation.

    Args:
        data: a PNG, JPEG, WebP or GIF file.
        max_pixels: the most pixels it may have; no pixel is decoded of one that has more.

    Returns:
        An image in mode RGB.

    Raises:
        ImageError: it is of another format, damaged, or too large.
    """
    name = _format(data)
    if name is None:
        raise ImageError(f"the data, {len(data):,} bytes, is not an image in one of the formats {ALLOWED}")
    try:
        with _CLASSES[name](io.BytesIO(data)) as image:
            _check_pixels(image, max_pixels)
            is_large = image.width * image.height > _LARGE_PIXELS
            with _decoding_large if is_large else contextlib.nullcontext():
                image.load()
                return _in_rgb(_upright(image))
    except ImageError:
        raise
    except Image.DecompressionBombError:  # from the few readers that look at a size by themselves
        raise ImageError(f"the {name} image has too many pixels; expected 1 to {max_pixels:,}") from None
    except _DAMAGED as error:
        raise ImageError(f"the {name} image is damaged: {error or type(error).__name__}") from error


def _format(data: bytes) -> str | None:
    """By the first bytes."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    return None


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    pixels = image.width * image.height
    if not 0 < pixels <= max_pixels:
        raise ImageError(
            f"the image has {image.width} x {image.height} = {pixels:,} pixels; expected 1 to {max_pixels:,}"
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGED:  # the picture itself is whole: shown as it is stored, like browsers do
        turn = None
    return image if turn is None else image.transpose(turn)


def _in_rgb(image: Image.Image) -> Image.Image:
    """What is seen of an image in front of white."""
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    transparent = image if image.mode == "RGBA" else image.convert("RGBA")
    seen = Image.new("RGB", image.size, "white")
    seen.paste(transparent, mask=transparent)
    return seen


def _from_16_bits(image: Image.Image) -> Image.Image:
    """A greyscale image of 16 bits.  Pillow would make all but the 256 darkest greys white."""
    stored = np.asarray(image)
    seen = (stored >> 8).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        seen[stored == transparent] = 255
    return Image.fromarray(seen).convert("RGB")
