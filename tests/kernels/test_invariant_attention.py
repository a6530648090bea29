"""Attention of the batch-invariant mode, interpreted: a decode and every chunking have the same bits."""

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from persimmon.kernels import invariant_attention as module
from persimmon.kernels.chunk_plan import LastTokens
from persimmon.kernels.decode_work import DecodeWorkspace, build_work_list
from persimmon.kernels.invariant_attention import chunk_attention, config_of, decode_attention
from persimmon.kernels.operands import LayerCache
from persimmon.kernels.prefill_attention import ChunkPlan, plan_chunks, qk_norm_rotary_store
from persimmon.kernels.reference_cache import store_rows
from tests.interpreter import keep_language_patched, multiply_as_matrix_units
from tests.kernels.stored_rows import empty_layer

CPU = torch.device("cpu")
NAN = float("nan")
HEADS, DIM, BLOCK_SIZE, LENGTH = 1, 16, 16, 530
"""A length of three splits, so that the order in which they are joined matters."""
BEGIN = 470
"""The first token that is computed; before it, the cache holds what tests put there."""
POSITIONS = [470, 500, 511, 512, 513, 529]


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_language_patched()
    multiply_as_matrix_units(monkeypatch)


@dataclass(frozen=True)
class Sequence:
    """One sequence's tokens, and a cache whose other rows are NaN."""

    qkv: torch.Tensor
    norm: tuple[torch.Tensor, torch.Tensor]
    angles: tuple[torch.Tensor, torch.Tensor]
    cache: LayerCache
    table: list[int]

    @classmethod
    def make(cls, dtype: torch.dtype, length: int = LENGTH, cache_dtype: torch.dtype | None = None) -> "Sequence":
        generator = torch.Generator().manual_seed(1)
        angles = torch.rand(length, DIM // 4, generator=generator) * 6
        blocks = list(range(-(-length // BLOCK_SIZE) + 2))
        random.Random(2).shuffle(blocks)
        shape = (len(blocks), HEADS, BLOCK_SIZE, DIM)
        made = cls(
            qkv=torch.randn(length, HEADS, 3, DIM, generator=generator).to(dtype),
            norm=(torch.rand(2, DIM, generator=generator) + 0.5, torch.randn(2, DIM, generator=generator)),
            angles=(angles.cos(), angles.sin()),
            cache=empty_layer(shape, cache_dtype or dtype),
            table=blocks[2:],
        )
        positions = torch.arange(min(BEGIN, length))
        rows = torch.tensor(made.table)[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE  # of one head
        keys, values = (torch.randn(len(rows), DIM, generator=generator).to(dtype) for _ in range(2))
        store_rows(made.cache, rows, keys, values)
        return made

    def plan(self, start: int, count: int) -> ChunkPlan:
        dtype = self.qkv.dtype
        return plan_chunks(
            [self.table], [start], [count], block_size=BLOCK_SIZE, device=CPU, dtype=dtype, configs=[config_of(dtype)]
        )

    def chunk(self, start: int, count: int) -> torch.Tensor:
        """Stores and attends some tokens whose predecessors are in the cache: [count, HEADS * DIM]."""
        plan, qkv = self.plan(start, count), self.qkv[start : start + count]
        q = qk_norm_rotary_store(qkv, *self.norm, 1e-5, *self.angles, self.cache, plan, exact=True)
        return chunk_attention(q, self.cache, plan, out=torch.full((count, HEADS * DIM), NAN, dtype=qkv.dtype))

    def decode(self, positions: list[int], workspace: DecodeWorkspace | None = None) -> torch.Tensor:
        """A step in which several copies of the sequence end at these positions; -1 for padding."""
        lengths = torch.tensor([position + 1 for position in positions], dtype=torch.int32)
        tables = torch.full((len(positions), len(self.table) + 1), -(2**30), dtype=torch.int32)
        for row, position in enumerate(positions):
            used = -(-(position + 1) // BLOCK_SIZE)
            tables[row, :used] = torch.tensor(self.table[:used], dtype=torch.int32)
        qkv = self.qkv[[max(position, 0) for position in positions]]
        if workspace is None:
            workspace = DecodeWorkspace.allocate(len(positions), LENGTH, HEADS, DIM, CPU)
        build_work_list(lengths, workspace)
        q = qk_norm_rotary_store(
            qkv, *self.norm, 1e-5, *self.angles, self.cache, LastTokens(lengths, tables), exact=True
        )
        out = torch.full((len(positions), HEADS * DIM), NAN, dtype=qkv.dtype)
        return decode_attention(q, self.cache, lengths, tables, workspace, out=out)


@pytest.fixture(
    scope="module",
    params=[
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float16, torch.int8),
    ],
    ids=str,
)
def computed(request: pytest.FixtureRequest) -> tuple[Sequence, torch.Tensor]:
    """A sequence whose last tokens have been computed in one chunk, and what came of them, by position."""
    with pytest.MonkeyPatch.context() as patch:
        keep_language_patched()
        multiply_as_matrix_units(patch)
        # Rounding to 16 bits hides most differences in the order of sums; float32 takes tiles of another shape.
        dtype, cache_dtype = request.param
        sequence = Sequence.make(dtype, cache_dtype=cache_dtype)
        out = torch.full((LENGTH, HEADS * DIM), NAN, dtype=dtype)
        out[BEGIN:] = sequence.chunk(BEGIN, LENGTH - BEGIN)
        return sequence, out


def written(cache: LayerCache) -> list[torch.Tensor]:
    """All bits."""
    return [tensor.view(torch.uint8).clone() for tensor in cache.tensors]


def test_a_token_of_a_prompt_and_a_decoded_one_have_the_same_bits(computed: tuple[Sequence, torch.Tensor]) -> None:
    sequence, whole = computed
    before = written(sequence.cache)
    alone = sequence.decode(POSITIONS[-1:])
    assert torch.equal(alone[0], whole[POSITIONS[-1]])
    assert torch.equal(sequence.decode(POSITIONS), whole[POSITIONS])
    assert all(map(torch.equal, before, written(sequence.cache)))


def test_is_causal_softmax_over_the_sequence_s_own_blocks() -> None:
    length = 70
    sequence = Sequence.make(torch.float32, length)
    out = sequence.chunk(0, length)
    plan = sequence.plan(0, length)
    assert torch.equal(sequence.decode([length - 1, 0, 31]), out[[length - 1, 0, 31]])
    q = qk_norm_rotary_store(sequence.qkv, *sequence.norm, 1e-5, *sequence.angles, sequence.cache, plan)
    keys, values = (
        tensor[sequence.table].transpose(0, 1).reshape(HEADS, -1, DIM)[:, :length].double()
        for tensor in sequence.cache.tensors
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1).double(), keys, values, is_causal=True
    )
    torch.testing.assert_close(out.double(), expected.transpose(0, 1).reshape(length, -1), rtol=1e-5, atol=1e-5)


def test_no_cut_into_chunks_changes_a_bit(computed: tuple[Sequence, torch.Tensor]) -> None:
    sequence, whole = computed
    cut = Sequence.make(whole.dtype, cache_dtype=sequence.cache.keys.dtype)
    bounds = [BEGIN, BEGIN + 1, 500, LENGTH - 1, LENGTH]
    parts = [cut.chunk(start, end - start) for start, end in pairwise(bounds)]
    assert torch.equal(torch.cat(parts), whole[BEGIN:])


class TestDecodes:
    def test_find_the_counters_as_the_step_before_did_and_read_nothing_stale(
        self, computed: tuple[Sequence, torch.Tensor]
    ) -> None:
        sequence, _ = computed
        workspace = DecodeWorkspace.allocate(4, LENGTH, HEADS, DIM, CPU)
        first = sequence.decode([529, 500, 475], workspace)
        for stale in (workspace.partial_outputs, workspace.partial_maxima, workspace.partial_totals):
            stale.fill_(NAN)
        assert torch.equal(sequence.decode([529, 500, 475], workspace), first)
        assert not workspace.arrivals.any()

    def test_of_padding_write_nothing(self, computed: tuple[Sequence, torch.Tensor]) -> None:
        sequence, _ = computed
        before = written(sequence.cache)
        out = sequence.decode([529, -1, 480, -1])
        assert torch.equal(out[[0, 2]], sequence.decode([529, 480]))
        assert out[[1, 3]].isnan().all()
        assert all(map(torch.equal, before, written(sequence.cache)))

    def test_do_not_depend_on_the_number_of_programs(
        self, computed: tuple[Sequence, torch.Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sequence, whole = computed
        monkeypatch.setattr(module, "num_sms", lambda device: 1)
        assert torch.equal(sequence.decode([529, 511, 480]), whole[[529, 511, 480]])


class TestRefuses:
    def test_tiles_of_another_shape(self) -> None:
        sequence = Sequence.make(torch.float16, 20)
        plan = plan_chunks([sequence.table], [0], [20], block_size=BLOCK_SIZE, device=CPU)
        with pytest.raises(ValueError, match=r"the plan's tiles are .*, not PrefillConfig\(block_queries=64"):
            chunk_attention(sequence.qkv[:, :, 0].contiguous(), sequence.cache, plan, out=torch.empty(20, DIM).half())

    def test_a_workspace_for_fewer_sequences(self) -> None:
        sequence = Sequence.make(torch.float16, 20)
        with pytest.raises(ValueError, match=r"2 sequences, .* room for 1"):
            sequence.decode([0, 1], DecodeWorkspace.allocate(1, LENGTH, HEADS, DIM, CPU))

    def test_tensors_that_do_not_fit(self) -> None:
        sequence = Sequence.make(torch.float16, 20)
        q, out = sequence.qkv[:, :, 0].contiguous(), torch.empty(20, DIM).half()
        plan = sequence.plan(0, 20)
        with pytest.raises(ValueError, match="do not hold 20 tokens"):
            chunk_attention(q[:19], sequence.cache, plan, out=out)
        with pytest.raises(ValueError, match=r"K and V must be \[blocks, 1, block size, 16\]"):
            chunk_attention(q, LayerCache(*(tensor.float() for tensor in sequence.cache.tensors)), plan, out=out)
        with pytest.raises(ValueError, match="must be contiguous"):
            chunk_attention(sequence.qkv[:, :, 0], sequence.cache, plan, out=out)
