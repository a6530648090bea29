"""What tests call on every rank.  Imports little, because each process of a rank imports it."""

from pathlib import Path
from typing import Any

import torch

from persimmon.kernels import reference
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.executor import TorchExecutor
from persimmon.model.following_runner import FollowingRunner
from persimmon.model.kv_cache import KVCache
from persimmon.model.persimmon import Persimmon
from persimmon.model.ranks import ONE_SHOT_BYTES, DistributedRanks
from persimmon.model.runner import Runner, SequenceInput
from tests.model.rows import row_with

CPU = torch.device("cpu")


def exchange(ranks: DistributedRanks, config: PersimmonConfig) -> dict[str, Any]:
    """Sums of few and of many numbers, gathered logits and a broadcast, of numbers that only this rank has."""
    generator = torch.Generator().manual_seed(ranks.shard.rank)
    few, many = (torch.randn(rows, 48, generator=generator) for rows in (3, 1 + ONE_SHOT_BYTES // (4 * 48)))
    logits = torch.randn(5, len(ranks.shard.vocabulary(config)), generator=generator)
    results: dict[str, Any] = {"few": few, "many": many, "logits": logits}
    for name, call in {
        "sum of few": lambda: ranks.sum(few.clone()),
        "sum of many": lambda: ranks.sum(many.clone()),
        "gathered": lambda: ranks.gather(logits, config),
        "broadcast": lambda: ranks.broadcast(torch.full((4,), ranks.shard.rank)),
    }.items():
        before = ranks.bytes_sent
        results[name] = call()
        results[f"{name}, bytes"] = ranks.bytes_sent - before
    return results


def plain_torch_logits(ranks: DistributedRanks, folder: Path, prompt: list[int]) -> torch.Tensor:
    """Of a prompt and of a token after it, by the operations in plain torch."""
    config = PersimmonConfig.from_folder(folder)
    parameters = Checkpoint.open(folder, config).parameters(shard=ranks.shard)
    model = Persimmon(config, parameters, torch.float32, CPU, reference, ranks=ranks)
    cache = KVCache.allocate(config, 8, 16, torch.float32, CPU, ranks.shard)
    executor = TorchExecutor(reference).start(model, cache)
    runner = Runner(executor) if ranks.shard.rank == 0 else FollowingRunner(executor)
    steps = [SequenceInput(prompt, 0, [2, 0], (row_with(),)), SequenceInput([7], len(prompt), [2, 0], (row_with(),))]
    return torch.cat([runner.logits([step]) for step in steps])
