"""Gumbel draws, truncation and penalties in plain torch and numpy: what the sampling kernels are tested against.

Knows nothing of Triton, requests or scheduling; nothing here is fast.
"""

import numpy as np
import torch

from persimmon.kernels.operands import DrawInputs, PenaltyInputs, TruncationInputs

_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).

    Args:
        counter: [4, N] uint64, each below 2**32.
        key: [2, N] or [2, 1] uint64, each below 2**32.

    Returns:
        [4, N] uint64, each below 2**32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left = c0 * np.uint64(0xD2511F53)
        right = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (right >> _SHIFT) ^ c1 ^ k0, right & _WORD, (left >> _SHIFT) ^ c3 ^ k1, left & _WORD
        k0 = (k0 + np.uint64(0x9E3779B9)) & _WORD
        k1 = (k1 + np.uint64(0xBB67AE85)) & _WORD
    return np.stack((c0, c1, c2, c3))


def gumbel(seed: int, sample_index: int, position: int, vocab_size: int) -> np.ndarray:
    """The noise of every token id for one draw.

    Philox with the seed as key and (id // 4, position, sample_index, 0) as counter gives four words, of which the
    id's is number id % 4.  The word makes u in (0, 1), which float32 resolves finely near 0; -log(1 - u) is then an
    exponential variable with its small values, those that win draws, resolved as finely.  1 - u rounds, and what
    rounding took is added back: log1p in two operations.

    Returns:
        [vocab_size] float32, between -2.9 and 23.
    """
    groups = np.arange(-(-vocab_size // 4), dtype=np.uint64)
    counter = np.zeros((4, groups.size), dtype=np.uint64)
    counter[0], counter[1], counter[2] = groups, position, sample_index
    key = np.array([[seed & 0xFFFFFFFF], [seed >> 32]], dtype=np.uint64)
    words = philox(counter, key).T.reshape(-1)[:vocab_size]
    uniform = (words.astype(np.uint32).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    uniform = np.minimum(uniform, np.float32(1 - 2.0**-24))
    rest = np.float32(1) - uniform
    exponential = (uniform - (np.float32(1) - rest)) - np.log(rest)
    noise: np.ndarray = -np.log(exponential)
    return noise


def kept(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The tokens that a row may draw: min-p, then top-k, then top-p, each on what the one before kept.

    Tokens are ordered by their logit and, among equals, by id; each rule keeps a first part of that order.

    Args:
        logits: [vocab_size], no NaN.
        temperature: divides the logits before the softmax; 0 keeps only the highest.
        top_k, top_p, min_p: as in `TruncationInputs`.

    Returns:
        [vocab_size] bool.
    """
    exact = logits.double()
    best = exact.max()
    tempered = torch.where(exact == best, 0.0, (exact - best) / temperature if temperature > 0 else -np.inf)
    ordered, ids = exact.sort(descending=True, stable=True)
    del ordered
    tempered = tempered[ids]
    keep = tempered >= (np.log(min_p) if min_p > 0 else -np.inf)
    if top_k > 0:
        keep[top_k:] = False
    weights = torch.where(keep, tempered.exp(), 0.0)
    before = weights.cumsum(0) - weights
    if top_p < 1:
        keep &= before < top_p * weights.sum()
    keep[0] = True
    return torch.zeros_like(keep).scatter_(0, ids, keep)


def sample(
    logits: torch.Tensor, draw: DrawInputs, truncation: TruncationInputs | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token a row: the highest logit + temperature * Gumbel noise among those that the row keeps.

    That is a draw from softmax(logits / temperature) (the Gumbel-max trick), and for temperature 0 the most probable
    token.  A NaN counts as -inf; among equals the lowest id wins.

    Args:
        logits: [R, vocab_size] of any floating dtype.
        draw: R rows of it.
        truncation: R rows of it, or None where nothing is cut off; `active` does not matter here.

    Returns:
        tokens [R] int64, and their log-probabilities [R] float32 under softmax(logits): no temperature, nothing cut.
    """
    rows, vocab_size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    logprobs = torch.empty(rows)
    for row in range(rows):
        own = logits[row].float().nan_to_num(nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        temperature = float(draw.temperature[row])
        noise = gumbel(int(draw.seed[row]), int(draw.sample_index[row]), int(draw.position[row]), vocab_size)
        score = own + draw.temperature[row] * torch.from_numpy(noise)
        if truncation is not None:
            keep = kept(
                own,
                temperature,
                int(truncation.top_k[row]),
                float(truncation.top_p[row]),
                float(truncation.min_p[row]),
            )
            score[~keep] = -np.inf
        # numpy's argmax is the first of equals; torch promises no order.
        tokens[row] = int(score.numpy().argmax())
        logprobs[row] = own.double().log_softmax(0)[tokens[row]]
    return tokens, logprobs


def apply_penalties(logits: torch.Tensor, penalties: PenaltyInputs) -> None:
    """Lowers, in place, the logits of tokens that a row has seen.

    The repetition penalty of CTRL (Keskar et al., arXiv:1909.05858) first, with negative logits multiplied instead of
    divided; then OpenAI's frequency and presence penalties, which look only at the output.

    Args:
        logits: [R, vocab_size] float32.
        penalties: R rows of it.
    """
    for row in range(logits.shape[0]):
        begin, end = int(penalties.offsets[row]), int(penalties.offsets[row + 1])
        ids = penalties.token_ids[begin:end].long()
        counts = penalties.output_counts[begin:end]
        seen = logits[row, ids]
        seen = torch.where(seen > 0, seen / penalties.repetition[row], seen * penalties.repetition[row])
        seen -= penalties.frequency[row] * counts + penalties.presence[row] * (counts > 0)
        logits[row, ids] = seen
