"""Start of the engine: checkpoint, memory plan, weights, KV cache, warm-up, each shown on the console with its seconds.

With core.py the only part of the server that imports torch, and like it runs only in the engine process.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from persimmon.kernels.cache_types import cache_choice
from persimmon.model.config import PersimmonConfig
from persimmon.model.executor import Executor
from persimmon.model.graph_sizes import MIXED_SIZES
from persimmon.model.kv_cache import block_bytes
from persimmon.model.memory import MemoryPlan, available_memory, plan_memory
from persimmon.model.patches import PatchSpan
from persimmon.model.quantization.scheme import described
from persimmon.model.ranks import DistributedRanks
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import PooledStates, PromptLogprobs, Report, Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.shard import Shard
from persimmon.model.sizes import readable
from persimmon.model.token_counts import TokenCounts
from persimmon.server.engine.followers import Followers, LeadingRunner
from persimmon.server.engine.guess_memory import guess_bytes
from persimmon.server.engine.image_spans import held_bytes
from persimmon.server.engine.model_build import build, phase, table_bytes
from persimmon.server.engine.model_setup import ModelSetup, serving_device, set_up
from persimmon.server.engine.rank_cores import cores_of_ranks
from persimmon.server.memory_need import ENGINE_GROWTH_BYTES, still_to_be_taken, within_share
from persimmon.server.runtime_folder import runtime_folder
from persimmon.server.settings.engine import EngineSettings
from persimmon.server.settings.speculation import SpeculativeConfig


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A runner that has run once, and what it runs on.

    Attributes:
        runner, plan, dtype, executor: of the model.
        weights: how they are quantized, for people.
        speculation: how next tokens are guessed; None for only what grammars force.
        followers: the other ranks; None where there are none.
    """

    runner: Runner
    plan: MemoryPlan
    dtype: torch.dtype
    executor: Executor
    weights: str
    speculation: SpeculativeConfig | None
    followers: Followers | None = None

    @property
    def device(self) -> str:
        """What computes, for people."""
        ranks = 1 if self.followers is None else 1 + len(self.followers)
        return self.executor.name if ranks == 1 else f"{self.executor.name}, {ranks} ranks"


def load_model(
    settings: EngineSettings, folder: Path, print_line: Callable[[str], None], memory_share: int | None = None
) -> LoadedModel:
    """Loads a checkpoint and makes it ready to serve.

    With several ranks it starts the others, which end with this process; see `Followers`.

    Args:
        settings: of the engine.
        folder: the checkpoint's.
        print_line: takes one line of progress for the console.
        memory_share: bytes of the host's memory that all ranks may plan with on a CPU; None for all that is free.

    Raises:
        CheckpointError: the checkpoint is damaged or not Persimmon's, or cannot be divided among the ranks.
        KernelsUnavailableError: this machine cannot compute it, or not as asked.
        MemoryPlanError: it does not fit as asked.
        RankLostError: another rank has ended before it was ready.
    """
    ranks = settings.tensor_parallel_size
    own, *others = cores_of_ranks(ranks, serving_device(Shard(0, ranks)))
    if not others:
        own.take()
        return _load(settings, folder, print_line, memory_share)
    with runtime_folder() as meeting_place:
        followers = Followers(settings, folder, cores=others, rendezvous=meeting_place / "ranks")
        try:
            own.take()
            return _load(settings, folder, print_line, memory_share, followers)
        except BaseException:
            followers.close()
            raise


