"""The memory plan: what weights, activations and the KV cache take, made before anything is allocated.

Knows byte counts, not settings: the caller says what is asked for and prints the plan.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from persimmon.kernels import QuantizedFormat
from persimmon.kernels.cache_types import cache_choice
from persimmon.model.checkpoint import expected_shapes
from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.kv_cache import block_bytes
from persimmon.model.leftovers import EMBEDDING
from persimmon.model.memory_limits import MemoryLeft, memory_left
from persimmon.model.patches import PATCHES_AT_ONCE, padded
from persimmon.model.persimmon import is_lookup_table, is_matrix, parameter_dtype
from persimmon.model.sampler import rows_at_once
from persimmon.model.shard import Shard
from persimmon.model.sizes import readable
from persimmon.model.tensor_names import PATCH_PROJECTION

WeightBytes = Callable[[tuple[int, int], torch.dtype | QuantizedFormat], int]
"""What kernels take for an (out, in) matrix, by what it is stored in: `Kernels.weight_bytes`, `Kernels.tied_bytes`."""

GIB = 1 << 30

GPU_RESERVE = 512 << 20
"""Bytes of a GPU's free memory that no plan touches: cuBLAS's workspaces, kernels that are loaded when first run."""


SMALL_CACHE = GIB
"""Limit of the KV cache of a small model on a CPU, in bytes: a demo should not fill a laptop's memory."""

# Steps smaller than this are slow, so advice lowers the length of sequences before it goes below.
_SMALL_STEP_TOKENS = 64
_SMALL_STEP_SEQS = 4


class MemoryPlanError(ValueError):
    """What is asked for does not fit.  One line with the numbers and the flag to change."""


