"""Logits to tokens, each row by its own sequence's settings.

A draw depends on (seed, sample_index, position) and the row's own logits, never on the row's place in the batch: the
same request gives the same tokens whatever else runs, and again after a preemption.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from persimmon.kernels.launch import upload
from persimmon.kernels.reference_sampling import philox
from persimmon.model.adjustments import adjust_, penalize
from persimmon.model.logprobs import LogprobRows
from persimmon.model.row_sampling import RowSampling

_LOGITS_AT_ONCE = 2**23

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Samples:
    """What was drawn from R rows, on the device.

    Attributes:
        tokens: [R] int64.
        reported: the rows that asked for log-probabilities, in order.
        logprobs: theirs; None when no row asked.
    """

    tokens: torch.Tensor
    reported: Sequence[int] = ()
    logprobs: LogprobRows | None = None


Draw = Callable[[torch.Tensor, Sequence[RowSampling]], torch.Tensor]
"""A token a row, as its settings say, from final logits: [R, vocab_size] float32 and R settings to [R] int64."""


def draw(logits: torch.Tensor, params: Sequence[RowSampling]) -> torch.Tensor:
    """`Draw` in plain torch.

    Temperature, then min-p, top-k and top-p, each on what the one before kept, then the inverse of the cumulative
    distribution at `uniform`.
    """
    tokens = logits.argmax(-1)
    drawing = [row for row, own in enumerate(params) if not own.asked.greedy]
    at_once = rows_at_once(logits.shape[1])
    for begin in range(0, len(drawing), at_once):
        some = drawing[begin : begin + at_once]
        rows = upload(np.array(some), logits.device)
        tokens[rows] = _draw(logits.index_select(0, rows), [params[row] for row in some])
    return tokens


def sample(logits: torch.Tensor, params: Sequence[RowSampling], draw: Draw = draw) -> Samples:
    """One token a row, after what `persimmon.model.adjustments` changes.

    Log-probabilities are those of the logits as they are given.

    Args:
        logits: [R, vocab_size] float32; not changed.
        params: R of them.
        draw: draws the tokens.
    """
    tokens = draw(logits, params)
    adjusted = [row for row, own in enumerate(params) if own.adjusts]
    at_once = rows_at_once(logits.shape[1])
    for begin in range(0, len(adjusted), at_once):
        some = adjusted[begin : begin + at_once]
        rows = upload(np.array(some), logits.device)
        own_logits, own_params = logits.index_select(0, rows), [params[row] for row in some]
        adjust_(own_logits, own_params, penalize)
        tokens[rows] = draw(own_logits, own_params)
    reported = [row for row, own in enumerate(params) if own.asked.logprobs is not None]
    return Samples(tokens, reported, row_logprobs(logits, tokens, params, reported) if reported else None)


def row_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, params: Sequence[RowSampling], reported: Sequence[int]
) -> LogprobRows:
    """What some rows report of their tokens.

    Args:
        logits: [R, vocab_size] float32.
        tokens: [R] int64.
        params: R of them.
        reported: the rows, at least one.
    """
    top = max(params[row].asked.logprobs or 0 for row in reported)
    at_once = rows_at_once(logits.shape[1])
    parts = []
    for begin in range(0, len(reported), at_once):
        rows = upload(np.array(reported[begin : begin + at_once]), logits.device)
        parts.append(LogprobRows.of(logits.index_select(0, rows), tokens.index_select(0, rows), top))
    return LogprobRows.concatenate(parts)


def rows_at_once(vocab_size: int) -> int:
    """Rows that draw together: a draw takes many times its logits' memory, which is 1 MiB a row of 262,144."""
    return max(1, _LOGITS_AT_ONCE // vocab_size)


def _draw(logits: torch.Tensor, params: Sequence[RowSampling]) -> torch.Tensor:
    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    best = logits.argmax(-1)
    # The highest logit becomes 0 first: dividing by a tiny temperature would overflow otherwise.
    logits = (logits - logits.gather(1, best[:, None])) / column([own.asked.temperature for own in params])
    if any(own.asked.min_p > 0 for own in params):
        logits.masked_fill_(logits < column([own.asked.min_p for own in params]).log(), float("-inf"))
    truncated = [row for row, own in enumerate(params) if own.asked.truncates]
    if truncated:
        rows = torch.tensor(truncated, device=logits.device)
        logits[rows] = _truncate(logits[rows], [params[row] for row in truncated])
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    target = torch.from_numpy(uniform(params)).to(logits.device)[:, None] * cumulative[:, -1:]
    # The first token whose cumulative probability passes the target; a token of probability 0 never does.
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # Only a row of NaN has none.
    return torch.where(drawn < logits.shape[1], drawn, best)


def _truncate(logits: torch.Tensor, params: Sequence[RowSampling]) -> torch.Tensor:
    """Top-k, then top-p over what it kept; the rest becomes -inf.  Among equal logits the lowest id is kept."""
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    top_k = torch.tensor([own.asked.top_k or logits.shape[1] for own in params], device=logits.device)[:, None]
    ordered.masked_fill_(rank >= top_k, float("-inf"))
    probabilities = ordered.softmax(-1, dtype=torch.float64)
    before = probabilities.cumsum(-1) - probabilities
    top_p = torch.tensor([own.asked.top_p for own in params], dtype=torch.float64, device=logits.device)[:, None]
    # The token that reaches top_p is kept; top_p = 1 keeps all, rounding notwithstanding.
    ordered.masked_fill_((before >= top_p) & (top_p < 1) & (rank > 0), float("-inf"))
    return torch.empty_like(logits).scatter_(1, ids, ordered)


def uniform(params: Sequence[RowSampling]) -> np.ndarray:
    """One number in [0, 1) a row, from Philox4x32-10 with the seed as key and (position, sample_index) as counter.

    Returns:
        [R] float64 with 53 random bits.
    """
    key = np.array([own.asked.seed for own in params], dtype=np.uint64)
    counter = np.zeros((4, len(params)), dtype=np.uint64)
    counter[0] = [own.position for own in params]
    counter[1] = [own.sample_index for own in params]
    words = philox(counter, np.stack((key & _MASK, key >> _SHIFT)))
    bits = (words[0] << np.uint64(21)) ^ (words[1] >> np.uint64(11))
    draws: np.ndarray = bits.astype(np.float64) * 2.0**-53
    return draws
