"""Parts of a network: together they are the whole, and each is read without the rest."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.model import stored as stored_module
from persimmon.model.checkpoint import Checkpoint, dummy_parameters, expected_shapes
from persimmon.model.config import PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.leftovers import EMBEDDING, HEAD
from persimmon.model.memory import MemoryPlan
from persimmon.model.quantization.rounding import quantize
from persimmon.model.quantization.scheme import quantized_formats
from persimmon.model.ranks import bytes_of_sum, sum_in_order
from persimmon.model.shard import ONLY, WHOLE, Part, Shard, check_divides, check_groups
from tests.model.checkpoints import make_checkpoint
from tests.model.memory_plans import plan

CONFIG = PersimmonConfig(
    vocab_size=99,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
QKV = "model.layers.0.self_attn.query_key_value.weight"
DOWN = "model.layers.1.mlp.dense_4h_to_h.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("four-heads"),
        vocab_size=99,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
    )


def joined(name: str, parts: list[torch.Tensor | None]) -> torch.Tensor:
    """What the parts of all ranks make up; those that several ranks have must be equal."""
    own = [part for part in parts if part is not None]
    if name in (EMBEDDING, HEAD) or "query_key_value" in name or "dense_h_to_4h" in name:
        return torch.cat(own)
    if name.endswith(("self_attn.dense.weight", "dense_4h_to_h.weight")):
        return torch.cat(own, dim=1)
    assert all(torch.equal(part, own[0]) for part in own)
    # A bias is added once.
    assert len(own) == (1 if name.endswith(("self_attn.dense.bias", "dense_4h_to_h.bias")) else len(parts))
    return own[0]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_the_parts_of_all_ranks_are_the_checkpoint(folder: Path, size: int, quantization: str | None) -> None:
    config = PersimmonConfig.from_folder(folder)
    checkpoint = Checkpoint.open(folder, config)
    formats = quantized_formats(config, quantization) if quantization else {}  # type: ignore[arg-type]

    def read(shard: Shard) -> dict[str, torch.Tensor]:
        parameters = checkpoint.parameters(formats, shard=shard)
        return {name: own.dequantized() if isinstance(own, QuantizedMatrix) else own for name, own in parameters}

    whole = read(ONLY)
    ranks = [read(Shard(rank, size)) for rank in range(size)]
    for rank, own in enumerate(ranks):
        assert {name: tuple(part.shape) for name, part in own.items()} == expected_shapes(config, Shard(rank, size))
    for name, expected in whole.items():
        assert torch.equal(joined(name, [own.get(name) for own in ranks]), expected), name


def test_heads_stay_whole() -> None:
    """Rows of query_key_value are ordered by head, and each head's are its query, its key and its value."""
    part = Shard(1, 4).part(QKV, (768, 256), CONFIG)
    assert part == Part(rows=range(3 * 64, 2 * 3 * 64))
    assert Shard(1, 4).num_heads(CONFIG) == 1


@given(vocab_size=st.integers(8, 300_000), size=st.integers(1, 8))
def test_the_vocabulary_is_divided_into_neighbouring_parts_of_nearly_equal_size(vocab_size: int, size: int) -> None:
    config = replace(CONFIG, vocab_size=vocab_size)
    parts = [Shard(rank, size).vocabulary(config) for rank in range(size)]
    assert (parts[0].start, parts[-1].stop) == (0, vocab_size)
    assert all(before.stop == after.start for before, after in pairwise(parts))
    # What is gathered has the width of the first rank's.
    assert len(parts[0]) == max(map(len, parts)) <= min(map(len, parts)) + 1


def test_only_the_rows_of_a_rank_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PersimmonConfig.from_folder(folder)
    read: list[tuple[tuple[int, ...], int]] = []
    rows = stored_module.StoredTensor.rows

    def noted(self: stored_module.StoredTensor, start: int, stop: int) -> torch.Tensor:
        read.append((self.shape, stop - start))
        return rows(self, start, stop)

    monkeypatch.setattr(stored_module.StoredTensor, "rows", noted)
    shard = Shard(3, 4)
    for _ in Checkpoint.open(folder, config).parameters(quantized_formats(config, "int8"), shard=shard):
        pass
    for shape, count in read:
        # Of what is divided by columns, each row is read, and only some are in memory at once.
        assert count == {99: 24, 768: 192, 512: 128}.get(shape[0], shape[0])


