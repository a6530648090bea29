"""Which batch sizes get a CUDA graph of their own, and what the graphs take.  Knows no GPU."""

from collections.abc import Sequence

import torch

from persimmon.model.config import PersimmonConfig

_BYTES_A_GRAPH = 4 << 20
"""An allowance for the driver's own record of a graph's launches; not yet measured on a GPU."""


def default_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a graph: closest together where a padded row costs most, the largest being all sequences."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def graph_bytes(config: PersimmonConfig, dtype: torch.dtype, sizes: Sequence[int]) -> int:
    """What decode graphs of these sizes take, an upper estimate; 0 for none.

    Per row of the largest its logits in float32 and one step's intermediate results, which all graphs share because
    only one runs at a time; per graph the driver's record.
    """
    if not sizes:
        return 0
    per_row = (10 * config.hidden_size + 2 * config.intermediate_size) * dtype.itemsize
    return max(sizes) * (4 * config.vocab_size + per_row) + len(sizes) * _BYTES_A_GRAPH
