"""Start of the engine: checkpoint, memory plan, weights, KV cache, warm-up, each shown on the console with its seconds.

With core.py the only part of the server that imports torch, and like it runs only in the engine process.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persimmon import kernels
from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.kernels.cache_types import cache_choice, chosen_dtype
from persimmon.model.checkpoint import Checkpoint, dummy_parameters
from persimmon.model.config import PersimmonConfig
from persimmon.model.cores import usable_cores
from persimmon.model.errors import CheckpointError
from persimmon.model.executor import Executor, executor_for
from persimmon.model.graph_sizes import MIXED_SIZES, default_sizes
from persimmon.model.kv_cache import KVCache, block_bytes
from persimmon.model.leftovers import EMBEDDING
from persimmon.model.memory import MemoryPlan, available_memory, plan_memory
from persimmon.model.persimmon import Persimmon
from persimmon.model.quantization.scheme import described, formats_of_config, quantized_formats
from persimmon.model.row_sampling import RowSampling
from persimmon.model.runner import PooledStates, PromptLogprobs, Report, Runner, SequenceInput
from persimmon.model.sampling_params import SamplingParams
from persimmon.model.sizes import readable
from persimmon.model.token_counts import TokenCounts
from persimmon.progress import progress_bar
from persimmon.server.engine.guess_memory import guess_bytes
from persimmon.server.memory_need import still_to_be_taken
from persimmon.server.settings.engine import EngineSettings
from persimmon.server.settings.speculation import SpeculativeConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A runner that has run once, and what it runs on.

    Attributes:
        runner, plan, dtype, executor: of the model.
        weights: how they are quantized, for people.
        speculation: how next tokens are guessed; None for only what grammars force.
    """

    runner: Runner
    plan: MemoryPlan
    dtype: torch.dtype
    executor: Executor
    weights: str
    speculation: SpeculativeConfig | None


