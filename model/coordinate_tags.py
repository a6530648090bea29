"""Boxes and points in an image: tags in texts, and the tokens that Fuyu reads and writes for them.

`<box>y1, x1, y2, x2</box>` and `<point>x, y</point>` are in pixels of the image as it was sent.  For the model they are
an opening token, a token for each number and a closing token; a number is half of a coordinate in the image as the
model sees it.  Knows the tokenizer; nothing of prompts and answers as a whole.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from persimmon.model.tokenizer import IncrementalDetokenizer, Tokenizer

TokenIds = tuple[int, ...]
"""Tokens that stand for themselves; the texts next to them are tokenized apart."""

_NUMBER = r"\s*(?:[0-9]{1,9}(?:\.[0-9]{1,9})?)\s*"
_TAG = re.compile(rf"<(?:box>(?P<box>{_NUMBER}(?:,{_NUMBER}){{3}})</box|point>(?P<point>{_NUMBER},{_NUMBER})</point)>")
_DIGITS = re.compile(r"[0-9]{1,9}")


class CoordinateError(ValueError):
    """A coordinate that the model has no token for.  The message is a sentence for the client."""


@dataclass(frozen=True)
class CoordinateTags:
    """The tokens of boxes and points in a vocabulary.

    Attributes:
        tokenizer: of the vocabulary.
        box: the tokens that open and close a box.
        point: those that open and close a point.
    """

    tokenizer: Tokenizer
    box: tuple[int, int]
    point: tuple[int, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self | None:
        """Those of a tokenizer; None where its vocabulary lacks one."""
        ids = [tokenizer.token_id(f"<0x0{number}>") for number in range(4)]
        if None in ids:
            return None
        box_open, box_close, point_open, point_close = (token_id for token_id in ids if token_id is not None)
        return cls(tokenizer, (box_open, box_close), (point_open, point_close))

    def split(self, text: str, scale: float) -> Iterator[str | TokenIds]:
        """A prompt's text in parts: what is between the tags, and each tag as its tokens.

        What only looks like a tag stays text.

        Args:
            text: any.
            scale: of the image that the coordinates are in, as `ImagePatches.scale`.

        Raises:
            CoordinateError: a number is not in the vocabulary.
        """
        # FuyuProcessor keeps its factors in float32, which decides where a half is rounded to.
        scale = float(np.float32(scale))
        begin = 0
        for match in _TAG.finditer(text):
            if match.start() > begin:
                yield text[begin : match.start()]
            begin = match.end()
            opening, closing = self.point if match["box"] is None else self.box
            coordinates = [float(number) for number in (match["box"] or match["point"]).split(",")]
            yield (opening, *[self._number(coordinate, scale) for coordinate in coordinates], closing)
        if begin < len(text):
            yield text[begin:]

    def detokenizer(self, scale: float) -> IncrementalDetokenizer:
        """A detokenizer for one new answer, which writes boxes and points as tags.

        Args:
            scale: of the image that the answer is about, as `ImagePatches.scale`.
        """
        return _TagDetokenizer(self, scale)

    def _number(self, coordinate: float, scale: float) -> int:
        number = round(coordinate / 2 * scale)  # halves to even, like numpy's
        token_id = self.tokenizer.token_id(str(number))
        if token_id is None:
            raise CoordinateError(
                f"the coordinate {coordinate:g} is {number} in units of the model, for which its vocabulary has no "
                "token; give coordinates within the image"
            )
        return token_id


class _TagDetokenizer(IncrementalDetokenizer):
    """Holds tokens back that may be a tag, six at most; those that are none become what they are as text."""

    def __init__(self, tags: CoordinateTags, scale: float) -> None:
        super().__init__(tags.tokenizer.all_token_bytes)
        self._tokenizer = tags.tokenizer
        self._scale = scale
        # By the opening token: the closing one, how many numbers come between, and what people call it.
        self._kinds = {tags.box[0]: (tags.box[1], 4, "box"), tags.point[0]: (tags.point[1], 2, "point")}
        self._held: list[int] = []
        self._numbers: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """See `IncrementalDetokenizer`."""
        return "".join([self._take(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """See `IncrementalDetokenizer`."""
        return self._release() + super().finish()

    def _take(self, token_id: int) -> str:
        """The text that is certain after one more token."""
        if self._held:
            closing, count, name = self._kinds[self._held[0]]
            if token_id == closing and len(self._numbers) == count:
                return self._tag(name)
            if len(self._numbers) < count and (number := self._number(token_id)) is not None:
                self._held.append(token_id)
                self._numbers.append(number)
                return ""
        released = self._release()
        if token_id in self._kinds:
            self._held.append(token_id)
            return released
        return released + super().push((token_id,))

    def _tag(self, name: str) -> str:
        coordinates = ", ".join(str(2 * int(number / self._scale)) for number in self._numbers)
        self._held, self._numbers = [], []
        return self._decoder.decode(f" <{name}>{coordinates}</{name}>".encode())

    def _number(self, token_id: int) -> int | None:
        (piece,) = self._tokenizer.pieces([token_id])
        return int(piece) if _DIGITS.fullmatch(piece) else None

    def _release(self) -> str:
        held, self._held, self._numbers = self._held, [], []
        return super().push(held)
