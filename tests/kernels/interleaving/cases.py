"""Random steps of every Triton kernel, small enough to interpret many of them.  Knows no way to run them.

A case draws everything from its generator: shapes, live rows, lengths, block tables, numbers.  To add a kernel, write a
case that calls its wrapper and enter it in CASES, or in MERGES if its programs exchange data within a launch.  A test
fails while a kernel of a LIMITS table has no case.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from persimmon.kernels import decode_attention as decode_module
from persimmon.kernels import decode_work, invariant_attention, packed_projection
from persimmon.kernels.cache_types import EIGHT_BIT_CACHES
from persimmon.kernels.chunk_plan import LastTokens
from persimmon.kernels.decode_work import DecodeWorkspace, build_work_list
from persimmon.kernels.dequantize import dequantize
from persimmon.kernels.head import sample_head
from persimmon.kernels.invariant_projection import project_rows, project_rows_add_
from persimmon.kernels.layer_norm import bias_relu_squared_, embed, layer_norm
from persimmon.kernels.operands import LayerCache, PenaltyInputs, TruncationInputs
from persimmon.kernels.packed_projection import PackedConfig
from persimmon.kernels.packed_weight import pack
from persimmon.kernels.prefill_attention import prefill_attention, qk_norm_rotary_store
from persimmon.kernels.projection_config import ProjectionConfig, Workspace
from persimmon.kernels.reference_cache import store_rows
from persimmon.kernels.sampling import Workspace as SamplingWorkspace
from persimmon.kernels.sampling import sample_logits
from persimmon.kernels.truncation import TruncationWorkspace, apply_penalties, sample_truncated
from tests.kernels import (
    test_decode_attention,
    test_head,
    test_packed_projection,
    test_prefill_attention,
    test_projection,
    test_sampling,
)
from tests.kernels.quantized_matrices import random_matrix
from tests.kernels.stored_rows import empty_layer
from tests.kernels.test_layer_norm import affine
from tests.kernels.test_reference_attention import Layout, Span

CPU = torch.device("cpu")
NAN = float("nan")
DTYPES = [torch.float16, torch.float32]
EIGHT_BITS = list(EIGHT_BIT_CACHES.values())


@dataclass(frozen=True)
class Outcome:
    """What a case leaves.

    Attributes:
        results: everything that its launches computed, in order; no memory that nothing was written to.
        counters: what must be zero at the end.
    """

    results: list[torch.Tensor]
    counters: list[torch.Tensor]


Case = Callable[[random.Random], Outcome]


def projections(rng: random.Random) -> Outcome:
    """Both kinds of projection with splits: two layers and the first one again, on one workspace, with padding rows."""
    bucket = rng.choice([rng.randint(1, 8), rng.randint(1, 20), rng.randint(33, 40)])
    live = rng.randint(0, bucket)
    hidden, width = rng.randint(129, 192), rng.choice([rng.randint(129, 192), rng.randint(257, 320)])
    dtype, block_n = rng.choice(DTYPES), rng.choice([64, 128])
    in_prologue = rng.random() < 0.5
    wide = ProjectionConfig(block_n=block_n, block_k=128, splits=rng.randint(2, 3), norm_in_prologue=in_prologue)
    narrow = replace(wide, splits=rng.randint(2, 4))
    into = test_projection.Into.make(bucket, hidden, width, dtype)
    back = test_projection.Add.make(bucket, width, hidden, dtype, zeros=0.5)
    alive = back.alive if rng.random() < 0.5 else None
    transposed = alive is not None or rng.random() < 0.5
    made = Workspace.allocate([(width, wide), (hidden, narrow)], bucket, CPU)
    made.partials.fill_(NAN)
    rows, results = slice(0, live), []
    for _layer in range(3):
        out, flags = into.run(wide, rows=rows, bucket=bucket, activation="relu_squared", made=made)
        assert flags is not None
        results += [out, flags]
        results += back.run(narrow, rows=rows, bucket=bucket, transposed=transposed, alive=alive, made=made)
        # The next layer differs, so that partial sums left by this one would show; the third layer is the first again.
        into, back = replace(into, x=-into.x), replace(back, activation=-back.activation)
    return Outcome(results, [made.counters])


def projection_without_splits(rng: random.Random) -> Outcome:
    bucket = rng.randint(1, 34)
    case = test_projection.Into.make(bucket, rng.randint(16, 130), rng.randint(16, 130), rng.choice(DTYPES))
    config = replace(test_projection.SMALL, splits=1)
    out, flags = case.run(config, rows=slice(rng.randint(0, bucket)), bucket=bucket, activation="relu_squared")
    return Outcome([out] if flags is None else [out, flags], [])


def decode_attention(rng: random.Random, *, eight_bits: bool = False) -> Outcome:
    """Two steps, each of a work list and two layers twice, on one workspace; sequences end and begin between them."""
    most, most_tokens, split = rng.randint(1, 5), rng.randint(1, 140), 32
    heads, dim, block_size = rng.randint(1, 2), 16, rng.choice([16, 32])
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (decode_work, decode_module):
            patch.setattr(module, "SPLIT_TOKENS", split)
        config = test_decode_attention.few_programs(patch, rng.randint(2, 7))
        workspace = DecodeWorkspace.allocate(most, most_tokens, heads, dim, CPU)
        for stale in (workspace.partial_outputs, workspace.partial_maxima, workspace.partial_totals):
            stale.fill_(NAN)
        for _step in range(2):
            sequences = range(rng.randint(1, most))
            lengths = [rng.choice([0, rng.randint(1, most_tokens), most_tokens]) for _ in sequences]
            dtype = rng.choice(DTYPES)
            cache_dtype = rng.choice(EIGHT_BITS) if eight_bits else dtype
            layers = [
                test_decode_attention.Step.make(
                    lengths,
                    dtype=dtype,
                    cache_dtype=cache_dtype,
                    block_size=block_size,
                    heads=heads,
                    dim=dim,
                    seed=rng.randrange(1000),
                )
                for _ in range(2)
            ]
            build_work_list(layers[0].lengths, workspace)
            items = int(workspace.num_items)
            results += [each[:items].clone() for each in (workspace.item_sequences, workspace.item_splits)]
            for layer in layers * 2:
                results += [layer.run(workspace, config), *(each.clone() for each in layer.cache.tensors)]
    return Outcome(results, [workspace.arrivals])


def rows_of_one_sequence(rng: random.Random) -> Outcome:
    """Several new tokens a sequence, each a row that attends to those before it; two layers on one workspace."""
    split, most_tokens, heads, dim = 32, 70, rng.randint(1, 2), 16
    dtype, results = rng.choice(DTYPES), []
    with pytest.MonkeyPatch.context() as patch:
        for module in (decode_work, decode_module):
            patch.setattr(module, "SPLIT_TOKENS", split)
        config = test_decode_attention.few_programs(patch, rng.randint(2, 5))
        lengths = [rng.choice([0, rng.randint(1, most_tokens)]), rng.randint(1, most_tokens)]
        tokens = [rng.randint(1, 3) if lengths[0] else 1, rng.randint(2, 4)]
        workspace = DecodeWorkspace.allocate(sum(tokens), most_tokens + 4, heads, dim, CPU)
        for _layer in range(2):
            layer = test_decode_attention.Step.make(
                lengths,
                tokens=tokens,
                dtype=dtype,
                cache_dtype=rng.choice([dtype, *EIGHT_BITS]),
                heads=heads,
                dim=dim,
                seed=rng.randrange(1000),
            )
            build_work_list(layer.lengths, workspace)
            results += [layer.run(workspace, config, shared=True), *layer.cache.tensors]
    return Outcome(results, [workspace.arrivals])


def prefill(rng: random.Random, *, eight_bits: bool = False) -> Outcome:
    spans = [Span(rng.randint(0, 70), rng.randint(1, 36)) for _ in range(rng.randint(1, 2))]
    layout = Layout.make(spans, rng.choice([16, 32, 64]), rng.randrange(1000))
    heads, dim, half, dtype = rng.randint(1, 2), 16, rng.choice([2, 4, 8]), rng.choice(DTYPES)
    plan = test_prefill_attention.plan_of(layout)
    cache_dtype = rng.choice(EIGHT_BITS) if eight_bits else dtype
    cache = empty_layer((layout.num_blocks, heads, layout.block_size, dim), cache_dtype)
    for sequence, span in enumerate(spans):
        for block, slot in (layout.place(sequence, position) for position in range(span.start)):
            rows = (block * heads + torch.arange(heads)) * layout.block_size + slot
            store_rows(cache, rows, *(_numbers(rng, heads, dim, dtype=dtype) for _ in range(2)))
    qkv = _numbers(rng, len(plan.positions), heads, 3, dim, dtype=dtype)
    weight, bias = (_numbers(rng, 2, dim), _numbers(rng, 2, dim)) if rng.random() < 0.5 else (None, None)
    by_row = rng.random() < 0.5
    cos = _numbers(rng, len(plan.positions) if by_row else max(span.length for span in spans), half)
    q = qk_norm_rotary_store(qkv, weight, bias, 1e-5, cos, -cos, cache, plan, angles_by_row=by_row)
    return Outcome([q, prefill_attention(q, cache, plan), *cache.tensors], [])


def elementwise(rng: random.Random) -> Outcome:
    rows, hidden, dtype = rng.randint(1, 20), rng.randint(1, 200), rng.choice(DTYPES)
    live = rng.randint(0, rows)
    table, sampled = _numbers(rng, 30, hidden, dtype=dtype), torch.arange(3, 9)
    ids = torch.tensor([rng.choice([rng.randrange(30), -1 - rng.randrange(6), -9, 10**12]) for _ in range(rows)])
    x, statistics = embed(ids, sampled, table, torch.tensor([live], dtype=torch.int32))
    x[live:], statistics[:, :, live:] = 0, 0
    weight, bias = affine(hidden, dtype)
    results = [x.clone(), statistics, layer_norm(x, statistics, weight, bias, 1e-5)]
    results.append(layer_norm(x, None, weight, bias, 1e-5, residual=_numbers(rng, rows, hidden, dtype=dtype)))
    return Outcome([*results, x.clone(), bias_relu_squared_(x, bias if rng.random() < 0.5 else None)], [])


def sampling(rng: random.Random) -> Outcome:
    """A head and its draws, penalties, and draws anew from what truncation keeps."""
    rows, vocab_size, config = rng.randint(1, 3), rng.randint(1, 300), test_sampling.SMALL
    config = replace(config, slice_tokens=128)
    live = torch.tensor([rng.choice([rows, rng.randint(0, rows)])], dtype=torch.int32)
    hidden, weight = test_head.random_head(rows, vocab_size, rng.randint(1, 80), rng.choice(DTYPES))
    draw = test_sampling.draws([rng.choice([0.0, 0.7, 2.0]) for _ in range(rows)], seed=rng.randrange(1000))
    draw = replace(draw, wants_logits=torch.ones_like(draw.wants_logits))
    workspace = SamplingWorkspace.allocate(rows, vocab_size, CPU, config)
    logits = torch.zeros(rows, vocab_size)
    results = list(sample_head(hidden, weight, draw, live, workspace, logits=logits, config=config))
    counts = [rng.randint(0, vocab_size) for _ in range(rows)]
    ids = [token for count in counts for token in rng.sample(range(vocab_size), count)]
    per_row = [_numbers(rng, rows).abs() + 0.5 for _ in range(3)]
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    seen = torch.tensor(ids, dtype=torch.int32)
    apply_penalties(logits, PenaltyInputs(offsets, seen, (seen % 3).int(), *per_row), live)
    results = [each.clone() for each in (*results, logits)]
    results += (each.clone() for each in sample_logits(logits, draw, live, workspace, config=config))
    truncation = TruncationInputs(
        active=torch.tensor([rng.randint(0, 1) for _ in range(rows)], dtype=torch.int32),
        top_k=torch.tensor([rng.choice([0, 1, 5, 400]) for _ in range(rows)], dtype=torch.int32),
        top_p=torch.tensor([rng.choice([0.0, 0.5, 0.95, 1.0]) for _ in range(rows)]),
        min_p=torch.tensor([rng.choice([0.0, 0.1]) for _ in range(rows)]),
    )
    search = TruncationWorkspace.allocate(rows, vocab_size, CPU, config)
    search.maxima.fill_(NAN)
    search.digits.fill_(-1)
    search.searches.fill_(-1)
    results += sample_truncated(logits, draw, truncation, live, workspace, search, config=config)
    return Outcome(results, [])


def head(rng: random.Random) -> Outcome:
    """The output projection over several blocks of rows, with and without its logits."""
    rows, vocab_size = rng.randint(1, 40), rng.randint(1, 150)
    config = replace(test_sampling.SMALL, head_rows=16)
    hidden, weight = test_head.random_head(rows, vocab_size, rng.randint(1, 80), rng.choice(DTYPES))
    draw = test_sampling.draws([rng.choice([0.0, 0.7]) for _ in range(rows)], seed=rng.randrange(1000))
    wanted = torch.tensor([rng.randint(0, 1) for _ in range(rows)], dtype=torch.int32)
    logits = torch.zeros(rows, vocab_size) if rng.random() < 0.5 else None
    workspace = SamplingWorkspace.allocate(rows, vocab_size, CPU, config)
    # More live rows than there are count as all of them.
    live = torch.tensor([rng.choice([rows + 5, rng.randint(0, rows)])], dtype=torch.int32)
    draw = replace(draw, wants_logits=wanted)
    results = list(sample_head(hidden, weight, draw, live, workspace, logits=logits, config=config))
    return Outcome(results if logits is None else [*results, logits], [])


def invariant_decode(rng: random.Random) -> Outcome:
    """A step of the batch-invariant mode: two layers and the first one again, on one workspace."""
    most, most_tokens, heads, dim = rng.randint(1, 4), rng.randint(1, 200), rng.randint(1, 2), 16
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (decode_work, invariant_attention):
            patch.setattr(module, "SPLIT_TOKENS", 64)
        programs = rng.randint(2, 6)
        patch.setattr(invariant_attention, "num_sms", lambda device: programs)
        patch.setattr(invariant_attention, "_PROGRAMS_PER_SM", 1)
        workspace = DecodeWorkspace.allocate(most, most_tokens, heads, dim, CPU)
        for stale in (workspace.partial_outputs, workspace.partial_maxima, workspace.partial_totals):
            stale.fill_(NAN)
        lengths = [rng.choice([0, rng.randint(1, most_tokens), most_tokens]) for _ in range(rng.randint(1, most))]
        dtype, seed = rng.choice(DTYPES), rng.randrange(1000)
        layers = [test_decode_attention.Step.make(lengths, dtype=dtype, heads=heads, seed=seed + n) for n in range(2)]
        build_work_list(layers[0].lengths, workspace)
        for layer in [*layers, layers[0]]:
            tokens, cache = LastTokens(layer.lengths, layer.block_tables), layer.cache
            weight, bias = layer.norm
            q = qk_norm_rotary_store(layer.qkv, weight, bias, 1e-5, layer.cos, layer.sin, cache, tokens, exact=True)
            out = torch.zeros(len(lengths), heads * dim, dtype=dtype)
            invariant_attention.decode_attention(q, cache, layer.lengths, layer.block_tables, workspace, out=out)
            results += [out, *(each.clone() for each in cache.tensors)]
    return Outcome(results, [workspace.arrivals])


def invariant_rows(rng: random.Random) -> Outcome:
    """Prompts of the batch-invariant mode: products of any number of rows, and attention of chunks."""
    rows, hidden, width, dtype = rng.randint(1, 140), rng.randint(16, 150), rng.randint(16, 150), rng.choice(DTYPES)
    config, transposed = replace(test_projection.SMALL, splits=rng.randint(1, 2)), rng.random() < 0.5
    x, weight = _numbers(rng, rows, hidden, dtype=dtype), _numbers(rng, width, hidden, dtype=dtype)
    bias = _numbers(rng, width, dtype=dtype) if rng.random() < 0.5 else None
    up = project_rows(x, weight, bias, activation="relu_squared", config=config)
    back = _numbers(rng, *((width, hidden) if transposed else (hidden, width)), dtype=dtype)
    statistics = project_rows_add_(x, up, back, None, transposed=transposed, config=config)
    spans = [Span(rng.randint(0, 70), rng.randint(1, 70)) for _ in range(rng.randint(1, 2))]
    layout, heads, dim = Layout.make(spans, rng.choice([16, 32, 64]), rng.randrange(1000)), 2, 16
    plan = test_prefill_attention.plan_of(layout, [invariant_attention.config_of(dtype)])
    shape = (layout.num_blocks, heads, layout.block_size, dim)
    cache = LayerCache(*(_numbers(rng, *shape, dtype=dtype) for _ in range(2)))
    q = _numbers(rng, len(plan.positions), heads, dim, dtype=dtype)
    out = invariant_attention.chunk_attention(q, cache, plan, out=torch.empty(len(q), heads * dim, dtype=dtype))
    return Outcome([up, x, statistics, out], [])


def packed(rng: random.Random) -> Outcome:
    """Weights of 8 and 4 bits: both kinds of projection with splits, the head, and some of a matrix dequantized.

    They merge their splits by the function that "projections" plants faults in.
    """
    rows, dtype = rng.randint(1, 34), torch.float16
    bits, group = rng.choice(test_packed_projection.FORMATS)
    hidden, width = 128, rng.choice([256, 384])
    up, down, head = (
        pack(random_matrix(shape, bits, group, seed=rng.randrange(1000)), columns=columns)
        for shape, columns in (((width, hidden), False), ((hidden, width), True), ((150, hidden), False))
    )
    x = _numbers(rng, rows, hidden, dtype=dtype)
    live = torch.tensor([rng.randint(0, rows)], dtype=torch.int32)
    made = test_packed_projection.workspace(max(width, hidden), rows, 2)
    out, alive = packed_projection.project(
        x, up, None, activation="relu_squared", live=live, workspace=made, config=PackedConfig()
    )
    assert alive is not None
    flags = alive if rng.random() < 0.5 else None
    statistics = packed_projection.project_add_(
        x, out, down, None, alive=flags, live=live, workspace=made, config=PackedConfig(splits=2)
    )
    count = int(live)
    results = [out[:count], alive, x[:count], statistics[:, :, :count]]
    draw = test_sampling.draws([rng.choice([0.0, 0.7]) for _ in range(rows)], seed=rng.randrange(1000))
    workspace = SamplingWorkspace.allocate(rows, 150, CPU)
    tokens, totals = sample_head(_numbers(rng, rows, hidden, dtype=dtype), head, draw, live, workspace)
    results += [tokens[:count], totals[:count]]
    results.append(dequantize(down, torch.zeros(hidden * width, dtype=dtype), 0, hidden).clone())
    return Outcome(results, [made.counters])


def _numbers(rng: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**31))).to(dtype)


MERGES: dict[str, Case] = {
    "projections": projections,
    "decode attention": decode_attention,
    "batch-invariant decode": invariant_decode,
}
"""Kernels whose programs exchange something within a launch."""

CASES: dict[str, Case] = MERGES | {
    "projection without splits": projection_without_splits,
    "prefill": prefill,
    "decode attention over 8 bits": partial(decode_attention, eight_bits=True),
    "rows of one sequence": rows_of_one_sequence,
    "prefill over 8 bits": partial(prefill, eight_bits=True),
    "elementwise": elementwise,
    "sampling": sampling,
    "head": head,
    "batch-invariant rows": invariant_rows,
    "packed weights": packed,
}
