"""What a request changes in the network's logits before a token is drawn from them.

Biases come first, then penalties, then banned tokens and tokens that a grammar does not allow, which no bias can bring
back. vLLM bans first; the logits are the same, because a ban is minus infinity, which biases and penalties do not
change.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from persimmon.kernels.launch import upload
from persimmon.kernels.operands import PenaltyInputs
from persimmon.model.row_sampling import RowSampling

Penalize = Callable[[torch.Tensor, PenaltyInputs], None]
"""Lowers, in place, the [R, vocab_size] float32 logits of tokens that a row has seen."""


def adjust_(logits: torch.Tensor, params: Sequence[RowSampling], penalize: Penalize) -> None:
    """Changes logits in place as their rows ask for: biases, penalties, bans, then masks of grammars.

    Args:
        logits: [R, vocab_size] float32.
        params: R of them.
        penalize: applies the penalties.
    """
    biased = [(row, token, bias) for row, own in enumerate(params) for token, bias in own.asked.logit_bias.items()]
    if biased:
        rows, tokens, biases = zip(*biased, strict=True)
        # A row has each id at most once, so the order of addition does not matter.
        logits.view(-1).index_add_(0, _places(rows, tokens, logits), _column(biases, logits.device))
    if any(own.seen is not None for own in params):
        penalize(logits, _penalties(params, logits.device))
    banned = [(row, token) for row, own in enumerate(params) for token in own.banned]
    if banned:
        rows, tokens = zip(*banned, strict=True)
        logits.view(-1).index_fill_(0, _places(rows, tokens, logits), float("-inf"))
    constrained = [row for row, own in enumerate(params) if own.allowed is not None]
    if constrained:
        words = np.stack([allowed() for own in params if (allowed := own.allowed) is not None])
        places = upload(np.array(constrained), logits.device)
        mask = _unpacked(words, logits.shape[1], logits.device)
        logits[places] = logits[places].masked_fill_(~mask, float("-inf"))


def penalize(logits: torch.Tensor, penalties: PenaltyInputs) -> None:
    """Penalties in plain torch, all rows at once; the maths is `reference_sampling.apply_penalties`.

    Args:
        logits: [R, vocab_size] float32, changed in place.
        penalties: R rows of it.
    """
    sizes = penalties.offsets.diff().long()
    rows = torch.repeat_interleave(torch.arange(len(sizes), device=logits.device), sizes)
    ids, counts = penalties.token_ids.long(), penalties.output_counts
    seen, repetition = logits[rows, ids], penalties.repetition[rows]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen -= penalties.frequency[rows] * counts + penalties.presence[rows] * (counts > 0)
    logits[rows, ids] = seen


def _penalties(params: Sequence[RowSampling], device: torch.device) -> PenaltyInputs:
    seen = [own.seen for own in params]
    sizes = [0 if own is None else len(own.token_ids) for own in seen]
    empty = np.empty(0, dtype=np.int32)
    return PenaltyInputs(
        offsets=upload(np.cumsum([0, *sizes], dtype=np.int32), device),
        token_ids=upload(np.concatenate([empty, *(own.token_ids for own in seen if own is not None)]), device),
        output_counts=upload(np.concatenate([empty, *(own.output_counts for own in seen if own is not None)]), device),
        repetition=_column([own.asked.repetition_penalty for own in params], device),
        frequency=_column([own.asked.frequency_penalty for own in params], device),
        presence=_column([own.asked.presence_penalty for own in params], device),
    )


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return upload(np.array(values, dtype=np.float32), device)


def _places(rows: Sequence[int], tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
    """Where tokens of rows lie in the flattened logits."""
    places = np.array(rows, dtype=np.int64) * logits.shape[1] + np.array(tokens, dtype=np.int64)
    return upload(places, logits.device)


def _unpacked(words: np.ndarray, vocab_size: int, device: torch.device) -> torch.Tensor:
    """[R, ceil(vocab_size / 32)] int32 words of bits, lowest first, as [R, vocab_size] bool."""
    if device.type == "cpu":
        bits = np.unpackbits(words.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    spread = upload(words, device)[:, :, None] >> torch.arange(32, dtype=torch.int32, device=device)
    return (spread & 1).view(len(words), -1)[:, :vocab_size].bool()
