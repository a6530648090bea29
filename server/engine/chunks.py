"""How a step's room for prompts is shared among those that are being computed.

Decides counts of tokens; knows neither blocks nor who runs.
"""

from collections.abc import Sequence as Ordered
from math import inf

from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.shares import Share
from persimmon.server.engine.step_cost import StepCosts, StepWork

MIN_CHUNK = 16
"""Tokens of a prompt that a step computes even if there is no time for them: a few more cost little more than none."""


def share_chunks(
    prompts: Ordered[Sequence], tokens: int, work: StepWork, costs: StepCosts | None, max_seconds: float = inf
) -> dict[Sequence, int]:
    """How many tokens of each prompt run in a step together with its decodes.

    Half of the room is for the oldest prompt, whatever its length and priority.  The rest goes to the most urgent
    priority, there to the client that has least left to compute for its share, and there to the shortest prompt.  So
    neither a long prompt nor those behind it starve.  Each of the two gets MIN_CHUNK tokens whatever that takes.

    Args:
        prompts: those that run and are not computed to their end; at least one.
        tokens: that the step has left.
        work: its decodes.
        costs: what chunks take of its time; None where that does not count.
        max_seconds: time that chunks may take, whatever the decodes allow.

    Returns:
        Tokens for each prompt that gets some, the oldest first.
    """
    seconds = inf
    if costs is not None:
        # Sequences without blocks do not count: longer chunks would not bring them their first token sooner.
        seconds = min(max_seconds, costs.chunk_seconds(work.decodes, work.decode_context, len(prompts)))
        tokens = int(min(tokens, costs.chunk_tokens(work.decodes, len(prompts))))
    share = _ChunkShare(tokens, seconds, costs)
    first = min(prompts, key=lambda own: own.age)
    others = [own for own in prompts if own is not first]
    left: dict[Share, float] = {}
    for own in prompts:
        left[own.share] = left.get(own.share, 0.0) + own.num_uncomputed / own.share.weight
    others.sort(key=lambda own: (own.priority, left[own.share], own.num_uncomputed))
    counts = {first: share.take(first, 0, MIN_CHUNK, part=0.5 if others else 1.0)}
    for place, sequence in enumerate(others):
        if share.tokens == 0:
            break
        counts[sequence] = share.take(sequence, 0, MIN_CHUNK if place == 0 else 0)
    counts[first] += share.take(first, counts[first], 0)
    return {sequence: count for sequence, count in counts.items() if count > 0}


class _ChunkShare:
    """What is left of a step for prompt chunks.

    Args:
        tokens: of the token budget.
        seconds: of the time; infinite where nothing is known of that.
        costs: what chunks take of it.
    """

    def __init__(self, tokens: int, seconds: float, costs: StepCosts | None) -> None:
        self.tokens = tokens
        self._seconds = seconds
        self._costs = costs

    def take(self, sequence: Sequence, taken: int, least: int, part: float = 1.0) -> int:
        """Takes a chunk for a sequence, as long as it can be.

        Args:
            sequence: whose prompt.
            taken: tokens that it has in this step already.
            least: tokens it gets even if there is no time for them.
            part: how much of what is left it may take.
        """
        wanted = sequence.num_uncomputed - taken
        start = sequence.num_computed + taken
        count = min(wanted, max(1, int(self.tokens * part)), self.tokens)
        if self._costs is not None:
            if taken == 0:
                self._seconds -= self._costs.reach(start)
            affordable = self._costs.affordable(self._seconds * part, start)
            count = int(min(count, max(affordable, least)))
            self._seconds -= self._costs.chunk(count, start)
        self.tokens -= count
        return count
