"""Quantized weights as the kernels of a GPU read them: tiles that lie in one piece, each number unpacked in registers.

Lays numbers and scales out; multiplies nothing.

A tile has 64 outputs (128 in "columns" of 4 bits) and the inputs of a unit; tiles of the same outputs follow each
other, so a program reads one stretch of memory, 16 bytes a thread.

- "rows" of 8 bits: [outputs, inputs] bytes.  Of 4 bits: [outputs, inputs / 2], the first half of the unit's inputs in
  the low half bytes and the second in the high ones: each half is multiplied with neighbouring inputs, without a
  shuffle.
- "columns", for sparse inputs, where what meets a zero is not read: [inputs, 64 bytes].  Of 4 bits each byte holds two
  outputs, the first 64 of the tile in the low halves.

Numbers are in two's complement, so a byte that is not read stands for zeros.  What pads the matrix is zero as well.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812

from persimmon.kernels.quantized import Bits, QuantizedFormat, QuantizedMatrix

GROUP_SIZES = (32, 64, 128)
"""Inputs that may share a scale; multiples of 128 are groups of 128 with equal scales."""

FEATURES = 128
"""Inputs of an iteration of a kernel's loop, whose multiple the inputs are padded to."""

PADDED_OUTPUTS = 128
"""What the outputs are padded to a multiple of: most that a program of any kernel takes."""

ScaleKind = Literal["output", "float16", "bfloat16", "float32"]


def run_of(generation: int, bits: Bits, *, columns: bool) -> int:
    """Neighbouring inputs of an output that lie side by side in a thread's registers when matrix units take them.

    The inputs of a tile lie in memory in the order in which threads hold them, so that each thread reads 16 bytes at
    once and threads side by side read bytes side by side.  That order is the instruction's and Triton's for 8-bit
    numbers that become 16-bit operands (seen in 3.7.1): wgmma takes pairs, mma of sm_80 to sm_89 and sm_120 takes runs
    of 4, or of 8 where two outputs share a byte, and tcgen05 takes whole rows.  Another order would be slower, not
    wrong: 16 bytes in order, and columns as they are.
    """
    if generation == 9:
        return 2
    if generation in (10, 11):
        return 16
    return 8 if bits == 4 and columns else 4


