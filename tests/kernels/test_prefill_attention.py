"""The prompt kernels, interpreted, against float64 formulas; everything that they must not read is NaN."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persimmon.kernels import LayerCache, reference_attention
from persimmon.kernels.cache_types import EIGHT_BIT_CACHES, allocate_layer
from persimmon.kernels.chunk_plan import CONFIGS, FLOAT32_CONFIGS
from persimmon.kernels.prefill_attention import (
    ChunkPlan,
    PrefillConfig,
    plan_chunks,
    prefill_attention,
    qk_norm_rotary_store,
)
from persimmon.kernels.reference_cache import dequantize_rows, quantize_rows, saturate_to_fp8, store_rows
from tests.interpreter import multiply_as_matrix_units, multiply_bfloat16
from tests.kernels.stored_rows import assert_stored_alike, empty_layer
from tests.kernels.test_reference import CPU, DTYPES, NAN, assert_close, exact, naive_layer_norm, rounded
from tests.kernels.test_reference_attention import Layout, Span, naive_attention, naive_rotary

SMALL = (PrefillConfig(16, 32, 4, 3), PrefillConfig(32, 32, 4, 3))
"""Tiles that give short chunks several of them."""


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_bfloat16(monkeypatch)


def plan_of(
    layout: Layout, configs: Sequence[PrefillConfig] | None = SMALL, dtype: torch.dtype = torch.float16
) -> ChunkPlan:
    starts, counts = [span.start for span in layout.spans], [span.count for span in layout.spans]
    return plan_chunks(
        layout.tables, starts, counts, block_size=layout.block_size, device=CPU, dtype=dtype, configs=configs
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """For comparisons in which NaN equals NaN."""
    return tensor.view(torch.uint8)


class TestPlanChunks:
    SPANS = (Span(0, 5), Span(130, 100), Span(31, 1), Span(16, 16), Span(0, 17))

    @pytest.mark.parametrize("block_size", [16, 32, 64])
    def test_every_token_has_its_position_and_its_slot(self, block_size: int) -> None:
        layout = Layout.make(self.SPANS, block_size, seed=1, spare_in_table=2)
        plan = plan_of(layout)
        assert plan.positions.tolist() == [p for span in self.SPANS for p in range(span.start, span.length)]
        assert plan.slots.tolist() == [block * block_size + offset for block, offset in layout.step_places()]
        assert plan.query_starts.tolist() == [0, 5, 105, 106, 122, 139]
        assert plan.starts.tolist() == [0, 130, 31, 16, 0]
        for row, table, span in zip(plan.block_tables.tolist(), layout.tables, self.SPANS, strict=True):
            used = -(-span.length // block_size)
            assert row[:used] == table[:used]

    def test_tiles_cover_every_query_once_those_with_most_keys_first(self) -> None:
        plan = plan_of(Layout.make(self.SPANS, 16, seed=1))
        covered = []
        for launch in plan.launches:
            ends = []
            for sequence, first in launch.tiles.tolist():
                span = self.SPANS[sequence]
                last = min(first + launch.config.block_queries, span.count)
                covered += [(sequence, query) for query in range(first, last)]
                ends.append(span.start + last)
            assert ends == sorted(ends, reverse=True)
        assert sorted(covered) == [(i, query) for i, span in enumerate(self.SPANS) for query in range(span.count)]

    def test_a_sequence_s_own_chunk_decides_its_tile_shape(self) -> None:
        plan = plan_of(Layout.make(self.SPANS, 16, seed=1))
        shapes = {
            launch.config: sorted({sequence for sequence, _ in launch.tiles.tolist()}) for launch in plan.launches
        }
        assert shapes == {SMALL[0]: [0, 2, 3], SMALL[1]: [1, 4]}

    def test_only_shapes_that_are_needed_are_launched(self) -> None:
        for dtype, configs in [(torch.float16, CONFIGS), (torch.bfloat16, CONFIGS), (torch.float32, FLOAT32_CONFIGS)]:
            for count, config in [(16, configs[0]), (17, configs[1])]:
                plan = plan_of(Layout.make([Span(9, count)], 16, seed=0), None, dtype)
                assert [launch.config for launch in plan.launches] == [config]

    @given(st.lists(st.builds(Span, st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=5))
    def test_all_tensors_are_aligned_parts_of_one_copy(self, spans: list[Span]) -> None:
        plan = plan_of(Layout.make(spans, 16, seed=0))
        tensors = [plan.positions, plan.slots, plan.block_tables, plan.query_starts, plan.starts]
        tensors += [launch.tiles for launch in plan.launches]
        storage = plan.slots.untyped_storage()
        for tensor in tensors:
            assert tensor.untyped_storage().data_ptr() == storage.data_ptr()
            assert tensor.storage_offset() * tensor.itemsize % 16 == 0
            assert tensor.is_contiguous()
        assert [tensor.dtype for tensor in tensors] == [torch.int32, torch.int64] + [torch.int32] * (len(tensors) - 2)
        places = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)
        assert all(begin + size <= end for (begin, size), (end, _) in pairwise(places))

    @pytest.mark.parametrize(
        ("tables", "starts", "counts", "message"),
        [
            ([], [], [], "a step needs a sequence"),
            ([[0]], [0, 1], [1], "1 block tables, 2 starts and 1 counts"),
            ([[0]], [-1], [1], r"at least 0 .* got \[-1\]"),
            ([[0]], [0], [0], r"at least 1, got \[0\] and \[0\]"),
            ([[0], [1, 2]], [0, 30], [16, 3], "sequence 1 .* 33 tokens, which take 3 blocks of 16; its table has 2"),
        ],
    )
    def test_says_what_is_wrong(
        self, tables: list[list[int]], starts: list[int], counts: list[int], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            plan_chunks(tables, starts, counts, block_size=16, device=CPU)


class TestQkNormRotaryStore:
    THETA = 100.0
    SPANS = (Span(14, 4), Span(31, 1), Span(63, 2))

    @pytest.mark.parametrize("normed", [True, False], ids=["normed", "not normed"])
    @pytest.mark.parametrize(
        ("block_size", "heads", "dim", "rotary_dim"),
        [(16, 3, 64, 32), (32, 3, 64, 32), (64, 2, 16, 4), (16, 1, 16, 16), (32, 2, 32, 24), (64, 11, 128, 64)],
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_formula_and_writes_only_its_own_rows(
        self, dtype: torch.dtype, block_size: int, heads: int, dim: int, rotary_dim: int, normed: bool
    ) -> None:
        layout = Layout.make(self.SPANS, block_size, seed=dim)
        positions = np.array([position for span in layout.spans for position in range(span.start, span.length)])
        generator = np.random.default_rng(7)
        eps = 0.1
        qkv = rounded(generator.normal(0.5, 1, (len(positions), heads, 3, dim)), dtype)
        weight = rounded(generator.uniform(0.5, 1.5, (2, dim)), dtype) if normed else None
        bias = rounded(generator.normal(0, 0.5, (2, dim)), dtype) if normed else None
        angles = np.arange(80)[:, None] * self.THETA ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
        # Unused positions are NaN in the tables.
        angles[np.setdiff1d(np.arange(80), positions)] = NAN
        cos, sin = (rounded(table, torch.float32) for table in (np.cos(angles), np.sin(angles)))
        shape = (layout.num_blocks, heads, block_size, dim)
        k_cache, v_cache = (torch.full(shape, NAN, dtype=dtype) for _ in range(2))
        expected_k, expected_v = k_cache.clone(), v_cache.clone()
        before = qkv.clone()

        q = qk_norm_rotary_store(qkv, weight, bias, eps, cos, sin, LayerCache(k_cache, v_cache), plan_of(layout))

        assert torch.equal(qkv, before)
        expected_qk = exact(qkv[:, :, :2])
        for token, head, which in np.ndindex(expected_qk.shape[:3]):
            vector = expected_qk[token, head, which]
            if weight is not None and bias is not None:
                vector = naive_layer_norm(vector, exact(weight[which]), exact(bias[which]), eps)
            expected_qk[token, head, which] = naive_rotary(vector, int(positions[token]), rotary_dim, self.THETA)
        assert q.shape == (len(positions), heads, dim)
        assert_close(q, expected_qk[:, :, 0], dtype, factor=2)
        for token, (block, slot) in enumerate(layout.step_places()):
            assert_close(k_cache[block, :, slot], expected_qk[token, :, 1], dtype, factor=2)
            expected_k[block, :, slot] = k_cache[block, :, slot]
            expected_v[block, :, slot] = qkv[token, :, 2]
        assert torch.equal(bits(k_cache), bits(expected_k))
        assert torch.equal(bits(v_cache), bits(expected_v))

    @pytest.mark.parametrize(("dtype", "dim", "rotary_dim"), [(torch.float16, 64, 32), (torch.float32, 32, 24)])
    @pytest.mark.parametrize("cache_dtype", EIGHT_BIT_CACHES.values(), ids=EIGHT_BIT_CACHES)
    def test_stores_8_bits_as_plain_torch_does(
        self, cache_dtype: torch.dtype, dtype: torch.dtype, dim: int, rotary_dim: int
    ) -> None:
        layout, heads = Layout.make(self.SPANS, 16, seed=dim), 3
        plan, theirs = plan_of(layout), layout.plan(3, cache_dtype)
        generator = torch.Generator().manual_seed(dim)
        qkv = torch.randn(len(plan.positions), heads, 3, dim, generator=generator).to(dtype)
        qkv[0, 0, 1, 3] = NAN
        qkv[1, 1, 2, 3] = math.inf
        angles = torch.rand(80, rotary_dim // 2, generator=generator) * 6
        weight, bias = (torch.randn(2, dim, generator=generator) for _ in range(2))
        own, other, before = (empty_layer((layout.num_blocks, heads, 16, dim), cache_dtype) for _ in range(3))
        q = qk_norm_rotary_store(qkv, weight, bias, 1e-5, angles.cos(), angles.sin(), own, plan)
        cos, sin = (table[plan.positions.long()][:, None, None] for table in (angles.cos(), angles.sin()))
        expected = reference_attention.qk_norm_rotary_store(qkv, weight, bias, 1e-5, cos, sin, other, theirs)
        assert_close(q, exact(expected), dtype, factor=2)
        assert_stored_alike(own, other, before)

    def test_angles_may_be_those_of_rows_instead_of_positions(self) -> None:
        layout = Layout.make([Span(3, 4), Span(40, 1), Span(0, 7)], 16, seed=3)
        positions = np.array([position for span in layout.spans for position in range(span.start, span.length)])
        qkv, plan = torch.randn(len(positions), 3, 3, 64), plan_of(layout)
        angles = torch.rand(64, 16) * 6
        made = []
        for rows, by_row in ((slice(None), False), (torch.from_numpy(positions), True)):
            cache = LayerCache(*(torch.zeros(layout.num_blocks, 3, 16, 64) for _ in range(2)))
            cos, sin = angles[rows].cos(), angles[rows].sin()
            q = qk_norm_rotary_store(qkv, None, None, 1e-5, cos, sin, cache, plan, angles_by_row=by_row)
            made.append((q, *cache.tensors))
        assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))

    def test_keys_and_queries_that_pass_the_rotation_keep_their_bits(self) -> None:
        layout = Layout.make([Span(100, 3)], 16, seed=0)
        qkv = torch.randn(3, 2, 3, 64).half()
        qkv[1, 1, :2, 40] = float("inf")
        angles = torch.rand(103, 16) * 6
        cache = LayerCache(*(torch.zeros(layout.num_blocks, 2, 16, 64).half() for _ in range(2)))
        plan = plan_of(layout)
        with np.errstate(invalid="ignore"):
            q = qk_norm_rotary_store(qkv, None, None, 1e-5, angles.cos(), angles.sin(), cache, plan)
        assert torch.equal(q[..., 32:], qkv[:, :, 0, 32:])
        for token, (block, slot) in enumerate(layout.step_places()):
            assert torch.equal(cache.keys[block, :, slot, 32:], qkv[token, :, 1, 32:])

    def test_a_token_s_bits_do_not_depend_on_the_others(self) -> None:
        qkv = torch.randn(12, 3, 3, 64).half()
        weight, bias = torch.rand(2, 64).half(), torch.rand(2, 64).half()
        angles = torch.rand(64, 16) * 6

        def store(layout: Layout, first: int) -> tuple[torch.Tensor, torch.Tensor]:
            plan = plan_of(layout)
            part = qkv[first : first + len(plan.positions)]
            cache = LayerCache(*(torch.zeros(layout.num_blocks, 3, 16, 64).half() for _ in range(2)))
            q = qk_norm_rotary_store(part, weight, bias, 1e-5, angles.cos(), angles.sin(), cache, plan)
            return q, torch.stack([cache.keys[block, :, slot] for block, slot in layout.step_places()])

        spans = [Span(3, 4), Span(40, 1), Span(0, 7)]
        together = store(Layout.make(spans, 16, seed=3), 0)
        first = 0
        for span in spans:
            alone = store(Layout.make([span], 16, seed=4), first)
            for part, whole in zip(alone, together, strict=True):
                assert torch.equal(part, whole[first : first + span.count])
            first += span.count


@dataclasses.dataclass(frozen=True)
class Filled:
    """A layout's cache and queries; every row that no sequence has written is NaN, and so are the bands around all.

    Attributes:
        q: [T, H, D].
        cache: the layer's.
        expected: [T, H * D] float64.
    """

    layout: Layout
    q: torch.Tensor
    cache: LayerCache
    expected: np.ndarray

    @classmethod
    def make(
        cls,
        layout: Layout,
        dtype: torch.dtype = torch.float16,
        cache_dtype: torch.dtype | None = None,
        *,
        heads: int = 2,
        dim: int = 64,
        seed: int = 0,
        value: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] = lambda g, shape: g.normal(0, 1, shape),
    ) -> "Filled":
        generator = np.random.default_rng(seed)
        shape = (layout.num_blocks, heads, layout.block_size, dim)
        cache = allocate_layer(shape, cache_dtype or dtype, guarded)
        q = guarded((sum(span.count for span in layout.spans), heads, dim), dtype)
        expected: list[np.ndarray] = []
        for sequence, span in enumerate(layout.spans):
            k, v, queries = (
                rounded(value(generator, (rows, heads, dim)), dtype) for rows in (span.length, span.length, span.count)
            )
            for position in range(span.length):
                block, slot = layout.place(sequence, position)
                rows = (block * heads + torch.arange(heads)) * layout.block_size + slot
                store_rows(cache, rows, k[position], v[position])
            q[len(expected) : len(expected) + span.count] = queries
            round_trip = ROUND_TRIPS.get(cache.keys.dtype, torch.Tensor.float)
            k_exact, v_exact = exact(round_trip(k)), exact(round_trip(v))
            for i, query in enumerate(exact(queries)):
                seen = span.start + i + 1
                expected.append(naive_attention(query, k_exact[:seen], v_exact[:seen]))
        return cls(layout, q, cache, np.stack(expected).reshape(len(expected), -1))

    def attend(self, plan: ChunkPlan | None = None) -> torch.Tensor:
        return prefill_attention(self.q, self.cache, plan or plan_of(self.layout))


ROUND_TRIPS: dict[torch.dtype, Callable[[torch.Tensor], torch.Tensor]] = {
    torch.int8: lambda rows: dequantize_rows(*quantize_rows(rows)),
    torch.float8_e4m3fn: lambda rows: saturate_to_fp8(rows).float(),
}
"""What is read of rows that have been stored in 8 bits."""


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of NaN, or of int8 numbers that none rounds to, with a thousand more of them on either side."""
    size = int(np.prod(shape))
    tensor = torch.empty(size + 2048, dtype=dtype).fill_(-128 if dtype == torch.int8 else NAN)
    return tensor[1024 : 1024 + size].view(shape)


