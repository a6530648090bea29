"""Rounding to nearest: no worse than by the largest weight, exact where it can be, plain errors."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.kernels.cpu import weight_rounding
from persimmon.kernels.quantized import Bits, pack_int4
from persimmon.model.errors import CheckpointError
from persimmon.model.quantization.rounding import quantize

KINDS: list[tuple[Bits, int | None]] = [(8, None), (8, 32), (4, 32), (4, 128), (4, None)]
FORMATS = [
    QuantizedFormat(bits, group_size, dtype)
    for bits, group_size in KINDS
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]
formats = st.sampled_from(FORMATS)


@pytest.fixture(params=["c", "plain torch"], autouse=True, scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs on both."""
    if request.param == "c" and not weight_rounding.available():
        pytest.skip("no build of the C kernels for this processor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_rounding, "available", lambda: request.param == "c")
        yield


def random_weight(seed: int, rows: int, scale: float, heavy: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 256, generator=generator)
    return scale * (weight**3 if heavy else weight)


def squared_errors(weight: torch.Tensor, values: torch.Tensor, group_size: int) -> torch.Tensor:
    return (weight.double() - values.double()).view(len(weight), -1, group_size).square().sum(-1)


def by_largest(weight: torch.Tensor, form: QuantizedFormat, steps: float) -> torch.Tensor:
    """Values of plain rounding, where the largest weight of a group is this many times its scale."""
    groups = weight.view(len(weight), -1, form.group_size or weight.shape[1])
    scales = (groups.abs().amax(-1, keepdim=True) / steps).to(form.scale_dtype).float()
    limit = 1 << (form.bits - 1)
    return ((groups / scales).round().clamp(-limit, limit - 1) * scales).view_as(weight)


def assert_same_values(actual: QuantizedMatrix, expected: QuantizedMatrix) -> None:
    # Numbers times scales of 16 bits are exact in float32.
    tolerance = 2e-7 if expected.scales.dtype == torch.float32 else 0
    torch.testing.assert_close(actual.dequantized(), expected.dequantized(), rtol=tolerance, atol=0)


@given(formats, st.integers(0, 999), st.integers(1, 9), st.sampled_from([1e-2, 1.0, 300.0]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_group_has_a_larger_error_than_by_its_largest_weight(form, seed, rows, scale, heavy):
    weight = random_weight(seed, rows, scale, heavy)
    group_size = form.group_size or weight.shape[1]
    errors = squared_errors(weight, quantize(weight, form).dequantized(), group_size)
    largest = 1 << (form.bits - 1)
    for steps in (largest - 1, largest - 0.5):  # the two usual choices
        plain = squared_errors(weight, by_largest(weight, form, steps), group_size)
        assert bool((errors <= plain * (1 + 1e-5)).all()), (errors / plain).max()


@pytest.mark.parametrize("group_size", [32, 128])
def test_the_search_takes_a_fifth_off_the_squared_error_of_normal_weights(group_size):
    weight = random_weight(0, rows=64, scale=0.02, heavy=False)
    form = QuantizedFormat(4, group_size, torch.bfloat16)
    plain = squared_errors(weight, by_largest(weight, form, 7.5), group_size).sum()
    assert squared_errors(weight, quantize(weight, form).dequantized(), group_size).sum() < 0.8 * plain


@given(formats, st.integers(0, 999), st.integers(1, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_a_matrix_that_the_format_can_hold_comes_out_as_it_was(form, seed, rows, data):
    """Where each group has its lowest number, or at least the largest."""
    generator = torch.Generator().manual_seed(seed)
    limit = 1 << (form.bits - 1)
    columns, group_size = 256, form.group_size or 256
    integers = torch.randint(-limit, limit, (rows, columns // group_size, group_size), generator=generator)
    integers[..., 3] = data.draw(st.sampled_from([-limit, 1 - limit, limit - 1]))
    integers = integers.to(torch.int8).view(rows, columns)
    scales = torch.rand(rows, columns // group_size, generator=generator) + 0.01
    given = QuantizedMatrix(
        numbers=integers if form.bits == 8 else pack_int4(integers),
        scales=scales.to(form.scale_dtype),
        bits=form.bits,
        group_size=group_size,
    )
    assert_same_values(quantize(given.dequantized(), form), given)


@given(formats, st.integers(0, 999), st.booleans())
@settings(max_examples=30, deadline=None)
def test_what_was_rounded_is_not_changed_by_rounding_again(form, seed, heavy):
    rounded = quantize(random_weight(seed, rows=4, scale=0.05, heavy=heavy), form)
    assert_same_values(quantize(rounded.dequantized(), form), rounded)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_rows_of_zeros_stay_zero(form):
    weight = random_weight(1, rows=3, scale=1.0, heavy=False)
    weight[1] = 0
    matrix = quantize(weight, form)
    assert not bool(matrix.dequantized()[1].any())
    assert bool(matrix.scales.isfinite().all())
    assert bool((matrix.scales != 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_bfloat16_scales_hold_weights_of_any_magnitude(magnitude, dtype):
    weight = (magnitude * random_weight(2, rows=4, scale=1.0, heavy=False)).to(dtype)
    values = quantize(weight, QuantizedFormat(8, None, torch.bfloat16)).dequantized()
    torch.testing.assert_close(values, weight.float(), rtol=0, atol=magnitude * 0.03)


def test_a_large_matrix_in_slices_equals_its_rows_apart():
    weight = torch.randn(70, 4096, generator=torch.Generator().manual_seed(3)).bfloat16()
    form = QuantizedFormat(4, 128, torch.bfloat16)
    whole = quantize(weight, form)
    for start, stop in ((0, 31), (31, 70)):
        part = quantize(weight[start:stop], form)
        assert torch.equal(whole.rows(start, stop).numbers, part.numbers)
        assert torch.equal(whole.rows(start, stop).scales, part.scales)


@pytest.mark.parametrize("columns", [4, 20, 36, 100])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_any_length_are_rounded_whole(bits, columns):
    weight = torch.linspace(-1.0, 1.0, 3 * columns).view(3, columns)
    form = QuantizedFormat(bits, None, torch.float32)
    plain = squared_errors(weight, by_largest(weight, form, (1 << bits - 1) - 0.5), columns)
    assert bool((squared_errors(weight, quantize(weight, form).dequantized(), columns) <= plain * (1 + 1e-5)).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_row(value):
    weight = random_weight(4, rows=2000, scale=1.0, heavy=False)
    weight[1234, 17] = value
    with pytest.raises(CheckpointError, match=f"row 1234 has the weight {value}; only finite numbers"):
        quantize(weight, QuantizedFormat(4, 32, torch.bfloat16))


def test_a_weight_too_large_for_its_scale_is_refused_with_its_row():
    weight = random_weight(4, rows=9, scale=1.0, heavy=False)
    weight[7, 17] = 1e6
    with pytest.raises(CheckpointError, match=r"row 7 has the weight 1e\+06, too large for scales in float16"):
        quantize(weight, QuantizedFormat(4, 32, torch.float16))


@pytest.mark.parametrize("group_size", [0, 3, 96, 512])
def test_groups_that_do_not_divide_the_inputs_are_refused(group_size):
    with pytest.raises(ValueError, match=f"groups of {group_size} do not divide 256 inputs of 4 bits"):
        quantize(torch.zeros(2, 256), QuantizedFormat(4, group_size, torch.bfloat16))
