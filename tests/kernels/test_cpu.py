"""The C kernels against plain torch; products of quantized weights are in test_cpu_quantized.py."""

import ctypes
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persimmon import kernels
from persimmon.kernels import (
    Activation,
    KernelsUnavailableError,
    LayerCache,
    Linear,
    Norm,
    QuantizedMatrix,
    Residual,
    Rotary,
    reference,
)
from persimmon.kernels.cpu import library
from persimmon.kernels.cpu.native import NativeKernels, NativePlan, NativeWeight
from persimmon.kernels.cpu.program import Program, step_of
from tests.cpu_builds import FLOAT_BUILDS

CPU = torch.device("cpu")
NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-2}
"""Of products; float16 is widened, bfloat16 may be rounded to."""

pytestmark = pytest.mark.skipif(not library.builds(), reason="no build of the C kernels for this processor")


@pytest.fixture(params=FLOAT_BUILDS or ["none"], scope="module")
def build(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_norm(width: int, *rows: int) -> Norm:
    return Norm(1 + 0.2 * random(*rows, width, seed=1), 0.2 * random(*rows, width, seed=2), 1e-5)


def plan_of(tables: list[list[int]], starts: list[int], counts: list[int]) -> NativePlan:
    operations = NativeKernels(library.builds()[0])
    return operations.plan_attention(
        tables, starts, counts, num_blocks=0, num_heads=0, block_size=0, dtype=torch.float32, device=CPU
    )


def rows_plan(rows: int) -> NativePlan:
    """A step of `tokens` tokens, for operations that look at nothing else."""
    return plan_of([[0]], [0], [rows])


class TestBuilds:
    def test_are_there_where_there_is_a_compiler(self) -> None:
        if platform.machine() != "x86_64" or not shutil.which("cc"):
            pytest.skip("nothing to compile for, or with")
        runnable = [name for name, needed in library.BUILDS.items() if needed <= library.processor_flags()]
        assert library.builds() == runnable

    def test_fastest_serves_a_cpu(self) -> None:
        operations = kernels.for_device(CPU)
        assert isinstance(operations, NativeKernels)
        assert operations.build == library.builds()[0]

    def test_plain_torch_serves_where_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library, "builds", list)
        assert kernels.for_device(CPU) is reference

    def test_needing_more_than_the_processor_has_are_left_out(self, tmp_path: Path) -> None:
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma f16c bmi2\n\nprocessor\t: 1\n")
        assert library.processor_flags(cpuinfo) == {"fpu", "avx2", "fma", "f16c", "bmi2"}
        assert library.processor_flags(tmp_path / "none") == frozenset()


