"""Projections with packed weights, interpreted, against float64 and against themselves."""

from itertools import product

import pytest
import torch

from persimmon.kernels import reference_projection as reference
from persimmon.kernels.dequantize import dequantize
from persimmon.kernels.packed_projection import PackedConfig, added_config, project, project_add_, workspace_sizes
from persimmon.kernels.packed_weight import PackedWeight, Packing, pack
from persimmon.kernels.projection_config import Norm, Workspace
from persimmon.kernels.quantized import Bits, QuantizedFormat
from tests.interpreter import multiply_as_matrix_units
from tests.kernels.quantized_matrices import packed_shape, random_matrix

NAN = float("nan")
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative and absolute error allowed at values around one: the rounding of the type and a little."""

FORMATS: list[tuple[Bits, int | None]] = [*product((8, 4), (None, 128, 64, 32))]  # type: ignore[list-item]
GENERATIONS = (8, 9, 10)
"""Of GPUs, each with a layout of its own."""


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_as_matrix_units(monkeypatch)


def normal(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype] * factor
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def workspace(out_features: int, rows: int, splits: int) -> Workspace:
    """Partial sums that are NaN until they are written."""
    return Workspace(
        torch.full((splits * rows * out_features,), NAN),
        torch.zeros(-(-out_features // 64) * -(-rows // 32), dtype=torch.int32),
    )


def add(
    weight: PackedWeight,
    x: torch.Tensor,
    given: torch.Tensor,
    *,
    alive: torch.Tensor | None = None,
    bucket: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """X + given @ weight^T and statistics, among `bucket` rows of which the others are NaN."""
    live, bucket = len(x), bucket or len(x)
    padded, inputs = (torch.full((bucket, part.shape[1]), NAN, dtype=part.dtype) for part in (x, given))
    padded[:live], inputs[:live] = x, given
    made = workspace(x.shape[1], bucket, added_config(weight.packing).splits)
    rows = torch.tensor([live], dtype=torch.int32)
    statistics = project_add_(padded, inputs, weight, None, alive=alive, live=rows, workspace=made)
    assert padded[live:].isnan().all()
    assert not made.counters.any()
    return padded[:live], statistics[:, :, :live]


class TestPacking:
    @pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
    @pytest.mark.parametrize(("bits", "group"), FORMATS)
    def test_every_number_and_scale_is_found_again(self, bits: Bits, group: int | None, columns: bool) -> None:
        index = FORMATS.index((bits, group))
        scale_dtype = (torch.float16, torch.bfloat16, torch.float32)[index % 3]
        matrix = random_matrix((150, 128), bits, group, scale_dtype=scale_dtype)
        weight = pack(matrix, columns=columns, generation=GENERATIONS[(index + columns) % 3])
        assert weight.shape == (150, 128)
        assert weight.nbytes == weight.packing.nbytes(weight.shape)
        shape = packed_shape(weight.shape, matrix.format, columns=columns, generation=8)
        assert (shape.numbers.shape, shape.scales.shape) == (weight.numbers.shape, weight.scales.shape)
        assert shape.scales.dtype == weight.scales.dtype
        buffer = torch.full((150 * 128,), NAN)
        assert torch.equal(dequantize(weight, buffer, 0, 150), matrix.dequantized())
        assert torch.equal(dequantize(weight, buffer, 128, 150), matrix.dequantized()[128:])

    def test_groups_of_a_multiple_of_128_have_equal_scales(self) -> None:
        matrix = random_matrix((128, 512), 8, 256)
        weight = pack(matrix)
        assert weight.packing.group == 128
        assert torch.equal(dequantize(weight, torch.empty(128 * 512), 0, 128), matrix.dequantized())

    def test_other_groups_are_refused(self) -> None:
        with pytest.raises(ValueError, match="groups of 48: on a GPU groups have 32, 64 or a multiple of 128 inputs"):
            Packing.of(QuantizedFormat(8, 48, torch.float16), columns=False)

    @pytest.mark.parametrize("bits", [8, 4])
    def test_numbers_take_their_bits_and_little_more(self, bits: Bits) -> None:
        shape, count = (4096, 16384), 4096 * 16384
        for group in (None, 128, 32):
            stored = QuantizedFormat(bits, group, torch.float16)
            most = stored.nbytes(shape) + (0 if group != 128 else count // 128 * 2) + (4 * 4096 if group is None else 0)
            assert count * bits // 8 < Packing.of(stored, columns=False).nbytes(shape) <= most


class TestProject:
    # Rows, output features, input features; generation of the GPU.
    SHAPES = ((1, 128, 256, 9), (20, 200, 128, 8), (5, 64, 200, 10), (70, 130, 128, 9))

    @pytest.mark.parametrize("case", range(8))
    def test_is_the_product_of_the_normed_rows(self, case: int) -> None:
        bits, group = FORMATS[case]
        rows, out_features, hidden, generation = self.SHAPES[case % 4]
        hidden = 256 if group else hidden
        dtype = (torch.float16, torch.bfloat16, torch.float32)[case % 3]
        matrix = random_matrix(
            (out_features, hidden), bits, group, scale_dtype=(torch.float16, torch.bfloat16)[case % 2]
        )
        x, bias = normal(rows, hidden, dtype=dtype, seed=1) + 0.5, normal(out_features, dtype=dtype, seed=2)
        gamma, beta = (
            1 + normal(hidden, dtype=torch.float32, seed=3) / 5,
            normal(hidden, dtype=torch.float32, seed=4) / 5,
        )
        norm = Norm(statistics=reference.tile_statistics(x), weight=gamma, bias=beta, eps=1e-5)
        splits = 1 + case % 2
        out, alive = project(
            x,
            pack(matrix, generation=generation),
            bias,
            norm=norm,
            activation="relu_squared" if case % 3 == 0 else "none",
            live=torch.tensor([rows], dtype=torch.int32),
            workspace=workspace(out_features, rows, splits),
            config=PackedConfig(splits=splits),
        )
        normed = torch.nn.functional.layer_norm(x.double(), (hidden,), gamma.double(), beta.double(), 1e-5).to(dtype)
        expected = normed.double() @ matrix.dequantized().double().T + bias.double()
        if case % 3 == 0:
            expected = expected.relu().square()
            if rows <= 64:
                assert alive is not None
                assert torch.equal(alive, (out != 0).any(0).to(torch.int8))
        assert_close(out, expected, dtype, factor=12 if case % 3 == 0 else 3)

    @pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
    def test_a_row_has_the_same_bits_in_any_company(self, bits: Bits, group: int | None) -> None:
        weight = pack(random_matrix((64, 256), bits, group))
        x = normal(70, 256, dtype=torch.float16, seed=1)
        together = self.run(weight, x)
        assert torch.equal(self.run(weight, x[3:4]), together[3:4])
        assert torch.equal(self.run(weight, x[45:70]), together[45:70])

    @staticmethod
    def run(weight: PackedWeight, x: torch.Tensor) -> torch.Tensor:
        made = workspace(weight.shape[0], len(x), 2)
        return project(x.contiguous(), weight, None, live=None, workspace=made, config=PackedConfig(splits=2))[0]

    def test_normalising_in_the_prologue_changes_no_bit(self) -> None:
        weight, x = pack(random_matrix((64, 128), 4, 32)), normal(3, 128, dtype=torch.float16, seed=1)
        ones, zeros = torch.ones(128), torch.zeros(128)
        norm = Norm(statistics=reference.tile_statistics(x), weight=ones, bias=zeros, eps=1e-5)
        fused, apart = (
            project(
                x,
                weight,
                None,
                norm=norm,
                live=None,
                workspace=workspace(64, 3, 1),
                config=PackedConfig(norm_in_prologue=inside),
            )[0]
            for inside in (True, False)
        )
        assert torch.equal(fused, apart)


class TestProjectAdd:
    @pytest.mark.parametrize("case", range(8))
    def test_adds_the_product_of_what_is_not_zero(self, case: int) -> None:
        bits, group = FORMATS[case]
        rows, dtype = (3, 17)[case % 2], (torch.float16, torch.bfloat16)[case // 4]
        in_features, hidden = (256, 128) if group else (320, 200)
        matrix = random_matrix((hidden, in_features), bits, group)
        x, given = normal(rows, hidden, dtype=dtype, seed=1), normal(rows, in_features, dtype=dtype, seed=2)
        dead = torch.rand(in_features, generator=torch.Generator().manual_seed(3)) < 0.7
        alive = (~dead).to(torch.int8)
        expected = x.double() + (given * alive).double() @ matrix.dequantized().double().T
        weight = pack(matrix, columns=True, generation=GENERATIONS[case % 3])
        # Its inputs are not zero where the flags say so: what is not read counts as zero.
        masked = add(weight, x, given, alive=alive, bucket=rows + 2)
        assert_close(masked[0], expected, dtype)
        torch.testing.assert_close(masked[1], reference.tile_statistics(masked[0]), rtol=1e-5, atol=1e-5)
        dense = add(weight, x, given * alive)
        assert torch.equal(dense[0], masked[0])
        assert torch.equal(dense[1], masked[1])

    def test_adds_the_product_of_rows(self) -> None:
        matrix = random_matrix((128, 512), 4, 128)
        x, given = (normal(4, width, dtype=torch.float16, seed=width) for width in (128, 512))
        out, statistics = add(pack(matrix), x, given, bucket=5)
        assert_close(out, x.double() + given.double() @ matrix.dequantized().double().T, torch.float16)
        torch.testing.assert_close(statistics, reference.tile_statistics(out), rtol=1e-5, atol=1e-5)

    def test_a_row_has_the_same_bits_in_any_company(self) -> None:
        weight = pack(random_matrix((128, 256), 4, 128), columns=True)
        x, given = normal(70, 128, dtype=torch.float16, seed=1), normal(70, 256, dtype=torch.float16, seed=2)
        together = add(weight, x, given)
        for rows in (slice(3, 4), slice(45, 70)):
            out, statistics = add(weight, x[rows], given[rows])
            assert torch.equal(out, together[0][rows])
            assert torch.equal(statistics, together[1][:, :, rows])

    def test_a_workspace_of_the_size_that_is_stated_holds_all_splits(self) -> None:
        weight = pack(random_matrix((128, 256), 4, None), columns=True)
        assert added_config(weight.packing).splits == 8
        partials, counters = workspace_sizes(128)
        made = Workspace(torch.full((partials,), NAN), torch.zeros(counters, dtype=torch.int32))
        x = normal(256, 128, dtype=torch.float16, seed=1)[:256]
        assert made.partials.numel() == 8 * x.numel()
        assert made.counters.numel() >= 4


class TestErrors:
    WEIGHT = pack(random_matrix((128, 64), 8, None))
    NONE = Workspace(torch.zeros(0), torch.zeros(0, dtype=torch.int32))

    def test_say_what_was_given_and_what_is_allowed(self) -> None:
        x = torch.zeros(2, 64)
        with pytest.raises(ValueError, match="1 to 256 rows, not 257"):
            project(torch.zeros(257, 64), self.WEIGHT, None, live=None, workspace=self.NONE)
        with pytest.raises(ValueError, match=r"shape \(128, 64\) does not take x \[2, 32\]"):
            project(x[:, :32].contiguous(), self.WEIGHT, None, live=None, workspace=self.NONE)
        with pytest.raises(ValueError, match=r"bias must have the shape \[128\], not \(64,\)"):
            project(x, self.WEIGHT, torch.zeros(64), live=None, workspace=self.NONE)
        with pytest.raises(ValueError, match="must be contiguous"):
            project(torch.zeros(64, 2).T, self.WEIGHT, None, live=None, workspace=self.NONE)
        with pytest.raises(ValueError, match=r"2 splits of .* need 512 and 2"):
            project(x, self.WEIGHT, None, live=None, workspace=self.NONE, config=PackedConfig(splits=2))
        norm = Norm(statistics=torch.zeros(2, 1, 3), weight=torch.ones(64), bias=torch.zeros(64), eps=1e-5)
        with pytest.raises(ValueError, match=r"have the shape \(2, 1, 2\), not \(2, 1, 3\)"):
            project(x, self.WEIGHT, None, norm=norm, live=None, workspace=self.NONE)
        with pytest.raises(ValueError, match=r"x must be a contiguous \[2, 128\]"):
            project_add_(x, x, self.WEIGHT, None, live=None, workspace=self.NONE)
        out, flags = torch.zeros(2, 128), torch.ones(64, dtype=torch.int8)
        with pytest.raises(ValueError, match=r"flags \[64\] belong to a weight in columns"):
            project_add_(out, x, self.WEIGHT, None, alive=flags, live=None, workspace=self.NONE)
