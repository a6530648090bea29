"""The latest answers to requests of one cache salt, from which others of the same salt are guessed too.

Knows token ids only.
"""

from array import array
from collections.abc import Sequence

from persimmon.server.engine.token_index import TokenIndex

RECENT_TOKENS = 1 << 14
"""Tokens that are kept of one salt; a power of two."""

MAX_EXPECTED = 64
"""Tokens of an answer that are expected to follow, at most."""

_END = -1
"""Stands after each answer; no token has this id."""


class RecentAnswers:
    """Answers in a text of a fixed size, where the next one replaces the oldest; with an index.

    Args:
        size: the tokens that it has room for, a power of two.
    """

    def __init__(self, size: int = RECENT_TOKENS) -> None:
        self._size = size
        self._text = array("i")
        # Where the next answer begins.
        self._next = 0
        self._index = TokenIndex(size)

    @staticmethod
    def nbytes(size: int = RECENT_TOKENS) -> int:
        """What it takes, in bytes: a text, which may have a quarter more room than it needs, and its index."""
        return 5 * size + 512 + TokenIndex.nbytes(size)

    @property
    def num_unindexed(self) -> int:
        """Tokens that are not found yet."""
        return self._next - self._index.known

    def add(self, token_ids: Sequence[int]) -> None:
        """Keeps an answer: its last tokens, if it has more than a quarter of what is kept."""
        answer = array("i", token_ids[-(self._size // 4) :])
        answer.append(_END)
        if self._next + len(answer) > self._size:
            self._next = self._index.known = 0
        self._text[self._next : self._next + len(answer)] = answer
        self._next += len(answer)

    def index(self, count: int) -> None:
        """Makes further tokens findable, at most this many."""
        self._index.add(self._text, min(self._next, self._index.known + count))

    def find(self, token_ids: Sequence[int], end: int, longest: int, matched: int) -> tuple[Sequence[int], int]:
        """What followed as many as possible of a sequence's last tokens, at most MAX_EXPECTED tokens.

        Args:
            token_ids: the sequence.
            end: the number of its tokens that count, at least one.
            longest: the number of last tokens to compare, at most.
            matched: places where no more than this number of tokens match do not count.

        Returns:
            What followed, and how many tokens match; nothing and `matched` where no place counts.
        """
        place, more = self._index.find(self._text, token_ids, end, longest, matched)
        if not place:
            return (), matched
        followed = self._text[place : place + MAX_EXPECTED].tolist()
        if _END in followed:
            followed = followed[: followed.index(_END)]
        return (followed, more) if followed else ((), matched)