def load_model(settings: EngineSettings, folder: Path, print_line: Callable[[str], None]) -> LoadedModel:
    """Loads a checkpoint and makes it ready to serve.

    Args:
        settings: of the engine.
        folder: the checkpoint's.
        print_line: takes one line of progress for the console.

    Raises:
        CheckpointError: the checkpoint is damaged or not Persimmon's.
        KernelsUnavailableError: this machine cannot compute it, or not as asked.
        MemoryPlanError: it does not fit as asked.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if "OMP_NUM_THREADS" not in os.environ:  # by which torch counts its threads
        torch.set_num_threads(usable_cores())
    # cuBLAS would otherwise add up split products in 16 bits, which squared ReLU's magnitudes do not survive.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    config = PersimmonConfig.from_folder(folder)
    dtype = choose_dtype(settings.dtype, config.dtype, device, cpu_bfloat16=kernels.cpu_multiplies_bfloat16())
    operations = kernels.for_device(
        device,
        dtype,
        batch_invariant=settings.batch_invariant,
        allow_old_triton=settings.allow_old_triton,
        quantized_activations=settings.quantized_activations,
    )
    cache_dtypes = choose_cache_dtypes(settings.kv_cache_dtype, operations.cache_dtypes(dtype), device)
    speculation = choose_speculation(settings, config, device)
    guesses = _max_guesses(speculation, config)
    executor = executor_for(operations, device, _graph_sizes(settings, config), guesses=guesses)
    longest = settings.max_model_len or config.context_length
    with _phase("checkpoint", print_line):
        checkpoint = Checkpoint.open(folder, config) if settings.load_format == "auto" else None
    if checkpoint is not None:
        config = checkpoint.config
        for note in checkpoint.notes:
            print_line(f"  {'':<12} {note}")
    check_batch_invariance(settings, config, device)
    table = None
    if checkpoint is not None and settings.embedding_table == "file":
        table = embedding_in_file(checkpoint, operations, dtype, device)
    formats = formats_to_make(settings, config, dtype if checkpoint is None else checkpoint.dtype)
    if table is not None:
        formats.pop(EMBEDDING, None)
    stored: dict[str, torch.dtype | QuantizedFormat] = {} if checkpoint is None else dict(checkpoint.stored)
    for name, kept in (stored | formats).items():
        stored[name] = kept if isinstance(kept, QuantizedFormat) else operations.stored_dtype(kept, dtype)
    quantized = any(isinstance(form, QuantizedFormat) for form in stored.values())
    looks_up = speculation is not None and speculation.method != "off"
    for_guesses = guess_bytes(settings.max_num_seqs, longest) if looks_up else 0
    reserved = still_to_be_taken(config, settings.api_workers, settings.max_body_size) + for_guesses
    left = available_memory(device, settings.gpu_memory_utilization, reserved)
    plan = plan_memory(
        config,
        available=left.bytes,
        limited_by="--gpu-memory-utilization of the GPU's" if device.type == "cuda" else left,
        dtype=dtype,
        device=device,
        block_size=settings.block_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        kv_cache_bytes=settings.kv_cache_memory,
        step_buffers=executor.step_buffers(config, dtype, _limits(settings, config, longest, quantized=quantized)),
        weight_bytes=operations.weight_bytes,
        tied_bytes=operations.tied_bytes,
        stored=stored,
        embedding_in_file=table is not None,
        cache_dtypes=cache_dtypes,
    )
    weights = described(stored, config)
    _print_plan(plan, config, dtype, cache_dtypes, weights, print_line)
    if for_guesses:
        print_line(f"               guesses take up to {readable(for_guesses)} more while sequences run")
    if table is not None:
        print_line(f"               the embedding, {readable(table.nbytes)}, stays in its file")
        if formats and isinstance(table, torch.Tensor):  # which --quantization rounds otherwise
            weights = f"{str(table.dtype).removeprefix('torch.')} embedding, {weights}"

    def allocate() -> KVCache:
        with _phase("KV cache", print_line):
            return KVCache.allocate(config, plan.num_blocks, plan.block_size, cache_dtypes[0], device)

    cache = None
    if device.type == "cpu":
        # It gets its memory while weights are read: no step must wait for that, and what is short of memory is so now.
        cache = allocate()
        cache.populate(threads=max(1, usable_cores() // 2))
    with _phase("weights", print_line):
        if checkpoint is not None:
            total = plan.weights if formats else checkpoint.total_bytes - (0 if table is None else table.nbytes)
            without = () if table is None else (EMBEDDING,)
            tensors = _with_progress_bar(checkpoint.parameters(formats, without), total)
        else:
            dummies = dummy_parameters(config, dtype, device, settings.seed, formats)
            tensors = _with_progress_bar(dummies, plan.weights)
        model = Persimmon(
            config=config,
            tensors=tensors,
            dtype=dtype,
            device=device,
            kernels=operations,
            max_model_len=plan.max_model_len,
            embedding=table,
        )
        if device.type == "cuda":
            # What loading has borrowed beyond the weights is the KV cache's.
            torch.cuda.empty_cache()
    cache = cache or allocate()
    executor.reserve(_limits(settings, config, plan.max_model_len, quantized=quantized))
    with _phase(executor.preparation, print_line) if executor.preparation else nullcontext():
        executor.start(model, cache, _graph_progress)
    runner = Runner(executor)
    with _phase("warm-up", print_line):
        for batch in warm_up_steps(plan, settings, config, compiles=executor.compiles):
            runner.run(batch)
    return LoadedModel(
        runner=runner, plan=plan, dtype=dtype, executor=executor, weights=weights, speculation=speculation
    )


def check_batch_invariance(settings: EngineSettings, config: PersimmonConfig, device: torch.device) -> None:
    """Makes sure that with --batch-invariant no product of the network depends on the number of rows.

    Raises:
        KernelsUnavailableError: one does.
    """
    if settings.batch_invariant and config.tie_word_embeddings and device.type == "cpu":
        raise kernels.KernelsUnavailableError(
            "--batch-invariant does not hold on a CPU for a checkpoint with tie_word_embeddings: its lm_head is the "
            "embedding, whose products torch adds up in an order that depends on the number of rows. Serve it without "
            "the flag, or on a GPU"
        )


def embedding_in_file(
    checkpoint: Checkpoint, operations: kernels.Kernels[Any, Any], dtype: torch.dtype, device: torch.device
) -> torch.Tensor | QuantizedMatrix:
    """The embedding for --embedding-table file: see `Checkpoint.mapped_embedding`.

    Raises:
        KernelsUnavailableError: the device or its kernels cannot read it there.
        CheckpointError: it cannot be read there in the form that the file has, or is read whole.
    """
    if device.type != "cpu":
        raise kernels.KernelsUnavailableError(
            "--embedding-table is file, which a GPU cannot read: leave it out, or hide the GPU with "
            "CUDA_VISIBLE_DEVICES="
        )
    if checkpoint.config.generates and checkpoint.config.tie_word_embeddings:
        raise CheckpointError(
            "--embedding-table is file, but with tie_word_embeddings each step reads the whole embedding as lm_head: "
            "leave the flag out"
        )
    table = checkpoint.mapped_embedding()
    if isinstance(table, torch.Tensor) and operations.stored_dtype(table.dtype, dtype) != table.dtype:
        stored, used = (str(each).removeprefix("torch.") for each in (table.dtype, dtype))
        raise kernels.KernelsUnavailableError(
            f"--embedding-table is file, but the file's embedding is {stored}, which is not looked up as it is when "
            f"activations are {used}: use --dtype {stored}, or leave the flag out"
        )
    return table


def choose_speculation(
    settings: EngineSettings, config: PersimmonConfig, device: torch.device
) -> SpeculativeConfig | None:
    """How next tokens are guessed; None for only what grammars force.

    Without --speculative-config none are on a GPU, and on a CPU as many as pay, where no steps overlap.
    """
    if settings.speculative_config is not None:
        return settings.speculative_config
    if device.type != "cpu":
        return SpeculativeConfig(method="off")
    return None if settings.async_scheduling == "on" or not config.generates else SpeculativeConfig(method="auto")


def _graph_sizes(settings: EngineSettings, config: PersimmonConfig) -> list[int]:
    # A classifier only computes prompts, which no graph is made for.
    if settings.enforce_eager or not config.generates:
        return []
    return list(settings.cuda_graph_sizes or default_sizes(settings.max_num_seqs))


def _max_guesses(speculation: SpeculativeConfig | None, config: PersimmonConfig) -> int:
    """Maximum guesses of a sequence in a step, of those that are not only what grammars force."""
    if speculation is None or speculation.method == "off" or not config.generates:
        return 0
    return speculation.max_guesses


def _limits(
    settings: EngineSettings, config: PersimmonConfig, max_model_len: int, *, quantized: bool = False
) -> kernels.StepLimits:
    return kernels.StepLimits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=max_model_len,
        num_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        # What draws takes grows with it, and a classifier draws nothing.
        vocab_size=config.vocab_size if config.generates else 0,
        quantized=quantized,
    )


def choose_dtype(asked: str, stored: str | None, device: torch.device, *, cpu_bfloat16: bool) -> torch.dtype:
    """The type to compute in.

    `auto` is the checkpoint's own 16-bit type on a GPU, or float16 for one stored in float32; on a CPU it is bfloat16
    for a checkpoint stored in that, where the processor multiplies it, and otherwise float32, the exact choice.

    Args:
        asked: the setting.
        stored: the checkpoint's type, None where it does not say.
        device: that computes.
        cpu_bfloat16: whether the processor multiplies bfloat16 numbers.
    """
    if asked == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if stored == "bfloat16" and cpu_bfloat16 else torch.float32
        asked = stored if stored in ("float16", "bfloat16") else "float16"
    return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[asked]


def choose_cache_dtypes(asked: str, offered: Sequence[torch.dtype], device: torch.device) -> list[torch.dtype]:
    """The type to keep keys and values in, and after it the others that could be used.

    Args:
        asked: the setting.
        offered: what the kernels can keep them in, the network's own type first.
        device: that computes.

    Raises:
        KernelsUnavailableError: the kernels do not offer what is asked for.
    """
    chosen = chosen_dtype(asked, offered[0])
    if chosen not in offered:
        names = [cache_choice(own, offered[0]) for own in offered]
        raise kernels.KernelsUnavailableError(
            f"--kv-cache-dtype is {asked}, which this {'GPU' if device.type == 'cuda' else 'CPU'}'s kernels do not "
            f"have for --dtype {str(offered[0]).removeprefix('torch.')}: use "
            f"{' or '.join(filter(None, (', '.join(names[:-1]), names[-1])))}"
        )
    return [chosen, *(own for own in offered if own != chosen)]


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


@contextmanager
def _phase(name: str, print_line: Callable[[str], None]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    print_line(f"  {name:<12} {time.perf_counter() - started:6.2f} s")


def _print_plan(
    plan: MemoryPlan,
    config: PersimmonConfig,
    dtype: torch.dtype,
    cache_dtypes: Sequence[torch.dtype],
    weights: str,
    print_line: Callable[[str], None],
) -> None:
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
    if len(cache_dtypes) > 1:
        print_line("               " + _cache_choices(plan, config, dtype, cache_dtypes))
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


def formats_to_make(
    settings: EngineSettings, config: PersimmonConfig, stored: torch.dtype
) -> dict[str, QuantizedFormat]:
    """The formats that tensors get while they are loaded, by name: those of --quantization, or of dummies a file's own.

    Args:
        settings: of the engine.
        config: the network.
        stored: the dtype of the checkpoint's tensors.

    Raises:
        CheckpointError: the checkpoint is quantized already, or a matrix cannot be quantized as asked.
    """
    if settings.quantization == "none":
        return formats_of_config(config, stored) if settings.load_format == "dummy" else {}
    if config.quantization is not None:
        raise CheckpointError(
            f"--quantization is {settings.quantization}, but the checkpoint's weights are quantized already "
            f"(quantization_config in its config.json): serve it without --quantization"
        )
    return quantized_formats(config, settings.quantization, settings.quantization_group_size)


def _with_progress_bar(
    tensors: Iterator[tuple[str, torch.Tensor | QuantizedMatrix]], total: int
) -> Iterator[tuple[str, torch.Tensor | QuantizedMatrix]]:
    with progress_bar("weights", total, "B") as bar:
        for name, tensor in tensors:
            yield name, tensor
            bar.update(tensor.nbytes)


def _graph_progress(sizes: Sequence[int]) -> Iterator[int]:
    with progress_bar("CUDA graphs", len(sizes), "graph") as bar:
        for size in sizes:
            yield size
            bar.update()
