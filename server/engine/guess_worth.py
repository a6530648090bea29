"""How many guesses pay in a step: what they may bring against what a wider step takes.

A guess is computed if it brings tokens faster than the step brings them without it.  Knows no blocks, and no tokens.
"""

from persimmon.server.engine.acceptance import FORCED, KIND_OF, RECENT, Acceptance, first_rates
from persimmon.server.engine.proposers import Proposal
from persimmon.server.engine.step_cost import StepCosts

MAX_STEPS_WITH_GUESSES = 32
"""After this many steps with guesses one has none, so that it stays known what that takes."""

MIN_PROBABILITY, MAX_GUESSES = 0.02, 64
"""Limits that hold even for guesses that cost nothing."""

UNKNOWN_PROBABILITY, UNKNOWN_GUESSES = 0.5, 4
"""While it is not known what guesses cost: the least probability of those that are computed, and how many they are."""

STEPS_TO_TRIAL = 64
"""After this many steps without guesses one has UNKNOWN_GUESSES likely ones, whatever they seem to cost: what was
learned on a busy machine, or from slow grammars, would otherwise hold for ever."""


class GuessWorth:
    """Decides how many guesses steps have, from what their costs and earlier guesses teach."""

    def __init__(self) -> None:
        self._rates = first_rates()
        self._steps = 0
        self._decodes = 0
        self._steps_without = 0
        self._trial = False
        # How much faster tokens came with the guesses of the last step that had some; others must keep up with those.
        self._gain = 1.0
        self._tokens = self._gained = self._seconds = self._quiet = self._each = self._least = 0.0

    def acceptance(self) -> Acceptance:
        """Of a new sequence."""
        return Acceptance(self._rates)

    def begin(self, costs: StepCosts | None, decodes: int, context: int) -> bool:
        """Begins a step; whether any guess may pay.

        Args:
            costs: what steps cost; None where nothing is known of that.
            decodes: sequences that decode in the step, at least one.
            context: tokens that those attend to, in all.
        """
        known = None if costs is None else costs.guesses
        similar = self._decodes / 2 <= decodes <= 2 * self._decodes
        if known is None or not similar or self._steps >= MAX_STEPS_WITH_GUESSES:
            self._decodes = decodes
            return self._without()
        self._tokens, self._gained = float(decodes), 0.0
        self._quiet = known.step + known.decode * decodes + known.decode_context * context
        self._seconds = self._quiet + known.fixed
        self._each = known.token + known.context * context / decodes
        self._least = UNKNOWN_PROBABILITY
        self._limit = UNKNOWN_GUESSES
        self._trial = known.observed and self._steps_without >= STEPS_TO_TRIAL
        if known.observed and not self._trial:
            self._least = max(MIN_PROBABILITY, self._gain * self._each * decodes / self._quiet)
            self._limit = MAX_GUESSES
        return self._least < 1 or self._without()

    def count(self, acceptance: Acceptance, proposal: Proposal) -> int:
        """How many of a sequence's proposed guesses may pay."""
        rates, matched, first = acceptance.rates, proposal.matched, RECENT if proposal.recent else 0
        count, chance = 0, 1.0
        for place in range(min(len(proposal.token_ids), self._limit)):
            chance *= rates[FORCED if place < proposal.forced else first + KIND_OF[matched + place]]
            if chance < self._least:
                break
            self._gained += chance
            count += 1
        self._seconds += count * self._each
        if self._trial:
            self._limit -= count
        return count

    @property
    def paying(self) -> bool:
        """Whether the guesses that were counted in this step, together, bring tokens faster than a step without any."""
        return self._gained > 0 and (self._trial or self._faster() > 1)

    def pays(self) -> bool:
        """Ends a step; whether it has the guesses that were counted, as `paying` says."""
        if not self.paying:
            return self._without()
        self._gain = max(1.0, self._faster())
        self._steps += 1
        self._steps_without = 0
        return True

    def _faster(self) -> float:
        """How much faster tokens come with the guesses that were counted in this step than without any."""
        return (1 + self._gained / self._tokens) * self._quiet / self._seconds

    def _without(self) -> bool:
        """The step has no guesses: False."""
        self._steps, self._gain = 0, 1.0
        self._steps_without += 1
        return False
