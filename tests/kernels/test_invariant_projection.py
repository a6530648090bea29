"""Products of many rows, interpreted: those of `projection` bit for bit, whichever of the two computes a row."""

import pytest
import torch

from persimmon.kernels import projection
from persimmon.kernels.fused import FusedPlan
from persimmon.kernels.invariant import InvariantKernels
from persimmon.kernels.invariant_projection import project_rows, project_rows_add_, row_statistics
from persimmon.kernels.layer_norm import embed, statistics_shape
from persimmon.kernels.operands import Norm, Residual
from persimmon.kernels.projection import ProjectionConfig, Workspace, project, project_add_
from tests.interpreter import keep_language_patched, multiply_as_matrix_units

CPU = torch.device("cpu")
NAN = float("nan")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
WHOLE = ProjectionConfig()
SPLIT = ProjectionConfig(splits=3)


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_language_patched()
    multiply_as_matrix_units(monkeypatch)


def normal(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def rows_live(count: int) -> torch.Tensor:
    return torch.tensor([count], dtype=torch.int32)


def workspace(rows: int, out_features: int, config: ProjectionConfig) -> Workspace:
    made = Workspace.allocate([(out_features, config)], rows, CPU)
    made.partials.fill_(NAN)
    return made


class TestProjectRows:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("config", "activation"), [(WHOLE, "relu_squared"), (SPLIT, "none")])
    def test_has_the_bits_of_the_decode_s_projection(self, config: ProjectionConfig, activation, dtype) -> None:
        x = normal(131, 320, dtype=dtype, seed=1)
        weight = normal(144, 320, dtype=dtype, seed=2, scale=320**-0.5)
        bias = normal(144, dtype=dtype, seed=3)
        whole = project_rows(x, weight, bias, activation=activation, config=config)
        for rows in (slice(0, 1), slice(60, 93), slice(130, 131)):
            part = x[rows]
            expected, _ = project(
                part,
                weight,
                bias,
                activation=activation,
                live=rows_live(len(part)),
                workspace=workspace(len(part), 144, config),
                config=config,
            )
            assert torch.equal(whole[rows], expected)
            assert torch.equal(project_rows(part, weight, bias, activation=activation, config=config), expected)

    def test_a_product_in_float32_is_not_rounded(self) -> None:
        x, weight = normal(70, 128, dtype=torch.float16, seed=1), normal(64, 128, dtype=torch.float16, seed=2)
        out = torch.full((70, 64), NAN)
        assert project_rows(x, weight, None, config=WHOLE, out=out) is out
        torch.testing.assert_close(out.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)
        assert torch.equal(project_rows(x, weight, None, config=WHOLE, dtype=torch.float32), out)
        assert torch.equal(project_rows(x, weight, None, config=WHOLE), out.half())

    def test_no_rows_are_no_product(self) -> None:
        x, weight = torch.empty(0, 64), torch.empty(32, 64)
        assert project_rows(x, weight, None, config=WHOLE).shape == (0, 32)
        assert row_statistics(x).shape == statistics_shape(0, 64)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"weight": torch.empty(32, 65)}, r"weight \(32, 65\) .* does not take x \[3, 64\]"),
            ({"bias": torch.empty(33)}, r"bias must have the shape \[32\], not \(33,\)"),
            ({"out": torch.empty(3, 31)}, r"out must be a contiguous \[3, 32\], not \(3, 31\)"),
            ({"x": torch.empty(64, 3).t()}, r"must be contiguous"),
        ],
    )
    def test_errors_say_what_was_given_and_what_is_allowed(self, change: dict, message: str) -> None:
        given = {"x": torch.empty(3, 64), "weight": torch.empty(32, 64), "bias": None, "config": WHOLE}
        with pytest.raises(ValueError, match=message):
            project_rows(**given | change)


class TestProjectRowsAdd:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("transposed", [False, True])
    def test_has_the_bits_of_the_decode_s_projection(self, transposed: bool, dtype: torch.dtype) -> None:
        rows, inside, hidden = 70, 400, 144
        before = normal(rows, hidden, dtype=dtype, seed=1)
        activation = normal(rows, inside, dtype=dtype, seed=2).relu()
        weight = normal(hidden, inside, dtype=dtype, seed=3, scale=inside**-0.5)
        weight = weight.t().contiguous() if transposed else weight
        bias = normal(hidden, dtype=dtype, seed=4)
        whole = before.clone()
        statistics = project_rows_add_(whole, activation, weight, bias, transposed=transposed, config=SPLIT)
        for part in (slice(0, 1), slice(20, 53), slice(69, 70)):
            x = before[part].clone()
            expected = project_add_(
                x,
                activation[part],
                weight,
                bias,
                transposed=transposed,
                live=rows_live(len(x)),
                workspace=workspace(len(x), hidden, SPLIT),
                config=SPLIT,
            )
            assert torch.equal(whole[part], x)
            assert torch.equal(statistics[:, :, part], expected)

    def test_x_that_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"x must be a contiguous \[3, 32\]"):
            project_rows_add_(torch.empty(3, 31), torch.empty(3, 64), torch.empty(32, 64), None, config=WHOLE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_that_the_embedding_writes(dtype: torch.dtype) -> None:
    table = normal(50, 150, dtype=dtype, seed=1)
    x, expected = embed(torch.arange(50), None, table)
    assert torch.equal(row_statistics(x), expected)
    assert torch.equal(row_statistics(x[17:18].contiguous())[:, :, 0], expected[:, :, 17])


def test_the_server_s_projections_have_the_same_splits_in_both() -> None:
    """A split that began inside a turn of the loop would be added up in another order."""
    from persimmon.kernels.invariant_projection import FLOAT32_TILES, TILES
    from persimmon.kernels.projection_config import SPLIT_ALIGNMENT

    for tiles in (TILES, FLOAT32_TILES):
        assert SPLIT_ALIGNMENT % tiles.features == 0
    for config in (projection.WIDE, projection.ATTENTION_OUT, projection.MLP_DOWN):
        assert config.split_features(4096) % SPLIT_ALIGNMENT == 0


def test_the_norm_of_some_rows_is_that_of_all() -> None:
    """A step that samples from every row has the statistics already; one that does not must give the same bits."""
    kernels, plan = InvariantKernels(CPU), FusedPlan(rows_live(50), torch.empty(0), torch.empty(0, 0))
    x = kernels.embed(torch.arange(50), None, normal(50, 200, dtype=torch.float32, seed=1), plan)
    norm = Norm(normal(200, dtype=torch.float32, seed=2), normal(200, dtype=torch.float32, seed=3), 1e-5)
    rows = torch.arange(0, 50, 2)
    every = kernels.norm_rows(x, norm, None)
    assert torch.equal(kernels.norm_rows(x, norm, rows), every[rows])
    assert torch.equal(kernels.norm_rows(Residual(x.values), norm, rows), every[rows])
