"""Runs a step: plain lists of tokens and blocks in, sampled tokens out.

Turns them into device tensors, runs the network and samples.  Knows nothing of requests or of why these sequences
run together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels import Kernels
from model.kv_cache import KVCache
from model.persimmon import Persimmon, Step
from model.sampler import SamplingParams, sample


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """One sequence's part of a step.

    Attributes:
        token_ids: the tokens to compute, at least one.
        start: position of the first of them; all before it are in the cache.
        block_table: the blocks that hold the sequence, those for these tokens included.
        sampling: how the next token is drawn; None when these tokens are not the last known ones.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    sampling: SamplingParams | None


class Runner:
    """The network, its cache and the sampler on one device.

    Args:
        model: the network.
        cache: its keys and values.
        kernels: the operations `model` was prepared for.
    """

    def __init__(self, model: Persimmon, cache: KVCache, kernels: Kernels[Any]) -> None:
        self._model = model
        self._cache = cache
        self._kernels = kernels

    def run(self, batch: Sequence[SequenceInput]) -> list[int]:
        """Runs one step.

        Returns:
            A token for each sequence whose `sampling` is set, in the order of the batch.
        """
        # Single tokens first and by length, as `plan_attention` wants them.
        order = sorted(range(len(batch)), key=lambda i: (len(batch[i].token_ids) != 1, batch[i].start))
        inputs = [batch[i] for i in order]
        step, sampled_at = self._step(inputs)
        if not sampled_at:
            self._model.forward(step, self._cache)
            return []
        logits = self._model.logits(self._model.forward(step, self._cache))
        params = [inputs[i].sampling for i in sampled_at]
        with torch.inference_mode():
            tokens = sample(logits, [own for own in params if own is not None]).tolist()
        by_batch_place = sorted(zip((order[i] for i in sampled_at), tokens, strict=True))
        return [token for _, token in by_batch_place]

    def logits(self, batch: Sequence[SequenceInput]) -> torch.Tensor:
        """Runs one step and returns the logits instead of sampling; the batch must be in the order `run` would use.

        Returns:
            [R, vocab_size] float32, a row for each sequence whose `sampling` is set.
        """
        step, _ = self._step(batch)
        return self._model.logits(self._model.forward(step, self._cache))

    def _step(self, inputs: Sequence[SequenceInput]) -> tuple[Step, list[int]]:
        counts = [len(item.token_ids) for item in inputs]
        device = self._cache.device
        attention = self._kernels.plan_attention(
            [item.block_table for item in inputs],
            [item.start for item in inputs],
            counts,
            num_blocks=self._cache.num_blocks,
            num_heads=self._cache.num_heads,
            block_size=self._cache.block_size,
            dtype=self._cache.dtype,
            device=device,
        )
        token_ids = [token for item in inputs for token in item.token_ids]
        last_rows: list[int] = []
        sampled_at: list[int] = []
        end = 0
        for index, (item, count) in enumerate(zip(inputs, counts, strict=True)):
            end += count
            if item.sampling is not None:
                last_rows.append(end - 1)
                sampled_at.append(index)
        step = Step(
            torch.tensor(token_ids, dtype=torch.int64, device=device),
            attention,
            torch.tensor(last_rows, dtype=torch.int64, device=device),
        )
        return step, sampled_at