class TestPrefillAttention:
    MIXTURES: ClassVar[dict[str, list[Span]]] = {
        "one token alone": [Span(0, 1)],
        "one prompt": [Span(0, 77)],
        "one chunk with context": [Span(50, 33)],
        "drafts": [Span(0, 2), Span(31, 3), Span(64, 8), Span(130, 5), Span(1, 16)],
        "tile borders": [Span(0, 32), Span(31, 1), Span(32, 32), Span(30, 34), Span(63, 17), Span(33, 31)],
        "chunks and drafts": [Span(130, 4), Span(0, 65), Span(64, 16), Span(1, 17), Span(31, 40)],
    }

    @pytest.mark.parametrize("spans", MIXTURES.values(), ids=MIXTURES)
    @pytest.mark.parametrize(("block_size", "dim"), [(16, 64), (32, 32), (64, 16)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_causal_softmax_over_the_sequence_s_own_blocks(
        self, dtype: torch.dtype, block_size: int, dim: int, spans: list[Span]
    ) -> None:
        filled = Filled.make(Layout.make(spans, block_size, seed=len(spans)), dtype, heads=2, dim=dim)
        assert_close(filled.attend(), filled.expected, dtype, factor=2)

    @pytest.mark.parametrize(("dtype", "block_size", "dim"), [(torch.float32, 16, 64), (torch.bfloat16, 64, 16)])
    @pytest.mark.parametrize("cache_dtype", EIGHT_BIT_CACHES.values(), ids=EIGHT_BIT_CACHES)
    def test_reads_what_was_rounded_to_8_bits(
        self, cache_dtype: torch.dtype, dtype: torch.dtype, block_size: int, dim: int
    ) -> None:
        layout = Layout.make(self.MIXTURES["chunks and drafts"], block_size, seed=1)
        filled = Filled.make(layout, dtype, cache_dtype, heads=2, dim=dim)
        assert_close(filled.attend(), filled.expected, dtype, factor=2)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("block_size", [16, 64])
    def test_is_right_in_the_tiles_that_are_used(self, block_size: int, dtype: torch.dtype) -> None:
        layout = Layout.make([Span(70, 150), Span(100, 5)], block_size, seed=1, spare_in_table=1)
        filled = Filled.make(layout, dtype, heads=1)
        assert_close(filled.attend(plan_of(layout, None, dtype)), filled.expected, dtype, factor=2)

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        spans=st.lists(st.builds(Span, st.integers(0, 150), st.integers(1, 40)), min_size=1, max_size=4),
        block_size=st.sampled_from([16, 32, 64]),
        block_keys=st.sampled_from([32, 64]),
        heads=st.integers(1, 3),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 1000),
    )
    def test_is_right_for_any_ragged_batch(
        self, spans: list[Span], block_size: int, block_keys: int, heads: int, dtype: torch.dtype, seed: int
    ) -> None:
        layout = Layout.make(spans, block_size, seed)
        filled = Filled.make(layout, dtype, heads=heads, dim=16, seed=seed)
        configs = [dataclasses.replace(config, block_keys=block_keys) for config in SMALL]
        assert_close(filled.attend(plan_of(layout, configs)), filled.expected, dtype, factor=2)

    def test_touches_nothing_but_its_own_rows_of_the_output(self) -> None:
        layout = Layout.make([Span(20, 37), Span(3, 5)], 16, seed=2)
        filled = Filled.make(layout)
        tensors = (filled.q, *filled.cache.tensors)
        before = [bits(tensor).clone() for tensor in tensors]
        around = torch.full((46, 128), NAN, dtype=torch.float16)
        out = prefill_attention(filled.q, filled.cache, plan_of(layout), out=around[2:44])
        assert out.data_ptr() == around[2:44].data_ptr()
        assert_close(around[2:44], filled.expected, torch.float16, factor=2)
        assert around[:2].isnan().all()
        assert around[44:].isnan().all()
        for tensor, unchanged in zip(tensors, before, strict=True):
            assert torch.equal(bits(tensor), unchanged)

    def test_the_order_of_tiles_does_not_change_a_bit(self) -> None:
        layout = Layout.make([Span(20, 70), Span(0, 40), Span(9, 5), Span(40, 3)], 16, seed=3)
        filled = Filled.make(layout)
        plan = plan_of(layout)
        order = torch.Generator().manual_seed(0)
        shuffled = dataclasses.replace(
            plan,
            launches=tuple(
                dataclasses.replace(launch, tiles=launch.tiles[torch.randperm(len(launch.tiles), generator=order)])
                for launch in reversed(plan.launches)
            ),
        )
        assert torch.equal(filled.attend(plan), filled.attend(shuffled))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_sequence_s_bits_do_not_depend_on_the_others(self, dtype: torch.dtype) -> None:
        spans = [Span(20, 50), Span(0, 4), Span(31, 17)]
        filled = Filled.make(Layout.make(spans, 32, seed=4, spare_in_table=1), dtype)
        together = filled.attend()
        first = 0
        for span, table in zip(spans, filled.layout.tables, strict=True):
            plan = plan_of(Layout([span], [table], filled.layout.num_blocks, 32))
            tokens = slice(first, first + span.count)
            alone = prefill_attention(filled.q[tokens], filled.cache, plan)
            assert torch.equal(alone, together[tokens])
            first += span.count

    @pytest.mark.parametrize(
        ("dtype", "cache_dtype"),
        [*((own, own) for own in DTYPES), (torch.float16, torch.int8)],
    )
    def test_how_a_prompt_is_cut_into_chunks_does_not_change_a_bit(
        self, dtype: torch.dtype, cache_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A token lies in another row of its tile in each cut, and on some CPUs BLAS rounds rows differently.
        multiply_as_matrix_units(monkeypatch)
        filled = Filled.make(Layout.make([Span(0, 107)], 16, seed=5), dtype, cache_dtype)
        whole = filled.attend()
        table = filled.layout.tables[0]
        parts = []
        for start, end in [(0, 33), (33, 50), (50, 107)]:
            plan = plan_of(Layout([Span(start, end - start)], [table], filled.layout.num_blocks, 16))
            # What later chunks will store is not there yet.
            cache = LayerCache(*(stored.clone() for stored in filled.cache.tensors))
            for position in range(end, 107):
                for stored in cache.tensors:
                    unwritten = -128 if stored.dtype == torch.int8 else NAN
                    stored[table[position // 16], :, position % 16] = unwritten
            parts.append(prefill_attention(filled.q[start:end], cache, plan))
        assert torch.equal(torch.cat(parts), whole)

    def test_sharp_scores_do_not_overflow(self) -> None:
        layout = Layout.make([Span(80, 20), Span(70, 3)], 16, seed=6)
        filled = Filled.make(layout, torch.float32, value=lambda g, shape: g.normal(0, 20, shape))
        assert_close(filled.attend(), filled.expected, torch.float32, factor=1000)

    def test_scores_far_below_zero_do_not_vanish(self) -> None:
        """All of a query's scores may be the same large negative number; its weights are equal all the same."""
        filled = Filled.make(Layout.make([Span(40, 20)], 16, seed=7))
        filled.q.fill_(-100.0)
        for sequence, span in enumerate(filled.layout.spans):
            for position in range(span.length):
                block, slot = filled.layout.place(sequence, position)
                filled.cache.keys[block, :, slot] = 100.0
                filled.cache.values[block, :, slot] = position
        expected = (40 + np.arange(20)[:, None] + np.zeros((1, 128))) / 2
        assert_close(filled.attend(), expected, torch.float16)

    def test_stored_chunks_attend_as_the_reference_s_do(self) -> None:
        heads, dim = 3, 32
        generator = torch.Generator().manual_seed(0)
        spans, tables = [Span(0, 40), Span(33, 6)], [[7, 1, 4], [3, 0, 6]]
        layout = Layout(spans, tables, 8, 16)
        qkv = torch.randn(46, heads, 3, dim, generator=generator)
        weight, bias = (torch.rand(2, dim, generator=generator) + 0.5 for _ in range(2))
        angles = torch.rand(64, dim // 4, generator=generator) * 6
        cache = LayerCache(*(torch.randn(8, heads, 16, dim, generator=generator) for _ in range(2)))
        expected_cache = LayerCache(*(stored.clone() for stored in cache.tensors))

        plan = plan_of(layout)
        q = qk_norm_rotary_store(qkv, weight, bias, 1e-5, angles.cos(), angles.sin(), cache, plan)
        attended = prefill_attention(q, cache, plan)

        theirs = layout.plan(heads, torch.float32)
        cos, sin = (table[plan.positions.long()][:, None, None] for table in (angles.cos(), angles.sin()))
        q = reference_attention.qk_norm_rotary_store(qkv, weight, bias, 1e-5, cos, sin, expected_cache, theirs)
        expected = reference_attention.paged_attention(q, expected_cache, theirs)
        assert_close(attended, exact(expected), torch.float32, factor=4)
        assert_close(cache.keys, exact(expected_cache.keys), torch.float32, factor=4)
        assert torch.equal(cache.values, expected_cache.values)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda f: {"q": f.q[:-1]}, "plan's 5 tokens, got "),
            (lambda f: {"q": f.q.transpose(0, 1).contiguous().transpose(0, 1)}, "contiguous"),
            (
                lambda f: {"cache": dataclasses.replace(f.cache, keys=f.cache.keys[:, :1])},
                r"K and V must be \[blocks, 2, block size, 64\]",
            ),
            (
                lambda f: {"cache": dataclasses.replace(f.cache, keys=f.cache.keys.float())},
                r"torch.float16 or 8 bits, and contiguous, got .* torch.float32",
            ),
            (
                lambda f: {"cache": dataclasses.replace(f.cache, values=f.cache.values[1:])},
                "K and V must have one shape",
            ),
            (lambda f: {"out": torch.empty(5, 127)}, r"out must be \[5, 128\] torch.float16"),
        ],
    )
    def test_says_what_is_wrong(self, change: Callable[[Filled], dict], message: str) -> None:
        filled = Filled.make(Layout.make([Span(3, 5)], 16, seed=0))
        arguments = {"q": filled.q, "cache": filled.cache, **change(filled)}
        with pytest.raises(ValueError, match=message):
            prefill_attention(plan=plan_of(filled.layout), **arguments)


def test_offsets_beyond_two_to_the_31st_are_right() -> None:
    """The cache's last block begins at element 2^31 + 2^12; only the pages that are used ever become memory."""
    block_size, dim, dtype = 64, 64, torch.float16
    num_blocks = 2**31 // (block_size * dim) + 2
    cache = LayerCache(*(torch.empty(num_blocks, 1, block_size, dim, dtype=dtype) for _ in range(2)))
    span = Span(0, 180)
    layout = Layout([span], [[num_blocks - 1, 1, num_blocks - 2]], num_blocks, block_size)
    qkv = torch.randn(span.count, 1, 3, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    angles = torch.zeros(span.count, dim // 4)
    plan = plan_of(layout)
    q = qk_norm_rotary_store(qkv, None, None, 0.0, angles.cos(), angles.sin(), cache, plan)
    for token in (0, 63, 64, 128, 179):
        block, slot = layout.place(0, token)
        assert torch.equal(cache.keys[block, :, slot], qkv[token, :, 1])
        assert torch.equal(cache.values[block, :, slot], qkv[token, :, 2])
    values = exact(qkv)
    expected = [naive_attention(values[i, :, 0], values[: i + 1, :, 1], values[: i + 1, :, 2]) for i in range(180)]
    attended = prefill_attention(q, cache, plan)
    assert_close(attended, np.stack(expected).reshape(180, dim), dtype, factor=2)
