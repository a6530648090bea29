"""The projection kernel, interpreted, against float64 and against itself; everything it must not read is NaN."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from persimmon.kernels import projection as module
from persimmon.kernels import reference_projection as reference
from persimmon.kernels.layer_norm import statistics_shape
from persimmon.kernels.projection import Norm, ProjectionConfig, Workspace, project, project_add_
from tests.interpreter import multiply_as_matrix_units

CPU = torch.device("cpu")
NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative and absolute error allowed at values around one: the rounding of the type and a little."""
EPS = 1e-5
SMALL = ProjectionConfig(block_k=32, splits=2)


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_as_matrix_units(monkeypatch)


def normal(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype] * factor
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def rows_live(count: int) -> torch.Tensor:
    return torch.tensor([count], dtype=torch.int32)


def workspace(out_features: int, config: ProjectionConfig, rows: int) -> Workspace:
    """Partial sums that are NaN until they are written."""
    made = Workspace.allocate([(out_features, config)], rows, CPU)
    made.partials.fill_(NAN)
    return made


def pad(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows of NaN behind x's own."""
    padded = torch.full((rows, *x.shape[1:]), NAN, dtype=x.dtype)
    padded[: len(x)] = x
    return padded


@dataclass(frozen=True)
class Into:
    """A projection that reads the residual stream through its LayerNorm."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor

    @classmethod
    def make(cls, rows: int, hidden: int, out_features: int, dtype: torch.dtype, *, bias: bool = True) -> "Into":
        return cls(
            x=normal(rows, hidden, dtype=dtype, seed=1) + 0.5,
            weight=normal(out_features, hidden, dtype=dtype, seed=2, scale=hidden**-0.5),
            bias=normal(out_features, dtype=dtype, seed=3) if bias else None,
            norm_weight=1 + normal(hidden, dtype=torch.float32, seed=4, scale=0.2),
            norm_bias=normal(hidden, dtype=torch.float32, seed=5, scale=0.2),
        )

    def run(
        self,
        config: ProjectionConfig = SMALL,
        *,
        rows: slice = slice(None),
        bucket: int | None = None,
        activation: Literal["none", "relu_squared"] = "none",
        normed: bool = True,
        made: Workspace | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The outputs of some of the rows, computed among `bucket` rows of which the others are NaN."""
        x = self.x[rows]
        live, bucket = len(x), bucket or len(x)
        statistics = torch.full(statistics_shape(bucket, x.shape[1]), NAN)
        statistics[:, :, :live] = reference.tile_statistics(x)
        out, alive = project(
            pad(x, bucket),
            self.weight,
            self.bias,
            norm=Norm(statistics=statistics, weight=self.norm_weight, bias=self.norm_bias, eps=EPS) if normed else None,
            activation=activation,
            live=rows_live(live),
            workspace=made or workspace(len(self.weight), config, bucket),
            config=config,
        )
        return out[:live], alive

    def expected(self, *, normed: bool = True) -> torch.Tensor:
        x = self.x
        if normed:
            exact = torch.nn.functional.layer_norm(
                x.double(), x.shape[1:], self.norm_weight.double(), self.norm_bias.double(), EPS
            )
            x = exact.to(x.dtype)
        out = x.double() @ self.weight.double().T
        return out if self.bias is None else out + self.bias.double()


class TestProject:
    @pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 33])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_product_of_the_normed_rows(self, dtype: torch.dtype, rows: int) -> None:
        case = Into.make(rows, 128, 192, dtype)
        out, alive = case.run()
        assert alive is None
        # A normed value that rounds to its other neighbour moves the sum by less than one rounding of it.
        assert_close(out, case.expected(), dtype, factor=3)

    @pytest.mark.parametrize("normed", [True, False], ids=["normed", "not normed"])
    @pytest.mark.parametrize(("hidden", "out_features"), [(64, 64), (96, 100), (40, 24), (200, 130)])
    @pytest.mark.parametrize("splits", [1, 2])
    def test_takes_features_that_fill_no_tile(self, hidden: int, out_features: int, normed: bool, splits: int) -> None:
        case = Into.make(3, hidden, out_features, torch.float16, bias=False)
        out, _ = case.run(replace(SMALL, splits=splits), normed=normed, bucket=5)
        assert_close(out, case.expected(normed=normed), torch.float16, factor=3)

    @pytest.mark.parametrize("rows", [1, 5, 16])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_normalising_in_the_prologue_changes_no_bit(self, dtype: torch.dtype, rows: int) -> None:
        case = Into.make(rows, 192, 64, dtype)
        fused, _ = case.run()
        apart, _ = case.run(replace(SMALL, norm_in_prologue=False))
        assert torch.equal(fused, apart)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_norm_s_parameters_may_have_either_dtype(self, dtype: torch.dtype) -> None:
        case = Into.make(3, 192, 64, dtype)
        narrow = replace(case, norm_weight=case.norm_weight.to(dtype), norm_bias=case.norm_bias.to(dtype))
        wide = replace(case, norm_weight=narrow.norm_weight.float(), norm_bias=narrow.norm_bias.float())
        assert torch.equal(narrow.run()[0], wide.run()[0])

    @pytest.mark.parametrize("activation", ["none", "relu_squared"])
    @pytest.mark.parametrize("splits", [1, 2])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_row_has_the_same_bits_in_any_company(self, dtype: torch.dtype, splits: int, activation) -> None:
        case = Into.make(64, 192, 64, dtype)
        config = replace(SMALL, splits=splits)
        together, _ = case.run(config, activation=activation)
        for first, count, bucket in ((0, 1, 1), (7, 1, 16), (20, 3, 8), (30, 17, 32), (16, 48, 64)):
            rows = slice(first, first + count)
            alone, _ = case.run(config, rows=rows, bucket=bucket, activation=activation)
            assert torch.equal(alone, together[rows])

    @pytest.mark.parametrize("splits", [1, 3])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_squares_what_is_positive_and_flags_what_lives(self, dtype: torch.dtype, splits: int) -> None:
        case = Into.make(2, 384, 192, dtype)
        out, alive = case.run(replace(SMALL, splits=splits), activation="relu_squared", bucket=20)
        assert_close(out, case.expected().relu().square(), dtype, factor=12)
        assert alive is not None
        assert alive.dtype == torch.int8
        assert torch.equal(alive, (out != 0).any(0).to(torch.int8))
        assert 0 < alive.sum() < len(alive)

    def test_squares_end_at_the_largest_number_of_float16(self) -> None:
        x = torch.tensor([[255.875], [256.0], [-300.0], [60000.0], [NAN]], dtype=torch.float16).repeat(1, 16)
        weight = torch.zeros(64, 16, dtype=torch.float16)
        weight[:, 0] = 1
        none = workspace(0, ProjectionConfig(), 5)
        out, _ = project(x, weight, None, activation="relu_squared", live=rows_live(5), workspace=none)
        assert out[:4, 0].tolist() == [65472.0, 65504.0, 0.0, 65504.0]
        assert out[4].isnan().all()
        wide, _ = project(x.float(), weight.float(), None, activation="relu_squared", live=rows_live(5), workspace=none)
        assert wide[3, 0] == 60000.0**2

    def test_agrees_with_its_twin(self) -> None:
        case = Into.make(5, 128, 64, torch.float16)
        out, alive = case.run(normed=False, activation="relu_squared")
        expected, flags = reference.project(case.x, case.weight, case.bias, "relu_squared")
        assert_close(out, expected, torch.float16)
        assert alive is not None
        assert flags is not None
        assert torch.equal(alive, flags)

    def test_no_live_row_at_all_flags_nothing(self) -> None:
        case = Into.make(0, 64, 64, torch.float16)
        _, alive = case.run(activation="relu_squared", bucket=4)
        assert alive is not None
        assert not alive.any()


