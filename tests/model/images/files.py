"""Images as files of all kinds, whose pixels are noise."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def noise(height: int, width: int, *channels: int, seed: int = 0) -> np.ndarray:
    """Random uint8 [height, width, *channels], smooth enough that lossy formats keep it."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (-(-height // 8), -(-width // 8), *channels), np.uint8)
    pixels = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    return pixels ^ generator.integers(0, 16, pixels.shape, np.uint8)


def image(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """An image of noise."""
    channels = {"RGB": (3,), "RGBA": (4,), "LA": (2,), "L": (), "CMYK": (4,)}[mode]
    return Image.fromarray(noise(height, width, *channels, seed=seed), mode)


def file(picture: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    """An image as a file."""
    out = io.BytesIO()
    picture.save(out, kind, **settings)
    return out.getvalue()


def oriented(picture: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    """A file that says how it is to be turned."""
    exif = Image.Exif()
    exif[274] = orientation
    return file(picture, kind, exif=exif)


def png_of_size(height: int, width: int) -> bytes:
    """A PNG whose header gives a size, and which has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
