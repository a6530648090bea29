"""How one row of logits becomes a token.  Knows no tensor."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from persimmon.model.token_counts import TokenCounts


@dataclass(slots=True)
class SamplingParams:
    """How one row is sampled.

    Attributes:
        temperature: 0 takes the most probable token, the lowest id among equals.
        top_p: keeps the most probable tokens until their probabilities sum to this; 1 keeps all.
        top_k: keeps this many of the most probable tokens; 0 keeps all.
        min_p: drops tokens less probable than this share of the most probable one; 0 keeps all.
        seed: 0 <= seed < 2**63.
        sample_index: which of a request's samples this is.
        position: the place of the token to be sampled in the sequence's output.
        repetition_penalty, presence_penalty, frequency_penalty: see `reference_sampling.apply_penalties`.
        seen: the tokens that penalties look at; None where there are no penalties.
        logit_bias: (token id, bias) pairs, each id once; added to the logits.
        banned: token ids that must not come.
        allowed: gives the tokens that may come as [ceil(vocab_size / 32)] int32 words of bits, lowest first; called
            when the network has been started, so that it may be working on them beside that.  None allows all.
        logprobs: how many of the most probable tokens to report beside the token's own log-probability; None for no
            report.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    position: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seen: TokenCounts | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned: tuple[int, ...] = ()
    allowed: Callable[[], np.ndarray] | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether no draw is needed."""
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p may drop tokens."""
        return self.top_k > 0 or self.top_p < 1.0

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were seen become less probable, or more."""
        return self.seen is not None

    @property
    def adjusts(self) -> bool:
        """Whether the logits have to be changed before a token is drawn."""
        return self.penalizes or bool(self.logit_bias) or bool(self.banned) or self.allowed is not None
