"""The memory plan: what weights, activations and the KV cache take, made before anything is allocated.

Knows byte counts, not settings: the caller says what is asked for and prints the plan.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from model.checkpoint import expected_shapes
from model.config import Architecture, PersimmonConfig
from model.kv_cache import block_bytes
from model.persimmon import parameter_dtype
from model.sampler import rows_at_once

GIB = 1 << 30

GPU_RESERVE = 512 << 20
"""Bytes of a GPU's free memory that no plan touches: cuBLAS's workspaces, kernels that are loaded when first run."""


SMALL_CACHE = GIB
"""So much a CPU gives to the KV cache of a small model, if it has it: a demo is no reason to fill a laptop."""


class MemoryPlanError(ValueError):
    """What is asked for does not fit.  One line with the numbers and the flag to change."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose.

    Attributes:
        available: what the server may use in all.
        weights: the parameters.
        activations: the largest step's intermediate results, an upper estimate.
        step_buffers: what lives from start to end beside weights and cache: kernels' workspaces, CUDA graphs.
        block_bytes: one KV block over all layers.
        num_blocks: KV blocks.
        block_size: tokens in a block.
        max_model_len: most tokens of one sequence.
    """

    available: int
    weights: int
    activations: int
    step_buffers: int
    block_bytes: int
    num_blocks: int
    block_size: int
    max_model_len: int

    @property
    def kv_cache(self) -> int:
        """Bytes of all KV blocks."""
        return self.num_blocks * self.block_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size


def plan_memory(
    config: PersimmonConfig,
    *,
    available: int,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int | None,
    kv_cache_bytes: int | None,
    step_buffers: int = 0,
    matrix_dtype: torch.dtype | None = None,
) -> MemoryPlan:
    """Divides the memory.

    Args:
        config: the network.
        available: bytes the server may use, see `available_memory`.
        dtype: of weights and cache.
        device: a CPU's default for the KV cache is modest, because other programs share its memory: a quarter of it at
            most, and SMALL_CACHE, four times the weights or one longest sequence, whichever is most.
        block_size: tokens in a block.
        max_num_seqs: rows of logits in the largest step.
        max_num_batched_tokens: tokens in the largest step.
        max_model_len: None for as much as the model was trained for and the cache holds.
        kv_cache_bytes: None for what is left.
        step_buffers: bytes of kernels' workspaces and CUDA graphs.
        matrix_dtype: of most weights, where that is not `dtype`; see `parameter_dtype`.

    Raises:
        MemoryPlanError: it does not fit.
    """
    trained_for = config.max_position_embeddings
    if max_model_len is not None and max_model_len > trained_for:
        raise MemoryPlanError(
            f"--max-model-len is {max_model_len} but the model was trained for {trained_for} tokens: "
            f"give at most {trained_for}"
        )
    weights = sum(
        math.prod(shape) * parameter_dtype(name, dtype, matrix_dtype).itemsize
        for name, shape in expected_shapes(config).items()
    )
    wanted_len = max_model_len or trained_for
    activations = activation_bytes(config, dtype, max_num_seqs, max_num_batched_tokens, wanted_len)
    per_block = block_bytes(config, block_size, dtype)
    left = max(0, available - weights - activations - step_buffers)
    if kv_cache_bytes is None:
        kv_cache_bytes = left
        if device.type == "cpu":
            one = -(-wanted_len // block_size) * per_block
            enough = max(SMALL_CACHE, 4 * weights, one)
            kv_cache_bytes = min(max_num_seqs * one, enough, left, available // 4)
    num_blocks = kv_cache_bytes // per_block
    numbers = (
        f"weights {_gib(weights)}, activations {_gib(activations)}, "
        + (f"step buffers {_gib(step_buffers)}, " if step_buffers else "")
        + f"KV cache {_gib(kv_cache_bytes)} of {_gib(available)} available"
    )
    if kv_cache_bytes > left or num_blocks < 1:
        raise MemoryPlanError(
            f"the memory does not suffice: {numbers}, one KV block {_gib(per_block)}; lower --kv-cache-memory, "
            "--max-num-seqs or --max-num-batched-tokens, or use a 16-bit --dtype"
        )
    holds = num_blocks * block_size
    if max_model_len is not None and max_model_len > holds:
        raise MemoryPlanError(
            f"--max-model-len is {max_model_len} but the KV cache holds {holds} tokens ({numbers}): "
            f"lower it to {holds} or raise --kv-cache-memory"
        )
    return MemoryPlan(
        available, weights, activations, step_buffers, per_block, num_blocks, block_size, min(wanted_len, holds)
    )


def activation_bytes(
    config: PersimmonConfig, dtype: torch.dtype, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
) -> int:
    """An upper estimate of the intermediate results alive at once in the largest step.

    Per token: residual, norm, fused QKV, float32 queries and keys while they are normalized and rotated, attention
    output, and the MLP's activation; for the longest context: its keys and values, gathered and once more packed
    for the product, and the chunk's mask, as booleans and as numbers; per sampled row: the logits, in
    16 bits too, and once more where requests change them and want to know what they were; per row that draws at once:
    five further float32 copies, what a grammar allows, and the ids, probabilities and sums, of 8 bytes each, that
    top-p sorts out; or, before that, per row of a prompt that is read for log-probabilities at once, its logits and
    two further copies.  A classifier makes no logits: per row that it scores there are its hidden state and the
    scores, in float32.
    """
    square_in_float32 = 2 * config.intermediate_size * 4 if dtype.itemsize == 2 else 0
    per_token = (8 * config.hidden_size + config.intermediate_size) * dtype.itemsize
    per_token += 3 * 2 * config.hidden_size * 4 + square_in_float32
    context = max_model_len * 2 * 2 * config.hidden_size * dtype.itemsize
    mask = min(max_num_batched_tokens, max_model_len) * max_model_len * (1 + dtype.itemsize)
    if config.generates:
        at_once = rows_at_once(config.vocab_size)
        drawing = min(max_num_seqs, at_once) * (5 * 4 + 1 + 4 * 8)
        reporting = min(max_num_batched_tokens, at_once) * (3 * 4 + dtype.itemsize)
        results = config.vocab_size * (max_num_seqs * (2 * 4 + dtype.itemsize) + max(drawing, reporting))
    else:
        of_every_token = config.architecture is Architecture.TOKEN_CLASSIFICATION
        rows = max_num_batched_tokens if of_every_token else max_num_seqs
        results = rows * (config.hidden_size + config.num_labels) * 4
    return max_num_batched_tokens * per_token + context + mask + results


def available_memory(device: torch.device, gpu_memory_utilization: float, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes the server may plan with on this device.

    On a GPU a share of its whole memory, less what other programs hold beyond the rest; on a CPU what is free now,
    within the container's limit.

    Args:
        device: to plan for.
        gpu_memory_utilization: the share.
        cgroup: where the control group's files are.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, min(free - GPU_RESERVE, int(total * gpu_memory_utilization)))
    return min([psutil.virtual_memory().available, *_container_limit(cgroup)])


def _container_limit(cgroup: Path) -> list[int]:
    """What the control group still grants, where there is one with a limit (cgroup v2, then v1)."""
    for limit_file, usage_file, stat_file, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            limit = int((cgroup / limit_file).read_text())
            usage = int((cgroup / usage_file).read_text())
            statistics = dict(line.split() for line in (cgroup / stat_file).read_text().splitlines())
        except (OSError, ValueError):  # no such file, or the word "max": no limit
            continue
        # File pages that nobody uses make room when asked to; a checkpoint read before leaves gigabytes of them.
        return [max(0, limit - usage + int(statistics.get(cache, 0)))]
    return []


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"
