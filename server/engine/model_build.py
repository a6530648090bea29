"""A rank's weights and KV cache, made ready to run steps.  Knows what was decided, and decides nothing."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch

from persimmon.kernels import QuantizedMatrix
from persimmon.model.checkpoint import dummy_parameters
from persimmon.model.executor import Executor
from persimmon.model.kv_cache import KVCache
from persimmon.model.leftovers import EMBEDDING
from persimmon.model.memory import MemoryPlan
from persimmon.model.persimmon import Persimmon
from persimmon.model.ranks import Ranks
from persimmon.progress import progress_bar
from persimmon.server.engine.model_setup import ModelSetup
from persimmon.server.settings.engine import EngineSettings


def build(
    settings: EngineSettings,
    setup: ModelSetup,
    plan: MemoryPlan,
    ranks: Ranks | None,
    print_line: Callable[[str], None] | None = None,
) -> Executor:
    """Reads a rank's weights, allocates its KV cache, and makes ready to run its steps.

    Args:
        settings: of the engine.
        setup: of this rank.
        plan: of the memory of all ranks.
        ranks: those that share the network; None where this is the only one.
        print_line: takes one line of progress for the console; None for no progress.

    Raises:
        CheckpointError: a file has become unreadable, or a weight cannot be quantized.
    """
    config, device = setup.config, setup.device

    def allocate() -> KVCache:
        with phase("KV cache", print_line):
            return KVCache.allocate(
                config, plan.num_blocks, plan.block_size, setup.cache_dtypes[0], device, setup.shard
            )

    cache = None
    if device.type == "cpu":
        # It gets its memory while weights are read: no step must wait for that, and what is short of memory is so now.
        cache = allocate()
        cache.populate(threads=max(1, torch.get_num_threads() // 2))
    with phase("weights", print_line):
        tensors, total = _parameters(settings, setup, plan)
        model = Persimmon(
            config=config,
            tensors=tensors if print_line is None else _with_progress_bar(tensors, total),
            dtype=setup.dtype,
            device=device,
            kernels=setup.kernels,
            max_model_len=plan.max_model_len,
            embedding=setup.table,
            ranks=ranks,
        )
        if device.type == "cuda":
            # What loading has borrowed beyond the weights is the KV cache's.
            torch.cuda.empty_cache()
    cache = cache or allocate()
    executor = setup.executor
    executor.reserve(setup.limits(settings, plan.max_model_len))
    with phase(executor.preparation, print_line) if executor.preparation else nullcontext():
        executor.start(model, cache, iter if print_line is None else _graph_progress)
    return executor


def _parameters(
    settings: EngineSettings, setup: ModelSetup, plan: MemoryPlan
) -> tuple[Iterator[tuple[str, torch.Tensor | QuantizedMatrix]], int]:
    """A rank's parameters, and about how many bytes they are."""
    checkpoint, shard = setup.checkpoint, setup.shard
    if checkpoint is None:
        dummies = dummy_parameters(setup.config, setup.dtype, setup.device, settings.seed, setup.formats, shard)
        return dummies, plan.weights // shard.size
    total = plan.weights if setup.formats else checkpoint.total_bytes - table_bytes(setup)
    without = () if setup.table is None else (EMBEDDING,)
    return checkpoint.parameters(setup.formats, without, shard), total // shard.size


def table_bytes(setup: ModelSetup) -> int:
    """Of the embedding of all ranks, where it stays in its file."""
    if setup.table is None:
        return 0
    rows = len(setup.shard.vocabulary(setup.config))
    return setup.table.nbytes // rows * setup.config.vocab_size


@contextmanager
def phase(name: str, print_line: Callable[[str], None] | None) -> Iterator[None]:
    """Prints how long the block took, unless there is nowhere to print it."""
    started = time.perf_counter()
    yield
    if print_line is not None:
        print_line(f"  {name:<12} {time.perf_counter() - started:6.2f} s")


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
