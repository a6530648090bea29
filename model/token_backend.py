"""What a tokenizer needs of the library that turns its text into tokens.

Two modules provide it: `sentencepiece_backend` and `tokenizers_backend`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from persimmon.model.token_finder import Part
from persimmon.model.tokenizer_settings import AddedToken


@dataclass(frozen=True)
class Frame:
    """What a checkpoint puts around a text.

    Attributes:
        begin: token ids before it.
        end: token ids after it.
    """

    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()


class TokenBackend(Protocol):
    """A vocabulary and how text becomes its tokens.  Safe to use from several threads at once.

    Attributes:
        token_bytes: what each token id adds to a text, in UTF-8; nothing for a special token.
        unknown_ids: tokens that stand for text outside the vocabulary.
        specials: the special tokens, which are not text, by their spelling.
        base_size: ids below it are of the vocabulary that was trained, the others were added to it.
        frame: what the tokenizer's own file puts around a text; None where it says nothing of that.
    """

    token_bytes: list[bytes]
    unknown_ids: frozenset[int]
    specials: Mapping[str, AddedToken]
    base_size: int
    frame: Frame | None

    def encode(self, parts: Sequence[Part]) -> list[int]:
        """The token ids of a prompt's parts.  No text in them becomes a special token."""

    def name(self, token_id: int) -> str:
        """A token's spelling in the vocabulary; of an id that it lacks something like "token_id:5"."""

    def token_id(self, name: str) -> int | None:
        """The id of a spelling; None where the vocabulary lacks it."""

    def begins_with_prefix(self, token_id: int) -> bool:
        """Whether a text's first token, if it is this one, begins with a space that encoding put before the text."""
