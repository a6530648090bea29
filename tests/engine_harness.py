"""Scheduler, block pool and runner in one process, wired as the engine process wires them, without sockets.

Every KV row is NaN until a sequence writes it, so a kernel that reads what it must not read is found out.
"""

from collections import defaultdict, deque
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persimmon import kernels
from persimmon.kernels import Kernels
from persimmon.model.checkpoint import Checkpoint
from persimmon.model.config import PersimmonConfig
from persimmon.model.executor import executor_for
from persimmon.model.grammar import GrammarCompiler
from persimmon.model.kv_cache import KVCache
from persimmon.model.persimmon import Persimmon
from persimmon.model.runner import Runner
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.shard import ONLY
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.server.engine.blocks import BlockPool
from persimmon.server.engine.guesses import Speculation
from persimmon.server.engine.messages import EngineStats
from persimmon.server.engine.plan_runner import PlanRunner
from persimmon.server.engine.scheduler import Scheduler
from persimmon.server.engine.sequence import Sequence
from persimmon.server.engine.step_plan import StepPlan
from persimmon.server.engine.step_runner import LaunchedStep, StepRunner

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)


def load_model(
    folder: Path, dtype: torch.dtype = torch.float32, operations: Kernels[Any, Any] | None = None
) -> Persimmon:
    """A checkpoint's network on the CPU, with the operations that serve there unless others are given."""
    config = PersimmonConfig.from_folder(folder)
    checkpoint = Checkpoint.open(folder, config)
    return Persimmon(checkpoint.config, checkpoint.parameters(), dtype, CPU, operations or kernels.for_device(CPU))


def runner_of(model: Persimmon, cache: KVCache, operations: Kernels[Any, Any] | None = None) -> Runner:
    """Runs steps on the CPU, with the operations that the model was loaded with; what serves a CPU by default."""
    return Runner(executor_for(operations or kernels.for_device(CPU), CPU).start(model, cache))


def poisoned_cache(model: Persimmon, num_blocks: int, block_size: int, dtype: torch.dtype | None = None) -> KVCache:
    """A KV cache of a type, the model's by default, full of NaN; of int8 its scales are."""
    shard = ONLY if model.ranks is None else model.ranks.shard
    cache = KVCache.allocate(model.config, num_blocks, block_size, dtype or model.dtype, CPU, shard)
    for tensor in cache.tensors:
        tensor.fill_(-128 if tensor.dtype == torch.int8 else float("nan"))
    return cache


