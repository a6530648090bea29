"""The residual stream's elementwise kernels, interpreted, against float64; everything they must not read is NaN."""

from pathlib import Path

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from persimmon.kernels import layer_norm as module
from persimmon.kernels import reference_projection as reference
from persimmon.kernels.layer_norm import ElementwiseConfig, bias_relu_squared_, embed, layer_norm
from tests.kernels.quantized_matrices import random_matrix

NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative and absolute error allowed at values around one: the rounding of the type and a little."""
EPS = 1e-5


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype] * factor
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def exact_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x.double(), x.shape[1:], weight.double(), bias.double(), eps)


def affine(hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return 1 + normal(hidden, dtype=dtype, seed=8, scale=0.3), normal(hidden, dtype=dtype, seed=9)


class TestEmbed:
    @pytest.mark.parametrize("hidden", [64, 96, 24, 200])
    @pytest.mark.parametrize("rows", [1, 3, 16, 17, 40])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gathers_rows_and_their_statistics(self, dtype: torch.dtype, rows: int, hidden: int) -> None:
        table = normal(50, hidden, dtype=dtype)
        ids = torch.randint(0, 50, (rows,), generator=torch.Generator().manual_seed(1))
        x, statistics = embed(ids, None, table)
        assert torch.equal(x, table[ids])
        torch.testing.assert_close(statistics, reference.tile_statistics(x), rtol=1e-5, atol=1e-6)

    def test_negative_ids_are_samples_of_the_step_before(self) -> None:
        table = normal(50, 64, dtype=torch.float16)
        sampled = torch.tensor([7, 8, 49])
        x, statistics = embed(torch.tensor([3, -1, -3, -2, 0]), sampled, table)
        assert torch.equal(x, table[[3, 7, 49, 8, 0]])
        expected, expected_statistics = reference.embed(torch.tensor([3, -1, -3, -2, 0]), sampled, table)
        assert torch.equal(x, expected)
        torch.testing.assert_close(statistics, expected_statistics)

    @pytest.mark.parametrize("group", [96, 32])
    def test_rows_of_8_bits_are_multiplied_by_their_scales(self, group: int) -> None:
        # Not bfloat16, which the interpreter cuts off instead of rounding it.
        table = random_matrix((50, 96), 8, group, scale_dtype=torch.float16)
        x, statistics = embed(torch.tensor([3, 49, 60]), None, table)
        assert x.dtype == torch.float16
        assert torch.equal(x[:2], table.dequantized()[[3, 49]].half())
        assert not x[2].any()
        torch.testing.assert_close(statistics, reference.tile_statistics(x), rtol=1e-5, atol=1e-6)

    def test_a_table_of_4_bits_is_refused(self) -> None:
        with pytest.raises(ValueError, match="the embedding has 4 bits; the kernels of a GPU look up 8 or 16 of them"):
            embed(torch.tensor([3]), None, random_matrix((50, 64), 4, 32))

    @pytest.mark.parametrize("token", [-1, -4, -5, -(2**62), 50, 2**40, 2**62])
    def test_ids_outside_the_table_give_zeros(self, token: int) -> None:
        table = normal(50, 64, dtype=torch.float16)
        sampled = torch.tensor([-1, -2, 50, 2**40])
        x, statistics = embed(torch.tensor([1, token]), sampled, table)
        assert torch.equal(x, torch.stack((table[1], torch.zeros(64, dtype=torch.float16))))
        assert not statistics[:, :, 1].any()

    @pytest.mark.parametrize(("live", "bucket"), [(0, 4), (1, 4), (5, 24), (20, 24), (24, 24), (99, 24)])
    def test_rows_behind_the_live_ones_are_not_written(
        self, live: int, bucket: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *shape, **kind: empty(*shape, **kind).fill_(NAN))
        table, ids = normal(50, 64, dtype=torch.float16), torch.arange(bucket)
        x, statistics = embed(ids, None, table, torch.tensor([live], dtype=torch.int32))
        assert torch.equal(x[:live], table[:bucket][:live])
        assert x[live:].isnan().all()
        assert not statistics[:, :, :live].isnan().any()
        assert statistics[:, :, live:].isnan().all()

    def test_no_rows_are_no_work(self) -> None:
        x, statistics = embed(torch.zeros(0, dtype=torch.int64), None, normal(50, 96, dtype=torch.float16))
        assert x.shape == (0, 96)
        assert statistics.shape == (2, 2, 0)

    def test_a_table_may_have_more_than_2_to_the_31_numbers(self, tmp_path: Path) -> None:
        hidden = 1024
        vocabulary = 2**31 // hidden + 4
        # A sparse file: pages that are never written take no space.
        file = np.memmap(tmp_path / "table", dtype=np.float16, mode="w+", shape=(vocabulary, hidden))
        table = torch.from_numpy(file)
        table[-6:] = normal(6, hidden, dtype=torch.float16)
        ids = torch.tensor([vocabulary - 1, vocabulary - 4, vocabulary - 5, vocabulary - 6])
        x, _ = embed(ids, None, table)
        assert torch.equal(x, table[ids])
        assert x.any(1).all()


class TestLayerNorm:
    @pytest.mark.parametrize("hidden", [64, 96, 24, 200, 448])
    @pytest.mark.parametrize("rows", [1, 5, 16, 17, 40])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_merges_the_tiles_statistics(self, dtype: torch.dtype, rows: int, hidden: int) -> None:
        x = normal(rows, hidden, dtype=dtype, seed=1) * 3 + 1
        weight, bias = affine(hidden, dtype)
        statistics = reference.tile_statistics(x)
        normed = layer_norm(x, statistics, weight, bias, EPS)
        assert_close(normed, exact_norm(x, weight, bias), dtype)
        assert_close(normed, reference.merged_layer_norm(x, statistics, weight, bias, EPS), dtype)

    @pytest.mark.parametrize("hidden", [64, 96, 24, 200, 448])
    @pytest.mark.parametrize("rows", [1, 5])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_computes_the_statistics_where_none_are_given(self, dtype: torch.dtype, rows: int, hidden: int) -> None:
        x = normal(rows, hidden, dtype=dtype, seed=1) * 3 + 1
        before = x.clone()
        weight, bias = affine(hidden, dtype)
        assert_close(layer_norm(x, None, weight, bias, EPS), exact_norm(x, weight, bias), dtype)
        assert torch.equal(x, before)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_adds_the_residual_first(self, dtype: torch.dtype) -> None:
        x, residual = normal(3, 96, dtype=dtype, seed=1), normal(3, 96, dtype=dtype, seed=2)
        weight, bias = affine(96, dtype)
        total = x.double() + residual.double()
        normed = layer_norm(x, None, weight, bias, EPS, residual=residual)
        assert_close(x, total, dtype)
        assert_close(normed, exact_norm(x, weight, bias), dtype)

    @pytest.mark.parametrize("merged", [True, False], ids=["merged", "from the row"])
    @pytest.mark.parametrize(("mean", "spread"), [(1000.0, 1.0), (-30000.0, 30.0), (0.0, 20000.0), (1.0, 1e-3)])
    def test_a_large_mean_costs_no_digits(self, mean: float, spread: float, merged: bool) -> None:
        x = normal(4, 448, dtype=torch.float32, seed=3, scale=spread) + mean
        weight, bias = torch.ones(448), torch.zeros(448)
        _, statistics = embed(torch.arange(4), None, x)
        normed = layer_norm(x, statistics if merged else None, weight, bias, EPS)
        # The mean itself has 24 bits: what is lost of it is lost from every deviation.
        lost = abs(mean) / spread * 2**-23
        torch.testing.assert_close(normed.double(), exact_norm(x, weight, bias), rtol=2e-6, atol=2e-6 + 2 * lost)

    @pytest.mark.parametrize("eps", [1e-6, 1e-2, 1.0])
    def test_adds_eps_to_the_variance(self, eps: float) -> None:
        x = normal(2, 64, dtype=torch.float32, scale=0.01)
        weight, bias = affine(64, torch.float32)
        expected = exact_norm(x, weight, bias, eps)
        assert_close(layer_norm(x, None, weight, bias, eps), expected, torch.float32)
        assert_close(layer_norm(x, reference.tile_statistics(x), weight, bias, eps), expected, torch.float32)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_row_has_the_same_bits_in_any_company(self, dtype: torch.dtype) -> None:
        x = normal(40, 200, dtype=dtype, seed=4)
        weight, bias = affine(200, dtype)
        statistics = embed(torch.arange(40), None, x)[1]
        together = layer_norm(x, statistics, weight, bias, EPS)
        for first, count in ((0, 1), (7, 1), (20, 3), (30, 10), (3, 33)):
            rows = slice(first, first + count)
            own, own_statistics = embed(torch.arange(first, first + count), None, x)
            assert torch.equal(own_statistics, statistics[:, :, rows])
            assert torch.equal(layer_norm(own, own_statistics, weight, bias, EPS), together[rows])

    def test_how_columns_are_shared_changes_no_bit(self) -> None:
        x = normal(3, 200, dtype=torch.float16)
        statistics = reference.tile_statistics(x)
        weight, bias = affine(200, torch.float16)
        one, other = (
            layer_norm(x, statistics, weight, bias, EPS, config=ElementwiseConfig(norm_columns=columns))
            for columns in (32, 256)
        )
        assert torch.equal(one, other)

    def test_a_row_of_nan_stays_alone(self) -> None:
        x = normal(4, 96, dtype=torch.float16)
        weight, bias = affine(96, torch.float16)
        expected = layer_norm(x, reference.tile_statistics(x), weight, bias, EPS)
        x[2] = NAN
        for statistics in (reference.tile_statistics(x), None):
            normed = layer_norm(x, statistics, weight, bias, EPS)
            assert normed[2].isnan().all()
            assert_close(normed[[0, 1, 3]], expected[[0, 1, 3]], torch.float16)

    def test_no_rows_are_no_work(self) -> None:
        x = torch.zeros(0, 96)
        weight, bias = affine(96, torch.float32)
        assert layer_norm(x, None, weight, bias, EPS).shape == (0, 96)
        assert layer_norm(x, torch.zeros(2, 2, 0), weight, bias, EPS).shape == (0, 96)

    def test_errors_say_what_was_given_and_what_is_allowed(self) -> None:
        x, (weight, bias) = torch.zeros(3, 96), affine(96, torch.float32)
        with pytest.raises(ValueError, match=r"have the shape \(2, 2, 3\), not \(2, 1, 3\)"):
            layer_norm(x, torch.zeros(2, 1, 3), weight, bias, EPS)
        with pytest.raises(ValueError, match="give one of the two"):
            layer_norm(x, torch.zeros(2, 2, 3), weight, bias, EPS, residual=x.clone())
        with pytest.raises(ValueError, match=r"x must be contiguous, not strided \(1, 96\)"):
            layer_norm(torch.zeros(96, 96).T, None, weight, bias, EPS)


class TestBiasReluSquared:
    @pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 100), (2, 320), (0, 16)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_formula_in_place(self, dtype: torch.dtype, rows: int, width: int, with_bias: bool) -> None:
        x = normal(rows, width, dtype=dtype, scale=2)
        bias = normal(width, dtype=dtype, seed=1) if with_bias else None
        expected = (x.double() + (bias.double() if bias is not None else 0)).relu().square()
        twin = reference.bias_relu_squared_(x.clone(), bias)
        out = bias_relu_squared_(x, bias, config=ElementwiseConfig(activation_columns=128))
        assert out is x
        assert_close(x, expected, dtype)
        assert_close(x, twin, dtype)

    def test_saturates_in_float16_alone(self) -> None:
        values = [255.75, 255.875, 256.0, 300.0, 65504.0, -300.0, -65504.0, 0.0]
        x = torch.tensor([values], dtype=torch.float16)
        assert bias_relu_squared_(x, None).tolist() == [[65408.0, 65472.0, *[65504.0] * 3, 0.0, 0.0, 0.0]]
        assert bias_relu_squared_(torch.tensor([[256.0, 1024.0]]), None).tolist() == [[65536.0, 1048576.0]]

    def test_nan_stays_nan(self) -> None:
        assert bias_relu_squared_(torch.tensor([[NAN, -1.0]]), None).isnan().tolist() == [[True, False]]

    def test_rows_may_lie_beyond_2_to_the_31_numbers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        width = 1024
        rows = 2**31 // width + 2
        # A sparse file: pages that are never written take no space.
        x = torch.from_numpy(np.memmap(tmp_path / "x", dtype=np.float16, mode="w+", shape=(rows, width)))
        x[-1] = normal(width, dtype=torch.float16)
        expected = reference.bias_relu_squared_(x[-1:].clone(), None)
        place = interpreter.InterpreterBuilder.set_grid_idx

        def only_the_last(self, column: int, y: int, z: int) -> None:
            place(self, column, y, z)
            self.grid_idx = (rows - 1, y, z)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", only_the_last)
        module.bias_relu_squared_kernel[(1, 1)](x, None, WIDTH=width, BLOCK_COLUMNS=width, PDL=False)
        assert torch.equal(x[-1:], expected)
