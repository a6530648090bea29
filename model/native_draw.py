"""Draws on a CPU with the C kernels: settings of rows in the kernels' words.  Knows nothing of how they draw."""

from collections.abc import Sequence

import numpy as np
import torch

from persimmon.kernels.cpu import library
from persimmon.kernels.cpu.native import NativeKernels
from persimmon.model.row_sampling import RowSampling


class NativeDraw:
    """`persimmon.model.sampler.Draw` in C, as fast for a large vocabulary as it reads the logits.

    Args:
        kernels: draw.
    """

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels

    def __call__(self, logits: torch.Tensor, params: Sequence[RowSampling]) -> torch.Tensor:
        """A token a row: [R, vocab_size] float32 and R settings to [R] int64."""
        draws = np.zeros(len(params), dtype=library.DRAWS)
        # Zeros are a greedy draw.
        for row, own in enumerate(params):
            if not own.asked.greedy:
                draws[row] = (
                    own.asked.temperature,
                    own.asked.top_p,
                    own.asked.min_p,
                    own.asked.top_k,
                    own.asked.seed,
                    own.sample_index,
                    own.position,
                )
        return self._kernels.draw(logits, draws)
