"""Products of quantized weights in C against their dequantized values and against a model of the rounding in numpy.

Every build that this processor runs.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persimmon.kernels import (
    Activation,
    KernelsUnavailableError,
    Linear,
    Norm,
    QuantizedFormat,
    QuantizedMatrix,
    Residual,
    reference,
)
from persimmon.kernels.cpu.native import NativeKernels, NativePlan, QuantizedActivations
from persimmon.kernels.quantized import pack_int4
from tests.cpu_builds import BUILDS

pytestmark = pytest.mark.skipif(not BUILDS, reason="no build of the C kernels for this processor")

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS: tuple[QuantizedActivations, ...] = ("float", "int8")
ROUNDED_GROUP = 64
"""Inputs that share a scale where the weight's groups do not say otherwise, see rounding.h."""


@pytest.fixture(params=BUILDS or ["none"], scope="module")
def build(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(
    bits: int, outputs: int, inputs: int, group_size: int | None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> QuantizedMatrix:
    """Numbers of the whole range, the lowest included."""
    limit = 1 << (bits - 1)
    integers = torch.randint(-limit, limit, (outputs, inputs), dtype=torch.int8, generator=generator(seed))
    groups = 1 if group_size is None else inputs // group_size
    scales = (0.5 + torch.rand(outputs, groups, generator=generator(seed + 1))).div(limit).to(dtype)
    numbers = integers if bits == 8 else pack_int4(integers)
    return QuantizedMatrix(numbers, scales, 8 if bits == 8 else 4, group_size or inputs)


def rows_of(count: int, inputs: int, seed: int = 2, zeros: float = 0.0) -> torch.Tensor:
    rows = torch.randn(count, inputs, generator=generator(seed))
    rows[:, torch.rand(inputs, generator=generator(seed + 1)) < zeros] = 0.0
    return rows


def plan(rows: int) -> NativePlan:
    return NativeKernels(BUILDS[0]).plan_attention(
        [[0]], [0], [rows], num_blocks=0, num_heads=0, block_size=0, dtype=torch.float32, device=torch.device("cpu")
    )


def product(
    build: str,
    weight: QuantizedMatrix,
    rows: torch.Tensor,
    activations: QuantizedActivations,
    *,
    sparse_input: bool = False,
) -> torch.Tensor:
    operations = NativeKernels(build, quantized_activations=activations)
    linear = Linear(operations.prepare_weight(weight, sparse_input=sparse_input), None)
    return operations.product(Activation(rows), linear)


def modelled(weight: QuantizedMatrix, rows: torch.Tensor) -> torch.Tensor:
    """The product of integers as rounding.h and quantized.h define it, step by step in numpy."""
    outputs, inputs = weight.shape
    group = weight.group_size
    if group == inputs:
        group = ROUNDED_GROUP
    elif group > ROUNDED_GROUP:
        group = next(size for size in range(ROUNDED_GROUP, 0, -8) if weight.group_size % size == 0)
    numbers, scales, x = weight.integers.numpy(), weight.scales.float().numpy(), rows.numpy()
    sums = np.zeros((len(x), outputs), dtype=np.float32)
    for first in range(0, inputs, group):
        some = x[:, first : first + group]
        largest = np.abs(some).max(axis=1, keepdims=True)
        inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
        rounded = np.rint(some * inverse).astype(np.int64)
        integers = rounded @ numbers[:, first : first + group].astype(np.int64).T
        partial, scale = integers.astype(np.float32), largest / np.float32(127)
        # A multiplication and an addition with one rounding: in float64 both are as good as exact.
        if weight.group_size == inputs:
            sums = (partial.astype(np.float64) * scale + sums).astype(np.float32)
        else:
            own = scales[:, first // weight.group_size]
            sums = ((partial * scale).astype(np.float64) * own + sums).astype(np.float32)
    return torch.from_numpy(sums * scales.T if weight.group_size == inputs else sums)


SHAPES = [  # outputs, inputs, group size; of 8 bits, of 4 bits
    (192, 512, None),
    (100, 130, None),
    (7, 34, None),
    (64, 256, 128),
    (130, 192, 32),
    (65, 272, 136),
    (64, 384, 192),
]


class TestAProductOfFloats:
    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
    @pytest.mark.parametrize(("outputs", "inputs", "group_size"), SHAPES)
    def test_is_that_of_the_dequantized_weight(
        self, build: str, bits: int, scale_dtype: torch.dtype, outputs: int, inputs: int, group_size: int | None
    ) -> None:
        weight = matrix(bits, outputs, inputs, group_size, scale_dtype)
        for count in (1, 3, 6, 7, 70):
            rows = rows_of(count, inputs)
            expected = reference.QuantizedWeight(weight).multiply(rows, None)
            actual = product(build, weight, rows, "float")
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5 * inputs**0.5)


class TestAProductOfIntegers:
    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
    @pytest.mark.parametrize(("outputs", "inputs", "group_size"), SHAPES)
    def test_is_the_model_s_bit_for_bit(
        self, build: str, bits: int, scale_dtype: torch.dtype, outputs: int, inputs: int, group_size: int | None
    ) -> None:
        weight = matrix(bits, outputs, inputs, group_size, scale_dtype)
        for count in (1, 4, 6, 70):
            rows = rows_of(count, inputs)
            assert torch.equal(product(build, weight, rows, "int8"), modelled(weight, rows))

    @pytest.mark.parametrize("bits", [8, 4])
    def test_holds_the_largest_sums(self, build: str, bits: int) -> None:
        # Every product of the same sign and as large as it gets: where sums of 16 bits would overflow first.
        lowest = -(1 << (bits - 1))
        integers = torch.full((64, 256), lowest, dtype=torch.int8)
        integers[32:] = -lowest - 1
        numbers = integers if bits == 8 else pack_int4(integers)
        weight = QuantizedMatrix(numbers, torch.ones(64, 2), 8 if bits == 8 else 4, 128)
        for sign in (1.0, -1.0):
            rows, expected = torch.full((5, 256), sign), modelled(weight, torch.full((5, 256), sign))
            assert torch.equal(product(build, weight, rows, "int8"), expected)
            if sign > 0:  # as behind squared ReLU, for which there is another instruction
                assert torch.equal(product(build, weight, rows, "int8", sparse_input=True), expected)

    def test_of_a_row_that_is_not_finite_is_not_a_number(self, build: str) -> None:
        weight, rows = matrix(8, 64, 256, None), rows_of(4, 256)
        rows[1, 200], rows[2, 3] = torch.inf, torch.nan
        rows[3] = 1e-38  # so small that the inverse of its scale would be infinite
        actual = product(build, weight, rows, "int8")
        assert torch.equal(actual[0], modelled(weight, rows[:1])[0])
        assert actual[1:3].isnan().all()
        assert (actual[3] == 0).all()


@pytest.mark.parametrize("activations", ACTIVATIONS)
class TestARow:
    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_has_the_same_bits_in_any_company(
        self, build: str, activations: QuantizedActivations, data: st.DataObject
    ) -> None:
        bits = data.draw(st.sampled_from([8, 4]))
        group_size = data.draw(st.sampled_from([None, 32, 64, 128]))
        sparse_input = data.draw(st.booleans())
        weight = matrix(bits, data.draw(st.integers(1, 140)), 256, group_size)
        count = data.draw(st.integers(2, 110))
        rows = rows_of(count, 256, zeros=data.draw(st.sampled_from([0.0, 0.5, 0.95, 1.0])))
        rows[rows.abs() < data.draw(st.sampled_from([0.0, 1.5]))] = 0.0
        if sparse_input:
            rows = rows.relu().square()
        together = product(build, weight, rows, activations, sparse_input=sparse_input)
        for some in (slice(0, 1), slice(1, 4), slice(count - 7 if count > 7 else 0, count)):
            assert torch.equal(
                product(build, weight, rows[some].contiguous(), activations, sparse_input=sparse_input), together[some]
            )
        dense = product(build, weight, rows, activations)
        assert torch.equal(dense, together)  # leaving zeros out changes nothing

    @pytest.mark.parametrize(("outputs", "count"), [(640, 20), (64, 100)])  # the second is cut into blocks of rows
    def test_has_the_same_bits_on_any_number_of_threads(
        self, build: str, activations: QuantizedActivations, outputs: int, count: int
    ) -> None:
        weight, rows = matrix(8, outputs, 256, 128), rows_of(count, 256)
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(product(build, weight, rows, activations))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("bits", [8, 4])
class TestAnMLP:
    @pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("rows", [1, 4, 9, 99])
    def test_is_the_reference_s(
        self, build: str, activations: QuantizedActivations, bits: int, zeros: float, rows: int
    ) -> None:
        operations = NativeKernels(build, quantized_activations=activations)
        up_weight, down_weight = matrix(bits, 512, 128, 64), matrix(bits, 128, 512, None, seed=7)
        up_bias = torch.where(torch.rand(512, generator=generator(8)) < zeros, -1e3, 0.0)
        norm = Norm(torch.ones(128), torch.zeros(128), 1e-5)
        up = Linear(operations.prepare_weight(up_weight), up_bias)
        bias = torch.randn(128, generator=generator(10))
        down = Linear(operations.prepare_weight(down_weight, sparse_input=True), bias)
        x = rows_of(rows, 128, seed=9)
        actual = Residual(x.clone())
        inner = operations.norm_linear_relu_squared(actual, norm, up, plan(rows))
        operations.add_product_(actual, inner, down, plan(rows))
        wanted = reference.layer_norm(x, norm.weight, norm.bias, norm.eps) @ up_weight.dequantized().t() + up_bias
        expected = x + wanted.relu().square() @ down_weight.dequantized().t() + bias
        tolerance = (1e-4 if activations == "float" else 3e-2) * (expected - x).abs().max().item()
        torch.testing.assert_close(actual.values, expected, rtol=0, atol=tolerance)


class TestAnEmbedding:
    @pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
    def test_is_looked_up_in_8_bits(self, build: str, scale_dtype: torch.dtype) -> None:
        table = matrix(8, 40, 24, None, scale_dtype)
        ids, sampled = torch.tensor([3, -2, 39, -1]), torch.tensor([7, 8])
        x = NativeKernels(build).embed(ids, sampled, table, plan(4))
        assert torch.equal(x.values, table.dequantized()[[3, 8, 39, 7]])

    @pytest.mark.parametrize("activations", ACTIVATIONS)
    @pytest.mark.parametrize(("outputs", "inputs"), [(130, 256), (50, 34)])
    @pytest.mark.parametrize("rows", [1, 5, 70])
    def test_that_is_the_head_has_the_bits_of_a_head_of_its_own(
        self, build: str, activations: QuantizedActivations, outputs: int, inputs: int, rows: int
    ) -> None:
        operations = NativeKernels(build, quantized_activations=activations)
        table, hidden = matrix(8, outputs, inputs, None, torch.bfloat16), rows_of(rows, inputs)
        tied = operations.tied_weight(table)
        assert tied.data is table.numbers  # not a copy
        assert tied.nbytes == table.nbytes
        assert torch.equal(operations.logits(hidden, tied), operations.logits(hidden, operations.prepare_weight(table)))

    def test_in_groups_or_4_bits_is_refused(self, build: str) -> None:
        for table in (matrix(8, 40, 64, 32), matrix(4, 40, 64, None)):
            with pytest.raises(KernelsUnavailableError, match="do not look embeddings up in int"):
                NativeKernels(build).embed(torch.tensor([1]), None, table, plan(1))
            with pytest.raises(KernelsUnavailableError, match="do not look embeddings up in int"):
                NativeKernels(build).tied_weight(table)


class TestAWeight:
    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
    @pytest.mark.parametrize(("outputs", "inputs", "group_size"), SHAPES)
    def test_takes_the_bytes_that_were_planned(
        self, build: str, bits: int, scale_dtype: torch.dtype, outputs: int, inputs: int, group_size: int | None
    ) -> None:
        operations = NativeKernels(build)
        weight = matrix(bits, outputs, inputs, group_size, scale_dtype)
        planned = operations.weight_bytes(weight.shape, weight.format)
        for sparse_input in (True, False):
            assert operations.prepare_weight(weight, sparse_input=sparse_input).nbytes == planned
        if outputs % 64 == 0 and inputs % 8 == 0:
            assert planned == weight.nbytes  # no padding

    def test_in_groups_that_are_not_read_is_refused_before_it_is_loaded(self, build: str) -> None:
        operations = NativeKernels(build)
        with pytest.raises(KernelsUnavailableError, match="do not read groups of 12 quantized weights; expected one"):
            operations.weight_bytes((64, 48), QuantizedFormat(8, 12, torch.float32))
        with pytest.raises(KernelsUnavailableError, match="groups of 12"):
            operations.prepare_weight(matrix(8, 64, 48, 12))
