"""Rows of 8 bits in Triton, interpreted: rounded as plain torch rounds them, bit for bit, and read back."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.kernels import LayerCache
from persimmon.kernels.cached_rows import (
    check_cache,
    key_scale,
    magnitude_bits,
    narrowed,
    scale_bits,
    scale_pairs,
    scaled_to_int8,
    value_scale,
    widened,
)
from persimmon.kernels.reference_cache import dequantize_rows, quantize_rows, saturate_to_fp8

NAN, INFINITY = float("nan"), float("inf")
EDGES = [0.0, -0.0, 2**-10, 2**-9 * 1.5, 2**-6, 0.4375, 240.0, 447.0, 448.0, 464.0, 1e-40, 65504.0, 3e38]
ROWS, DIM = 4, 16
rows = st.lists(
    st.lists(st.floats(width=32) | st.sampled_from(EDGES), min_size=DIM, max_size=DIM), min_size=ROWS, max_size=ROWS
)


@triton.jit  # type: ignore[untyped-decorator]
def _round_rows(x, numbers, pairs, fp8, ROWS: tl.constexpr, DIM: tl.constexpr):
    row = tl.arange(0, ROWS)
    place = row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    own = tl.load(x + place)
    bits = scale_bits(tl.max(magnitude_bits(own), 1))
    tl.store(pairs + row, bits | (bits << 16))
    tl.store(numbers + place, narrowed(scaled_to_int8(own, key_scale(bits)[:, None]), tl.int8))
    tl.store(fp8 + place, narrowed(own, fp8.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _widen_rows(numbers, pairs, out, ROWS: tl.constexpr, DIM: tl.constexpr):
    row = tl.arange(0, ROWS)
    place = row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    scale = None if pairs is None else value_scale(tl.load(pairs + row))
    tl.store(out + place, widened(tl.load(numbers + place), scale, out.dtype.element_ty))


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of int8, their scales, twice each, and numbers of fp8."""
    numbers, scales = torch.zeros(x.shape, dtype=torch.int8), torch.zeros(len(x), 2, dtype=torch.bfloat16)
    fp8 = torch.zeros(x.shape, dtype=torch.float8_e4m3fn)
    _round_rows[(1,)](x, numbers, scales.view(torch.int32), fp8, ROWS=len(x), DIM=x.shape[1])
    return numbers, scales, fp8


def read_back(numbers: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(numbers.shape, dtype=dtype)
    pairs = None if scales is None else scales.view(torch.int32)
    _widen_rows[(1,)](numbers, pairs, out, ROWS=len(numbers), DIM=numbers.shape[1])
    return out


@settings(max_examples=30, deadline=None)
@given(rows)
def test_rows_are_rounded_as_plain_torch_rounds_them(values: list[list[float]]) -> None:
    x = torch.tensor(values)
    numbers, scales, fp8 = rounded(x)
    expected_numbers, expected_scales = quantize_rows(x)
    assert torch.equal(numbers, expected_numbers)
    for own in scales.unbind(1):
        torch.testing.assert_close(own, expected_scales, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(fp8.float(), saturate_to_fp8(x).float(), rtol=0, atol=0, equal_nan=True)


def test_every_number_is_read_back(subtests: pytest.Subtests) -> None:
    numbers = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(16, 16)
    scales = torch.rand(16, 2).bfloat16()
    for dtype in (torch.float16, torch.float32):
        with subtests.test(dtype=dtype):
            expected = dequantize_rows(numbers, scales[:, 1]).to(dtype)
            assert torch.equal(read_back(numbers, scales, dtype), expected)
            codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(16, 16)
            fp8 = codes.view(torch.float8_e4m3fn)
            is_number = ~fp8.float().isnan()  # the interpreter takes NaN for a number
            assert torch.equal(read_back(fp8, None, dtype)[is_number], fp8.to(dtype)[is_number])


def test_a_row_of_float16_s_largest_numbers_stays_finite_and_one_that_is_not_stays_so() -> None:
    x = torch.tensor([[65504.0, -65504.0] * 8, [INFINITY] + [1.0] * 15, [NAN] + [1.0] * 15, [1.0] * 16])
    numbers, scales, _ = rounded(x)
    back = read_back(numbers, scales, torch.float16)
    assert back[0].abs().tolist() == [65504.0] * 16
    assert back[1:3].isnan().all()
    assert torch.allclose(back[3], torch.ones(16).half(), rtol=2**-8)


class TestChecks:
    def cache(self, dtype: torch.dtype = torch.int8, scales: torch.dtype | None = torch.bfloat16) -> LayerCache:
        made = torch.zeros(5, 2, 16, 32, dtype=dtype)
        return LayerCache(made, made, None if scales is None else torch.zeros(5, 2, 16, 2, dtype=scales))

    def test_a_word_holds_both_scales_of_a_token(self) -> None:
        cache = self.cache()
        assert cache.scales is not None
        cache.scales[4, 1, 3] = torch.tensor([1.0, 2.0])
        pairs = scale_pairs(cache)
        assert pairs is not None
        assert pairs.shape == (5, 2, 16)
        assert int(pairs[4, 1, 3]) == 0x3F80 | 0x4000 << 16
        assert scale_pairs(self.cache(torch.float16, None)) is None

    def test_eight_bits_suit_queries_of_any_type(self) -> None:
        check_cache(self.cache(), 2, 32, torch.float16)
        check_cache(self.cache(torch.float8_e4m3fn, None), 2, 32, torch.bfloat16)
        check_cache(self.cache(torch.float16, None), 2, 32, torch.float16)

    @pytest.mark.parametrize(
        ("cache", "message"),
        [
            ((torch.float32, None), r"\[blocks, 2, block size, 32\] of torch.float16 or 8 bits, and contiguous, got"),
            ((torch.int8, None), r"scales must be \[5, 2, 16, 2\] for K and V of torch.int8, got None"),
            ((torch.float16, torch.bfloat16), r"scales must be None for K and V of torch.float16, got \[5, 2, 16, 2\]"),
            ((torch.int8, torch.float16), "scales must be torch.bfloat16 and contiguous, got torch.float16"),
        ],
    )
    def test_others_are_refused(self, cache: tuple[torch.dtype, torch.dtype | None], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_cache(self.cache(*cache), 2, 32, torch.float16)