def test_columns_of_groups_have_the_numbers_that_they_have_among_all() -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    for form in (QuantizedFormat(8, None, torch.float32), QuantizedFormat(4, 32, torch.bfloat16)):
        matrix = quantize(weight, form)
        part = matrix.columns(64, 128)
        assert torch.equal(part.dequantized(), matrix.dequantized()[:, 64:])
    with pytest.raises(ValueError, match="within a group of 32"):
        matrix.columns(16, 80)


class TestRefusals:
    def test_of_sizes_that_do_not_divide(self) -> None:
        for size in (1, 2, 4):
            check_divides(CONFIG, size)
        with pytest.raises(CheckpointError, match=r"is 8, which does not divide .* expected 1 or 2 or 4$"):
            check_divides(CONFIG, 8)

    def test_of_groups_that_would_lie_on_two_ranks(self) -> None:
        shapes = expected_shapes(CONFIG)
        formats = {name: QuantizedFormat(4, 128, torch.float16) for name in (QKV, DOWN)}
        check_groups(formats, shapes, CONFIG, 4)
        check_groups(formats | {"lm_head.weight": torch.float16}, shapes, CONFIG, 2)
        with pytest.raises(CheckpointError) as raised:
            check_groups(formats, shapes, CONFIG, 8)
        assert str(raised.value) == (
            f"--tensor-parallel-size is 8, which leaves each rank 64 inputs of {DOWN}; groups of 128 do not divide "
            f"them: use fewer ranks, or smaller groups"
        )


def test_norms_of_dummies_are_the_same_on_all_ranks() -> None:
    def made(rank: int) -> dict[str, torch.Tensor]:
        parameters = dummy_parameters(CONFIG, torch.float32, "cpu", 0, {}, Shard(rank, 4))
        return {name: own for name, own in parameters if isinstance(own, torch.Tensor)}

    first, last = made(0), made(3)
    assert last.keys() == expected_shapes(CONFIG, Shard(3, 4)).keys()
    assert all(torch.equal(first[name], own) for name, own in last.items() if "norm" in name)


class TestMemory:
    @staticmethod
    def plan(ranks: int) -> MemoryPlan:
        return plan(CONFIG, kv_cache_bytes=1 << 20, ranks=ranks)

    def test_the_same_cache_holds_the_same_tokens_on_any_number_of_ranks(self) -> None:
        one, four = self.plan(1), self.plan(4)
        assert one.num_blocks == four.num_blocks
        assert one.block_bytes == four.block_bytes

    def test_weights_are_those_of_all_ranks(self) -> None:
        expected = 0
        for rank in range(4):
            shapes = expected_shapes(CONFIG, Shard(rank, 4))
            expected += 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
        weights = self.plan(4).weights
        # Each is counted as the first, which has biases and a row of the vocabulary more.
        assert expected <= weights < 1.02 * expected


class TestSums:
    @given(
        size=st.integers(2, 5),
        width=st.integers(1, 40),
        seed=st.integers(0, 2**32),
        data=st.data(),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    def test_do_not_depend_on_what_else_is_summed(
        self, size: int, width: int, seed: int, data: st.DataObject, dtype: torch.dtype
    ) -> None:
        parts = torch.randn(size, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
        expected = parts[0].float()
        for part in parts[1:].float():
            expected = expected + part
        begin = data.draw(st.integers(0, width - 1))
        assert torch.equal(sum_in_order(parts.clone()), expected.to(dtype))
        assert torch.equal(sum_in_order(parts[:, begin:].clone()), expected.to(dtype)[begin:])

    def test_send_no_more_in_two_exchanges_than_in_one(self) -> None:
        assert bytes_of_sum(1 << 20, 2) == 1 << 20
        assert bytes_of_sum(1024, 4) == 3 * 1024
        assert bytes_of_sum(1 << 20, 4) == 2 * 3 * (1 << 18) < 3 * (1 << 20)


def test_one_rank_has_everything() -> None:
    assert all(ONLY.part(name, shape, CONFIG) == WHOLE for name, shape in expected_shapes(CONFIG).items())
    assert Shard(0, 1) == ONLY
