"""Attention in plain torch against naive float64 attention, written here from the formulas."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persimmon.kernels import LayerCache, reference_attention
from persimmon.kernels.reference_attention import AttentionPlan
from tests.kernels.test_reference import CPU, DTYPES, NAN, assert_close, exact, naive_layer_norm, rounded


def naive_rotary(x: np.ndarray, position: int, rotary_dim: int, theta: float) -> np.ndarray:
    """One head's vector [D]: dimension i turns against i + R/2, for i < R/2."""
    turned = x.copy()
    for i in range(rotary_dim // 2):
        angle = position * theta ** (-2 * i / rotary_dim)
        left, right = x[i], x[i + rotary_dim // 2]
        turned[i] = left * math.cos(angle) - right * math.sin(angle)
        turned[i + rotary_dim // 2] = right * math.cos(angle) + left * math.sin(angle)
    return turned


def naive_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One query [H, D] against the keys and values [L, H, D] that it may see."""
    scores = np.einsum("hd,lhd->hl", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    attended: np.ndarray = np.einsum("hl,lhd->hd", weights / weights.sum(-1, keepdims=True), v)
    return attended


@dataclass(frozen=True)
class Span:
    """A sequence's part of a step: `count` tokens after `start` cached ones."""

    start: int
    count: int

    @property
    def length(self) -> int:
        return self.start + self.count


@dataclass(frozen=True)
class Layout:
    """A step of several sequences over shuffled blocks."""

    spans: Sequence[Span]
    tables: Sequence[list[int]]
    num_blocks: int
    block_size: int

    @classmethod
    def make(cls, spans: Sequence[Span], block_size: int, seed: int, spare_in_table: int = 0) -> "Layout":
        """Every sequence has the blocks it needs, and `spare_in_table` beyond them; three blocks belong to no
        sequence."""
        needs = [-(-span.length // block_size) + spare_in_table for span in spans]
        num_blocks = sum(needs) + 3
        blocks = list(range(num_blocks))
        random.Random(seed).shuffle(blocks)
        tables = []
        for need in needs:
            tables.append(blocks[:need])
            blocks = blocks[need:]
        return cls(spans, tables, num_blocks, block_size)

    def plan(self, heads: int, dtype: torch.dtype) -> AttentionPlan:
        return reference_attention.plan_attention(
            self.tables,
            [span.start for span in self.spans],
            [span.count for span in self.spans],
            num_blocks=self.num_blocks,
            num_heads=heads,
            block_size=self.block_size,
            dtype=dtype,
            device=CPU,
        )

    def place(self, sequence: int, position: int) -> tuple[int, int]:
        """The block and the slot in it of one token."""
        return self.tables[sequence][position // self.block_size], position % self.block_size

    def step_places(self) -> list[tuple[int, int]]:
        """The places of the step's own tokens, in order."""
        return [
            self.place(sequence, position)
            for sequence, span in enumerate(self.spans)
            for position in range(span.start, span.length)
        ]


class TestQkNormRotaryStore:
    THETA = 100.0
    SPANS = (Span(0, 1), Span(40, 1), Span(31, 1), Span(16, 1), Span(0, 5), Span(14, 40), Span(33, 2))

    @pytest.mark.parametrize("eps", [1e-5, 0.3])
    @pytest.mark.parametrize("normed", [True, False], ids=["normed", "not normed"])
    @pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 32), (16, 4), (16, 16)])
    @pytest.mark.parametrize("block_size", [16, 32])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_formula_and_writes_only_its_own_rows(
        self, dtype: torch.dtype, block_size: int, dim: int, rotary_dim: int, normed: bool, eps: float
    ) -> None:
        heads = 3
        layout = Layout.make(self.SPANS, block_size, seed=dim)
        plan = layout.plan(heads, dtype)
        positions = [position for span in layout.spans for position in range(span.start, span.length)]
        assert plan.positions.tolist() == positions
        generator = np.random.default_rng(7)
        qkv = rounded(generator.normal(0.5, 1, (len(positions), heads, 3, dim)), dtype)
        weight = rounded(generator.uniform(0.5, 1.5, (2, dim)), dtype) if normed else None
        bias = rounded(generator.normal(0, 0.5, (2, dim)), dtype) if normed else None
        angles = np.array(positions)[:, None] * self.THETA ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
        cos, sin = (rounded(table, torch.float32)[:, None, None] for table in (np.cos(angles), np.sin(angles)))
        shape = (layout.num_blocks, heads, block_size, dim)
        k_cache, v_cache = (rounded(generator.normal(0, 1, shape), dtype) for _ in range(2))
        expected_k, expected_v = k_cache.clone(), v_cache.clone()
        before = qkv.clone()

        q = reference_attention.qk_norm_rotary_store(
            qkv, weight, bias, eps, cos, sin, LayerCache(k_cache, v_cache), plan
        )

        assert torch.equal(qkv, before)
        expected_qk = np.empty((len(positions), heads, 2, dim))
        for token, position in enumerate(positions):
            for head in range(heads):
                for which in range(2):
                    vector = exact(qkv[token, head, which])
                    if weight is not None and bias is not None:
                        vector = naive_layer_norm(vector, exact(weight[which]), exact(bias[which]), eps)
                    expected_qk[token, head, which] = naive_rotary(vector, position, rotary_dim, self.THETA)
        assert q.shape == (len(positions), heads, dim)
        assert_close(q, expected_qk[:, :, 0], dtype, factor=2)
        for token, (block, slot) in enumerate(layout.step_places()):
            assert_close(k_cache[block, :, slot], expected_qk[token, :, 1], dtype, factor=2)
            expected_k[block, :, slot] = k_cache[block, :, slot]
            expected_v[block, :, slot] = qkv[token, :, 2]
        assert torch.equal(k_cache, expected_k)
        assert torch.equal(v_cache, expected_v)

    def test_the_dimensions_behind_the_rotary_ones_pass(self) -> None:
        layout = Layout.make([Span(100, 3)], 16, seed=0)
        qkv = torch.randn(3, 2, 3, 64)
        angles = torch.rand(3, 1, 1, 16) * 6
        cache = LayerCache(*(torch.zeros(layout.num_blocks, 2, 16, 64) for _ in range(2)))
        plan = layout.plan(2, torch.float32)
        q = reference_attention.qk_norm_rotary_store(qkv, None, None, 1e-5, angles.cos(), angles.sin(), cache, plan)
        assert torch.equal(q[..., 32:], qkv[:, :, 0, 32:])
        assert not torch.isclose(q[..., :32], qkv[:, :, 0, :32]).any(-1).all()


def attend_and_compare(
    layout: Layout, dtype: torch.dtype, *, heads: int = 2, dim: int = 64, seed: int = 0, scale: float = 1.0
) -> None:
    """Paged attention against the naive one, every cache row that no sequence has written being NaN."""
    generator = np.random.default_rng(seed)
    shape = (layout.num_blocks, heads, layout.block_size, dim)
    k_cache, v_cache = (torch.full(shape, NAN, dtype=dtype) for _ in range(2))
    queries, expected = [], []
    for sequence, span in enumerate(layout.spans):
        k, v = (rounded(generator.normal(0, scale, (span.length, heads, dim)), dtype) for _ in range(2))
        q = rounded(generator.normal(0, scale, (span.count, heads, dim)), dtype)
        for position in range(span.length):
            block, slot = layout.place(sequence, position)
            k_cache[block, :, slot] = k[position]
            v_cache[block, :, slot] = v[position]
        for i in range(span.count):
            seen = span.start + i + 1
            expected.append(naive_attention(exact(q[i]), exact(k[:seen]), exact(v[:seen])))
        queries.append(q)
    k_before, v_before = k_cache.clone(), v_cache.clone()

    attended = reference_attention.paged_attention(
        torch.cat(queries), LayerCache(k_cache, v_cache), layout.plan(heads, dtype)
    )

    assert attended.shape == (len(expected), heads * dim)
    assert_close(attended, np.stack(expected).reshape(len(expected), -1), dtype, factor=2 * max(scale**2, 1))
    assert torch.equal(k_cache.nan_to_num(7.0), k_before.nan_to_num(7.0))
    assert torch.equal(v_cache.nan_to_num(7.0), v_before.nan_to_num(7.0))


class TestPagedAttention:
    MIXTURES: ClassVar[dict[str, list[Span]]] = {
        "one token alone": [Span(0, 1)],
        "one decode": [Span(299, 1)],
        "block borders": [Span(start, 1) for start in (14, 15, 16, 30, 31, 32, 33, 62, 63, 64, 65)],
        "one prompt": [Span(0, 77)],
        "one chunk with context": [Span(50, 33)],
        "decodes of equal length": [Span(120, 1)] * 5,
        "decodes of very different lengths": [Span(start, 1) for start in (0, 1, 2, 90, 100, 110, 400, 499)],
        "decodes in any order": [Span(start, 1) for start in (300, 2, 310, 0, 40, 299)],
        "decodes, then chunks": [Span(3, 1), Span(70, 1), Span(0, 20), Span(64, 16), Span(17, 60)],
        "chunks, then decodes": [Span(0, 20), Span(64, 16), Span(3, 1), Span(70, 1), Span(0, 1)],
        "chunks that end with a block": [Span(0, 64), Span(32, 32), Span(63, 1), Span(48, 16)],
    }

    @pytest.mark.parametrize("spans", MIXTURES.values(), ids=MIXTURES)
    @pytest.mark.parametrize("block_size", [16, 32, 64])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_causal_softmax_over_the_sequence_s_own_blocks(
        self, dtype: torch.dtype, block_size: int, spans: list[Span]
    ) -> None:
        attend_and_compare(Layout.make(spans, block_size, seed=len(spans)), dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_blocks_reserved_beyond_the_sequence_are_not_read(self, dtype: torch.dtype) -> None:
        spans = self.MIXTURES["decodes, then chunks"]
        attend_and_compare(Layout.make(spans, 16, seed=1, spare_in_table=2), dtype)

    def test_sharp_scores_do_not_overflow(self) -> None:
        attend_and_compare(Layout.make([Span(80, 1), Span(20, 30)], 16, seed=1), torch.float32, scale=20.0)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        spans=st.lists(st.builds(Span, st.integers(0, 200), st.integers(1, 40)), min_size=1, max_size=6),
        decodes=st.lists(st.builds(Span, st.integers(0, 300), st.just(1)), max_size=8),
        block_size=st.sampled_from([16, 32, 64]),
        heads=st.integers(1, 3),
        dtype=st.sampled_from(DTYPES),
        sort=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def test_is_right_for_any_ragged_batch(
        self,
        spans: list[Span],
        decodes: list[Span],
        block_size: int,
        heads: int,
        dtype: torch.dtype,
        sort: bool,
        seed: int,
    ) -> None:
        if sort:
            decodes = sorted(decodes, key=lambda span: span.start)
        attend_and_compare(Layout.make([*decodes, *spans], block_size, seed), dtype, heads=heads, dim=16, seed=seed)


class TestPlanAttention:
    @given(st.lists(st.integers(0, 500), min_size=1, max_size=40), st.booleans())
    def test_groups_cover_all_decodes_and_waste_little(self, starts: list[int], sort: bool) -> None:
        starts = sorted(starts) if sort else starts
        layout = Layout.make([*(Span(start, 1) for start in starts), Span(5, 3)], 16, seed=0)
        plan = layout.plan(2, torch.float32)
        covered: list[int] = []
        for group in plan.decodes:
            lengths = [start + 1 for start in starts[group.first : group.end]]
            assert max(lengths) * len(lengths) <= reference_attention.PADDING_LIMIT * sum(lengths)
            covered.extend(range(group.first, group.end))
        assert covered == list(range(len(starts)))
        assert [(chunk.first, chunk.end) for chunk in plan.chunks] == [(len(starts), len(starts) + 3)]

    def test_neighbours_of_equal_length_share_one_call(self) -> None:
        plan = Layout.make([Span(100, 1)] * 32, 16, seed=0).plan(2, torch.float32)
        assert len(plan.decodes) == 1
        assert plan.decodes[0].padding is None

    def test_no_two_tokens_share_a_cache_row(self) -> None:
        layout = Layout.make([Span(10, 1), Span(0, 50), Span(47, 20)], 16, seed=0)
        rows = layout.plan(4, torch.float32).store_rows.tolist()
        assert len(set(rows)) == len(rows) == 71 * 4