def blocks_for(lengths: Ids[int], block_size: int) -> int:
    """Blocks that sequences of these lengths fill or begin."""
    return sum(-(-length // block_size) for length in lengths)


@dataclass
class Reports:
    """What steps have reported of a sequence, in order."""

    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: list[float] = field(default_factory=list)


class Harness:
    """An engine that generates for its caller.

    Args:
        model: the network.
        num_blocks: KV blocks.
        block_size: tokens in a block.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: token budget of a step.
        prefix_caching: whether full blocks are found again.
        grammars: compiles the sequences' grammars.
        overlap: whether a step is planned and launched before the one before it is looked at, as on a GPU.
        operations: those that the model was loaded with; what serves a CPU by default.
        runner: runs the steps, with as many blocks; one on the CPU by default.
        typical_output: tokens that an answer is expected to have; with few, more sequences are preempted.
        cache_dtype: of keys and values; the model's by default.
        speculation: how next tokens are guessed; None for no guesses.
        guess_forced: whether what grammars force is guessed, too.
    """

    def __init__(
        self,
        model: Persimmon,
        *,
        num_blocks: int,
        block_size: int = 16,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 2048,
        prefix_caching: bool = False,
        grammars: GrammarCompiler | None = None,
        overlap: bool = False,
        operations: Kernels[Any, Any] | None = None,
        runner: Runner | None = None,
        typical_output: int = 256,
        cache_dtype: torch.dtype | None = None,
        speculation: Speculation | None = None,
        guess_forced: bool = False,
    ) -> None:
        if runner is None:
            runner = runner_of(model, poisoned_cache(model, num_blocks, block_size, cache_dtype), operations)
        self.pool = BlockPool(num_blocks, block_size, prefix_caching=prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=min(num_blocks * block_size, model.config.context_length),
            rope_limit=model.config.rope_limit,
            typical_output=typical_output,
            speculation=speculation,
            max_guess_rows=runner.max_guess_rows,
        )
        self.reports: defaultdict[Sequence, Reports] = defaultdict(Reports)
        """What the steps have reported of each sequence."""
        self._run: StepRunner = PlanRunner(runner, grammars, guess_forced=guess_forced)
        self._overlap = overlap
        self._under_way: deque[tuple[StepPlan, LaunchedStep]] = deque()
        self.failures: dict[Sequence, str] = {}
        """Why sequences could not go on."""

    def generate(
        self,
        prompts: Ids[list[int]],
        max_tokens: int,
        *,
        sampling: Ids[SamplingParams] | None = None,
        arrivals: Ids[int] | None = None,
    ) -> list[Sequence]:
        """Runs until all have finished, and checks that every block is free then.

        Args:
            prompts: token ids.
            max_tokens: new tokens for each.
            sampling: how each draws; greedily by default.
            arrivals: before which step each arrives, in any order; all before the first by default.

        Returns:
            The finished sequences, in the order of the prompts.
        """
        sequences = [
            Sequence(key=key, token_ids=list(prompt), max_tokens=max_tokens, sampling=own)
            for key, (prompt, own) in enumerate(
                zip(prompts, sampling if sampling is not None else [GREEDY] * len(prompts), strict=True)
            )
        ]
        self.run(sequences, arrivals)
        return sequences

    def run(self, sequences: Ids[Sequence], arrivals: Ids[int] | None = None) -> None:
        """Runs sequences until all have finished; see `generate`."""
        steps = arrivals if arrivals is not None else [0] * len(sequences)
        waiting = [sequence for _, sequence in sorted(zip(steps, sequences, strict=True), key=lambda pair: pair[0])]
        due = sorted(steps)
        step = 0
        while waiting or self.scheduler.has_work or self._under_way:
            while waiting and due[0] <= step:
                self._add(waiting.pop(0))
                del due[0]
            if self.scheduler.has_work or self._under_way:
                self._step()
            step += 1
        if self.pool.num_free != self.pool.num_blocks:
            raise AssertionError(f"{self.pool.num_blocks - self.pool.num_free} blocks are still held")

    def _add(self, sequence: Sequence) -> None:
        prepared = self._run.prepare(sequence)
        if prepared is not None:
            prepared.result()
        self.scheduler.add(sequence)

    def _step(self) -> None:
        plan = self.scheduler.plan_ahead() if self._under_way else self.scheduler.plan()
        if plan is None:
            self._end_oldest()
            plan = self.scheduler.plan()
        if plan.scheduled:
            self._under_way.append((plan, self._run.launch(plan)))
        while len(self._under_way) > (1 if self._overlap and plan.scheduled else 0):
            self._end_oldest()

    def _end_oldest(self) -> None:
        plan, launched = self._under_way.popleft()
        outcome = launched.wait()
        for place, item in enumerate(plan.scheduled):
            reports = self.reports[item.sequence]
            reports.prompt_logprobs += outcome.prompt_logprobs.get(place, [])
            reports.pooled += np.frombuffer(outcome.pooled.get(place, b""), dtype="<f4").tolist()
        for advance in self.scheduler.commit(plan, outcome.tokens):
            if advance.row in outcome.failures:
                self.failures[advance.sequence] = outcome.failures[advance.row]
                self.scheduler.abort(advance.sequence.key)
            elif advance.row in outcome.logprobs and advance.tokens:
                self.reports[advance.sequence].logprobs += outcome.logprobs[advance.row][: len(advance.tokens)]

    def outputs(self, prompts: Ids[list[int]], max_tokens: int, arrivals: Ids[int] | None = None) -> list[list[int]]:
        """Greedy continuations."""
        return [new_tokens(sequence) for sequence in self.generate(prompts, max_tokens, arrivals=arrivals)]

    @property
    def stats(self) -> EngineStats:
        """The scheduler's counts."""
        return self.scheduler.stats()


def new_tokens(sequence: Sequence) -> list[int]:
    """What was generated."""
    return sequence.token_ids[sequence.prompt_length :]
