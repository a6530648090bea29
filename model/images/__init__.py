"""Images as patches: what a client sends, cut into the rows of patches that Fuyu's network reads.

Knows Pillow and numpy; no torch, no HTTP, no tokenizer.  API workers use it.
"""

from persimmon.model.images.errors import ImageError
from persimmon.model.images.patches import ImagePatches
from persimmon.model.images.reader import ImageLimits, ImageReader
from persimmon.model.images.settings import ImageSettings

__all__ = ["ImageError", "ImageLimits", "ImagePatches", "ImageReader", "ImageSettings"]