def _load(
    settings: EngineSettings,
    folder: Path,
    print_line: Callable[[str], None],
    memory_share: int | None,
    followers: Followers | None = None,
) -> LoadedModel:
    with phase("checkpoint", print_line):
        setup = set_up(settings, folder, Shard(0, settings.tensor_parallel_size))
    for note in () if setup.checkpoint is None else setup.checkpoint.notes:
        print_line(f"  {'':<12} {note}")
    others_free = None if followers is None else followers.agree(setup.agreement)
    looks_up = setup.speculation is not None and setup.speculation.method != "off"
    longest = settings.max_model_len or setup.config.context_length
    for_guesses = guess_bytes(settings.max_num_seqs, longest) if looks_up else 0
    for_images = held_bytes(setup.config.vision, longest)
    plan = _plan(settings, setup, for_guesses + for_images, others_free, memory_share)
    weights = described(setup.stored, setup.config)
    _print_plan(plan, setup, weights, print_line)
    if for_guesses:
        print_line(f"               guesses take up to {readable(for_guesses)} more while sequences run")
    if for_images:
        print_line(f"               images take up to {readable(for_images)} more while sequences wait and run")
    if setup.table is not None:
        print_line(f"               the embedding, {readable(table_bytes(setup))}, stays in its file")
        if setup.formats and isinstance(setup.table, torch.Tensor):  # which --quantization rounds otherwise
            weights = f"{str(setup.table.dtype).removeprefix('torch.')} embedding, {weights}"
    ranks = None
    if followers is not None:
        followers.build(plan)
        ranks = DistributedRanks.join(setup.shard, followers.rendezvous, setup.device)
    executor = build(settings, setup, plan, ranks, print_line)
    runner = Runner(executor) if followers is None else LeadingRunner(executor, followers)
    with phase("warm-up", print_line):
        for batch in warm_up_steps(plan, settings, setup.config, compiles=executor.compiles):
            runner.run(batch)
    return LoadedModel(
        runner=runner,
        plan=plan,
        dtype=setup.dtype,
        executor=executor,
        weights=weights,
        speculation=setup.speculation,
        followers=followers,
    )


def _plan(
    settings: EngineSettings,
    setup: ModelSetup,
    for_requests: int,
    others_free: int | None,
    memory_share: int | None,
) -> MemoryPlan:
    """The plan for all ranks.

    Args:
        settings: of the engine.
        setup: of the first rank.
        for_requests: bytes of the host's memory that guesses and images may take.
        others_free: of the other ranks the fewest bytes that one may use of its GPU; None where that has no say.
        memory_share: as `load_model` has it.
    """
    config, device, operations, ranks = setup.config, setup.device, setup.kernels, setup.shard.size
    reserved = still_to_be_taken(config, settings.api_workers, settings.max_body_size) + for_requests
    reserved += (ranks - 1) * ENGINE_GROWTH_BYTES
    left = within_share(available_memory(device, settings.gpu_memory_utilization, reserved), memory_share, for_requests)
    limits = setup.limits(settings, settings.max_model_len or config.context_length)
    return plan_memory(
        config,
        available=left.bytes if others_free is None else ranks * min(left.bytes, others_free),
        limited_by="--gpu-memory-utilization of the GPU's" if device.type == "cuda" else left,
        dtype=setup.dtype,
        device=device,
        block_size=settings.block_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        kv_cache_bytes=settings.kv_cache_memory,
        step_buffers=ranks * setup.executor.step_buffers(config, setup.dtype, limits),
        weight_bytes=operations.weight_bytes,
        tied_bytes=operations.tied_bytes,
        stored=setup.stored,
        embedding_in_file=setup.table is not None,
        cache_dtypes=setup.cache_dtypes,
        ranks=ranks,
    )


