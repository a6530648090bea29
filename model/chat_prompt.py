"""A conversation as the model reads it: texts, special tokens and images, and from there to token ids.

Knows the tokenizer; nothing of how a format arranges a conversation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Self

from persimmon.model.config import VisionConfig
from persimmon.model.coordinate_tags import CoordinateTags, TokenIds
from persimmon.model.errors import CheckpointError
from persimmon.model.images import ImagePatches
from persimmon.model.token_finder import Part
from persimmon.model.tokenizer import Tokenizer

ChatPart = Part | TokenIds | ImagePatches
"""A part of a conversation: text, the id of a special token in it, tokens apart from the text, or an image."""

BEGIN = "<s>"
NEWLINE = "|NEWLINE|"
BEGIN_OF_ANSWER = "<0x04>"


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of images, and of the prompts that hold them.

    Attributes:
        patch: the placeholder of a patch.
        newline: ends a row of patches.
        begin: `<s>`, or else the tokenizer's BOS, which ends an image and begins a text.
        answer: begins an answer.
        tags: of boxes and points; None where the vocabulary lacks them.
    """

    patch: int
    newline: int
    begin: int
    answer: int
    tags: CoordinateTags | None

    @classmethod
    def of(cls, vision: VisionConfig, tokenizer: Tokenizer) -> Self:
        """Those of a checkpoint.

        Raises:
            CheckpointError: the vocabulary lacks one.
        """

        def named(name: str, otherwise: int | None = None) -> int:
            token_id = tokenizer.token_id(name)
            token_id = otherwise if token_id is None else token_id
            if token_id is None:
                raise CheckpointError(
                    f"the tokenizer's vocabulary lacks the token {name!r}, which prompts with images need"
                )
            return token_id

        return cls(
            patch=vision.image_token_id,
            newline=named(NEWLINE),
            begin=named(BEGIN, tokenizer.bos_token_id),
            answer=named(BEGIN_OF_ANSWER),
            tags=CoordinateTags.of(tokenizer),
        )


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as the model reads it.

    Attributes:
        parts: its text, the ids of special tokens that a template has written, and images.
        begin: ids before it.
        image_tokens: of the model's prompts; None where it reads no images.
    """

    parts: tuple[ChatPart, ...]
    begin: tuple[int, ...] = ()
    image_tokens: ImageTokens | None = None

    def __len__(self) -> int:
        """Characters of its text."""
        return sum(len(part) for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[ImagePatches]:
        """Its images, in order."""
        return [part for part in self.parts if isinstance(part, ImagePatches)]

    @property
    def num_image_tokens(self) -> int:
        """Tokens of its images: one for each patch and one for each row of patches."""
        return sum(image.num_tokens for image in self.images)

    def followed_by(self, text: str) -> "ChatPrompt":
        """The same conversation with a text after it."""
        *others, last = self.parts
        if isinstance(last, str):
            return replace(self, parts=(*others, last + text))
        # The tokenizer puts the space before a text that is tokenized apart.
        return replace(self, parts=(*self.parts, text.lstrip(" ") if isinstance(last, tuple) else text))

    def token_ids(self, tokenizer: Tokenizer, add_bos: bool | None = None) -> list[int]:
        """Its token ids.

        Args:
            tokenizer: the checkpoint's.
            add_bos: False leaves out the ids that no template has written.

        Raises:
            CoordinateError: a tag next to an image has a coordinate without a token.
        """
        ids = [] if add_bos is False else list(self.begin)
        for apart, group in groupby(self._with_images_as_tokens(), key=lambda part: isinstance(part, tuple)):
            parts = list(group)
            if apart:
                ids += [token_id for part in parts if isinstance(part, tuple) for token_id in part]
            else:
                ids += tokenizer.encode_parts([part for part in parts if not isinstance(part, tuple)], add_bos=False)
        return ids

    def image_rows(self, token_ids: Sequence[int]) -> Iterator[tuple[int, int, bytes, bytes]]:
        """The rows of patches of its images, from the first to the last.

        Args:
            token_ids: as `token_ids` gives them.

        Yields:
            Where its placeholders begin, how many there are, the digest of its pixels and the pixels: uint8
            [columns, patch_size, patch_size, 3].
        """
        place = 0
        for image in self.images:
            for digest, pixels in zip(image.digests, image.pixels, strict=True):
                start = token_ids.index(self._written.patch, place)
                yield start, image.columns, digest, pixels
                place = start + image.columns

    def text(self, tokenizer: Tokenizer) -> str:
        """Its text, with special tokens spelled out and images named by their sizes."""
        return "".join([_spelled(part, tokenizer) for part in self.parts])

    @property
    def _written(self) -> ImageTokens:
        if self.image_tokens is None:
            raise ValueError("the prompt holds an image, but the model reads none")
        return self.image_tokens

    def _with_images_as_tokens(self) -> Iterator[Part | TokenIds]:
        """The parts with images and tags as tokens.  Tags are in the pixels of the image before them, or the first."""
        images = self.images
        scale = images[0].scale if images else None
        for part in self.parts:
            if isinstance(part, ImagePatches):
                written = self._written
                scale = part.scale
                yield (*part.token_ids(written.patch, written.newline), written.begin)
            elif isinstance(part, str) and scale is not None and self._written.tags is not None:
                yield from self._written.tags.split(part, scale)
            else:
                yield part


def _spelled(part: ChatPart, tokenizer: Tokenizer) -> str:
    match part:
        case str():
            return part
        case ImagePatches(width=width, height=height):
            return f"<image {width}x{height}>"
        case int():
            return tokenizer.pieces([part])[0]
        case _:
            return "".join(tokenizer.pieces(part))
