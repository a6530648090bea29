"""Sampling with the GPU's kernels: each row's settings to the device, its token back into the kernels' own buffer.

A draw is the argmax of logit + temperature * Gumbel noise, which is a function of (seed, sample_index, position, token
id) alone.  The draws are others than those of `model.sampler`, which inverts the cumulative distribution.
"""

from collections.abc import Sequence

import torch

from kernels.fused import FusedKernels
from model.sampler import SamplingParams
from model.step_inputs import StepBuffer, needs_logits, write_draw


class FusedSampler:
    """Draws tokens from final hidden states.

    Args:
        kernels: the operations, with their buffers reserved.
        head: lm_head, [vocab_size, hidden].
    """

    def __init__(self, kernels: FusedKernels, head: torch.Tensor) -> None:
        self._kernels = kernels
        self._head = head

    def __call__(self, hidden: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
        """A token a row: [R, hidden] and R settings to [R] int64, in memory that the next step overwrites."""
        rows, device = len(params), hidden.device
        host = StepBuffer(rows, 0, torch.device("cpu"), pinned=device.type == "cuda")
        write_draw(host.inputs(rows), params)
        buffer = StepBuffer(rows, 0, device)
        buffer.words.copy_(host.words, non_blocking=True)
        inputs = buffer.inputs(rows)
        wanted = any(needs_logits(own) for own in params)
        logits = torch.empty(rows, len(self._head), dtype=torch.float32, device=device) if wanted else None
        tokens = self._kernels.sample(hidden, self._head, inputs.draw, inputs.live, logits)
        if logits is not None:
            self._kernels.sample_truncated(logits, inputs.draw, inputs.truncation, inputs.live)
        return tokens