@dataclass(frozen=True, slots=True)
class _Step:
    """The largest step: what activations depend on, named as the settings."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose, of all ranks together.

    Attributes:
        available: what the server may use in all.
        weights: the parameters.
        activations: the largest step's intermediate results, an upper estimate.
        step_buffers: what stays allocated in addition to weights and cache: kernels' workspaces, CUDA graphs.
        block_bytes: one KV block over all layers.
        num_blocks: KV blocks.
        block_size: tokens in a block.
        max_model_len: maximum tokens of one sequence.
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
    weight_bytes: WeightBytes | None = None,
    tied_bytes: WeightBytes | None = None,
    stored: Mapping[str, torch.dtype | QuantizedFormat] | None = None,
    embedding_in_file: bool = False,
    cache_dtypes: Sequence[torch.dtype] = (),
    limited_by: object = "left of this machine's memory",
    ranks: int = 1,
) -> MemoryPlan:
    """Divides the memory.

    Args:
        config: the network.
        available: bytes the server may use, see `available_memory`.
        dtype: that the network computes in.
        device: a CPU's default for the KV cache is modest, because other programs share its memory: a quarter of it at
            most, and SMALL_CACHE, four times the weights or one longest sequence, whichever is most.  A `max_model_len`
            that is given gets room for one sequence in any case.
        block_size: tokens in a block.
        max_num_seqs: rows of logits in the largest step.
        max_num_batched_tokens: tokens in the largest step.
        max_model_len: None for as much as the model is made for and the cache holds.
        kv_cache_bytes: None for what is left.
        step_buffers: bytes of kernels' workspaces and CUDA graphs, of all ranks.
        weight_bytes: of the matrix of a product; by default its numbers in `dtype`.
        tied_bytes: of an embedding that is lm_head too, what that takes beyond the table; by default nothing.
        stored: what they are given a parameter in, by its name: a format where it is quantized, or the dtype that they
            keep it in; by default `dtype`.
        embedding_in_file: whether the embedding's numbers stay in a file, and take none of this memory.
        cache_dtypes: what keys and values may be stored in: first the type to use, by default `dtype`, then others,
            which advice may name.
        limited_by: what makes `available` what it is, for messages.
        ranks: processes that share the network; each is counted as the first, which has the largest part.

    Raises:
        MemoryPlanError: it does not fit.
    """
    made_for = config.context_length
    if max_model_len is not None and max_model_len > made_for:
        raise MemoryPlanError(
            f"--max-model-len is {max_model_len} but the model supports {made_for} tokens: give at most {made_for}"
        )
    shard = Shard(0, ranks)
    weights = ranks * _parameter_bytes(
        config, dtype, weight_bytes, tied_bytes, stored or {}, embedding_in_file, shard=shard
    )
    step = _Step(max_num_seqs, max_num_batched_tokens, max_model_len or made_for)
    cache_dtype = cache_dtypes[0] if cache_dtypes else dtype
    activations = _activations(config, dtype, cache_dtype, step, ranks)
    per_block = block_bytes(config, block_size, cache_dtype)
    taken = weights + activations + step_buffers
    left = max(0, available - taken)
    if left < per_block:
        tokens_bytes = per_block // block_size

        def needs(other: _Step) -> int:
            # A length that is asked for has to fit into the cache.
            length = other.max_model_len if max_model_len or other.max_model_len != step.max_model_len else 1
            cached = -(-length // block_size) * block_size * tokens_bytes
            return _activations(config, dtype, cache_dtype, other, ranks) + cached

        advice = _advice(step, needs, available - weights - step_buffers)
        if advice is None:
            advice = f"everything else takes {readable(taken - activations + per_block)}: give the server more memory"
            parameters = sum(map(math.prod, expected_shapes(config).values()))
            if weights > 3 * parameters:
                advice += ", or use a 16-bit --dtype"
            if weights > 1.5 * parameters:
                advice += ", or use --quantization int8"
            elif weights > 0.9 * parameters:
                advice += ", or use --quantization int4"
        asked = "" if kv_cache_bytes is None else f" (--kv-cache-memory asks for {readable(kv_cache_bytes)})"
        parts = f"weights {readable(weights)}, activations {readable(activations)}"
        parts += f", step buffers {readable(step_buffers)}" if step_buffers else ""
        raise MemoryPlanError(
            f"not enough memory: {parts} and one KV block {readable(per_block)} need "
            f"{readable(taken + per_block)}{asked}, {readable(available)} available ({limited_by}); {advice}"
        )
    cache = kv_cache_bytes
    one_sequence = -(-step.max_model_len // block_size) * per_block
    if cache is None:
        cache = left
        if device.type == "cpu":
            enough = max(SMALL_CACHE, 4 * weights, one_sequence)
            cache = min(max_num_seqs * one_sequence, enough, available // 4)
            cache = min(left, max(cache, per_block if max_model_len is None else one_sequence))
    elif cache > left:
        raise MemoryPlanError(
            f"--kv-cache-memory is {readable(cache)}, but of {readable(available)} available ({limited_by}) "
            f"{readable(left)} are left after weights and activations: give at most {left}"
        )
    elif cache < per_block:
        raise MemoryPlanError(
            f"--kv-cache-memory is {readable(cache)}, but one block of {block_size} tokens takes {readable(per_block)}"
            f": give at least {per_block}, or {one_sequence} for one sequence of {step.max_model_len} tokens"
        )
    num_blocks = cache // per_block
    holds = num_blocks * block_size
    if max_model_len is not None and max_model_len > holds:
        larger = f", or set --kv-cache-memory to {one_sequence}" if one_sequence <= left else ""
        for other in cache_dtypes[1:]:
            if cache // block_bytes(config, block_size, other) * block_size >= max_model_len:
                larger += f", or set --kv-cache-dtype to {cache_choice(other, dtype)}"
                break
        raise MemoryPlanError(
            f"--max-model-len is {max_model_len}, but the KV cache of {readable(cache)} holds {holds} tokens: "
            f"lower it to {holds}{larger}"
        )
    return MemoryPlan(
        available=available,
        weights=weights,
        activations=activations,
        step_buffers=step_buffers,
        block_bytes=per_block,
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=min(step.max_model_len, holds),
    )


def _parameter_bytes(
    config: PersimmonConfig,
    dtype: torch.dtype,
    weight_bytes: WeightBytes | None,
    tied_bytes: WeightBytes | None,
    stored: Mapping[str, torch.dtype | QuantizedFormat],
    embedding_in_file: bool,
    shard: Shard,
) -> int:
    total = 0
    table = len(shard.vocabulary(config)), config.hidden_size
    if tied_bytes is not None and config.generates and config.tie_word_embeddings:
        total += tied_bytes(table, stored.get(EMBEDDING, dtype))
    for name, shape in expected_shapes(config, shard).items():
        form = stored.get(name, dtype)
        if weight_bytes is not None and is_matrix(name):
            rows, columns = shape
            columns = padded(columns) if name.startswith(PATCH_PROJECTION) else columns
            total += weight_bytes((rows, columns), form)
        elif name == EMBEDDING:
            kept = dtype if isinstance(form, QuantizedFormat) or not is_lookup_table(EMBEDDING, config) else form
            total += _embedding_bytes(table, kept, form, in_file=embedding_in_file)
        else:
            total += math.prod(shape) * parameter_dtype(name, dtype).itemsize
    return total


def _embedding_bytes(
    shape: tuple[int, int], kept: torch.dtype, form: torch.dtype | QuantizedFormat, *, in_file: bool
) -> int:
    """Of a table [rows, hidden] that is stored in `form`; its numbers, or scales, are kept in `kept`."""
    rows, columns = shape
    if isinstance(form, QuantizedFormat):
        whole = replace(form, scale_dtype=kept).nbytes(shape)
        return whole - rows * columns * form.bits // 8 if in_file else whole
    return 0 if in_file else rows * columns * kept.itemsize


def _activations(config: PersimmonConfig, dtype: torch.dtype, cache_dtype: torch.dtype, step: _Step, ranks: int) -> int:
    return ranks * activation_bytes(
        config,
        dtype,
        step.max_num_seqs,
        step.max_num_batched_tokens,
        step.max_model_len,
        cache_dtype=cache_dtype,
        ranks=ranks,
    )


def _advice(step: _Step, needs: Callable[[_Step], int], allowed: int) -> str | None:
    """Settings with which a step needs no more bytes than are allowed; None where no step is small enough."""
    smaller = step
    while (now := needs(smaller)) > allowed:
        fewer_tokens, shorter = _with_fewer_tokens(smaller), _with_shorter_sequences(smaller)
        if fewer_tokens == shorter == smaller:
            return None
        saved = [now - needs(each) for each in (fewer_tokens, shorter)]
        small = smaller.max_num_batched_tokens <= _SMALL_STEP_TOKENS and smaller.max_num_seqs <= _SMALL_STEP_SEQS
        # Long sequences are worth more than large steps, up to a point.
        smaller = shorter if shorter != smaller and (small or saved[1] > 4 * saved[0]) else fewer_tokens
    changes = [
        f"--{name.replace('_', '-')} to {getattr(smaller, name)}"
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len")
        if getattr(smaller, name) != getattr(step, name)
    ]
    return f"set {' and '.join(changes)}"


def _with_fewer_tokens(step: _Step) -> _Step:
    tokens = max(1, step.max_num_batched_tokens // 2)
    return replace(step, max_num_batched_tokens=tokens, max_num_seqs=min(tokens, max(1, step.max_num_seqs // 2)))


def _with_shorter_sequences(step: _Step) -> _Step:
    return replace(step, max_model_len=max(2, step.max_model_len // 2))


def activation_bytes(
    config: PersimmonConfig,
    dtype: torch.dtype,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    *,
    cache_dtype: torch.dtype | None = None,
    ranks: int = 1,
) -> int:
    """An upper estimate of the intermediate results alive at once in the largest step, on one rank.

    Per token: residual, norm, fused QKV, float32 queries and keys while they are normalized and rotated, attention
    output, and the MLP's activation; for the longest context: its keys and values, gathered and once more packed
    for the product, in float32 where the cache has 8 bits, and the chunk's mask, as booleans and as numbers; per
    sampled row: the logits, in 16 bits too, and once more where requests change them and want to know what they were;
    per row that draws at once: five further float32 copies, what a grammar allows, and the ids, probabilities and
    sums, of 8 bytes each, that top-p sorts out; or, before that, per row of a prompt that is read for log-probabilities
    at once, its logits and two further copies.  A classifier makes no logits: per row that it scores there are its
    hidden state and the scores, in float32.

    Where images are read: pixels of the step, on the host and on the device, and in float32 those that are projected at
    once, as the product takes them, and what it makes of them.

    A rank among several has its heads' part of what attention makes, and its part of the MLP's activation; and what
    it sends of a sum and gets, in the network's dtype, with the sum in float32.
    """
    attended, inner = config.hidden_size // ranks, config.intermediate_size // ranks
    square_in_float32 = 2 * inner * 4 if dtype.itemsize == 2 else 0
    per_token = (4 * config.hidden_size + 4 * attended + inner) * dtype.itemsize
    per_token += 3 * 2 * attended * 4 + square_in_float32
    if ranks > 1:
        per_token += config.hidden_size * (3 * dtype.itemsize + 4)
    eight_bits = cache_dtype is not None and cache_dtype.itemsize == 1
    number_bytes = torch.float32.itemsize if eight_bits else dtype.itemsize
    context = max_model_len * 2 * attended * (2 * number_bytes + eight_bits)
    mask = min(max_num_batched_tokens, max_model_len) * max_model_len * (1 + number_bytes)
    patches = 0
    if config.vision is not None:
        numbers = config.vision.patch_numbers
        at_once = min(max_num_batched_tokens, PATCHES_AT_ONCE)
        patches = 2 * max_num_batched_tokens * numbers + at_once * (
            3 * 4 * padded(numbers) + 2 * 4 * config.hidden_size
        )
    if config.generates:
        at_once = rows_at_once(config.vocab_size)
        drawing = min(max_num_seqs, at_once) * (5 * 4 + 1 + 4 * 8)
        reporting = min(max_num_batched_tokens, at_once) * (3 * 4 + dtype.itemsize)
        results = config.vocab_size * (max_num_seqs * (2 * 4 + dtype.itemsize) + max(drawing, reporting))
    else:
        of_every_token = config.architecture is Architecture.TOKEN_CLASSIFICATION
        rows = max_num_batched_tokens if of_every_token else max_num_seqs
        results = rows * (config.hidden_size + config.num_labels) * 4
    return max_num_batched_tokens * per_token + context + mask + patches + results


def available_memory(device: torch.device, gpu_memory_utilization: float, reserved: int = 0) -> MemoryLeft:
    """Memory that the server may plan with on this device.

    On a GPU a share of its whole memory, less what other programs hold beyond the rest; on a CPU what is free now,
    within the limits of control groups, less what is reserved.

    Args:
        device: to plan for.
        gpu_memory_utilization: the share.
        reserved: bytes of the host's memory that are for other things.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return MemoryLeft(max(0, min(free - GPU_RESERVE, int(total * gpu_memory_utilization))))
    left = memory_left()
    return replace(left, bytes=max(0, left.bytes - reserved))
