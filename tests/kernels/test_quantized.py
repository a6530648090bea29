"""Matrices of small integers: what they stand for, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persimmon.kernels import QuantizedFormat, QuantizedMatrix
from persimmon.kernels.quantized import pack_int4, unpack_int4


def matrix(bits: int, group_size: int = 32) -> QuantizedMatrix:
    """[6, 64], numbers of the whole range."""
    generator = torch.Generator().manual_seed(bits)
    limit = 1 << (bits - 1)
    integers = torch.randint(-limit, limit, (6, 64), dtype=torch.int8, generator=generator)
    scales = torch.rand(6, 64 // group_size, generator=generator).half()
    return QuantizedMatrix(integers if bits == 8 else pack_int4(integers), scales, 8 if bits == 8 else 4, group_size)


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=40).filter(lambda row: len(row) % 2 == 0))
def test_packing_four_bits_is_reversible(row: list[int]) -> None:
    integers = torch.tensor([row, row[::-1]], dtype=torch.int8)
    packed = pack_int4(integers)
    assert packed.shape == (2, len(row) // 2)
    assert torch.equal(unpack_int4(packed), integers)
    assert packed[0, 0] == (row[0] + 8) + 16 * (row[1] + 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_is_its_number_times_the_scale_of_its_group(bits: int) -> None:
    quantized = matrix(bits)
    dense, integers = quantized.dequantized(), quantized.integers
    assert dense.shape == integers.shape == quantized.shape == (6, 64)
    for row, column in ((0, 0), (5, 31), (5, 32), (3, 63)):
        assert dense[row, column] == integers[row, column].float() * quantized.scales[row, column // 32].float()
    assert torch.equal(quantized.rows(2, 5).dequantized(), dense[2:5])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [32, 64])
def test_a_format_counts_the_bytes_of_its_matrices(bits: int, group_size: int) -> None:
    quantized = matrix(bits, group_size)
    expected = QuantizedFormat(8 if bits == 8 else 4, None if group_size == 64 else group_size, torch.float16)
    assert quantized.format == expected
    assert expected.nbytes(quantized.shape) == quantized.nbytes == 6 * 64 * bits // 8 + 6 * (64 // group_size) * 2


def test_parts_that_do_not_fit_together_are_refused() -> None:
    good = matrix(8)
    with pytest.raises(ValueError, match=r"torch\.int8 with scales of torch\.float64; expected torch\.int8"):
        QuantizedMatrix(good.numbers, good.scales.double(), 8, 32)
    with pytest.raises(ValueError, match="groups of 48 do not divide 64 inputs"):
        QuantizedMatrix(good.numbers, good.scales, 8, 48)
    with pytest.raises(ValueError, match=r"\[6, 2\] scales for a \[6, 64\] matrix in groups of 16"):
        QuantizedMatrix(good.numbers, good.scales, 8, 16)
