"""How one row of logits becomes a token: what its request asks for, and what changes from token to token.

Knows no tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from persimmon.model.sampling_params import SamplingParams
from persimmon.model.token_counts import SeenTokens


# Not frozen: of a sequence that decodes, `position` is changed in place from step to step.
@dataclass(slots=True, kw_only=True)
class RowSampling:
    """How one row is sampled.

    Attributes:
        asked: what the request asks for.
        sample_index: which of a request's samples this is.
        position: the place of the token to be sampled in the sequence's output.
        seen: the tokens that penalties look at; None where there are no penalties.
        banned: token ids that must not come.
        allowed: gives the tokens that may come as [ceil(vocab_size / 32)] int32 words of bits, lowest first; called
            when the network has been started, so that they may be computed while it runs.  None allows all.
    """

    asked: SamplingParams
    sample_index: int = 0
    position: int = 0
    seen: SeenTokens | None = None
    banned: tuple[int, ...] = ()
    allowed: Callable[[], np.ndarray] | None = None

    @property
    def adjusts(self) -> bool:
        """Whether the logits have to be changed before a token is drawn."""
        return self.asked.changes_logits or self.seen is not None or bool(self.banned) or self.allowed is not None
