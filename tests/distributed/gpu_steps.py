"""The steps of a GPU, in Triton's interpreter, on one of several ranks.  Imports little, as `rank_functions`."""

from pathlib import Path
from typing import Any

import torch

from persimmon.kernels import StepLimits
from persimmon.kernels.fused import FusedKernels
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.following_runner import FollowingRunner
from persimmon.model.fused_executor import FusedExecutor
from persimmon.model.kv_cache import KVCache
from persimmon.model.persimmon import Persimmon
from persimmon.model.ranks import Ranks
from persimmon.model.runner import PromptLogprobs, Runner, SequenceInput
from persimmon.model.shard import ONLY
from tests.model.rows import row_with

CPU = torch.device("cpu")
NUM_BLOCKS, BLOCK_SIZE = 6, 16
GREEDY, DRAWN = row_with(), row_with(temperature=0.9, seed=3)
TRUNCATED = row_with(temperature=1.2, top_k=5, top_p=0.9, seed=7, logprobs=2)
PENALIZED = row_with(logit_bias={5: 2.0}, logprobs=1)
STEPS = [
    [
        SequenceInput(range(2, 8), 0, [0, 1], (GREEDY, DRAWN), PromptLogprobs(3, range(6, 9), top=2)),
        SequenceInput([9, 8], 0, [2], (TRUNCATED,)),
    ],
    # Tokens that only the first rank knows.
    [SequenceInput([-1], 6, [0, 1], (GREEDY,)), SequenceInput([-3], 2, [2], (DRAWN,))],
    [SequenceInput([7], 7, [0, 1], (PENALIZED,)), SequenceInput([4], 3, [2], (TRUNCATED,))],
    [SequenceInput([6, 9], 8, [0, 1], (GREEDY, DRAWN), guesses=1)],
]


def outcomes(ranks: Ranks | None, folder: Path, sizes: list[int], count: int) -> list[Any]:
    """What each of the first STEPS gives, launched anew or on the fixed buffers of graphs."""
    config, kernels = PersimmonConfig.from_folder(folder), FusedKernels(CPU)
    shard = ONLY if ranks is None else ranks.shard
    executor = FusedExecutor(kernels, sizes, sizes and [16], guesses=1)
    executor.reserve(
        StepLimits(
            max_num_seqs=4,
            max_num_batched_tokens=64,
            max_model_len=NUM_BLOCKS * BLOCK_SIZE,
            num_heads=shard.num_heads(config),
            head_dim=config.head_dim,
            hidden_size=config.hidden_size,
            intermediate_size=shard.intermediate_size(config),
            vocab_size=config.vocab_size,
        )
    )
    parameters = Checkpoint.open(folder, config).parameters(shard=shard)
    model = Persimmon(config, parameters, torch.float32, CPU, kernels, ranks=ranks)
    cache = KVCache.allocate(config, NUM_BLOCKS, BLOCK_SIZE, torch.float32, CPU, shard)
    executor.start(model, cache)
    if ranks is not None and ranks.shard.rank > 0:
        follower = FollowingRunner(executor)
        for step in STEPS[:count]:
            follower.launch(step)
        return []
    runner = Runner(executor)
    return [runner.launch(step).wait() for step in STEPS[:count]]