def warm_up_steps(
    plan: MemoryPlan, settings: EngineSettings, config: PersimmonConfig, *, compiles: bool
) -> Iterator[list[SequenceInput]]:
    """Steps that do once what serving does: prompts, decodes, draws, reports, and several of them together.

    All sequences of a batch share the first blocks, which no sequence holds yet, since their content is not read.

    Args:
        plan: of the memory.
        settings: of the server, for its limits.
        config: the network, which generates or classifies.
        compiles: whether each kind of step is compiled when it first runs, as on a GPU: then it takes one of every
            kind, so that no request waits for that.
    """
    budget, most = settings.max_num_batched_tokens, settings.max_num_seqs
    longest = min(plan.max_model_len, plan.kv_tokens) - 1
    greedy = RowSampling(asked=SamplingParams(temperature=0.0))
    drawn = RowSampling(asked=SamplingParams(temperature=1.0, top_p=0.9))

    def chunk(
        length: int, start: int = 0, sampling: RowSampling = greedy, report: Report | None = None
    ) -> SequenceInput:
        table = _first_blocks(start + length, plan)
        if config.generates:
            return SequenceInput(
                token_ids=[0] * length, start=start, block_table=table, samplings=[sampling], report=report
            )
        last = PooledStates(range(length - 1, length), total=False, scores=True)
        return SequenceInput(
            token_ids=[0] * length, start=start, block_table=table, samplings=(), report=report or last
        )

    def together(tokens: int) -> list[SequenceInput]:
        """Chunks that hold about `tokens` tokens in total: several where one may not be that long."""
        length = min(longest, budget, tokens)
        return [chunk(length)] * max(1, min(most, budget // length, -(-tokens // length)))

    # One of every range of lengths and batch sizes that kernels are compiled for, and a length that no graph holds.
    ranges = (20, 40, 80, MIXED_SIZES[-1] + 1) if compiles else (20,)
    lengths = [min(longest, budget, length) for length in ranges]
    sizes = [size for size in (1, 9, 17, 33, 65, 257) if size <= most] if compiles else [1]
    for tokens in ranges:
        yield together(tokens)
    for size in sizes:
        length = min(longest, budget // size, 2)
        yield [chunk(length)] * size
        yield [chunk(1, length, drawn)] * size
    if most > 1:
        length = min(longest, budget - 1, 20)
        yield [chunk(1, length, drawn), chunk(length)]
    for length in lengths:
        every_token = range(length)
        yield [chunk(length, report=PooledStates(every_token, total=True))]
        if config.generates:
            yield [chunk(length, report=PromptLogprobs(0, [0] * length, top=1))]
        else:
            yield [chunk(length, report=PooledStates(every_token, total=False, scores=True))]
    if config.vision is not None:
        # Without the statistics of the embedding kernel, which not all rows come from.
        for length in (*lengths, 1):
            pixels = np.zeros((length, config.vision.patch_numbers), dtype=np.uint8)
            yield [replace(chunk(length), patches=[PatchSpan(0, pixels)])]
    if compiles and config.rope_limit is not None:
        # Angles by token, of a chunk and of a single token, and of single tokens next to a chunk.
        prompt_length = config.rope_limit + 2

        def long(length: int) -> SequenceInput:
            table = _first_blocks(length, plan)
            return SequenceInput(
                token_ids=[0] * length, start=0, block_table=table, samplings=(), prompt_length=prompt_length
            )

        for length in (*lengths, 1):
            yield [long(length)]
        if most > 1:
            yield [chunk(1), long(min(longest, budget - 1, 20))]
    for size in sizes if config.generates else ():
        length = min(longest, budget // size, 2)
        yield [chunk(length, sampling=_adjusted(config))] * size
        yield [chunk(1, length, _adjusted(config))] * size


def _adjusted(config: PersimmonConfig) -> RowSampling:
    """A draw from logits that everything has changed which may, with a report."""
    words = np.full(-(-config.vocab_size // 32), -1, dtype=np.int32)
    asked = SamplingParams(
        temperature=1.0,
        top_k=2,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={0: 1.0},
        logprobs=1,
    )
    return RowSampling(asked=asked, seen=TokenCounts([0]), banned=(0,), allowed=lambda: words)


def _first_blocks(tokens: int, plan: MemoryPlan) -> list[int]:
    return list(range(-(-tokens // plan.block_size)))


def _print_plan(plan: MemoryPlan, setup: ModelSetup, weights: str, print_line: Callable[[str], None]) -> None:
    config = setup.config
    parts = {
        f"weights ({weights})" if weights else "weights": plan.weights,
        "activations": plan.activations,
        **({"step buffers": plan.step_buffers} if plan.step_buffers else {}),
        "KV cache": plan.kv_cache,
    }
    print_line("  memory       " + ", ".join(f"{name} {readable(count)}" for name, count in parts.items()))
    print_line(
        f"               of {readable(plan.available)} available; {plan.num_blocks:,} KV blocks of {plan.block_size} "
        f"hold {plan.kv_tokens:,} tokens"
    )
    if setup.shard.size > 1:
        print_line(f"               in equal parts on {setup.shard.size} ranks")
    if len(setup.cache_dtypes) > 1:
        print_line("               " + _cache_choices(plan, config, setup.dtype, setup.cache_dtypes))
    if plan.max_model_len < config.context_length:
        print_line(
            f"               sequences are limited to {plan.max_model_len:,} tokens "
            f"(the model supports {config.context_length:,})"
        )


def _cache_choices(
    plan: MemoryPlan, config: PersimmonConfig, dtype: torch.dtype, cache_dtypes: Sequence[torch.dtype]
) -> str:
    """What a token of the KV cache takes in each type, and how many of them its memory holds; the one in use first."""
    sizes = {cache_choice(own, dtype): block_bytes(config, plan.block_size, own) for own in cache_dtypes}
    choices = [
        f"{name} holds {plan.kv_cache // size * plan.block_size:,} ({readable(size // plan.block_size)} each)"
        for name, size in sizes.items()
    ]
    return f"tokens by --kv-cache-dtype: {', '.join(choices)}"
