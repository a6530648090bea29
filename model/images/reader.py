"""ImageReader: the bytes that a client sends as an image, made into patches as FuyuProcessor makes them.

Knows what fits into a prompt; nothing of tokens.  May be used by several threads at once.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from persimmon.model.images.errors import ImageError
from persimmon.model.images.patches import ImagePatches
from persimmon.model.images.settings import ImageSettings


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What an image may take; checked before any pixel is decoded.

    Attributes:
        max_bytes: of the file.
        max_pixels: width times height.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 64_000_000


class ImageReader:
    """Reads images.

    Args:
        settings: of the checkpoint.
        limits: on what is read.
    """

    def __init__(self, settings: ImageSettings, limits: ImageLimits | None = None) -> None:
        # Servers of models that read no images do without Pillow's memory.
        from persimmon.model.images import decoding

        self._decoding = decoding
        self._settings = settings
        self._limits = limits or ImageLimits()

    def read(self, data: bytes) -> ImagePatches:
        """Decodes an image, makes it fit, and cuts it into patches.  Takes tens of milliseconds: not for an event loop.

        Args:
            data: a PNG, JPEG, WebP or GIF file; of animations the first frame counts.

        Raises:
            ImageError: it is damaged, too large, too narrow, or of another format.
        """
        if not data:
            raise ImageError(f"the image is empty: it has 0 bytes; expected {self._decoding.ALLOWED}")
        if len(data) > self._limits.max_bytes:
            raise ImageError(f"the image has {len(data):,} bytes; expected at most {self._limits.max_bytes:,}")
        image = self._decoding.decode(data, self._limits.max_pixels)
        height, width = image.height, image.width
        fitting = self._fitting(height, width)
        if fitting != (height, width):
            image = image.resize(fitting[::-1], self._decoding.BILINEAR)
        padded = self._padded(np.asarray(image))
        rows = _rows(padded, self._settings.patch_size)
        return ImagePatches(
            rows=len(rows),
            columns=padded.shape[1] // self._settings.patch_size,
            pixels=rows,
            height=height,
            width=width,
            scale=fitting[0] / height,
        )

    def _fitting(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that an image is resized to; its own where it fits."""
        settings = self._settings
        if height <= settings.max_height and width <= settings.max_width:
            return height, width
        # In this order and rounded down, as FuyuProcessor does it: another may differ by a pixel.
        scale = min(settings.max_height / height, settings.max_width / width)
        fitting = int(height * scale), int(width * scale)
        if 0 in fitting:
            raise ImageError(
                f"the image has {width} x {height} pixels, of which none are left in one direction when it is resized "
                f"to fit into {settings.max_width} x {settings.max_height}; send one that is less narrow"
            )
        return fitting

    def _padded(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """An image [height, width, 3] with its last patches filled up."""
        size = self._settings.patch_size
        height, width, channels = image.shape
        if height % size == width % size == 0:
            return image
        full = (-(-height // size) * size, -(-width // size) * size, channels)
        padded = np.full(full, self._settings.padding_value, np.uint8)
        padded[:height, :width] = image
        return padded


def _rows(image: npt.NDArray[np.uint8], size: int) -> tuple[bytes, ...]:
    """The rows of patches of an image [rows · size, columns · size, 3]."""
    height, width, channels = image.shape
    patches = image.reshape(height // size, size, width // size, size, channels).swapaxes(1, 2)
    return tuple(row.tobytes() for row in patches)
