"""GPTQ: products are off by less than with rounding to nearest, also where inputs say little or nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.kernels import QuantizedFormat
from persimmon.model.errors import CheckpointError
from persimmon.model.quantization import gptq, rounding
from persimmon.model.quantization.gptq import Hessian

FORMS = [
    QuantizedFormat(4, 32, torch.bfloat16),
    QuantizedFormat(4, 128, torch.float16),
    QuantizedFormat(8, None, torch.bfloat16),
]


def correlated(tokens: int, inputs: int, seed: int) -> torch.Tensor:
    """Inputs [tokens, inputs] of which most vary together, some much more than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, inputs // 4, generator=generator) @ torch.randn(
        inputs // 4, inputs, generator=generator
    )
    return mixed * torch.rand(inputs, generator=generator) + 0.1 * torch.randn(tokens, inputs, generator=generator)


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(inputs.shape[1])
    for part in inputs.split(100):
        hessian.add(part)
    return hessian.take()


def test_the_hessian_is_that_of_the_mean_squared_error():
    inputs = correlated(250, 64, seed=0)
    torch.testing.assert_close(hessian_of(inputs), 2 * inputs.T @ inputs / 250, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=str)
@given(st.integers(0, 99))
@settings(max_examples=4, deadline=None)
def test_products_are_off_by_less_than_with_rounding_to_nearest(form, seed):
    inputs = correlated(500, 256, seed)
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(seed)) * 0.05
    exact = inputs @ weight.T
    errors = [
        (inputs @ matrix.dequantized().T - exact).square().mean().item()
        for matrix in (gptq.quantize(weight, hessian_of(inputs), form), rounding.quantize(weight, form))
    ]
    assert errors[0] < 0.8 * errors[1]


def test_inputs_that_do_not_vary_together_are_rounded_to_nearest():
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    matrix = gptq.quantize(weight, torch.eye(256), FORMS[0])
    expected = rounding.quantize(weight, FORMS[0])
    assert torch.equal(matrix.numbers, expected.numbers)
    assert torch.equal(matrix.scales, expected.scales)


def test_inputs_that_were_always_zero_keep_their_weights():
    inputs = correlated(300, 256, seed=2)
    inputs[:, 64:96] = 0
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(3))
    matrix = gptq.quantize(weight, hessian_of(inputs), FORMS[0])
    nearest = rounding.quantize(weight, FORMS[0]).dequantized()
    assert torch.equal(matrix.dequantized()[:, 64:96], nearest[:, 64:96])


def test_fewer_tokens_than_inputs_and_none_at_all_are_enough_for_an_answer():
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(4))
    for hessian in (hessian_of(correlated(3, 256, seed=5)), torch.zeros(256, 256)):
        assert bool(gptq.quantize(weight, hessian, FORMS[0]).dequantized().isfinite().all())


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(CheckpointError, match="its inputs are not finite numbers"):
        gptq.quantize(torch.zeros(9, 256), torch.full((256, 256), float("nan")), FORMS[0])


def test_a_weight_that_is_not_finite_is_refused_with_its_row():
    weight = torch.zeros(9, 256)
    weight[7, 200] = float("nan")
    with pytest.raises(CheckpointError, match="row 7 has the weight nan"):
        gptq.quantize(weight, torch.eye(256), FORMS[0])
