"""Where the last tokens of a sequence occurred in a text.

A table leads from two tokens to the place where they ended last, and links lead from there to earlier places, as in
deflate ([RFC 1951, section 4](https://www.rfc-editor.org/rfc/rfc1951#section-4)).  Knows token ids only.
"""

from array import array
from collections.abc import Sequence

MAX_PLACES = 8
"""Places where the same two tokens ended that are looked at, the latest first."""

# Multiplies the first of two tokens: odd, and without a pattern in its bits.
_SPREAD = 40503


class TokenIndex:
    """A table of places in a text; a place is the number of tokens before it.

    It never grows: where the text has more tokens than it has room for, later places replace earlier ones.  It takes no
    memory before it has a token.

    Args:
        size: the places that it has room for, a power of two.
        known: the first place that it may have; tokens before it belong to others.

    Attributes:
        known: the tokens of the text up to this place are taken in.
    """

    def __init__(self, size: int, known: int = 0) -> None:
        self.known = known
        self._size = size
        self._mask = size - 1
        # By the last two tokens and by the last one: where they ended last.  By place: where the same two ended before.
        self._pairs = self._singles = self._earlier = array("i")

    @staticmethod
    def nbytes(size: int) -> int:
        """What an index takes, in bytes: 12 for each place, and its objects."""
        return 12 * size + 512

    def add(self, text: Sequence[int], end: int) -> None:
        """Takes in the tokens of a text up to `end`; those up to `known` are the ones that it has."""
        if not self._pairs:
            self._pairs, self._singles, self._earlier = (array("i", [0]) * self._size for _ in range(3))
        pairs, singles, earlier, mask = self._pairs, self._singles, self._earlier, self._mask
        place = self.known
        before = text[place - 1] if place else 0
        for token_id in text[place:end]:
            place += 1
            slot = (before * _SPREAD + token_id) & mask
            earlier[place & mask] = pairs[slot]
            pairs[slot] = singles[token_id & mask] = place
            before = token_id
        self.known = place

    def find(
        self, text: Sequence[int], token_ids: Sequence[int], end: int, longest: int, matched: int = 0
    ) -> tuple[int, int]:
        """The place in the text up to which as many as possible of a sequence's last tokens stand.

        Of the last MAX_PLACES where its last two tokens ended, the one that most of the tokens before them precede too,
        the latest of several.  Without such a place it is the last one where its last token ended.

        Args:
            text: what was taken in.
            token_ids: the sequence, which may be the text itself, taken in up to a place before `end`.
            end: the number of its tokens that count, at least one.
            longest: the number of last tokens to compare, at most.
            matched: places where no more than this number of tokens match do not count.

        Returns:
            The place, and how many tokens match; 0 and `matched` where none counts.
        """
        if not self._pairs:
            return 0, matched
        mask, last = self._mask, token_ids[end - 1]
        found, best = 0, matched or 1
        if end > 1:
            place = self._pairs[(token_ids[end - 2] * _SPREAD + last) & mask]
            left = MAX_PLACES
            while place and best < longest:
                most = min(longest, place, end)
                # What is not longer than the best so far mostly differs there already.
                if best < most and text[place - 1 - best] == token_ids[end - 1 - best]:
                    count = 0
                    while count < most and text[place - 1 - count] == token_ids[end - 1 - count]:
                        count += 1
                    if count > best:
                        found, best = place, count
                left -= 1
                earlier = self._earlier[place & mask]
                # A link that does not lead back belongs to a later place, which has replaced this one.
                if left == 0 or earlier >= place:
                    break
                place = earlier
            if found:
                return found, best
        if matched == 0:
            place = self._singles[last & mask]
            if place and text[place - 1] == last:
                return place, 1
        return 0, matched
