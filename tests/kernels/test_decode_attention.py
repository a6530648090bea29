"""The decode attention kernel, interpreted, against plain torch in float64; everything it must not read is NaN."""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.kernels import LayerCache
from persimmon.kernels import decode_attention as module
from persimmon.kernels import reference_decode_attention as reference
from persimmon.kernels.cache_types import EIGHT_BIT_CACHES
from persimmon.kernels.decode_attention import DecodeConfig, decode_attention
from persimmon.kernels.decode_work import SPLIT_TOKENS, DecodeWorkspace, build_work_list
from persimmon.kernels.reference_cache import store_rows
from tests.kernels.stored_rows import assert_stored_alike, empty_layer

CPU = torch.device("cpu")
NAN = float("nan")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 5e-6}
"""Relative and absolute error allowed at values around one: a few times the rounding of the type."""


@dataclass(frozen=True)
class Step:
    """One decode step of a layer, its cache inside guard bands of NaN."""

    qkv: torch.Tensor
    norm: tuple[torch.Tensor, torch.Tensor] | tuple[None, None]
    cos: torch.Tensor
    sin: torch.Tensor
    guarded: LayerCache
    lengths: torch.Tensor
    block_tables: torch.Tensor
    eps: float = 1e-5

    @classmethod
    def make(
        cls,
        lengths: list[int],
        *,
        dtype: torch.dtype = torch.float16,
        cache_dtype: torch.dtype | None = None,
        block_size: int = 16,
        heads: int = 2,
        dim: int = 16,
        rotary_dim: int | None = None,
        normed: bool = True,
        seed: int = 0,
        tokens: list[int] | None = None,
    ) -> "Step":
        """Sequences over shuffled blocks; whatever belongs to no sequence is NaN, and tables end in nonsense.

        A sequence has one new token, or several, each of which is a row; `lengths` are those up to the first of them.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        counts = tokens or [1] * len(lengths)
        pages = [-(-(length + count - 1) // block_size) for length, count in zip(lengths, counts, strict=True)]
        width = max(1, *pages) + 1
        num_blocks = sum(pages) + 3
        free = list(range(num_blocks))
        random.Random(seed).shuffle(free)
        guarded = empty_layer((num_blocks + 2, heads, block_size, dim), cache_dtype or dtype)
        tables = torch.full((len(lengths), width), -(2**30), dtype=torch.int32)
        qkv = normal(sum(counts), heads, 3, dim)
        for sequence, length in enumerate(lengths):
            if length == 0:
                qkv[sum(counts[:sequence])] = NAN
            for page in range(pages[sequence]):
                block = free.pop()
                tables[sequence, page] = block
                # The new tokens' own rows stay NaN: the step is what writes them.
                cached = max(0, min(block_size, length - 1 - page * block_size))
                rows = ((block + 1) * heads + torch.arange(heads)[:, None]) * block_size + torch.arange(cached)
                store_rows(guarded, rows.reshape(-1), normal(heads * cached, dim), normal(heads * cached, dim))
        half = (rotary_dim if rotary_dim is not None else dim // 2) // 2
        by_row = [length + place for length, count in zip(lengths, counts, strict=True) for place in range(count)]
        angles = torch.rand(max(*by_row, 1), half, generator=generator) * 6
        norm = (normal(2, dim) * 0.3 + 1, normal(2, dim)) if normed else (None, None)
        lengths_tensor = torch.tensor(by_row, dtype=torch.int32)
        tables = tables.repeat_interleave(torch.tensor(counts), 0)
        return cls(qkv, norm, angles.cos(), angles.sin(), guarded, lengths_tensor, tables)

    @property
    def cache(self) -> LayerCache:
        return LayerCache(*(tensor[1:-1] for tensor in self.guarded.tensors))

    def copy(self) -> "Step":
        return replace(self, guarded=LayerCache(*(tensor.clone() for tensor in self.guarded.tensors)))

    def only(self, sequence: int) -> "Step":
        """The same step of one of its sequences alone, with a cache of its own."""
        return self.copy().row(sequence)

    def row(self, number: int) -> "Step":
        """The same step of one of its rows alone, in the same cache."""
        row = slice(number, number + 1)
        return replace(self, qkv=self.qkv[row], lengths=self.lengths[row], block_tables=self.block_tables[row])

    def workspace(self) -> DecodeWorkspace:
        _, heads, _, dim = self.qkv.shape
        return DecodeWorkspace.allocate(len(self.lengths), max(1, *self.lengths.tolist()), heads, dim, CPU)

    @property
    def inputs(self) -> dict[str, Any]:
        """What the kernel and its reference take alike."""
        own = ("qkv", "eps", "cos", "sin", "lengths", "block_tables")
        return {
            **{name: getattr(self, name) for name in own},
            **dict(zip(("norm_weight", "norm_bias"), self.norm, strict=True)),
            "cache": self.cache,
        }

    def run(
        self,
        workspace: DecodeWorkspace | None = None,
        config: DecodeConfig | None = None,
        *,
        angles_by_row: bool = False,
        shared: bool = False,
    ) -> torch.Tensor:
        """The kernel's output; rows that it has not written are NaN."""
        if workspace is None:
            workspace = self.workspace()
            build_work_list(self.lengths, workspace)
        out = torch.full((len(self.lengths), self.qkv.shape[1] * self.qkv.shape[3]), NAN, dtype=self.qkv.dtype)
        returned = decode_attention(
            **self.inputs,
            workspace=workspace,
            out=out,
            config=config or DecodeConfig(),
            angles_by_row=angles_by_row,
            shared=shared,
        )
        assert returned is out
        return out

    def run_reference(self) -> torch.Tensor:
        return reference.decode_attention(**self.inputs, inside=torch.float64)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_is_the_reference(step: Step) -> None:
    """The same output in live rows, none in padding rows, and the same caches: NaN stays where nothing belongs."""
    other = step.copy()
    out, expected = step.run(), other.run_reference()
    live = step.lengths > 0
    assert_close(out[live], expected[live])
    assert out[~live].isnan().all()
    for stored, expected_stored in zip(step.guarded.tensors, other.guarded.tensors, strict=True):
        assert_close(stored, expected_stored)


