"""Which batch sizes and token counts get a CUDA graph, and the memory that graphs take.  Knows no GPU."""

from collections.abc import Sequence

import torch

from persimmon.model.config import PersimmonConfig

_BYTES_A_GRAPH = 4 << 20
"""An allowance for the driver's own record of a graph's launches; not yet measured on a GPU."""

MIXED_SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of tokens of steps with prompts that may get a graph; larger steps compute longer than the host launches."""


def default_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a graph: closest together where a padded row costs most, the largest being all sequences."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def guess_sizes(max_rows: int) -> list[int]:
    """Numbers of tokens of steps with guesses that are worth a graph: two at least, as of the sizes of decode steps."""
    return [size for size in default_sizes(max_rows) if size > 1] if max_rows else []


def mixed_sizes(max_num_batched_tokens: int) -> list[int]:
    """Numbers of tokens of steps with prompts that are worth a graph."""
    return [size for size in MIXED_SIZES if size <= max_num_batched_tokens]


def graph_bytes(
    config: PersimmonConfig,
    dtype: torch.dtype,
    sizes: Sequence[int],
    with_prompts: Sequence[int] = (),
    with_guesses: Sequence[int] = (),
) -> int:
    """What graphs take, an upper estimate; 0 for none.

    Per row of the largest batch its logits in float32; per token of the largest step the intermediate results, which
    all graphs share because only one runs at a time; per token of each step with prompts its final state; per graph the
    driver's record.

    Args:
        config: the network.
        dtype: that it computes in.
        sizes: batch sizes of decode steps with a graph, each of which has a second one for draws from few tokens.
        with_prompts: numbers of tokens of steps with prompts that have one.
        with_guesses: numbers of tokens of steps with guesses that have one, and a second one as decode steps.
    """
    if not sizes:
        return 0
    per_token = (10 * config.hidden_size + 2 * config.intermediate_size) * dtype.itemsize
    buffers = max(*sizes, *with_guesses, 0) * 4 * config.vocab_size
    buffers += max(*sizes, *with_prompts, *with_guesses, 0) * per_token
    states = sum(with_prompts) * config.hidden_size * dtype.itemsize
    graphs = len(sizes) + len(with_prompts) + len(with_guesses) + len({*sizes, *with_guesses})
    return buffers + states + graphs * _BYTES_A_GRAPH
