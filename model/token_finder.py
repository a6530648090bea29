"""Finds tokens in a text by their spelling.

Knows nothing of vocabularies, and of a token no more than its spelling and its flags.
"""

import bisect
import re
from collections.abc import Iterable, Sequence

from persimmon.model.tokenizer_settings import AddedToken

Part = str | int
"""A part of a prompt: text, or the id of a token that stands for itself."""

_KEY_LENGTH = 4


class TokenFinder:
    """Splits texts at some tokens.  Of several that begin at one place the longest is found.

    Args:
        tokens: each with another spelling.
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens}
        # By their first characters, because a vocabulary may have thousands that differ only further on.
        self._key_length = min([_KEY_LENGTH, *map(len, self._tokens)])
        lengths: dict[str, set[int]] = {}
        for text in self._tokens:
            lengths.setdefault(text[: self._key_length], set()).add(len(text))
        self._lengths = {key: sorted(found, reverse=True) for key, found in lengths.items()}
        firsts = "".join(sorted({re.escape(text[0]) for text in self._tokens}))
        self._first = re.compile(f"[{firsts}]") if firsts else None
        self._sorted = sorted(self._tokens)
        self._reversed = sorted(text[::-1] for text in self._tokens)
        self._longest = max(map(len, self._tokens), default=0)

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def split(self, text: str) -> list[Part]:
        """The parts of a text: what is between the tokens, none of it empty, and the ids of the tokens."""
        parts: list[Part] = []
        begin = 0
        for start, end, token in self._found(text):
            left = text[begin:start]
            if token.lstrip:
                left = left.rstrip()
            if left:
                parts.append(left)
            parts.append(token.token_id)
            begin = end
            if token.rstrip:
                begin += len(text) - begin - len(text[begin:].lstrip())
        if begin < len(text):
            parts.append(text[begin:])
        return parts

    def hide(self, text: str, mark: str) -> str:
        """The text with a mark inside each token, and at its ends where a token may begin or end with it.

        So `split` finds none of the tokens, whatever is put before or after the text.

        Args:
            text: without the mark.
            mark: a character that no token holds.
        """
        if not self or not text:
            return text
        parts, begin = [], 0
        for start, _, _ in self._found(text, overlapping=True):
            parts.append(text[begin : start + 1])
            begin = start + 1
        hidden = mark.join([*parts, text[begin:]])
        if any(_begins(self._sorted, text[-size:]) for size in range(1, min(self._longest, len(text) + 1))):
            hidden += mark
        if any(_begins(self._reversed, text[:size][::-1]) for size in range(1, min(self._longest, len(text) + 1))):
            hidden = mark + hidden
        return hidden

    def _found(self, text: str, overlapping: bool = False) -> Iterable[tuple[int, int, AddedToken]]:
        place = 0
        while self._first is not None and (match := self._first.search(text, place)) is not None:
            place = match.start()
            token = self._at(text, place)
            if token is None:
                place += 1
                continue
            end = place + len(token.content)
            yield place, end, token
            place = place + 1 if overlapping else end

    def _at(self, text: str, place: int) -> AddedToken | None:
        for length in self._lengths.get(text[place : place + self._key_length], ()):
            token = self._tokens.get(text[place : place + length])
            if token is not None and not (token.single_word and _within_word(text, place, place + length)):
                return token
        return None


def _within_word(text: str, start: int, end: int) -> bool:
    before, after = text[start - 1 : start] if start else "", text[end : end + 1]
    return bool(re.match(r"\w", before) or re.match(r"\w", after))


def _begins(ordered: Sequence[str], beginning: str) -> bool:
    """Whether one of some ordered strings begins so."""
    place = bisect.bisect_left(ordered, beginning)
    return place < len(ordered) and ordered[place].startswith(beginning)
