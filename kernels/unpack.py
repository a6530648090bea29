"""Numbers of packed weights and their scales, from bytes in registers to what a product takes.

Knows how `packed_weight` lays them out; loads tiles and scales, and multiplies nothing.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

# An exponent in front of a number's bits makes a float of them: 1024 + n in float16, 128 + n in bfloat16, 2^23 + n in
# float32.  Flipping the sign bit of two's complement adds half the range, which the subtraction takes off again.  Four
# bytes at a time: `prmt` spreads them, `lop3` masks a half byte and sets the exponent.
_FLOAT16_OF_BYTES = tl.constexpr("""{
.reg .b32 u, a, b, c;
xor.b32 u, $2, 0x80808080;
prmt.b32 a, u, 0x64646464, 0x4140;
prmt.b32 b, u, 0x64646464, 0x4342;
mov.b32 c, 0x64806480;
sub.f16x2 $0, a, c;
sub.f16x2 $1, b, c;
}""")
_FLOAT16_OF_LOW = tl.constexpr("""{
.reg .b32 a, b, c;
prmt.b32 a, $2, 0, 0x4140;
prmt.b32 b, $2, 0, 0x4342;
lop3.b32 a, a, 0x000f000f, 0x64086408, 0x6a;
lop3.b32 b, b, 0x000f000f, 0x64086408, 0x6a;
mov.b32 c, 0x64086408;
sub.f16x2 $0, a, c;
sub.f16x2 $1, b, c;
}""")
_FLOAT16_OF_HIGH = tl.constexpr("""{
.reg .b32 a, b, c, d;
prmt.b32 a, $2, 0, 0x4140;
prmt.b32 b, $2, 0, 0x4342;
lop3.b32 a, a, 0x00f000f0, 0x64806480, 0x6a;
lop3.b32 b, b, 0x00f000f0, 0x64806480, 0x6a;
mov.b32 c, 0x2c002c00;
mov.b32 d, 0xd480d480;
fma.rn.f16x2 $0, a, c, d;
fma.rn.f16x2 $1, b, c, d;
}""")
_BFLOAT16_OF_BYTES = tl.constexpr("""{
.reg .b32 u, a, b, c, d;
xor.b32 u, $2, 0x80808080;
prmt.b32 a, u, 0x4b000000, 0x7440;
prmt.b32 b, u, 0x4b000000, 0x7441;
prmt.b32 c, u, 0x4b000000, 0x7442;
prmt.b32 d, u, 0x4b000000, 0x7443;
sub.f32 a, a, 0f4B000080;
sub.f32 b, b, 0f4B000080;
sub.f32 c, c, 0f4B000080;
sub.f32 d, d, 0f4B000080;
prmt.b32 $0, a, b, 0x7632;
prmt.b32 $1, c, d, 0x7632;
}""")
_BFLOAT16_OF_LOW = tl.constexpr("""{
.reg .b32 a, b, c, d;
prmt.b32 a, $2, 0, 0x4140;
prmt.b32 b, $2, 0, 0x4342;
lop3.b32 a, a, 0x000f000f, 0x43084308, 0x6a;
lop3.b32 b, b, 0x000f000f, 0x43084308, 0x6a;
mov.b32 c, 0x3f803f80;
mov.b32 d, 0xc308c308;
fma.rn.bf16x2 $0, a, c, d;
fma.rn.bf16x2 $1, b, c, d;
}""")
_BFLOAT16_OF_HIGH = tl.constexpr("""{
.reg .b32 u, a, b, c, d;
shr.u32 u, $2, 4;
prmt.b32 a, u, 0, 0x4140;
prmt.b32 b, u, 0, 0x4342;
lop3.b32 a, a, 0x000f000f, 0x43084308, 0x6a;
lop3.b32 b, b, 0x000f000f, 0x43084308, 0x6a;
mov.b32 c, 0x3f803f80;
mov.b32 d, 0xc308c308;
fma.rn.bf16x2 $0, a, c, d;
fma.rn.bf16x2 $1, b, c, d;
}""")


@triton.jit
def rows_tile(packed, RUN: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr):
    """A tile as it lies in memory to [OUTPUTS, WIDTH]; see `Packing.run`."""
    if RUN == 16:
        tile = packed.reshape(OUTPUTS // 64, WIDTH // 16, 64, 16).permute(0, 2, 1, 3)
    else:
        # Of outputs [block of 16, half, 8] and inputs [block of 32, run of runs, half, thread, place in a run].
        tile = packed.reshape(OUTPUTS // 16, WIDTH // 32, 8, 4, 4 // RUN, 2, 2, RUN).permute(0, 6, 2, 1, 4, 5, 3, 7)
    return tile.reshape(OUTPUTS, WIDTH)


@triton.jit
def columns_tile(packed, RUN: tl.constexpr, UNIT: tl.constexpr):
    """A tile [UNIT, 64] as it lies in memory to [64, UNIT]; see `Packing.run`."""
    if RUN == 16:
        tile = tl.trans(packed)
    else:
        tile = packed.reshape(UNIT // (4 * RUN), RUN, 4, 4, 8, 2).permute(3, 5, 4, 0, 2, 1).reshape(64, UNIT)
    return tile


@triton.jit
def whole_bytes(packed, dtype: tl.constexpr):
    """8-bit numbers: uint8 to dtype."""
    if is_cuda() and dtype == tl.float16:
        numbers = tl.inline_asm_elementwise(
            _FLOAT16_OF_BYTES, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4
        )
    elif is_cuda() and dtype == tl.bfloat16:
        numbers = tl.inline_asm_elementwise(
            _BFLOAT16_OF_BYTES, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        numbers = packed.to(tl.int8, bitcast=True).to(tl.float32).to(dtype)
    return numbers


@triton.jit
def low_halves(packed, dtype: tl.constexpr):
    """The 4-bit numbers in the low halves of bytes: uint8 to dtype."""
    if is_cuda() and dtype == tl.float16:
        numbers = tl.inline_asm_elementwise(
            _FLOAT16_OF_LOW, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4
        )
    elif is_cuda() and dtype == tl.bfloat16:
        numbers = tl.inline_asm_elementwise(
            _BFLOAT16_OF_LOW, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        numbers = ((packed << 4).to(tl.int8, bitcast=True) >> 4).to(tl.float32).to(dtype)
    return numbers


@triton.jit
def high_halves(packed, dtype: tl.constexpr):
    """The 4-bit numbers in the high halves of bytes: uint8 to dtype."""
    if is_cuda() and dtype == tl.float16:
        numbers = tl.inline_asm_elementwise(
            _FLOAT16_OF_HIGH, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4
        )
    elif is_cuda() and dtype == tl.bfloat16:
        numbers = tl.inline_asm_elementwise(
            _BFLOAT16_OF_HIGH, "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        numbers = (packed.to(tl.int8, bitcast=True) >> 4).to(tl.float32).to(dtype)
    return numbers


@triton.jit
def group_scale(word, SECOND: tl.constexpr, KIND: tl.constexpr):
    """Float32 scales of the first or second group that a word holds; see `Packing.scale_kind`."""
    if KIND == "float32":
        scale = word
    elif KIND == "bfloat16":
        scale = ((word & -65536) if SECOND else (word << 16)).to(tl.float32, bitcast=True)
    else:
        scale = ((word >> 16) if SECOND else word).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale
