"""Weights that C rounds to 8 or 4 bits: the same bits from all builds, and no worse scales than plain torch finds."""

import pytest
import torch

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.kernels.cpu import weight_rounding
from persimmon.kernels.cpu.weight_rounding import round_weights
from persimmon.model.quantization import rounding
from tests.cpu_builds import BUILDS

FORMATS = [
    QuantizedFormat(8, None, torch.bfloat16),
    QuantizedFormat(8, 32, torch.float16),
    QuantizedFormat(4, 32, torch.float16),
    QuantizedFormat(4, 128, torch.bfloat16),
    QuantizedFormat(4, 36, torch.bfloat16),
]

pytestmark = pytest.mark.skipif(not BUILDS, reason="no build of the C kernels for this processor")


def weights(form: QuantizedFormat, dtype: torch.dtype) -> torch.Tensor:
    columns = 3 * (form.group_size or 100)
    generator = torch.Generator().manual_seed(columns)
    return (0.02 * torch.randn(70, columns, generator=generator)).to(dtype)


def rounded(weight: torch.Tensor, form: QuantizedFormat, build: str) -> QuantizedMatrix:
    rows, columns = weight.shape
    result = QuantizedMatrix.empty((rows, columns), form)
    assert round_weights(weight, result, rounding._STEPS[form.bits], rounding._REFITS[form.bits], build) is None
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_every_build_makes_the_same_bits(form: QuantizedFormat, dtype: torch.dtype) -> None:
    weight = weights(form, dtype)
    first, *others = (rounded(weight, form, build) for build in BUILDS)
    for other in others:
        assert torch.equal(first.numbers, other.numbers)
        assert torch.equal(first.scales, other.scales)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_groups_have_the_scales_of_plain_torch_or_others_that_are_as_good(
    form: QuantizedFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weights(form, torch.float32)
    own = rounded(weight, form, BUILDS[0])
    monkeypatch.setattr(weight_rounding, "available", lambda: False)
    expected = rounding.quantize(weight, form)
    same = own.scales == expected.scales
    assert same.float().mean() > 0.97
    alike = same.repeat_interleave(own.group_size, dim=1)
    assert torch.equal(own.integers[alike], expected.integers[alike])
    errors, others = (
        (weight - each.dequantized()).square().view(len(weight), -1, own.group_size).sum(-1) for each in (own, expected)
    )
    torch.testing.assert_close(errors, others, rtol=1e-5, atol=0)


def test_the_first_row_without_a_finite_scale_is_returned() -> None:
    weight = torch.ones(50, 64)
    weight[(17, 31), 5] = torch.nan
    result = QuantizedMatrix.empty((50, 64), QuantizedFormat(4, 32, torch.float16))
    for build in BUILDS:
        assert round_weights(weight, result, (7.0,), 0, build) == 17