class TestProjection:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [1, 2, 5, 7, 64, 97, 200])
    @pytest.mark.parametrize(("inputs", "outputs"), [(512, 192), (96, 64), (130, 100), (33, 7)])
    def test_is_torch_s(self, build: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
        operations = NativeKernels(build, dtype)
        weight, bias = random(outputs, inputs, dtype=dtype), random(outputs, seed=3)
        x, norm = random(rows, inputs, seed=4), random_norm(inputs)
        linear = Linear(operations.prepare_weight(weight), operations.prepare_bias(bias))
        actual = operations.norm_linear(Residual(x), norm, linear, rows_plan(rows))
        expected = reference.layer_norm(x, norm.weight, norm.bias, norm.eps) @ weight.float().t() + bias
        tolerance = TOLERANCE[dtype] * inputs**0.5
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

    def test_widens_16_bits_without_rounding(self, build: str) -> None:
        operations = NativeKernels(build)
        x = random(3, 128)
        for dtype in (torch.float16, torch.bfloat16):
            weight = random(64, 128, seed=5, dtype=dtype)
            assert operations.stored_dtype(dtype, torch.float32) == dtype
            narrow, wide = (operations.logits(x, operations.prepare_weight(own)) for own in (weight, weight.float()))
            assert torch.equal(narrow, wide)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [2, 7, 13, 64, 100])
    def test_of_a_row_has_the_same_bits_alone(self, build: str, dtype: torch.dtype, rows: int) -> None:
        operations = NativeKernels(build, dtype)
        head = operations.prepare_weight(random(200, 300, dtype=dtype))
        x = random(rows, 300, seed=6)
        together = operations.logits(x, head)
        alone = torch.cat([operations.logits(x[row : row + 1], head) for row in range(rows)])
        assert torch.equal(together, alone)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("rows", [1, 3, 9])
    def test_of_the_mlp_is_torch_s_however_many_activations_are_zero(
        self, build: str, dtype: torch.dtype, zeros: float, rows: int
    ) -> None:
        operations = NativeKernels(build, dtype)
        up_weight, down_weight = random(512, 128, dtype=dtype), random(128, 512, seed=7, dtype=dtype)
        up_bias = torch.where(torch.rand(512, generator=torch.Generator().manual_seed(8)) < zeros, -1e3, 0.0)
        norm, x = random_norm(128), random(rows, 128, seed=9)
        up = Linear(operations.prepare_weight(up_weight), up_bias)
        down = Linear(operations.prepare_weight(down_weight, sparse_input=True), random(128, seed=10))
        actual = Residual(x.clone())
        inner = operations.norm_linear_relu_squared(actual, norm, up, rows_plan(rows))
        operations.add_product_(actual, inner, down, rows_plan(rows))
        wanted = reference.layer_norm(x, norm.weight, norm.bias, norm.eps) @ up_weight.float().t() + up_bias
        expected = x + wanted.relu().square() @ down_weight.float().t() + random(128, seed=10)
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual.values, expected, rtol=0, atol=4 * TOLERANCE[dtype] * scale)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("inputs", [256, 200])
    def test_leaves_zeros_out_without_changing_a_bit(self, build: str, dtype: torch.dtype, inputs: int) -> None:
        operations = NativeKernels(build, dtype)
        weight, bias = random(100, inputs, dtype=dtype), random(100, seed=10)
        leaving, reading = (Linear(operations.prepare_weight(weight, sparse_input=own), bias) for own in (True, False))
        x = random(29, inputs, seed=11).abs()
        zeros = torch.tensor([0.0, 0.2, 0.5, 0.9, 0.99, 1.0]).repeat_interleave(5)[:29, None]
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(12)) < zeros] = 0.0

        def multiplied(rows: torch.Tensor, by: Linear[NativeWeight]) -> torch.Tensor:
            residual = Residual(torch.zeros(len(rows), 100))
            operations.add_product_(residual, Activation(rows.contiguous()), by, rows_plan(len(rows)))
            return residual.values

        expected = multiplied(x, reading)
        assert torch.equal(multiplied(x, leaving), expected)
        shuffled = torch.randperm(29, generator=torch.Generator().manual_seed(13))
        assert torch.equal(multiplied(x[shuffled], leaving), expected[shuffled])
        for rows in (1, 3, 7):
            assert torch.equal(torch.cat([multiplied(some, leaving) for some in x.split(rows)]), expected)

    def test_of_an_embedding_that_is_the_head_is_torch_s(self, build: str) -> None:
        table, hidden = random(50, 32), random(4, 32, seed=13)
        operations = NativeKernels(build)
        head = operations.tied_weight(table)
        assert head.data is table  # not a copy
        torch.testing.assert_close(operations.logits(hidden, head), hidden @ table.t())


class TestAttention:
    BLOCK_SIZE = 16
    HEADS = 3

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("dim", [64, 16, 24, 128])
    @pytest.mark.parametrize("block_size", [16, 32, 64])
    @pytest.mark.parametrize("normed", [True, False])
    def test_is_the_reference_s(self, build: str, dtype: torch.dtype, dim: int, block_size: int, normed: bool) -> None:
        # Prompts in chunks of uneven lengths, so that single tokens, pieces and whole prompts all occur.
        own = Sequences(build, dtype, dim, block_size, normed)
        other = Sequences("reference", torch.float32, dim, block_size, normed)
        lengths = [1, 5, 17, 70, 33]
        starts = [0] * len(lengths)
        for step in range(3):
            parts = [(start, lengths[(i + step) % len(lengths)]) for i, start in enumerate(starts)]
            tolerance = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
            torch.testing.assert_close(
                own.attend(parts, seed=step), other.attend(parts, seed=step), rtol=tolerance, atol=tolerance
            )
            starts = [sum(part) for part in parts]

    def test_over_many_segments_is_the_reference_s(self, build: str) -> None:
        own = Sequences(build, torch.float32, 64, 32, True, most=2600, sequences=1)
        other = Sequences("reference", torch.float32, 64, 32, True, most=2600, sequences=1)
        for part in ((0, 1023), (1023, 2), (1025, 1400), (2425, 1)):
            torch.testing.assert_close(own.attend([part], 0), other.attend([part], 0), rtol=1e-5, atol=1e-5)

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_has_the_same_bits_in_any_chunks_and_company(self, build: str, data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(DTYPES))
        length = data.draw(st.integers(1, 90))
        cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=5)) | {length})
        whole = Sequences(build, dtype, 64, 16, True).attend([(0, length), (0, 3)], seed=0, only=0)
        pieces, start = [], 0
        chunked = Sequences(build, dtype, 64, 16, True)
        for cut in cuts:
            pieces.append(chunked.attend([(start, cut - start)], seed=0, only=0))
            start = cut
        assert torch.equal(whole, torch.cat(pieces))