@dataclass(frozen=True, slots=True)
class Packing:
    """How a quantized matrix is laid out.

    Attributes:
        bits: of a number.
        group: inputs that share a scale, one of GROUP_SIZES; None for a scale for each output.
        columns: whether the inputs are sparse.
        scale_dtype: of the scales that it is made from.
        run: neighbouring inputs of an output that a thread's registers hold one after the other when matrix units take
            them; see `run_of`.
    """

    bits: Bits
    group: int | None
    columns: bool
    scale_dtype: torch.dtype
    run: int = 2

    @classmethod
    def of(cls, stored: QuantizedFormat, *, columns: bool, generation: int = 9) -> "Packing":
        """For a matrix of this format.

        Args:
            stored: the format.
            columns: whether the inputs are sparse.
            generation: first part of the compute capability of the GPU that will multiply, 8 for 8.9.

        Raises:
            ValueError: its groups have no layout.
        """
        size = stored.group_size
        if size is not None and size % GROUP_SIZES[-1] == 0:
            size = GROUP_SIZES[-1]
        if size is not None and size not in GROUP_SIZES:
            raise ValueError(
                f"the weights are quantized in groups of {size}: on a GPU groups have 32, 64 or a multiple of 128 "
                "inputs, or an output has one scale; quantize them anew, or serve them on a CPU"
            )
        return cls(stored.bits, size, columns, stored.scale_dtype, run_of(generation, stored.bits, columns=columns))

    @property
    def unit(self) -> int:
        """Inputs of a tile."""
        if self.group is None:
            return FEATURES
        # Two groups, each in one half of the bytes.
        return min(FEATURES, 2 * self.group) if self.bits == 4 and not self.columns else self.group

    @property
    def units(self) -> int:
        """Tiles that an iteration of a kernel's loop takes."""
        return FEATURES // self.unit

    @property
    def outputs(self) -> int:
        """Outputs of a tile."""
        return 128 if self.columns and self.bits == 4 else 64

    @property
    def tile_bytes(self) -> int:
        """Of a tile's numbers."""
        return self.outputs * self.unit * self.bits // 8

    @property
    def scale_kind(self) -> ScaleKind:
        """A float32 scale for each output; or of each group one float32, or two 16-bit scales in a word of 32 bits.

        Of groups of FEATURES, 16-bit scales become float32 as well: an iteration then has a word, and not half of one.
        """
        if self.group is None:
            return "output"
        if self.group == FEATURES or self.scale_dtype == torch.float32:
            return "float32"
        return "bfloat16" if self.scale_dtype == torch.bfloat16 else "float16"

    @property
    def words(self) -> int:
        """Of the scales of an output in an iteration."""
        if self.group is None:
            return 0
        return FEATURES // self.group // (1 if self.scale_kind == "float32" else 2)

    @property
    def constants(self) -> dict[str, int | str]:
        """What kernels that read such a weight are compiled for, by the names of their parameters."""
        return {
            "BITS": self.bits,
            "GROUP": self.group or 0,
            "SCALES": self.scale_kind,
            "WORDS": self.words,
            "COLUMNS": self.columns,
            "UNIT": self.unit,
            "RUN": self.run,
            "TILE_OUTPUTS": self.outputs,
        }

    def padded(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(out, in) with what fills the last tiles and iterations."""
        out_features, in_features = shape
        return _multiple(out_features, PADDED_OUTPUTS), _multiple(in_features, FEATURES)

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Of an (out, in) matrix: numbers and scales."""
        out_features, in_features = self.padded(shape)
        words = in_features // FEATURES * self.words if self.group else 1
        return out_features * (in_features * self.bits // 8 + 4 * words)

    def __str__(self) -> str:
        groups = "a scale for each output" if self.group is None else f"groups of {self.group}"
        return f"int{self.bits} {'columns' if self.columns else 'rows'}, {groups}"


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """The matrix of a product, quantized, as the kernels of a GPU read it.

    Attributes:
        numbers: uint8, [out / packing.outputs, in / packing.unit, packing.tile_bytes], both padded.
        scales: of a scale for each output float32 [out]; of groups int32 or float32
            [out / 64, in / FEATURES * packing.words, 64].
        shape: (out, in), what pads them left out.
        packing: how they lie.
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, int]
    packing: Packing

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.numbers.nbytes + self.scales.nbytes

    @property
    def format(self) -> str:
        """How its numbers lie."""
        return str(self.packing)


def pack(matrix: QuantizedMatrix, *, columns: bool = False, generation: int = 9) -> PackedWeight:
    """Lays a quantized [out, in] matrix out, on its own device.

    Args:
        matrix: what is stored.
        columns: whether it is multiplied by sparse inputs.
        generation: first part of the compute capability of the GPU that will multiply.

    Raises:
        ValueError: its groups have no layout.
    """
    packing = Packing.of(matrix.format, columns=columns, generation=generation)
    rows, inputs = packing.padded(matrix.shape)
    integers = F.pad(matrix.integers, (0, inputs - matrix.shape[1], 0, rows - matrix.shape[0]))
    # [blocks of outputs, outputs, units, inputs]
    tiles = integers.view(rows // packing.outputs, packing.outputs, inputs // packing.unit, packing.unit)
    if packing.bits == 4:
        low, high = tiles.chunk(2, dim=1 if packing.columns else 3)
        tiles = (low.view(torch.uint8) & 15) | (high.contiguous().view(torch.uint8) << 4)
    tiles = tiles.view(torch.uint8).transpose(1, 2)  # [.., units, outputs, inputs]
    arranged = _columns_in_memory(tiles, packing.run) if packing.columns else _rows_in_memory(tiles, packing.run)
    numbers = arranged.contiguous().view(rows // packing.outputs, inputs // packing.unit, -1)
    return PackedWeight(numbers=numbers, scales=_scale_words(matrix, packing), shape=matrix.shape, packing=packing)


def _rows_in_memory(tiles: torch.Tensor, run: int) -> torch.Tensor:
    """[.., 64, width] as `unpack.rows_tile` reads them."""
    blocks, units, outputs, width = tiles.shape
    if run == 16:
        return tiles.reshape(blocks, units, outputs, width // 16, 16).transpose(2, 3)
    # Outputs [block of 16, half, 8]; inputs [block of 32, run of runs, half, thread, place in a run].
    apart = tiles.reshape(blocks, units, outputs // 16, 2, 8, width // 32, 4 // run, 2, 4, run)
    return apart.permute(0, 1, 2, 5, 4, 8, 6, 7, 3, 9)


def _columns_in_memory(tiles: torch.Tensor, run: int) -> torch.Tensor:
    """[.., 64, unit] as `unpack.columns_tile` reads them."""
    blocks, units, outputs, unit = tiles.shape
    if run == 16:
        return tiles.transpose(2, 3)
    apart = tiles.reshape(blocks, units, outputs // 16, 2, 8, unit // (4 * run), 4, run)
    return apart.permute(0, 1, 5, 7, 6, 2, 4, 3)


def _scale_words(matrix: QuantizedMatrix, packing: Packing) -> torch.Tensor:
    rows, inputs = packing.padded(matrix.shape)
    scales = F.pad(matrix.scales, (0, 0, 0, rows - matrix.shape[0]))
    if packing.group is None:
        return scales[:, 0].float().contiguous()
    scales = scales.repeat_interleave(matrix.group_size // packing.group, dim=1)
    scales = F.pad(scales, (0, inputs // packing.group - scales.shape[1])).contiguous()
    words = scales.float() if packing.scale_kind == "float32" else scales.view(torch.int32)
    return words.view(rows // 64, 64, -1).transpose(1, 2).contiguous()


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of
