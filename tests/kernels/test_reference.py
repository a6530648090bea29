"""The plain-torch operations against naive float64 ones, written here from the formulas."""

import math

import numpy as np
import pytest
import torch

from persimmon.kernels import Linear, reference

CPU = torch.device("cpu")
NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative and absolute error allowed at values around one: a few times the rounding of the type."""


def rounded(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the nearest values that the type can hold."""
    return torch.from_numpy(np.asarray(array)).to(dtype)


def exact(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's values in float64."""
    values: np.ndarray = tensor.double().numpy()
    return values


def assert_close(actual: torch.Tensor, expected: np.ndarray, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert actual.dtype == dtype
    tolerance = ROUNDING[dtype] * factor
    np.testing.assert_allclose(exact(actual), expected, rtol=tolerance, atol=tolerance)


def naive_layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    normed: np.ndarray = centred / np.sqrt(variance + eps) * weight + bias
    return normed


class TestLayerNorm:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1, 64), (3, 96), (70, 256), (0, 32)])
    def test_is_the_formula(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        generator = np.random.default_rng(0)
        x = rounded(generator.normal(3.0, 2.0, shape), dtype)
        weight = rounded(generator.uniform(0.5, 1.5, shape[1]), dtype)
        bias = rounded(generator.normal(0, 0.5, shape[1]), dtype)
        expected = naive_layer_norm(exact(x), exact(weight), exact(bias), 1e-5)
        assert_close(reference.layer_norm(x, weight, bias, 1e-5), expected, dtype, factor=2)

    @pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-2, 1.0])
    def test_adds_eps_to_the_variance(self, eps: float) -> None:
        x = rounded(np.random.default_rng(1).normal(0, 0.01, (5, 64)), torch.float32)
        ones, zeros = torch.ones(64), torch.zeros(64)
        expected = naive_layer_norm(exact(x), exact(ones), exact(zeros), eps)
        assert_close(reference.layer_norm(x, ones, zeros, eps), expected, torch.float32)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_computes_in_float32_inside(self, dtype: torch.dtype) -> None:
        # The squares of these values, and their sum, are beyond float16.
        x = rounded(np.random.default_rng(2).normal(0, 2000, (4, 512)), dtype)
        ones, zeros = torch.ones(512, dtype=dtype), torch.zeros(512, dtype=dtype)
        expected = naive_layer_norm(exact(x), exact(ones), exact(zeros), 1e-5)
        assert_close(reference.layer_norm(x, ones, zeros, 1e-5), expected, dtype)


class TestReluSquared:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_formula(self, dtype: torch.dtype) -> None:
        x = rounded(np.random.default_rng(0).normal(0, 3, (9, 40)), dtype)
        expected = np.maximum(exact(x), 0) ** 2
        assert_close(reference.relu_squared(x.clone()), expected, dtype)

    def test_saturates_in_float16(self) -> None:
        x = torch.tensor([255.75, 255.875, 256.0, 300.0, 65504.0, -300.0, -65504.0, 0.0], dtype=torch.float16)
        largest = 65504.0
        expected = [65408.0, 65472.0, largest, largest, largest, 0.0, 0.0, 0.0]
        assert reference.relu_squared(x).tolist() == expected

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_does_not_saturate_in_wider_types(self, dtype: torch.dtype) -> None:
        assert reference.relu_squared(torch.tensor([256.0, 1024.0, -1024.0], dtype=dtype)).tolist() == [
            65536.0,
            1048576.0,
            0.0,
        ]


class TestLinear:
    @pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize(("inputs", "outputs"), [(64, 192), (96, 33), (17, 130)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_product_for_any_number_of_rows(
        self, dtype: torch.dtype, inputs: int, outputs: int, with_bias: bool
    ) -> None:
        generator = np.random.default_rng(0)
        weight = rounded(generator.normal(0, 1 / math.sqrt(inputs), (outputs, inputs)), dtype)
        bias = rounded(generator.normal(0, 1, outputs), dtype) if with_bias else None
        prepared = reference.prepare_weight(weight.clone())
        for rows in [0, *range(1, 71)]:
            x = rounded(generator.normal(0, 1, (rows, inputs)), dtype)
            expected = exact(x) @ exact(weight).T + (exact(bias) if bias is not None else 0)
            assert_close(reference.project(x, Linear(prepared, bias)), expected, dtype, factor=2)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_takes_a_weight_as_it_is_stored(self, dtype: torch.dtype) -> None:
        generator = np.random.default_rng(1)
        weight = rounded(generator.normal(0, 0.1, (48, 64)), dtype)
        x = rounded(generator.normal(0, 1, (5, 64)), dtype)
        assert_close(
            reference.project(x, Linear(reference.DenseWeight(weight), None)),
            exact(x) @ exact(weight).T,
            dtype,
            factor=2,
        )

    def test_preparing_leaves_the_weight_as_it_is(self) -> None:
        weight = torch.randn(32, 64)
        before = weight.clone()
        reference.prepare_weight(weight)
        assert torch.equal(weight, before)