class Sequences:
    """Sequences in a cache full of NaN, one operation at work on them.

    Token t of sequence s has the same query, key and value whatever step it is in.
    """

    def __init__(
        self,
        build: str,
        dtype: torch.dtype,
        dim: int,
        block_size: int,
        normed: bool,
        *,
        most: int = 256,
        sequences: int = 5,
    ) -> None:
        self.operations = reference if build == "reference" else NativeKernels(build, dtype)
        self.dim, self.heads, self.most = dim, 3, most
        self.norm = random_norm(dim, 2) if normed else None
        angles = torch.arange(most)[:, None] * torch.rand(dim // 4, generator=torch.Generator().manual_seed(1))
        self.rotary = Rotary(angles.cos(), angles.sin())
        blocks = -(-most // block_size)
        shuffled = torch.randperm(sequences * blocks, generator=torch.Generator().manual_seed(2)).tolist()
        self.tables = [shuffled[i * blocks : (i + 1) * blocks] for i in range(sequences)]
        shape = (sequences * blocks, self.heads, block_size, dim)
        self.cache = LayerCache(*(torch.full(shape, NAN, dtype=dtype) for _ in range(2)))

    def attend(self, parts: list[tuple[int, int]], seed: int, only: int | None = None) -> torch.Tensor:
        """One step in which sequence i computes `count` tokens from `start` on: [T, heads * dim], or one's rows."""
        order = sorted(range(len(parts)), key=lambda i: (parts[i][1] != 1, parts[i][0]))
        qkv = [
            random(self.most, self.heads, 3, self.dim, seed=100 * seed + i)[parts[i][0] : sum(parts[i])] for i in order
        ]
        plan = self.operations.plan_attention(
            [self.tables[i][: -(-sum(parts[i]) // self.cache.block_size)] for i in order],
            [parts[i][0] for i in order],
            [parts[i][1] for i in order],
            num_blocks=len(self.cache.keys),
            num_heads=self.heads,
            block_size=self.cache.block_size,
            dtype=self.cache.keys.dtype,
            device=CPU,
        )
        rotary = self.operations.rotary_at(self.rotary, plan)
        attended = self.operations.attention(torch.cat(qkv), self.norm, rotary, self.cache, plan)
        rows = dict(zip(order, attended.split([parts[i][1] for i in order]), strict=True))
        return torch.cat([rows[i] for i in range(len(parts)) if only in (None, i)])


class TestRows:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_begin_with_their_embeddings(self, build: str, dtype: torch.dtype) -> None:
        table = random(40, 24, dtype=dtype)
        ids, sampled = torch.tensor([3, -2, 39, -1]), torch.tensor([7, 8])
        x = NativeKernels(build).embed(ids, sampled, table, rows_plan(4))
        assert torch.equal(x.values, table[[3, 8, 39, 7]].float())

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_begin_with_their_embeddings_of_8_bits(self, build: str, dtype: torch.dtype) -> None:
        numbers = torch.arange(-128, 128, dtype=torch.int8).repeat(4).view(32, 32)
        table = QuantizedMatrix(numbers=numbers, scales=random(32, 1, dtype=dtype), bits=8, group_size=32)
        x = NativeKernels(build).embed(torch.tensor([3, 31, 0]), None, table, rows_plan(3))
        assert torch.equal(x.values, table.dequantized()[[3, 31, 0]])

    @pytest.mark.parametrize("width", [24, 64, 250])
    def test_end_with_their_norm(self, build: str, width: int) -> None:
        operations, x, norm = NativeKernels(build), Residual(random(9, width)), random_norm(width)
        normed = reference.layer_norm(x.values, norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(operations.norm_rows(x, norm, None), normed, rtol=1e-5, atol=1e-5)
        rows = torch.tensor([8, 0, 0])
        torch.testing.assert_close(operations.norm_rows(x, norm, rows), normed[rows], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("width", [1, 15, 16, 1000])
    def test_take_the_first_of_the_largest(self, build: str, width: int) -> None:
        logits = random(20, width).round(decimals=1)
        logits[3] = -torch.inf
        logits[4] = NAN
        best = NativeKernels(build).draw(logits, np.zeros(20, dtype=library.DRAWS))
        assert [row[best[i]].item() for i, row in enumerate(logits) if i != 4] == [
            row.max().item() for i, row in enumerate(logits) if i != 4
        ]
        assert all(not (row[: best[i]] >= row[best[i]]).any() for i, row in enumerate(logits))
        assert 0 <= best[4] < width


class TestALibrary:
    def test_of_other_sources_is_refused(self, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
        longer = type("Step", (ctypes.Structure,), {"_fields_": (*library.Step._fields_, ("new", ctypes.c_int64))})
        monkeypatch.setattr(library, "Step", longer)
        with pytest.raises(KernelsUnavailableError, match="a different version of the C kernels"):
            library.load.__wrapped__(build)


class TestProgram:
    def test_refuses_a_step_that_its_buffers_do_not_hold(self, build: str) -> None:
        program = Program(library.load(build), 4)
        with pytest.raises(ValueError, match="5 tokens does not fit into a program for 4"):
            program.run(step_of(5))

    def test_runs_on_as_many_threads_as_torch(self, build: str) -> None:
        head = NativeKernels(build).prepare_weight(random(640, 256))
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(NativeKernels(build).logits(random(30, 256, seed=1), head))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
