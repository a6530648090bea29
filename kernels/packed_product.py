"""A packed weight times rows, within a program: numbers are unpacked in registers, scales applied in float32.

Knows neither where rows come from nor what becomes of the product.
"""

import triton
import triton.language as tl

from persimmon.kernels.layer_norm import merge_statistics, normalise
from persimmon.kernels.packed_weight import FEATURES
from persimmon.kernels.prefetch import LINE_BYTES, prefetch, prefetch_lines
from persimmon.kernels.unpack import columns_tile, group_scale, high_halves, low_halves, rows_tile, whole_bytes

AHEAD_LINES = 64
"""Lines of the cache that a dependent launch asks for of each of its tiles' weights while the one before it ends."""


@triton.jit
def prefetch_tiles(
    weight,
    column_tile,
    first,
    IN_FEATURES: tl.constexpr,
    BITS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FEATURES: tl.constexpr = FEATURES,
    LINE_BYTES: tl.constexpr = LINE_BYTES,
    AHEAD_LINES: tl.constexpr = AHEAD_LINES,
):
    """Brings the first weights of a program's outputs, from `first` input features on, into the cache."""
    TILE_BYTES: tl.constexpr = (IN_FEATURES + FEATURES - 1) // FEATURES * FEATURES * TILE_OUTPUTS * BITS // 8
    line = first * TILE_OUTPUTS * BITS // 8 // LINE_BYTES + tl.arange(0, AHEAD_LINES)
    line = tl.minimum(line, TILE_BYTES // LINE_BYTES - 1)
    for tile in tl.static_range(BLOCK_N // TILE_OUTPUTS):
        number = (column_tile * (BLOCK_N // TILE_OUTPUTS) + tile).to(tl.int64)
        prefetch(weight + number * TILE_BYTES + line * LINE_BYTES)


@triton.jit
def load_words(scales, word, column_tile, WORDS: tl.constexpr, TOTAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """Words of an iteration's scales of BLOCK_N outputs, from the `word`-th on: a tuple of [BLOCK_N]."""
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    places = scales + (columns // 64) * (TOTAL * 64) + columns % 64
    words = ()
    for index in tl.static_range(WORDS):
        words += (tl.load(places + tl.minimum(word + index, TOTAL - 1) * 64),)  # type: ignore[assignment]
    return words


@triton.jit
def alive_bits(alive, first, IN_FEATURES: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr, RUN: tl.constexpr):
    """[UNIT, 1] int32: bit t is the flag of the input that row k of a tile holds, in the tile of first + t * STEP.

    As `projection.alive_iterations`.
    """
    turns = tl.arange(0, 32)[:, None]
    row = tl.arange(0, UNIT)[None, :]
    # The order of `columns_tile`.
    place = row if RUN == 16 else row // (4 * RUN) * (4 * RUN) + row % 4 * RUN + row // 4 % RUN
    features = first + turns * STEP + place
    flags = tl.load(alive + features, mask=features < IN_FEATURES, other=0)
    return tl.sum((flags != 0).to(tl.int32) << turns, 0)[:, None]


@triton.jit
def add_product(accumulator, w, x, scale, GROUPED: tl.constexpr):
    """Accumulator + w [outputs, inputs] @ x [rows, inputs]^T, times the scale [outputs] of the group if GROUPED."""
    start = tl.zeros(accumulator.shape, tl.float32) if GROUPED else accumulator
    product = tl.dot(w, tl.trans(x), start, input_precision="ieee")
    if GROUPED:
        scales = tl.broadcast_to(scale[:, None], product.shape)
        product = tl.fma(product, scales, accumulator)
    return product


@triton.jit
def packed_total(
    x,
    weight,
    scales,
    rows,
    exists,
    num_rows,
    norm_statistics,
    norm_weight,
    norm_bias,
    eps,
    alive,
    column_tile,
    first,
    IN_FEATURES: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_FEATURES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALES: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    RUN: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    NORM_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FEATURES: tl.constexpr = FEATURES,
    LINE_BYTES: tl.constexpr = LINE_BYTES,
):
    """BLOCK_N outputs of a packed weight times rows of x, over SPLIT_FEATURES inputs from `first` on.

    [BLOCK_N, BLOCK_M] float32, scaled.  x is [num_rows, IN_FEATURES], normalised on the way in where there are
    statistics; inputs whose flag in `alive` is zero are not read.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    UNITS: tl.constexpr = FEATURES // UNIT
    UNIT_BYTES: tl.constexpr = TILE_OUTPUTS * UNIT * BITS // 8
    ROW_BYTES: tl.constexpr = TILE_OUTPUTS * BITS // 8 if COLUMNS else UNIT * BITS // 8
    # A tile of 4-bit rows is two products, of its low half bytes and of its high ones.
    HALVES: tl.constexpr = 2 if BITS == 4 and not COLUMNS else 1
    WIDTH: tl.constexpr = UNIT // HALVES
    ITERATIONS: tl.constexpr = (IN_FEATURES + FEATURES - 1) // FEATURES
    TILE_BYTES: tl.constexpr = ITERATIONS * UNITS * UNIT_BYTES
    EVEN_K: tl.constexpr = IN_FEATURES == SPLITS * SPLIT_FEATURES
    stop = SPLIT_FEATURES if EVEN_K else tl.minimum(SPLIT_FEATURES, ITERATIONS * FEATURES - first)
    base = weight + (column_tile * (BLOCK_N // TILE_OUTPUTS)).to(tl.int64) * TILE_BYTES
    if COLUMNS:
        inner = tl.arange(0, UNIT)[:, None] * ROW_BYTES + tl.arange(0, ROW_BYTES)[None, :]
    else:
        outputs = tl.arange(0, BLOCK_N)[:, None]
        inner = (outputs // TILE_OUTPUTS) * TILE_BYTES + (outputs % TILE_OUTPUTS) * ROW_BYTES
        inner = inner + tl.arange(0, ROW_BYTES)[None, :]
    if norm_statistics is not None:
        mean, scale = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    if GROUP:
        PER_WORD: tl.constexpr = 1 if SCALES == "float32" else 2
        TOTAL_WORDS: tl.constexpr = ITERATIONS * WORDS
        words = load_words(scales, (first // FEATURES) * WORDS, column_tile, WORDS, TOTAL_WORDS, BLOCK_N)

    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # With flags, a part is as many iterations as a word has bits.
    PART: tl.constexpr = 32 * FEATURES if alive is not None else SPLIT_FEATURES
    for part in tl.static_range(0, SPLIT_FEATURES, PART):
        if alive is not None:
            alive_words = ()
            for unit in tl.static_range(UNITS):
                bits = alive_bits(alive, first + part + unit * UNIT, IN_FEATURES, FEATURES, UNIT, RUN)
                alive_words += (bits,)  # type: ignore[assignment]
        for start in tl.range(part, min(part + PART, stop), FEATURES, num_stages=STAGES):
            if norm_statistics is not None:  # noqa: SIM102 (decided when it is compiled)
                if start == 0:
                    # Not before the loop: the weights of its first iterations are on their way by now.
                    mean, scale = merge_statistics(
                        norm_statistics, rows, exists, num_rows, eps, IN_FEATURES, NORM_TILES
                    )
            if GROUP:
                if start == part:
                    # All others, which the following iterations ask the L2 cache for.
                    LINES: tl.constexpr = SPLIT_FEATURES // FEATURES * WORDS * 256 // LINE_BYTES
                    for block in tl.static_range(BLOCK_N // 64):
                        own_tile = column_tile * (BLOCK_N // 64) + block
                        own_words = own_tile * TOTAL_WORDS + (first // FEATURES) * WORDS
                        prefetch_lines(scales + own_words * 64, LINES, 0, 128, 128)
                # One iteration ahead: no product waits for its scales.
                words_now = words
                words = load_words(
                    scales, ((first + start) // FEATURES + 1) * WORDS, column_tile, WORDS, TOTAL_WORDS, BLOCK_N
                )
            for unit in tl.static_range(UNITS):
                at = first + start + unit * UNIT
                places = base + (at // UNIT) * UNIT_BYTES + inner
                if alive is not None:
                    read = (alive_words[unit] >> ((start - part) // FEATURES)) & 1 != 0
                    packed = tl.load(places, mask=read, other=0)
                else:
                    packed = tl.load(places)
                packed = columns_tile(packed, RUN, UNIT) if COLUMNS else rows_tile(packed, RUN, BLOCK_N, WIDTH)
                for half in tl.static_range(HALVES):
                    features = at + half * WIDTH + tl.arange(0, WIDTH)
                    x_mask = exists[:, None] if EVEN_K else exists[:, None] & (features < IN_FEATURES)[None, :]
                    x_tile = tl.load(x + (rows[:, None] * IN_FEATURES + features[None, :]), mask=x_mask, other=0.0)
                    if norm_statistics is not None:
                        if EVEN_K:
                            gamma, beta = tl.load(norm_weight + features), tl.load(norm_bias + features)
                        else:
                            gamma = tl.load(norm_weight + features, mask=features < IN_FEATURES, other=0.0)
                            beta = tl.load(norm_bias + features, mask=features < IN_FEATURES, other=0.0)
                        normed = normalise(x_tile, mean[:, None], scale[:, None], gamma[None, :], beta[None, :])
                        x_tile = normed.to(dtype)
                    if BITS == 8:
                        w = whole_bytes(packed, dtype)
                    elif COLUMNS:
                        both = tl.join(low_halves(packed, dtype), high_halves(packed, dtype))
                        w = both.permute(2, 0, 1).reshape(BLOCK_N, UNIT)
                    elif half == 0:
                        w = low_halves(packed, dtype)
                    else:
                        w = high_halves(packed, dtype)
                    # A product lies within one group: the (unit * UNIT + half * WIDTH) // GROUP-th of the iteration.
                    if GROUP:
                        word = words_now[(unit * UNIT + half * WIDTH) // GROUP // PER_WORD]
                        own = group_scale(word, (unit * UNIT + half * WIDTH) // GROUP % PER_WORD == 1, SCALES)
                        accumulator = add_product(accumulator, w, x_tile, own, True)
                    else:
                        accumulator = add_product(accumulator, w, x_tile, None, False)
    if not GROUP:
        own = tl.load(scales + column_tile * BLOCK_N + tl.arange(0, BLOCK_N))
        accumulator *= tl.broadcast_to(own[:, None], accumulator.shape)
    return accumulator
