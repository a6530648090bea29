"""Keys and values in 8 bits: how rows are rounded, and that attention reads what was rounded."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.kernels import reference_attention
from persimmon.kernels.cache_types import EIGHT_BIT_CACHES, row_bytes
from persimmon.kernels.reference_cache import dequantize_rows, quantize_rows, saturate_to_fp8
from tests.kernels.stored_rows import empty_layer
from tests.kernels.test_reference import exact
from tests.kernels.test_reference_attention import Layout, Span, naive_attention

NAN, INFINITY = float("nan"), float("inf")
LARGEST_FP8 = 448.0


class TestRoundingToInt8:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40))
    def test_errs_by_half_a_scale_at_most(self, row: list[float]) -> None:
        x = torch.tensor([row])
        numbers, scales = quantize_rows(x)
        assert numbers.dtype == torch.int8
        assert scales.dtype == torch.bfloat16
        assert numbers.abs().max() <= 127
        scale = scales.double().item()
        assert scale == (x.abs().max() / 127).bfloat16().item()
        error = (x.double() - numbers.double() * scale).abs().max().item()
        # The largest numbers may be as much beyond 127 as the scale was rounded down: 127 * 2^-8.
        assert error <= scale * 0.5001 or x.abs().max() < 1e-36

    def test_takes_the_nearest_number_and_of_two_the_even_one(self) -> None:
        numbers, scales = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5, 2.49, -127.0]]))
        assert scales.tolist() == [1.0]
        assert numbers.tolist() == [[127, 0, 2, -2, 2, -127]]

    def test_of_zeros_is_zeros(self) -> None:
        numbers, scales = quantize_rows(torch.zeros(2, 8))
        assert not numbers.any()
        assert not dequantize_rows(numbers, scales).any()

    @pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
    def test_of_what_is_not_finite_makes_its_row_nan_and_no_other(self, bad: float) -> None:
        rows = torch.randn(3, 8)
        rows[1, 4] = bad
        back = dequantize_rows(*quantize_rows(rows))
        assert back[1].isnan().all()
        assert torch.equal(back[[0, 2]], dequantize_rows(*quantize_rows(rows[[0, 2]])))


class TestRoundingToFp8:
    def test_takes_the_nearest_and_saturates(self) -> None:
        rows = torch.tensor([[0.0, 1.0625, 1.1875, 447.0, 470.0, 1e9, -INFINITY, -3.0]])
        expected = [[0.0, 1.0, 1.25, LARGEST_FP8, LARGEST_FP8, LARGEST_FP8, -LARGEST_FP8, -3.0]]
        assert saturate_to_fp8(rows).float().tolist() == expected

    def test_of_nan_is_nan(self) -> None:
        assert saturate_to_fp8(torch.tensor([[NAN, 2.0]])).float().isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("name", EIGHT_BIT_CACHES)
def test_a_row_takes_the_bytes_that_are_planned(name: str) -> None:
    dtype = EIGHT_BIT_CACHES[name]
    layer = empty_layer((4, 3, 16, 24), dtype)
    assert sum(tensor.nbytes for tensor in layer.tensors) == 2 * 4 * 3 * 16 * row_bytes(dtype, 24)


@pytest.mark.parametrize("name", EIGHT_BIT_CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 64])
def test_attention_reads_what_was_rounded(name: str, dtype: torch.dtype, block_size: int) -> None:
    heads, dim = 2, 16
    spans = [Span(0, 1), Span(40, 1), Span(0, 7), Span(30, 20)]
    layout = Layout.make(spans, block_size, seed=1)
    round_trip = {
        "int8": lambda rows: dequantize_rows(*quantize_rows(rows)),
        "fp8_e4m3": lambda rows: saturate_to_fp8(rows).float(),
    }[name]
    cache = empty_layer((layout.num_blocks, heads, block_size, dim), EIGHT_BIT_CACHES[name])
    unturned = torch.ones(1, 1, 1, 0), torch.zeros(1, 1, 1, 0)
    store = partial(reference_attention.qk_norm_rotary_store, norm_weight=None, norm_bias=None, eps=0.0)
    qkv = [torch.randn(span.length, heads, 3, dim).to(dtype) for span in spans]
    before = Layout([Span(0, span.start) for span in spans if span.start], [], layout.num_blocks, block_size)
    tables = [table for table, span in zip(layout.tables, spans, strict=True) if span.start]
    earlier = Layout(before.spans, tables, layout.num_blocks, block_size).plan(heads, cache.keys.dtype)
    context = torch.cat([own[: span.start] for own, span in zip(qkv, spans, strict=True)])
    store(context, cos=unturned[0], sin=unturned[1], cache=cache, plan=earlier)

    plan = layout.plan(heads, cache.keys.dtype)
    step = torch.cat([own[span.start :] for own, span in zip(qkv, spans, strict=True)])
    q = store(step, cos=unturned[0], sin=unturned[1], cache=cache, plan=plan)
    attended = reference_attention.paged_attention(q, cache, plan)

    expected = []
    for own, span in zip(qkv, spans, strict=True):
        keys, values = (exact(round_trip(own[:, :, part])) for part in (1, 2))
        seen = range(span.start + 1, span.length + 1)
        expected += [naive_attention(exact(own[i - 1, :, 0]), keys[:i], values[:i]) for i in seen]
    assert attended.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    np.testing.assert_allclose(
        exact(attended), np.stack(expected).reshape(len(expected), -1), rtol=tolerance, atol=tolerance
    )
