"""The C kernels' attention over a cache of 8-bit numbers against plain torch, every build that this processor runs."""

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persimmon.kernels import LayerCache, reference_attention
from persimmon.kernels.cpu import library
from persimmon.kernels.reference_cache import dequantize_rows
from tests.kernels.stored_rows import empty_layer
from tests.kernels.test_cpu import Sequences, random

NAN = float("nan")
LENGTHS = (1, 5, 17, 70, 33)

pytestmark = pytest.mark.skipif(not library.builds(), reason="no build of the C kernels for this processor")


@pytest.fixture(params=library.builds() or ["none"], scope="module")
def build(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def sequences_of(
    build: str, dim: int = 64, block_size: int = 32, *, normed: bool = True, most: int = 256, sequences: int = 5
) -> Sequences:
    """Sequences whose cache has 8 bits, with scales that are NaN until they are written."""
    made = Sequences(build, torch.float32, dim, block_size, normed, most=most, sequences=sequences)
    made.cache = empty_layer((len(made.cache.keys), made.heads, block_size, dim), torch.int8)
    return made


def as_the_reference_has_it(cache: LayerCache) -> LayerCache:
    """A cache of the C kernels with its numbers and scales in the order of the reference; see attention_int8.h."""
    blocks, heads, size, dim = cache.keys.shape
    flat = cache.keys.view(blocks, heads, -1)
    pairs = dim // 2 * 2
    keys = (
        flat[..., : pairs * size]
        .view(blocks, heads, dim // 2, size, 2)
        .transpose(2, 3)
        .reshape(blocks, heads, size, pairs)
    )
    keys = torch.cat((keys, flat[..., pairs * size :, None]), dim=-1) if dim % 2 else keys
    values = cache.values.view(blocks, heads, size // 2, dim, 2).transpose(3, 4).reshape(blocks, heads, size, dim)
    scales = scales_of(cache).view(blocks, heads, 2, size).transpose(2, 3)
    return LayerCache(keys.contiguous(), values.contiguous(), scales.contiguous())


def scales_of(cache: LayerCache) -> torch.Tensor:
    assert cache.scales is not None
    return cache.scales


@dataclass
class Both:
    """The same sequences twice: by the C kernels, and by plain torch that reads what the C kernels have stored."""

    own: Sequences
    other: Sequences

    def step(self, parts: list[tuple[int, int]], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What each attends to in a step; afterwards plain torch's cache holds what plain torch has stored."""
        attended = self.own.attend(parts, seed)
        self.other.attend(parts, seed)
        stored, self.other.cache = self.other.cache, as_the_reference_has_it(self.own.cache)
        with mock.patch.object(reference_attention, "store_rows"):
            expected = self.other.attend(parts, seed)
        self.other.cache = stored
        return attended, expected


def steps(lengths: tuple[int, ...] = LENGTHS) -> list[list[tuple[int, int]]]:
    """Three steps: prompts and chunks of uneven lengths, single tokens among them."""
    starts, made = [0] * len(lengths), []
    for step in range(3):
        parts = [(start, lengths[(i + step) % len(lengths)]) for i, start in enumerate(starts)]
        starts = [sum(part) for part in parts]
        made.append(parts)
    return made


@pytest.mark.parametrize("dim", [64, 16, 24, 128, 21])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_attention_is_plain_torch_s_over_the_same_cache(build: str, dim: int, block_size: int) -> None:
    normed = dim != 21
    both = Both(*(sequences_of(own, dim, block_size, normed=normed) for own in (build, "reference")))
    for seed, parts in enumerate(steps()):
        attended, expected = both.step(parts, seed)
        torch.testing.assert_close(attended, expected, rtol=3e-4, atol=3e-4)


def test_attention_over_many_segments_is_plain_torch_s(build: str) -> None:
    both = Both(*(sequences_of(own, most=2600, sequences=1) for own in (build, "reference")))
    for part in ((0, 1023), (1023, 2), (1025, 1400), (2425, 1)):
        attended, expected = both.step([part], 0)
        torch.testing.assert_close(attended, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [64, 21])
def test_rows_are_stored_as_plain_torch_rounds_them(build: str, dim: int) -> None:
    both = Both(*(sequences_of(own, dim, normed=dim != 21) for own in (build, "reference")))
    for seed, parts in enumerate(steps()):
        both.step(parts, seed)
    own, other = as_the_reference_has_it(both.own.cache), both.other.cache
    # Values come as they are.  Keys have passed a LayerNorm, whose last bits may decide about a number.
    assert torch.equal(own.values, other.values)
    assert torch.equal(scales_of(own)[..., 1].nan_to_num(-1), scales_of(other)[..., 1].nan_to_num(-1))
    keys, expected = (dequantize_rows(cache.keys, scales_of(cache)[..., 0]) for cache in (own, other))
    assert torch.equal(keys.isnan(), expected.isnan())
    difference = (keys - expected).nan_to_num().abs()
    assert difference.max() <= 1.01 * expected.nan_to_num().abs().max() / 127
    assert (difference > 0.01 * expected.nan_to_num().abs().max() / 127).float().mean() < 0.01


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_row_has_the_same_bits_in_any_chunks_and_company(build: str, data: st.DataObject) -> None:
    dim, block_size = data.draw(st.sampled_from([(64, 16), (64, 32), (24, 64)]))
    length = data.draw(st.integers(1, 90))
    cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=5)) | {length})
    whole = sequences_of(build, dim, block_size).attend([(0, length), (0, 3)], seed=0, only=0)
    pieces, start = [], 0
    chunked = sequences_of(build, dim, block_size)
    for cut in cuts:
        pieces.append(chunked.attend([(start, cut - start)], seed=0, only=0))
        start = cut
    assert torch.equal(whole, torch.cat(pieces))


def test_a_row_has_the_same_bits_in_chunks_that_end_within_a_segment(build: str) -> None:
    whole = sequences_of(build, most=1100, sequences=1).attend([(0, 1100)], seed=0)
    chunked = sequences_of(build, most=1100, sequences=1)
    parts = [(0, 1021), (1021, 1), (1022, 5), (1027, 73)]
    assert torch.equal(whole, torch.cat([chunked.attend([part], seed=0) for part in parts]))


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
def test_what_is_not_finite_stays_with_its_sequence(build: str, part: int, bad: float) -> None:
    def attend(spoiled: bool) -> list[torch.Tensor]:
        made = sequences_of(build, normed=False, sequences=2)
        qkv = [random(9, made.heads, 3, made.dim, seed=seed) for seed in (1, 2)]
        if spoiled:
            qkv[1][4, 1, part, 3] = bad
        plan = made.operations.plan_attention(
            [made.tables[0][:1], made.tables[1][:1]],
            [0, 0],
            [9, 9],
            num_blocks=len(made.cache.keys),
            num_heads=made.heads,
            block_size=made.cache.block_size,
            dtype=torch.int8,
            device=torch.device("cpu"),
        )
        rotary = made.operations.rotary_at(made.rotary, plan)
        attended = made.operations.attention(torch.cat(qkv), None, rotary, made.cache, plan)
        return list(attended.view(2, 9, made.heads, made.dim))

    clean, spoiled = attend(False), attend(True)
    assert torch.equal(clean[0], spoiled[0])
    assert torch.equal(clean[1][:4], spoiled[1][:4])
    assert torch.equal(clean[1][:, [0, 2]], spoiled[1][:, [0, 2]])
    # A key that matches nothing gets no weight, as in a cache of floats.
    seen = {0: spoiled[1][4:5, 1], 1: spoiled[1][:0], 2: spoiled[1][4:, 1]}[part]
    assert seen.isnan().all()
    assert clean[1].isfinite().all()
