"""Random steps of every Triton kernel, small enough to interpret many; what runs them and how is the tests' affair.

A case takes a generator and draws everything from it: shapes, live rows, lengths, block tables, numbers.  To add a
kernel, write a case that calls its wrapper and enter it in CASES, or in MERGES if its programs exchange anything within
a launch.  A test fails while a kernel of a LIMITS table has no case.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from persimmon.kernels import decode_attention as decode_module
from persimmon.kernels.decode_attention import DecodeWorkspace, build_work_list
from persimmon.kernels.layer_norm import bias_relu_squared_, embed, layer_norm
from persimmon.kernels.operands import LayerCache, PenaltyInputs, TruncationInputs
from persimmon.kernels.prefill_attention import prefill_attention, qk_norm_rotary_store
from persimmon.kernels.projection_config import ProjectionConfig, Workspace
from persimmon.kernels.sampling import Workspace as SamplingWorkspace
from persimmon.kernels.sampling import sample_head, sample_logits
from persimmon.kernels.truncation import TruncationWorkspace, apply_penalties, sample_truncated
from tests.kernels import test_decode_attention, test_prefill_attention, test_projection, test_sampling
from tests.kernels.test_layer_norm import affine
from tests.kernels.test_reference import Layout, Span

CPU = torch.device("cpu")
NAN = float("nan")
DTYPES = [torch.float16, torch.float32]


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


def projections(dice: random.Random) -> Outcome:
    """Both kinds of projection with splits, two layers on one workspace, padding rows, and all of it again."""
    bucket = dice.choice([dice.randint(1, 8), dice.randint(1, 20), dice.randint(33, 40)])
    live = dice.randint(0, bucket)
    hidden, width = dice.randint(129, 192), dice.choice([dice.randint(129, 192), dice.randint(257, 320)])
    dtype, block_n = dice.choice(DTYPES), dice.choice([64, 128])
    in_prologue = dice.random() < 0.5
    wide = ProjectionConfig(block_n=block_n, block_k=128, splits=dice.randint(2, 3), norm_in_prologue=in_prologue)
    narrow = replace(wide, splits=dice.randint(2, 4))
    into = test_projection.Into.make(bucket, hidden, width, dtype)
    back = test_projection.Add.make(bucket, width, hidden, dtype, zeros=0.5)
    alive = back.alive if dice.random() < 0.5 else None
    transposed = alive is not None or dice.random() < 0.5
    made = Workspace.allocate([(width, wide), (hidden, narrow)], bucket, CPU)
    made.partials.fill_(NAN)
    rows, results = slice(0, live), []
    for _layer_and_replay in range(4):
        out, flags = into.run(wide, rows=rows, bucket=bucket, activation="relu_squared", made=made)
        assert flags is not None
        results += [out, flags]
        results += back.run(narrow, rows=rows, bucket=bucket, transposed=transposed, alive=alive, made=made)
        # The next layer's numbers differ, so that partial sums left by this one would show.
        into, back = replace(into, x=-into.x), replace(back, activation=-back.activation)
    return Outcome(results, [made.counters])


def projection_without_splits(dice: random.Random) -> Outcome:
    bucket = dice.randint(1, 34)
    case = test_projection.Into.make(bucket, dice.randint(16, 130), dice.randint(16, 130), dice.choice(DTYPES))
    config = replace(test_projection.SMALL, splits=1)
    out, flags = case.run(config, rows=slice(dice.randint(0, bucket)), bucket=bucket, activation="relu_squared")
    return Outcome([out] if flags is None else [out, flags], [])


def decode_attention(dice: random.Random) -> Outcome:
    """Two steps, each of a work list and two layers twice, on one workspace; sequences end and begin between them."""
    most, most_tokens, split = dice.randint(1, 5), dice.randint(1, 140), 32
    heads, dim, block_size = dice.randint(1, 2), 16, dice.choice([16, 32])
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "SPLIT_TOKENS", split)
        config = test_decode_attention.few_programs(patch, dice.randint(2, 7))
        workspace = DecodeWorkspace.allocate(most, most_tokens, heads, dim, CPU)
        for stale in (workspace.partial_outputs, workspace.partial_maxima, workspace.partial_totals):
            stale.fill_(NAN)
        for _step in range(2):
            sequences = range(dice.randint(1, most))
            lengths = [dice.choice([0, dice.randint(1, most_tokens), most_tokens]) for _ in sequences]
            dtype = dice.choice(DTYPES)
            layers = [
                test_decode_attention.Step.make(
                    lengths, dtype=dtype, block_size=block_size, heads=heads, dim=dim, seed=dice.randrange(1000)
                )
                for _ in range(2)
            ]
            build_work_list(layers[0].lengths, workspace)
            items = int(workspace.num_items)
            results += [each[:items].clone() for each in (workspace.item_sequences, workspace.item_splits)]
            for layer in layers * 2:
                results += [layer.run(workspace, config), *(cache.clone() for cache in layer.caches)]
    return Outcome(results, [workspace.arrivals])


def prefill(dice: random.Random) -> Outcome:
    spans = [Span(dice.randint(0, 70), dice.randint(1, 36)) for _ in range(dice.randint(1, 2))]
    layout = Layout.make(spans, dice.choice([16, 32, 64]), dice.randrange(1000))
    heads, dim, half, dtype = dice.randint(1, 2), 16, dice.choice([2, 4, 8]), dice.choice(DTYPES)
    plan = test_prefill_attention.plan_of(layout)
    shape = (layout.num_blocks, heads, layout.block_size, dim)
    cache = LayerCache(*(torch.full(shape, NAN, dtype=dtype) for _ in range(2)))
    for sequence, span in enumerate(spans):
        for block, slot in (layout.place(sequence, position) for position in range(span.start)):
            for stored in cache.tensors:
                stored[block, :, slot] = _numbers(dice, heads, dim, dtype=dtype)
    qkv = _numbers(dice, len(plan.positions), heads, 3, dim, dtype=dtype)
    weight, bias = (_numbers(dice, 2, dim), _numbers(dice, 2, dim)) if dice.random() < 0.5 else (None, None)
    by_row = dice.random() < 0.5
    cos = _numbers(dice, len(plan.positions) if by_row else max(span.length for span in spans), half)
    q = qk_norm_rotary_store(qkv, weight, bias, 1e-5, cos, -cos, cache, plan, angles_by_row=by_row)
    return Outcome([q, prefill_attention(q, cache, plan), *cache.tensors], [])


def elementwise(dice: random.Random) -> Outcome:
    rows, hidden, dtype = dice.randint(1, 20), dice.randint(1, 200), dice.choice(DTYPES)
    live = dice.randint(0, rows)
    table, sampled = _numbers(dice, 30, hidden, dtype=dtype), torch.arange(3, 9)
    ids = torch.tensor([dice.choice([dice.randrange(30), -1 - dice.randrange(6), -9, 10**12]) for _ in range(rows)])
    x, statistics = embed(ids, sampled, table, torch.tensor([live], dtype=torch.int32))
    x[live:], statistics[:, :, live:] = 0, 0
    weight, bias = affine(hidden, dtype)
    results = [x.clone(), statistics, layer_norm(x, statistics, weight, bias, 1e-5)]
    results.append(layer_norm(x, None, weight, bias, 1e-5, residual=_numbers(dice, rows, hidden, dtype=dtype)))
    return Outcome([*results, x.clone(), bias_relu_squared_(x, bias if dice.random() < 0.5 else None)], [])


def sampling(dice: random.Random) -> Outcome:
    """A head and its draws, penalties, and draws anew from what truncation keeps."""
    rows, vocab_size, config = dice.randint(1, 3), dice.randint(1, 300), test_sampling.SMALL
    config = replace(config, slice_tokens=128)
    live = torch.tensor([dice.choice([rows, dice.randint(0, rows)])], dtype=torch.int32)
    hidden, weight = test_sampling.random_head(rows, vocab_size, dice.randint(1, 80), dice.choice(DTYPES))
    draw = test_sampling.draws([dice.choice([0.0, 0.7, 2.0]) for _ in range(rows)], seed=dice.randrange(1000))
    draw = replace(draw, wants_logits=torch.ones_like(draw.wants_logits))
    workspace = SamplingWorkspace.allocate(rows, vocab_size, CPU, config)
    logits = torch.zeros(rows, vocab_size)
    results = list(sample_head(hidden, weight, draw, live, workspace, logits=logits, config=config))
    counts = [dice.randint(0, vocab_size) for _ in range(rows)]
    ids = [token for count in counts for token in dice.sample(range(vocab_size), count)]
    per_row = [_numbers(dice, rows).abs() + 0.5 for _ in range(3)]
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    seen = torch.tensor(ids, dtype=torch.int32)
    apply_penalties(logits, PenaltyInputs(offsets, seen, (seen % 3).int(), *per_row), live)
    results = [each.clone() for each in (*results, logits)]
    results += (each.clone() for each in sample_logits(logits, draw, live, workspace, config=config))
    truncation = TruncationInputs(
        active=torch.tensor([dice.randint(0, 1) for _ in range(rows)], dtype=torch.int32),
        top_k=torch.tensor([dice.choice([0, 1, 5, 400]) for _ in range(rows)], dtype=torch.int32),
        top_p=torch.tensor([dice.choice([0.0, 0.5, 0.95, 1.0]) for _ in range(rows)]),
        min_p=torch.tensor([dice.choice([0.0, 0.1]) for _ in range(rows)]),
    )
    search = TruncationWorkspace.allocate(rows, vocab_size, CPU, config)
    search.maxima.fill_(NAN)
    search.digits.fill_(-1)
    search.searches.fill_(-1)
    results += sample_truncated(logits, draw, truncation, live, workspace, search, config=config)
    return Outcome(results, [])


def head(dice: random.Random) -> Outcome:
    """The output projection over several blocks of rows, with and without its logits."""
    rows, vocab_size = dice.randint(1, 40), dice.randint(1, 150)
    config = replace(test_sampling.SMALL, head_rows=16)
    hidden, weight = test_sampling.random_head(rows, vocab_size, dice.randint(1, 80), dice.choice(DTYPES))
    draw = test_sampling.draws([dice.choice([0.0, 0.7]) for _ in range(rows)], seed=dice.randrange(1000))
    wanted = torch.tensor([dice.randint(0, 1) for _ in range(rows)], dtype=torch.int32)
    logits = torch.zeros(rows, vocab_size) if dice.random() < 0.5 else None
    workspace = SamplingWorkspace.allocate(rows, vocab_size, CPU, config)
    # More live rows than there are count as all of them.
    live = torch.tensor([dice.choice([rows + 5, dice.randint(0, rows)])], dtype=torch.int32)
    draw = replace(draw, wants_logits=wanted)
    results = list(sample_head(hidden, weight, draw, live, workspace, logits=logits, config=config))
    return Outcome(results if logits is None else [*results, logits], [])


def _numbers(dice: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(dice.randrange(2**31))).to(dtype)


MERGES: dict[str, Case] = {"projections": projections, "decode attention": decode_attention}
"""Kernels whose programs exchange something within a launch."""

CASES: dict[str, Case] = MERGES | {
    "projection without splits": projection_without_splits,
    "prefill": prefill,
    "elementwise": elementwise,
    "sampling": sampling,
    "head": head,
}
