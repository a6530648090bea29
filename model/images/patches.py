"""ImagePatches: an image as rows of patches, and its place in a prompt.

Knows no file format and no tokenizer.
"""

import hashlib
from dataclasses import dataclass, field

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class ImagePatches:
    """An image, cut into square patches from left to right and from top to bottom.

    Attributes:
        rows: of patches.
        columns: patches in a row.
        pixels: of each row, uint8 [columns, patch_size, patch_size, 3]: what is before normalization.
        height: of the image that was sent, in pixels, as it is seen: after it was turned upright.
        width: likewise.
        scale: what the image's height was multiplied by to fit; 1.0 where it fitted.
        digests: of each row's pixels, 16 bytes; equal rows have equal ones.
    """

    rows: int
    columns: int
    pixels: tuple[bytes, ...]
    height: int
    width: int
    scale: float
    digests: tuple[bytes, ...] = field(init=False)

    def __post_init__(self) -> None:
        # Here, and not where prompts are made, because images are read in a thread.
        digests = tuple(hashlib.blake2b(row, digest_size=DIGEST_BYTES).digest() for row in self.pixels)
        object.__setattr__(self, "digests", digests)

    @property
    def num_tokens(self) -> int:
        """How many tokens the image takes in a prompt: one for each patch, and one at the end of each row."""
        return self.rows * (self.columns + 1)

    def token_ids(self, image_token_id: int, newline_id: int) -> list[int]:
        """What the image becomes in a prompt, without the BOS that follows it.

        Args:
            image_token_id: the placeholder of a patch.
            newline_id: the token that ends a row of patches.
        """
        return ([image_token_id] * self.columns + [newline_id]) * self.rows
