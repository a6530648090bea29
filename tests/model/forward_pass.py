"""The network over one sequence, without a runner: what tests of the network and of its heads compare.

Knows nothing of what is made of the hidden states.
"""

import random
from collections.abc import Sequence

import torch

from persimmon import kernels
from persimmon.model.persimmon import Persimmon, Step
from tests.engine_harness import CPU, poisoned_cache


def hidden_states(model: Persimmon, token_ids: Sequence[int], chunk: int | None = None) -> torch.Tensor:
    """The final hidden state of every token, [T, hidden], on the CPU.

    Args:
        model: the network.
        token_ids: the sequence.
        chunk: tokens of a pass, the last of which may have fewer; None for all in one.
    """
    block_size = 16
    blocks = list(range(-(-len(token_ids) // block_size)))
    random.Random(1).shuffle(blocks)
    cache = poisoned_cache(model, len(blocks), block_size)
    rows = []
    for start in range(0, len(token_ids), chunk or len(token_ids)):
        part = token_ids[start : start + (chunk or len(token_ids))]
        attention = kernels.for_device(CPU).plan_attention(
            [blocks],
            [start],
            [len(part)],
            num_blocks=cache.num_blocks,
            num_heads=cache.num_heads,
            block_size=block_size,
            dtype=cache.dtype,
            device=CPU,
        )
        rows.append(model.forward(Step(torch.tensor(part), attention, None), cache))
    return torch.cat(rows)
