"""Runs a step: plain lists of tokens and blocks in, sampled tokens out.

Turns them into device tensors, runs the network and samples.  Knows nothing of requests or of why these sequences
run together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from kernels import Kernels
from kernels.launch import upload
from model.kv_cache import KVCache
from model.persimmon import Persimmon, Step
from model.sampler import SamplingParams, sample


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """One sequence's part of a step.

    Attributes:
        token_ids: the tokens to compute, at least one.  A negative one, -1 - i, stands for the token that the i-th
            sampling sequence of the step before this one got.
        start: position of the first of them; all before it are in the cache.
        block_table: the blocks that hold the sequence, those for these tokens included.
        sampling: how the next token is drawn; None when these tokens are not the last known ones.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    sampling: SamplingParams | None


class PendingTokens:
    """Tokens that a step has been asked for; the device may still be computing them.

    Args:
        tokens: [R] int64 on the host; on a GPU pinned memory that a copy is on its way to.
        copied: the event after that copy; None when nothing is to be waited for.
    """

    def __init__(self, tokens: torch.Tensor, copied: torch.cuda.Event | None = None) -> None:
        self._tokens = tokens
        self._copied = copied

    def wait(self) -> list[int]:
        """The tokens, as soon as they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens: list[int] = self._tokens.tolist()
        return tokens


class Sampler(Protocol):
    """Final hidden states to tokens."""

    def __call__(self, hidden: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
        """A token a row: [R, hidden] and R settings to [R] int64 on the same device."""
        ...


class DecodeSteps(Protocol):
    """A faster way for steps in which every sequence has one token and samples."""

    @property
    def sampled(self) -> torch.Tensor:
        """[*] int64 on the device: the tokens of the last step, which the next may begin with."""
        ...

    def takes(self, rows: int) -> bool:
        """Whether it runs steps of so many sequences."""
        ...

    def launch(self, batch: Sequence[SequenceInput]) -> torch.Tensor:
        """Starts a step; [R] int64 tokens on the device, which are also the first of `sampled`."""
        ...


class Runner:
    """The network, its cache and the sampler on one device.

    Args:
        model: the network.
        cache: its keys and values.
        kernels: the operations `model` was prepared for.
        sampler: draws tokens; by default from the logits, with `model.sampler.sample`.
        decode_steps: runs the decode steps that it takes; by default they run like all others.
    """

    def __init__(
        self,
        model: Persimmon,
        cache: KVCache,
        kernels: Kernels[Any],
        sampler: Sampler | None = None,
        decode_steps: DecodeSteps | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._kernels = kernels
        self._sampler = sampler or self._sample_logits
        self._decode_steps = decode_steps
        self._sampled = decode_steps.sampled if decode_steps else torch.zeros(0, dtype=torch.int64, device=cache.device)

    def run(self, batch: Sequence[SequenceInput]) -> list[int]:
        """Runs one step.

        Returns:
            A token for each sequence whose `sampling` is set, in the order of the batch.
        """
        return self.launch(batch).wait()

    @torch.inference_mode()
    def launch(self, batch: Sequence[SequenceInput]) -> PendingTokens:
        """Starts one step without waiting for a GPU to end it; the next may be started at once.

        Returns:
            What `run` returns, later.
        """
        if self._decode_steps is not None and self._decode_steps.takes(len(batch)) and _is_decode(batch):
            return self._fetch(self._decode_steps.launch(batch))
        # Single tokens first and by length, as `plan_attention` wants them.
        order = sorted(range(len(batch)), key=lambda i: (len(batch[i].token_ids) != 1, batch[i].start))
        inputs = [batch[i] for i in order]
        step, sampled_at = self._step(inputs)
        hidden = self._model.forward(step, self._cache)
        if not sampled_at:
            return PendingTokens(torch.empty(0, dtype=torch.int64))
        tokens = self._sampler(hidden, [own for item in inputs if (own := item.sampling) is not None])
        places = [order[i] for i in sampled_at]
        by_place = sorted(range(len(places)), key=places.__getitem__)
        if by_place != list(range(len(places))):
            tokens = tokens[upload(np.array(by_place), tokens.device)]
        if self._decode_steps is None:
            self._sampled = tokens
        else:
            self._sampled[: len(tokens)] = tokens
        return self._fetch(tokens)

    @torch.inference_mode()
    def logits(self, batch: Sequence[SequenceInput]) -> torch.Tensor:
        """Runs one step and returns the logits instead of sampling; the batch must be in the order `run` would use.

        Returns:
            [R, vocab_size] float32, a row for each sequence whose `sampling` is set.
        """
        step, _ = self._step(batch)
        return self._model.logits(self._model.forward(step, self._cache))

    def _sample_logits(self, hidden: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
        return sample(self._model.logits(hidden), params)

    def _fetch(self, tokens: torch.Tensor) -> PendingTokens:
        if tokens.device.type == "cpu":
            return PendingTokens(tokens.clone())
        on_host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        on_host.copy_(tokens, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return PendingTokens(on_host, copied)

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
            upload(np.array(token_ids, dtype=np.int64), device),
            attention,
            None if len(last_rows) == end else upload(np.array(last_rows, dtype=np.int64), device),
            self._sampled if min(token_ids) < 0 else None,
        )
        return step, sampled_at


def _is_decode(batch: Sequence[SequenceInput]) -> bool:
    return all(len(item.token_ids) == 1 and item.sampling is not None for item in batch)