def assert_is_the_reference_of_eight_bits(step: Step) -> None:
    """The same rows stored, none but those, and the same output over what was stored."""
    before, other = step.copy(), step.copy()
    out = step.run()
    other.run_reference()
    # A key's last bits decide about a number, so plain torch attends to what the kernel has stored.
    with mock.patch.object(reference, "store_rows"):
        expected = step.run_reference()
    live = step.lengths > 0
    assert_close(out[live], expected[live])
    assert out[~live].isnan().all()
    assert_stored_alike(step.guarded, other.guarded, before.guarded)


def few_programs(monkeypatch: pytest.MonkeyPatch, programs: int) -> DecodeConfig:
    """A grid of that many programs."""
    monkeypatch.setattr(module, "num_sms", lambda device: programs)
    return DecodeConfig(programs_per_sm=1)


class TestWorkList:
    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(0, 4 * SPLIT_TOKENS), min_size=1, max_size=7))
    def test_holds_every_split_of_every_sequence_once_and_the_longest_first(self, lengths: list[int]) -> None:
        workspace = DecodeWorkspace.allocate(8, 4 * SPLIT_TOKENS, 1, 16, CPU)
        build_work_list(torch.tensor(lengths, dtype=torch.int32), workspace)
        count = int(workspace.num_items)
        items = list(
            zip(workspace.item_sequences[:count].tolist(), workspace.item_splits[:count].tolist(), strict=True)
        )
        splits = [-(-length // SPLIT_TOKENS) for length in lengths]
        assert sorted(items) == [(row, split) for row, n in enumerate(splits) for split in range(n)]
        sizes = [min(lengths[row] - split * SPLIT_TOKENS, SPLIT_TOKENS) for row, split in items]
        assert sizes == sorted(sizes, reverse=True)
        # Whose full splits they are: those who share them read them one after the other.
        full = [item for item, size in zip(items, sizes, strict=True) if size == SPLIT_TOKENS]
        assert full == sorted(full, key=lambda item: (item[1], item[0]))
        assert workspace.first_splits[: len(lengths)].tolist() == [sum(splits[:row]) for row in range(len(lengths))]

    def test_writes_nothing_behind_its_items(self) -> None:
        workspace = DecodeWorkspace.allocate(4, 2 * SPLIT_TOKENS, 1, 16, CPU)
        for tensor in (workspace.item_sequences, workspace.item_splits, workspace.first_splits):
            tensor.fill_(-7)
        build_work_list(torch.tensor([0, 300, 0], dtype=torch.int32), workspace)
        assert workspace.item_sequences.tolist() == [1, 1] + [-7] * 6
        assert workspace.item_splits.tolist() == [0, 1] + [-7] * 6
        assert workspace.first_splits.tolist() == [0, 0, 2, -7]

    def test_more_sequences_than_there_is_room_for_are_refused(self) -> None:
        workspace = DecodeWorkspace.allocate(2, 100, 1, 16, CPU)
        with pytest.raises(ValueError, match="3 sequences, but the workspace has room for 2"):
            build_work_list(torch.ones(3, dtype=torch.int32), workspace)

    def test_the_workspace_knows_its_size_beforehand(self) -> None:
        workspace = DecodeWorkspace.allocate(3, 600, 2, 16, CPU)
        held = sum(getattr(workspace, name).nbytes for name in DecodeWorkspace.__slots__)
        assert DecodeWorkspace.bytes(3, 600, 2, 16) == held


class TestDecodeAttention:
    @pytest.mark.parametrize("block_size", [16, 32, 64])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_is_attention_over_the_sequence_s_own_pages(self, dtype: torch.dtype, block_size: int) -> None:
        lengths = [1, 2, block_size, block_size + 1, 0, 100]
        assert_is_the_reference(Step.make(lengths, dtype=dtype, block_size=block_size))

    @pytest.mark.parametrize("length", [255, 256, 257, 511, 512, 513, 1040])
    def test_sequences_of_several_splits(self, length: int) -> None:
        assert_is_the_reference(Step.make([length], dtype=torch.float32, block_size=32, heads=1, seed=length))

    def test_more_splits_than_are_merged_at_once(self) -> None:
        assert_is_the_reference(Step.make([17 * SPLIT_TOKENS + 3], dtype=torch.float32, block_size=16, heads=1))

    @pytest.mark.parametrize("normed", [True, False], ids=["normed", "not normed"])
    @pytest.mark.parametrize(
        ("dim", "rotary_dim"), [(64, 32), (64, 64), (32, 16), (32, 24), (16, 2), (128, 64)], ids=str
    )
    def test_any_head_and_any_part_of_it_rotated(self, dim: int, rotary_dim: int, normed: bool) -> None:
        step = Step.make([19, 3], dim=dim, rotary_dim=rotary_dim, normed=normed, dtype=torch.float32, heads=1)
        assert_is_the_reference(step)

    @settings(max_examples=10, deadline=None)
    @given(
        lengths=st.lists(st.integers(0, 300), min_size=1, max_size=4),
        block_size=st.sampled_from([16, 32, 64]),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 1000),
    )
    def test_any_ragged_batch(self, lengths: list[int], block_size: int, dtype: torch.dtype, seed: int) -> None:
        assert_is_the_reference(Step.make(lengths, dtype=dtype, block_size=block_size, heads=1, seed=seed))

    def test_sharp_scores_do_not_overflow(self) -> None:
        step = Step.make([40, 270], dtype=torch.float32)
        step.cache.keys.mul_(1000.0)
        assert_is_the_reference(step)

    def test_eps_is_added_to_the_variance(self) -> None:
        assert_is_the_reference(replace(Step.make([20], dtype=torch.float32), eps=0.5))

    def test_a_step_of_padding_alone_does_nothing(self) -> None:
        assert_is_the_reference(Step.make([0, 0]))

    def test_writes_one_key_and_one_value_of_each_sequence_and_head(self) -> None:
        step = Step.make([1, 33, 256, 257], block_size=16)
        before = step.copy()
        step.run()
        for cache, old in zip(step.guarded.tensors, before.guarded.tensors, strict=True):
            changed = (cache.nan_to_num(7.0) != old.nan_to_num(7.0)).any(-1).nonzero().tolist()
            expected = [
                [int(step.block_tables[row, (length - 1) // 16]) + 1, head, (length - 1) % 16]
                for row, length in enumerate(step.lengths.tolist())
                for head in range(2)
            ]
            assert changed == sorted(expected)

    def test_attends_to_its_own_key_and_value_as_the_cache_holds_them(self) -> None:
        step = Step.make([2, 20], dtype=torch.float32)
        halves = LayerCache(*(tensor.half() for tensor in step.guarded.tensors))
        assert_is_the_reference(replace(step, guarded=halves))

    def test_values_are_stored_as_they_came(self) -> None:
        step = Step.make([5, 40], dtype=torch.bfloat16)
        step.run()
        for row, position in enumerate([4, 39]):
            block = step.block_tables[row, position // 16]
            assert torch.equal(step.cache.values[block, :, position % 16], step.qkv[row, :, 2])

    def test_pages_are_found_beyond_2_32_numbers(self, tmp_path: Path) -> None:
        small = Step.make([20], block_size=16, heads=1, dim=16)
        shape = (2**24 + 4, 1, 16, 16)
        assert math.prod(shape) > 2**32
        # Files with holes: nothing but the pages in use takes room.
        k_guarded, v_guarded = (
            torch.from_file(str(tmp_path / name), shared=True, size=math.prod(shape), dtype=torch.float16).view(shape)
            for name in ("keys", "values")
        )
        tables = small.block_tables.clone()
        tables[0, :2] = torch.tensor([2**24 + 1, 2**24])
        large = replace(small, guarded=LayerCache(k_guarded, v_guarded), block_tables=tables)
        pages, large_pages = small.block_tables[0, :2].long(), tables[0, :2].long()
        for cache, large_cache in zip(small.cache.tensors, large.cache.tensors, strict=True):
            large_cache[large_pages] = cache[pages]
        assert torch.equal(large.run(), small.run())
        for cache, large_cache in zip(small.cache.tensors, large.cache.tensors, strict=True):
            assert torch.equal(large_cache[large_pages].nan_to_num(7.0), cache[pages].nan_to_num(7.0))

    def test_a_second_step_finds_the_counters_as_the_first_did(self) -> None:
        workspace = DecodeWorkspace.allocate(3, 700, 2, 16, CPU)
        for lengths in ([257, 600, 3], [600, 1, 258], [0, 513, 0]):
            step = Step.make(lengths, seed=sum(lengths))
            other = step.copy()
            build_work_list(step.lengths, workspace)
            for _layer in range(2):
                out = step.run(workspace)
                live = step.lengths > 0
                assert_close(out[live], other.run_reference()[live])
                assert not workspace.arrivals.any()

    def test_stale_partial_results_are_not_read(self) -> None:
        step = Step.make([600, 300])
        workspace = step.workspace()
        for tensor in (workspace.partial_outputs, workspace.partial_maxima, workspace.partial_totals):
            tensor.fill_(NAN)
        build_work_list(step.lengths, workspace)
        assert torch.equal(step.run(workspace), step.run())

    def test_angles_may_be_those_of_rows_instead_of_positions(self) -> None:
        by_position = Step.make([5, 40, 0, 17], dim=32)
        rows = (by_position.lengths - 1).clamp_min(0).long()
        by_row = replace(by_position.copy(), cos=by_position.cos[rows], sin=by_position.sin[rows])
        actual, expected = by_row.run(angles_by_row=True), by_position.run()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        for one, other in zip(by_row.cache.tensors, by_position.cache.tensors, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cache_dtype", EIGHT_BIT_CACHES.values(), ids=EIGHT_BIT_CACHES)
class TestEightBits:
    @pytest.mark.parametrize(("dtype", "block_size"), [(torch.float16, 16), (torch.bfloat16, 64), (torch.float32, 32)])
    def test_is_attention_over_what_was_rounded(
        self, cache_dtype: torch.dtype, dtype: torch.dtype, block_size: int
    ) -> None:
        lengths = [1, 2, block_size, block_size + 1, 0, 100]
        step = Step.make(lengths, dtype=dtype, cache_dtype=cache_dtype, block_size=block_size)
        assert_is_the_reference_of_eight_bits(step)

    def test_over_several_splits(self, cache_dtype: torch.dtype) -> None:
        step = Step.make([513, 40], dtype=torch.float32, cache_dtype=cache_dtype, block_size=32, heads=1, dim=64)
        assert_is_the_reference_of_eight_bits(step)

    def test_a_sequence_s_bits_do_not_depend_on_the_others(self, cache_dtype: torch.dtype) -> None:
        step = Step.make([17, 257], cache_dtype=cache_dtype, heads=1)
        together = step.copy().run()
        for sequence in range(2):
            assert torch.equal(step.only(sequence).run()[0], together[sequence])

    def test_what_is_not_finite_stays_with_its_sequence_and_head(self, cache_dtype: torch.dtype) -> None:
        step = Step.make([3] * 5, cache_dtype=cache_dtype, normed=False)
        spoiled = replace(step.copy(), qkv=step.qkv.clone())
        keys_and_values = [(1, math.inf), (2, math.inf), (1, NAN), (2, NAN)]
        for sequence, (part, bad) in enumerate(keys_and_values, start=1):
            spoiled.qkv[sequence, 0, part, 3] = bad
        out, clean = (own.run().view(5, 2, 16) for own in (spoiled, step))
        assert torch.equal(out[0], clean[0])
        assert torch.equal(out[:, 1], clean[:, 1])
        if cache_dtype == torch.int8:
            assert out[1:, 0].isnan().all()
        else:  # it saturates; in the interpreter NaN is read as a number
            assert out[1:3, 0].isfinite().all()


class TestBits:
    LENGTHS = (300, 17, 256, 0, 520, 257)

    @pytest.fixture
    def step(self) -> Step:
        return Step.make(list(self.LENGTHS), heads=2, block_size=32)

    @pytest.fixture
    def expected(self, step: Step) -> torch.Tensor:
        return step.copy().run()

    @pytest.mark.parametrize("seed", [1, 2])
    def test_do_not_depend_on_the_order_of_the_items(self, step: Step, expected: torch.Tensor, seed: int) -> None:
        workspace = step.workspace()
        build_work_list(step.lengths, workspace)
        count = int(workspace.num_items)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        workspace.item_sequences[:count] = workspace.item_sequences[:count][order]
        workspace.item_splits[:count] = workspace.item_splits[:count][order]
        assert torch.equal(step.run(workspace).nan_to_num(7.0), expected.nan_to_num(7.0))

    @pytest.mark.parametrize("programs", [1, 3, 7])
    def test_do_not_depend_on_the_number_of_programs(
        self, step: Step, expected: torch.Tensor, programs: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = few_programs(monkeypatch, programs)
        assert torch.equal(step.run(config=config).nan_to_num(7.0), expected.nan_to_num(7.0))

    def test_do_not_depend_on_the_other_sequences(self, step: Step, expected: torch.Tensor) -> None:
        for sequence, length in enumerate(self.LENGTHS):
            if length:
                assert torch.equal(step.only(sequence).run()[0], expected[sequence])


@pytest.mark.parametrize(
    ("cache_dtype", "block_size"), [(None, 16), (None, 32), *zip(EIGHT_BIT_CACHES.values(), (16, 32), strict=True)]
)
def test_rows_of_one_sequence_have_the_bits_of_single_tokens(cache_dtype: torch.dtype | None, block_size: int) -> None:
    """Over the ends of blocks and of splits, next to a single token and padding."""
    lengths, tokens = [14, 252, 0, 40], [4, 8, 1, 1]
    step = Step.make(lengths, tokens=tokens, cache_dtype=cache_dtype, block_size=block_size, heads=1)
    alone = step.copy()
    out = step.run(shared=True)
    for number, length in enumerate(alone.lengths.tolist()):
        if length:
            assert torch.equal(alone.row(number).run()[0], out[number])
    assert out[sum(tokens[:2])].isnan().all()
    for stored, expected in zip(step.guarded.tensors, alone.guarded.tensors, strict=True):
        assert torch.equal(stored.view(torch.uint8), expected.view(torch.uint8))


class TestRefuses:
    def test_blocks_of_another_size(self) -> None:
        with pytest.raises(ValueError, match="blocks of 8 tokens; the kernel takes"):
            Step.make([3], block_size=8).run()

    def test_heads_of_another_size(self) -> None:
        with pytest.raises(ValueError, match="heads of 48 dimensions, 24 of them rotary"):
            Step.make([3], dim=48).run()

    def test_a_workspace_for_another_model(self) -> None:
        with pytest.raises(ValueError, match="2 heads of 16; the workspace is for at most 1 sequences of 4 heads"):
            Step.make([3]).run(DecodeWorkspace.allocate(1, 16, 4, 16, CPU))

    def test_a_workspace_for_fewer_sequences(self) -> None:
        with pytest.raises(ValueError, match=r"2 sequences .*; the workspace is for at most 1 sequences"):
            Step.make([3, 3]).run(DecodeWorkspace.allocate(1, 16, 2, 16, CPU))
