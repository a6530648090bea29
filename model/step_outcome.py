"""What came of a step, for each of its sequences.  Plain data on the host; knows no tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from persimmon.model.token_logprobs import TokenLogprobs


@dataclass(slots=True, kw_only=True)
class StepOutcome:
    """What came of a step.

    Attributes:
        tokens: for each of the step's samples, in order, the tokens drawn for it: one, or one for each of several
            positions, of which the later ones count only if the tokens before them were guessed right.  Those after
            guesses that cannot be right may be missing.
        logprobs: by a sample's place in that list, where it asked for them: one for each of its tokens.
        prompt_logprobs: by a sequence's place in the step.
        pooled: by a sequence's place in the step, its rows one after the other: float32, little-endian.
        failures: by a sample's place: why its sequence, and no other, cannot go on.
    """

    tokens: Sequence[list[int]]
    logprobs: Mapping[int, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, list[TokenLogprobs]] = field(default_factory=dict)
    pooled: Mapping[int, bytes] = field(default_factory=dict)
    failures: Mapping[int, str] = field(default_factory=dict)
