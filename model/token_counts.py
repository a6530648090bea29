"""Which tokens a sequence holds, and how often its output holds each: what penalties look at.  Knows no logits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class SeenTokens(Protocol):
    """The distinct tokens of a sequence up to a position."""

    @property
    def token_ids(self) -> np.ndarray:
        """[N] int32, each id once."""

    @property
    def output_counts(self) -> np.ndarray:
        """[N] int32, how often the output holds each of `token_ids`; 0 where only the prompt does."""


@dataclass(frozen=True, slots=True)
class TokensAt:
    """`SeenTokens` of a sequence as it was at some position, or may become."""

    token_ids: np.ndarray
    output_counts: np.ndarray


class TokenCounts:
    """The distinct tokens of one sequence, kept up to date token by token.

    Args:
        prompt: its prompt.

    Attributes:
        output_length: how many output tokens it has taken.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self.output_length = 0
        distinct = list(dict.fromkeys(prompt))
        self._places = {token_id: place for place, token_id in enumerate(distinct)}
        self._size = len(distinct)
        self._ids = np.array(distinct, dtype=np.int32)
        self._counts = np.zeros(self._size, dtype=np.int32)

    @property
    def token_ids(self) -> np.ndarray:
        """[N] int32, each id once."""
        return self._ids[: self._size]

    @property
    def output_counts(self) -> np.ndarray:
        """[N] int32, how often the output holds each of `token_ids`; 0 where only the prompt does."""
        return self._counts[: self._size]

    def append(self, token_id: int) -> None:
        """Takes the output's next token."""
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = self._size
            if self._size == len(self._ids):
                room = np.zeros(max(16, self._size), dtype=np.int32)
                self._ids, self._counts = np.append(self._ids, room), np.append(self._counts, room)
            self._ids[place] = token_id
            self._size += 1
        self._counts[place] += 1
        self.output_length += 1

    def followed_by(self, token_ids: Sequence[int]) -> TokensAt:
        """What would be seen if these tokens came next in the output; it does not change with the sequence."""
        more = Counter(token_ids)
        new = [token_id for token_id in more if token_id not in self._places]
        ids = np.append(self.token_ids, np.array(new, dtype=np.int32))
        counts = np.append(self.output_counts, np.zeros(len(new), dtype=np.int32))
        new_places = {token_id: self._size + place for place, token_id in enumerate(new)}
        for token_id, count in more.items():
            counts[new_places[token_id] if token_id in new_places else self._places[token_id]] += count
        return TokensAt(ids, counts)
