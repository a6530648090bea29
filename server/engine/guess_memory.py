"""The memory that guessing takes: how large indexes may be, how much a step adds to them, and which answers are kept.

Knows neither sequences nor proposers.
"""

from collections.abc import Sequence

from persimmon.server.engine.recent_answers import RecentAnswers
from persimmon.server.engine.token_index import TokenIndex

MAX_INDEX_BYTES = 128 << 20
"""Limit of the indexes of all sequences that run, in bytes."""

MAX_SALTS = 32
"""Cache salts whose answers are kept: those with the latest ones."""

MAX_INDEXED = 8192
"""Tokens that a step takes in, in one or two milliseconds."""

_INDEXES = 2
"""Of a sequence: of its prompt and of its answer."""


def index_size(max_num_seqs: int, max_model_len: int) -> int:
    """The number of tokens that an index has room for, at most.

    Those of the longest sequence, or as many as MAX_INDEX_BYTES allow.

    Args:
        max_num_seqs: sequences that run at once, at most.
        max_model_len: tokens of one, at most.
    """
    size = _power_of_two(max_model_len)
    while size > 1 and max_num_seqs * _INDEXES * TokenIndex.nbytes(size) > MAX_INDEX_BYTES:
        size //= 2
    return size


def guess_bytes(max_num_seqs: int, max_model_len: int) -> int:
    """What guessing takes at most, in bytes: the indexes of `index_size`, and recent answers."""
    indexes = max_num_seqs * _INDEXES * TokenIndex.nbytes(index_size(max_num_seqs, max_model_len))
    return indexes + MAX_SALTS * RecentAnswers.nbytes()


class GuessMemory:
    """What the proposers of an engine share.

    Args:
        max_num_seqs: sequences that run at once, at most.
        max_model_len: tokens of one, at most.
        keeps_answers: whether `remember` does anything.

    Attributes:
        left: tokens that the step may still take in.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, *, keeps_answers: bool = True) -> None:
        self.left = MAX_INDEXED
        self._keeps_answers = keeps_answers
        self._size = index_size(max_num_seqs, max_model_len)
        # By cache salt; the one whose last answer is oldest goes first.
        self._answers: dict[bytes, RecentAnswers] = {}

    def begin_step(self) -> None:
        """A step may take in MAX_INDEXED tokens again."""
        self.left = MAX_INDEXED

    def spend(self, known: int, end: int) -> int:
        """Up to where a step takes in the tokens from `known` to `end`; they count for what it may still take in."""
        end = min(end, known + self.left)
        self.left -= end - known
        return end

    def index(self, num_tokens: int, known: int = 0) -> TokenIndex:
        """An index for a text that may get this many tokens after `known` others."""
        return TokenIndex(min(self._size, _power_of_two(num_tokens)), known)

    def remember(self, salt: bytes, answer: Sequence[int]) -> None:
        """Keeps an answer for other sequences of the same cache salt, and only for those."""
        if not self._keeps_answers:
            return
        answers = self._answers.pop(salt, None) or RecentAnswers()
        answers.add(answer)
        self._answers[salt] = answers
        if len(self._answers) > MAX_SALTS:
            del self._answers[next(iter(self._answers))]

    def answers(self, salt: bytes) -> RecentAnswers | None:
        """The answers of a cache salt, which can be found as far as steps had time to index them; None without any."""
        answers = self._answers.get(salt)
        if answers is not None and answers.num_unindexed > 0:
            answers.index(self.spend(0, answers.num_unindexed))
        return answers


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()
