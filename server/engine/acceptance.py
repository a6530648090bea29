"""How often guesses are right, learned from what sequences got where tokens were expected.

It learns from each token that was expected, whether it was computed as a guess or not.  Knows neither what expects
tokens nor what guesses cost.
"""

KEEP, KEEP_OF_ALL = 0.88, 0.99
"""What the rate so far still counts after one more observation, of a sequence and of all."""

IDLE, REST = 16, 3
"""After IDLE steps in a row in which no guess paid for a sequence, REST follow in which none is looked for."""

LENGTHS = 6
"""Kinds of guesses, by how many tokens before them occurred before: 1, 2 or 3, 4 to 7, 8 to 15, 16 to 31, more."""

RECENT = LENGTHS
"""Where the kinds of guesses from recent answers begin; those before are from the sequence itself."""

FORCED = 2 * LENGTHS
"""The kind of guesses that spell text that a grammar forces: they are wrong only where it is split differently."""

KIND_OF = (0, *(min(length.bit_length(), LENGTHS) - 1 for length in range(1, 128)))
"""The kind of a guess from the sequence, by the number of tokens before it that occurred before."""


def first_rates() -> list[float]:
    """Of each kind, while nothing is known: the more tokens occurred before, the likelier is the next."""
    own, recent = ([first + 0.1 * length for length in range(LENGTHS)] for first in (0.3, 0.2))
    return [*own, *recent, 0.9]


class Acceptance:
    """How often the guesses for one sequence are right.

    Args:
        of_all: the rates of all sequences, which learn from this one; its own begin with them.

    Attributes:
        rates: of each kind, how probable it is that a guess is right if those before it are.
        rest: steps in which no guess is looked for.
    """

    def __init__(self, of_all: list[float]) -> None:
        self.rates = list(of_all)
        self.rest = 0
        self._of_all = of_all
        self._idle = 0

    def note(self, *, paid: bool) -> None:
        """Learns whether a guess paid in a step, as far as it concerns this sequence."""
        if paid:
            self._idle = 0
            return
        self._idle += 1
        if self._idle >= IDLE:
            self.rest = REST

    def observe(self, kind: int, *, right: bool) -> None:
        """Learns whether an expected token came.

        Args:
            kind: of the guess that it would have been.
            right: whether it came.
        """
        rates, of_all = self.rates, self._of_all
        rates[kind] = KEEP * rates[kind] + (1 - KEEP) * right
        of_all[kind] = KEEP_OF_ALL * of_all[kind] + (1 - KEEP_OF_ALL) * right
