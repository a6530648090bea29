"""Sampling with the GPU's kernels: each row's settings to the device, its token back into the kernels' own buffer.

A draw is the argmax of logit + temperature * Gumbel noise, which is a function of only (seed, sample_index, position,
token id). The draws differ from those of `persimmon.model.sampler`, which inverts the cumulative distribution.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from persimmon.kernels.fused import FusedKernels
from persimmon.kernels.fused_weight import GpuWeight
from persimmon.kernels.launch import upload
from persimmon.model.adjustments import adjust_
from persimmon.model.persimmon import Persimmon
from persimmon.model.row_sampling import RowSampling
from persimmon.model.sampler import Samples, row_logprobs
from persimmon.model.step_inputs import StepBuffer, StepInputs, needs_another_draw, needs_logits, write_draw

Gather = Callable[[torch.Tensor], torch.Tensor | None]
"""[R, hidden] states to [R, vocab_size] float32 logits, of which each rank makes a part; None on all but the first."""


class FusedSampler:
    """Draws tokens from final hidden states.

    Args:
        kernels: the operations, with their buffers reserved.
        head: lm_head, of shape (vocab_size, hidden).
        vocab_size: of the network.
        gather: where ranks share the network, of whose lm_head `head` is a part.
    """

    def __init__(
        self, kernels: FusedKernels, head: GpuWeight, vocab_size: int | None = None, gather: Gather | None = None
    ) -> None:
        self._kernels = kernels
        self._head = head
        self._vocab_size = vocab_size or head.shape[0]
        self._gather = gather

    def __call__(self, hidden: torch.Tensor, params: Sequence[RowSampling]) -> Samples:
        """Draws one token per row: [R, hidden] and R settings to tokens in memory that the next step overwrites."""
        rows, device = len(params), hidden.device
        host = StepBuffer(rows, 0, torch.device("cpu"), pinned=device.type == "cuda")
        write_draw(host.inputs(rows), params)
        buffer = StepBuffer(rows, 0, device)
        buffer.words.copy_(host.words, non_blocking=True)
        inputs = buffer.inputs(rows)
        wanted = any(needs_logits(own) for own in params)
        logits = torch.empty(rows, self._vocab_size, dtype=torch.float32, device=device) if wanted else None
        draw_tokens(self._kernels, self._head, self._gather, hidden, inputs, logits)
        if logits is None:
            return Samples(self._kernels.sampled[:rows])
        redraw = partial(self._kernels.sample_truncated, logits, inputs.draw, inputs.truncation, inputs.live)
        return finish_draw(self._kernels, logits, params, redraw)


def gather_of(model: Persimmon) -> Gather | None:
    """How a network's logits are gathered; None where this rank is the only one."""
    ranks = model.ranks
    if ranks is None:
        return None
    draws = ranks.shard.rank == 0

    def gather(hidden: torch.Tensor) -> torch.Tensor | None:
        logits = model.logits(hidden)
        return logits if draws else None

    return gather


def draw_tokens(
    kernels: FusedKernels,
    head: GpuWeight,
    gather: Gather | None,
    hidden: torch.Tensor,
    inputs: StepInputs,
    logits: torch.Tensor | None,
) -> None:
    """Draws a token a row into the kernels' buffer: while lm_head is multiplied, or from gathered logits.

    Args:
        kernels: the operations.
        head: lm_head, or this rank's part of it.
        gather: see `Gather`; None where this rank is the only one.
        hidden: [R, hidden].
        inputs: how each row draws.
        logits: [R, vocab_size] float32, written for rows that want theirs; None when none does.
    """
    if gather is None:
        kernels.sample(hidden, head, inputs.draw, inputs.live, logits)
        return
    gathered = gather(hidden)
    if gathered is None:
        return
    if logits is not None:
        logits.copy_(gathered)
    kernels.sample_logits(gathered, inputs.draw, inputs.live)


def finish_draw(
    kernels: FusedKernels, logits: torch.Tensor, params: Sequence[RowSampling], redraw: Callable[[], object]
) -> Samples:
    """What cannot be done while logits are computed, after `FusedKernels.sample`: changes, truncation, reports.

    Args:
        kernels: with the step's tokens in their buffer.
        logits: [R, vocab_size] float32, written for the rows that `needs_logits`; these are changed.
        params: R of them.
        redraw: draws the rows anew that `needs_another_draw`, see `FusedKernels.sample_truncated`.
    """
    reported = [row for row, own in enumerate(params) if own.asked.logprobs is not None]
    adjusted = [row for row, own in enumerate(params) if own.adjusts]
    unchanged = None
    if adjusted:
        if reported:
            # Log-probabilities are those of the logits as the network made them.
            unchanged = logits[upload(np.array(reported), logits.device)]
        adjust_(logits, params, kernels.penalize)
    if any(needs_another_draw(own) for own in params):
        redraw()
    tokens = kernels.sampled[: len(params)]
    if not reported:
        return Samples(tokens)
    if unchanged is None:
        return Samples(tokens, reported, row_logprobs(logits, tokens, params, reported))
    own_tokens = tokens[upload(np.array(reported), logits.device)]
    own_params = [params[row] for row in reported]
    return Samples(tokens, reported, row_logprobs(unchanged, own_tokens, own_params, range(len(reported))))