@dataclass(frozen=True)
class Add:
    """A projection that adds to the residual stream; the weight is [in, out]."""

    x: torch.Tensor
    activation: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def make(cls, rows: int, in_features: int, hidden: int, dtype: torch.dtype, *, zeros: float = 0.0) -> "Add":
        activation = normal(rows, in_features, dtype=dtype, seed=2)
        activation[:, torch.rand(in_features, generator=torch.Generator().manual_seed(6)) < zeros] = 0
        return cls(
            x=normal(rows, hidden, dtype=dtype, seed=1),
            activation=activation,
            weight=normal(in_features, hidden, dtype=dtype, seed=3, scale=in_features**-0.5),
            bias=normal(hidden, dtype=dtype, seed=4),
        )

    @property
    def alive(self) -> torch.Tensor:
        return (self.activation != 0).any(0).to(torch.int8)

    def run(
        self,
        config: ProjectionConfig = SMALL,
        *,
        rows: slice = slice(None),
        bucket: int | None = None,
        transposed: bool = True,
        alive: torch.Tensor | None = None,
        made: Workspace | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new x and its statistics of some of the rows, among `bucket` rows of which the others are NaN."""
        live = len(self.x[rows])
        bucket = bucket or live
        x = pad(self.x[rows], bucket)
        made = made or workspace(x.shape[1], config, bucket)
        statistics = project_add_(
            x,
            pad(self.activation[rows], bucket),
            self.weight if transposed else self.weight.T.contiguous(),
            self.bias,
            transposed=transposed,
            alive=alive,
            live=rows_live(live),
            workspace=made,
            config=config,
        )
        assert x[live:].isnan().all()
        assert not made.counters.any()
        return x[:live], statistics[:, :, :live]

    def expected(self) -> torch.Tensor:
        return self.x.double() + self.activation.double() @ self.weight.double() + self.bias.double()


class TestProjectAdd:
    @pytest.mark.parametrize("transposed", [True, False])
    @pytest.mark.parametrize("rows", [1, 3, 16, 17, 33])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_adds_the_product(self, dtype: torch.dtype, rows: int, transposed: bool) -> None:
        case = Add.make(rows, 256, 128, dtype)
        x, statistics = case.run(transposed=transposed)
        assert_close(x, case.expected(), dtype)
        torch.testing.assert_close(statistics, reference.tile_statistics(x), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("block_n", [64, 128])
    @pytest.mark.parametrize("transposed", [True, False])
    @pytest.mark.parametrize(("in_features", "hidden"), [(100, 96), (200, 200), (48, 24), (130, 192)])
    def test_takes_features_that_fill_no_tile(
        self, in_features: int, hidden: int, transposed: bool, block_n: int
    ) -> None:
        case = Add.make(3, in_features, hidden, torch.float16, zeros=0.5)
        x, statistics = case.run(
            replace(SMALL, block_n=block_n),
            bucket=4,
            transposed=transposed,
            alive=case.alive if transposed else None,
        )
        assert_close(x, case.expected(), torch.float16)
        torch.testing.assert_close(statistics, reference.tile_statistics(x), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("rows", [1, 8, 20])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_of_the_weight_without_a_live_activation_are_not_read(
        self, dtype: torch.dtype, rows: int, zeros: float
    ) -> None:
        case = Add.make(rows, 320, 64, dtype, zeros=zeros)
        dense = case.run()
        poisoned = case.weight.clone()
        poisoned[case.alive == 0] = NAN
        masked = replace(case, weight=poisoned).run(alive=case.alive)
        assert torch.equal(masked[0], dense[0])
        assert torch.equal(masked[1], dense[1])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_row_has_the_same_bits_in_any_company(self, dtype: torch.dtype) -> None:
        case = Add.make(64, 256, 64, dtype, zeros=0.7)
        together = case.run()
        for first, count, bucket in ((0, 1, 1), (7, 1, 16), (20, 3, 8), (30, 17, 32), (16, 48, 64)):
            rows = slice(first, first + count)
            x, statistics = case.run(rows=rows, bucket=bucket, alive=case.alive)
            assert torch.equal(x, together[0][rows])
            assert torch.equal(statistics, together[1][:, :, rows])

    def test_the_splits_may_arrive_in_any_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case, config = Add.make(5, 512, 64, torch.float16), replace(SMALL, splits=4)
        in_order = case.run(config)
        place = interpreter.InterpreterBuilder.set_grid_idx
        for order in ((3, 2, 1, 0), (1, 3, 0, 2)):
            monkeypatch.setattr(
                interpreter.InterpreterBuilder,
                "set_grid_idx",
                lambda self, x, y, z, order=order: place(self, x, order[y], z),
            )
            shuffled = case.run(config)
            assert torch.equal(shuffled[0], in_order[0])
            assert torch.equal(shuffled[1], in_order[1])

    @pytest.mark.parametrize("in_features", [256, 320])
    @pytest.mark.parametrize("splits", [1, 2, 3, 4, 8])
    def test_more_splits_than_there_is_work_for_are_harmless(self, splits: int, in_features: int) -> None:
        case = Add.make(2, in_features, 64, torch.float32)
        x, _ = case.run(replace(SMALL, splits=splits))
        assert_close(x, case.expected(), torch.float32)

    def test_projections_share_a_workspace_one_after_the_other(self) -> None:
        shapes = [(128, SMALL), (192, SMALL)]
        made = Workspace.allocate(shapes, 8, CPU)
        assert Workspace.bytes(shapes, 8) == 4 * (made.partials.numel() + made.counters.numel())
        add, into = Add.make(5, 192, 128, torch.float16), Into.make(8, 128, 192, torch.float16)
        for _ in range(2):
            assert_close(add.run(made=made)[0], add.expected(), torch.float16)
            assert_close(into.run(made=made)[0], into.expected(), torch.float16, factor=3)

    def test_agrees_with_its_twin(self) -> None:
        case = Add.make(5, 128, 64, torch.float16)
        x, statistics = case.run()
        expected = case.x.clone()
        expected_statistics = reference.project_add_(expected, case.activation, case.weight, case.bias, transposed=True)
        assert_close(x, expected, torch.float16)
        torch.testing.assert_close(statistics, expected_statistics, rtol=2e-3, atol=2e-3)


class TestOffsets:
    def test_a_weight_may_have_more_than_2_to_the_31_numbers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        in_features = 1024
        out_features = 2**31 // in_features + 64
        last_tile = out_features // 64 - 1
        # A sparse file: pages that are never written take no space.
        file = np.memmap(tmp_path / "weight", dtype=np.float16, mode="w+", shape=(out_features, in_features))
        weight = torch.from_numpy(file)
        weight[-64:] = normal(64, in_features, dtype=torch.float16, seed=1, scale=0.03)
        x = normal(1, in_features, dtype=torch.float16, seed=2)
        place = interpreter.InterpreterBuilder.set_grid_idx

        def only_the_last(self, x: int, y: int, z: int) -> None:
            place(self, x, y, z)
            self.grid_idx = (last_tile, y, z)

        class OneProgram:
            def __getitem__(self, grid: tuple[int, ...]):
                return kernel[(1, 1)]

        kernel = module.projection_kernel
        monkeypatch.setattr(module, "projection_kernel", OneProgram())
        monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", only_the_last)
        none = workspace(0, ProjectionConfig(), 1)
        out, _ = project(x, weight, None, live=rows_live(1), workspace=none, config=ProjectionConfig())
        assert_close(out[:, -64:], x.double() @ weight[-64:].double().T, torch.float16)


class TestErrors:
    X = torch.zeros(2, 64)
    WEIGHT = torch.zeros(128, 64)
    NONE = Workspace.allocate([(0, ProjectionConfig())], 1, CPU)

    def test_say_what_was_given_and_what_is_allowed(self) -> None:
        live = rows_live(2)
        with pytest.raises(ValueError, match="1 to 256 rows, not 257"):
            project(torch.zeros(257, 64), self.WEIGHT, None, live=live, workspace=self.NONE)
        with pytest.raises(ValueError, match=r"weight \(128, 64\).*does not take x \[2, 32\]"):
            project(self.X[:, :32].contiguous(), self.WEIGHT, None, live=live, workspace=self.NONE)
        with pytest.raises(ValueError, match=r"bias must have the shape \[128\], not \(64,\)"):
            project(self.X, self.WEIGHT, torch.zeros(64), live=live, workspace=self.NONE)
        with pytest.raises(ValueError, match="must be contiguous"):
            project(torch.zeros(64, 2).T, self.WEIGHT, None, live=live, workspace=self.NONE)
        with pytest.raises(ValueError, match=r"2 splits of .* need 512 and 2"):
            project(self.X, self.WEIGHT, None, live=live, workspace=self.NONE, config=SMALL)
        norm = Norm(statistics=torch.zeros(2, 1, 3), weight=torch.ones(64), bias=torch.zeros(64), eps=EPS)
        with pytest.raises(ValueError, match=r"have the shape \(2, 1, 2\), not \(2, 1, 3\)"):
            project(self.X, self.WEIGHT, None, norm=norm, live=live, workspace=self.NONE)
        with pytest.raises(ValueError, match=r"x must be a contiguous \[2, 128\]"):
            project_add_(self.X, self.X, self.WEIGHT, None, live=live, workspace=self.NONE, config=SMALL)
        out, flags = torch.zeros(2, 128), torch.ones(64, dtype=torch.int8)
        with pytest.raises(ValueError, match=r"flags \[64\] belong to a transposed weight"):
            project_add_(out, self.X, self.WEIGHT, None, alive=flags, live=live, workspace=self.NONE, config=SMALL)

    def test_a_config_is_checked_when_it_is_made(self) -> None:
        with pytest.raises(ValueError, match="block_n must be 64, 128 or 256, not 96"):
            ProjectionConfig(block_n=96)
        with pytest.raises(ValueError, match="block_k must be 16, 32, 64 or 128, not 24"):
            ProjectionConfig(block_k=24)
        with pytest.raises(ValueError, match="splits must be 1 or more, not 0"):
            ProjectionConfig(splits=0)
