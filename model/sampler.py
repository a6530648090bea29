"""Logits to tokens, each row by its own sequence's settings.

A draw depends on (seed, sample_index, position) and the row's own logits alone, never on the row's place in the
batch: the same request gives the same tokens whatever runs beside it, and again after a preemption.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.reference_sampling import philox

_LOGITS_AT_ONCE = 2**23

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


@dataclass(frozen=True, slots=True)
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
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    position: int = 0

    @property
    def greedy(self) -> bool:
        """Whether no draw is needed."""
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p may drop tokens."""
        return self.top_k > 0 or self.top_p < 1.0


def sample(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """One token a row.

    Temperature comes first, then min-p, top-k and top-p, each on what the one before kept.

    Args:
        logits: [R, vocab_size] float32.
        params: R of them.

    Returns:
        [R] int64.
    """
    tokens = logits.argmax(-1)
    drawing = [row for row, own in enumerate(params) if not own.greedy]
    at_once = rows_at_once(logits.shape[1])
    for begin in range(0, len(drawing), at_once):
        some = drawing[begin : begin + at_once]
        rows = torch.tensor(some, device=logits.device)
        tokens[rows] = _draw(logits.index_select(0, rows), [params[row] for row in some])
    return tokens


def rows_at_once(vocab_size: int) -> int:
    """Rows that draw together: a draw takes many times its logits' memory, which is 1 MiB a row of 262,144."""
    return max(1, _LOGITS_AT_ONCE // vocab_size)


def _draw(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    best = logits.argmax(-1)
    # The highest logit becomes 0 first: dividing by a tiny temperature would overflow otherwise.
    logits = (logits - logits.gather(1, best[:, None])) / column([own.temperature for own in params])
    if any(own.min_p > 0 for own in params):
        logits.masked_fill_(logits < column([own.min_p for own in params]).log(), float("-inf"))
    truncated = [row for row, own in enumerate(params) if own.truncates]
    if truncated:
        rows = torch.tensor(truncated, device=logits.device)
        logits[rows] = _truncate(logits[rows], [params[row] for row in truncated])
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    target = torch.from_numpy(uniform(params)).to(logits.device)[:, None] * cumulative[:, -1:]
    # The first token whose cumulative probability passes the target; a token of probability 0 never does.
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Only a row of NaN has none.
    return torch.where(drawn < logits.shape[1], drawn, best)


def _truncate(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Top-k, then top-p over what it kept; the rest becomes -inf.  Among equal logits the lowest id is kept."""
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    top_k = torch.tensor([own.top_k or logits.shape[1] for own in params], device=logits.device)[:, None]
    ordered.masked_fill_(rank >= top_k, float("-inf"))
    probabilities = ordered.softmax(-1, dtype=torch.float64)
    before = probabilities.cumsum(-1) - probabilities
    top_p = torch.tensor([own.top_p for own in params], dtype=torch.float64, device=logits.device)[:, None]
    # The token that reaches top_p is kept; top_p = 1 keeps all, rounding notwithstanding.
    ordered.masked_fill_((before >= top_p) & (top_p < 1) & (rank > 0), float("-inf"))
    return torch.empty_like(logits).scatter_(1, ids, ordered)


def uniform(params: Sequence[SamplingParams]) -> np.ndarray:
    """One number in [0, 1) a row, from Philox4x32-10 with the seed as key and (position, sample_index) as counter.

    Returns:
        [R] float64 with 53 random bits.
    """
    key = np.array([own.seed for own in params], dtype=np.uint64)
    counter = np.zeros((4, len(params)), dtype=np.uint64)
    counter[0] = [own.position for own in params]
    counter[1] = [own.sample_index for own in params]
    words = philox(counter, np.stack((key & _MASK, key >> _SHIFT)))
    bits = (words[0] << np.uint64(21)) ^ (words[1] >> np.uint64(11))
    draws: np.ndarray = bits.astype(np.float64) * 2.0**-53
    return draws
