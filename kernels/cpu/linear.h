/* Rows times a packed weight, the same bits for a row whatever other rows are there.
 *
 * A [out, in] weight is stored as panels of PANEL outputs, each [in, PANEL], so that the products of a panel read memory
 * from front to back; the last panel is as narrow as what is left.  For inputs rounded to bfloat16 it is
 * [in / 2, PANEL, 2]: one instruction multiplies a pair of inputs by a pair of weights.
 *
 * An output is summed in the order of its inputs, in float32, DEPTH of them at a time: a slice of a panel stays in the
 * first-level cache while all rows pass it, and sums wait in memory meanwhile, which rounds nothing.
 */
#ifndef PERSIMMON_LINEAR_H
#define PERSIMMON_LINEAR_H

#include "network.h"
#include "tiles.h"
#include "vectors.h"

/* Inputs of a slice: [128, 64] float32 are 32 KiB. */
#define DEPTH 128
/* Words of inputs between two fetches. */
#define FETCH_DEPTH(rows) ((rows) > 1 ? 8 : DEPTH)
/* With at most this many rows, inputs that are zero in all rows are skipped if they are at least a quarter of all. */
#define SPARSE_ROWS 4

/* Whose memory one thread uses: sums [ROWS_AT_ONCE, PANEL], a slice [DEPTH, PANEL] in another form, and which inputs of
 * a slice are not zero. */
typedef struct {
    float sums[ROWS_AT_ONCE * PANEL];
    float slice[DEPTH * PANEL];
    int32_t nonzero[DEPTH];
} Workspace;

/* sums[row, :] += inputs[k, row] * slice[k, :] for `depth` values of k, in order; all, or those in `nonzero`. */
INLINE void multiply_tile(const float *inputs, const void *slice, int64_t depth, const int32_t *nonzero, float *sums,
                          Fetch *fetch, const int type, const int rows, const int sparse) {
    const int vectors = TILE_VECTORS(rows);
    for (int column = 0; column < PANEL; column += vectors * LANES) {
        Vector total[TILE_ROWS][MAX_VECTORS];
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) total[row][v] = load(sums + row * PANEL + column + v * LANES);
        for (int64_t first = 0; first < depth; first += FETCH_DEPTH(rows)) {
            if (rows > 1 && !sparse) fetch_more(fetch);
            const int64_t end = depth - first < FETCH_DEPTH(rows) ? depth : first + FETCH_DEPTH(rows);
            for (int64_t i = first; i < end; i++) {
                const int64_t k = sparse ? nonzero[i] : i;
                Vector weights[MAX_VECTORS];
#pragma GCC unroll 8
                for (int v = 0; v < vectors; v++) weights[v] = load_as(slice, k * PANEL + column + v * LANES, type);
#pragma GCC unroll 6
                for (int row = 0; row < rows; row++) {
                    const Vector input = broadcast(inputs[k * rows + row]);
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; v++) total[row][v] = multiply_add(input, weights[v], total[row][v]);
                }
            }
        }
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) store(sums + row * PANEL + column + v * LANES, total[row][v]);
    }
}

#if defined(__AVX512BF16__)
/* The same for pairs: inputs [depth, rows, 2] and slice [depth, PANEL, 2] of bfloat16. */
INLINE void multiply_pairs_tile(const uint16_t *inputs, const uint16_t *slice, int64_t depth, const int32_t *nonzero,
                                float *sums, Fetch *fetch, const int rows, const int sparse) {
    Vector total[TILE_ROWS][MAX_VECTORS];
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int v = 0; v < MAX_VECTORS; v++) total[row][v] = load(sums + row * PANEL + v * LANES);
    for (int64_t first = 0; first < depth; first += FETCH_DEPTH(rows)) {
        if (rows > 1 && !sparse) fetch_more(fetch);
        const int64_t end = depth - first < FETCH_DEPTH(rows) ? depth : first + FETCH_DEPTH(rows);
        for (int64_t i = first; i < end; i++) {
            const int64_t k = sparse ? nonzero[i] : i;
            __m512bh weights[MAX_VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < MAX_VECTORS; v++)
                weights[v] = (__m512bh)_mm512_loadu_si512(slice + (k * PANEL + v * LANES) * 2);
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++) {
                int32_t pair;
                memcpy(&pair, inputs + (k * rows + row) * 2, sizeof pair);
                const __m512bh input = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int v = 0; v < MAX_VECTORS; v++)
                    total[row][v] = _mm512_dpbf16_ps(total[row][v], input, weights[v]);
            }
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int v = 0; v < MAX_VECTORS; v++) store(sums + row * PANEL + v * LANES, total[row][v]);
}
#endif

/* Where a slice's inputs, the words of one tile, are not zero in any row, if enough are zero to be worth it; else -1.
 * `magnitude`: the bits of a word that are not signs. */
INLINE int64_t nonzero_words(const uint32_t *inputs, int64_t depth, uint32_t magnitude, int32_t *found, const int rows) {
    int64_t count = 0;
    for (int64_t k = 0; k < depth; k++) {
        uint32_t bits = 0;
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) bits |= inputs[k * rows + row];
        found[count] = (int32_t)k;
        count += (bits & magnitude) != 0;
    }
    return count * 4 <= depth * 3 ? count : -1;
}

static int64_t find_nonzero(const uint32_t *inputs, int64_t rows, int64_t depth, uint32_t magnitude, int32_t *found) {
    switch (rows) {
        case 1: return nonzero_words(inputs, depth, magnitude, found, 1);
        case 2: return nonzero_words(inputs, depth, magnitude, found, 2);
        case 3: return nonzero_words(inputs, depth, magnitude, found, 3);
        default: return nonzero_words(inputs, depth, magnitude, found, SPARSE_ROWS);
    }
}

/* A slice of a panel as multiply_tile reads it: float32, PANEL wide. */
INLINE void widen_slice(const void *weights, int64_t depth, int64_t width, const int type, float *slice) {
    if (width == PANEL) {
        for (int64_t i = 0; i < depth * PANEL; i += LANES) store(slice + i, load_as(weights, i, type));
        return;
    }
    for (int64_t k = 0; k < depth; k++)
        for (int64_t column = 0; column < PANEL; column++)
            slice[k * PANEL + column] = column < width ? item_as(weights, k * width + column, type) : 0.0f;
}

static void widen_any_slice(const void *weights, int64_t depth, int64_t width, int64_t type, float *slice) {
    if (type == FLOAT16) widen_slice(weights, depth, width, FLOAT16, slice);
    else if (type == BFLOAT16) widen_slice(weights, depth, width, BFLOAT16, slice);
    else widen_slice(weights, depth, width, FLOAT32, slice);
}

/* A slice of pairs, PANEL wide. */
static void widen_pairs(const uint16_t *weights, int64_t depth, int64_t width, uint16_t *slice) {
    for (int64_t k = 0; k < depth; k++)
        for (int64_t i = 0; i < 2 * PANEL; i++) slice[k * 2 * PANEL + i] = i < 2 * width ? weights[k * 2 * width + i] : 0;
}

/* What is fetched during a slice of `depth` words.  The processor itself fetches well ahead where memory is read once and
 * from front to back; and inputs that are left out, -1 for none, need no weights. */
INLINE Fetch fetch_during(const Inputs *in, int64_t depth, int64_t nonzero_count, const char *at, int64_t bytes) {
    if (passes_of(in) == 1 || nonzero_count >= 0) return (Fetch){at, at, 0};
    return fetch_of(at, bytes, in, (depth + FETCH_DEPTH(in->tile) - 1) / FETCH_DEPTH(in->tile));
}

/* All rows times a slice, whose first input is word number `word`. */
INLINE void multiply_slice(const Inputs *in, int64_t word, const void *slice, int64_t depth, int64_t nonzero_count,
                           const int32_t *nonzero, float *sums, Fetch fetch, const int type) {
    for (int64_t row = 0; row < in->rows; row += in->tile) {
        const float *own = (const float *)tile_words(in, row, word);
        float *own_sums = sums + row * PANEL;
        if (nonzero_count >= 0) {
#define SPARSE(n) multiply_tile(own, slice, nonzero_count, nonzero, own_sums, &fetch, type, n, 1)
            FOR_ROWS(rows_of_tile(in, row), SPARSE)
        } else {
#define DENSE(n) multiply_tile(own, slice, depth, nonzero, own_sums, &fetch, type, n, 0)
            FOR_ROWS(rows_of_tile(in, row), DENSE)
        }
    }
}

/* The same for a slice in its own type.  What one tile reads, it widens itself; more tiles read what is widened once. */
static void multiply_any_slice(const Inputs *in, int64_t word, const void *weights, int64_t depth, int64_t width,
                               int64_t type, int64_t nonzero_count, Fetch fetch, Workspace *own) {
    const int direct = width == PANEL && (type == FLOAT32 || in->rows <= in->tile);
    if (!direct) widen_any_slice(weights, depth, width, type, own->slice);
#define MULTIPLY(slice, as) multiply_slice(in, word, slice, depth, nonzero_count, own->nonzero, own->sums, fetch, as)
    if (!direct) MULTIPLY(own->slice, FLOAT32);
    else if (type == FLOAT16) MULTIPLY(weights, FLOAT16);
    else if (type == BFLOAT16) MULTIPLY(weights, BFLOAT16);
    else MULTIPLY(weights, FLOAT32);
}

#if defined(__AVX512BF16__)
static void multiply_pairs_slice(const Inputs *in, int64_t word, const uint16_t *slice, int64_t depth,
                                 int64_t nonzero_count, const int32_t *nonzero, float *sums, Fetch fetch) {
    for (int64_t row = 0; row < in->rows; row += in->tile) {
        const uint16_t *own = (const uint16_t *)tile_words(in, row, word);
        float *own_sums = sums + row * PANEL;
        if (nonzero_count >= 0) {
#define SPARSE_PAIRS(n) multiply_pairs_tile(own, slice, nonzero_count, nonzero, own_sums, &fetch, n, 1)
            FOR_ROWS(rows_of_tile(in, row), SPARSE_PAIRS)
        } else {
#define DENSE_PAIRS(n) multiply_pairs_tile(own, slice, depth, nonzero, own_sums, &fetch, n, 0)
            FOR_ROWS(rows_of_tile(in, row), DENSE_PAIRS)
        }
    }
}
#endif

/* One panel's sums for up to ROWS_AT_ONCE rows.  Each slice is fetched while the one before is multiplied, the first of
 * panel number `next_panel` during the last. */
static void multiply_panel(const Operation *op, const Inputs *in, int64_t panel, int64_t next_panel, Workspace *own) {
    const int64_t first = panel * PANEL, width = op->out - first < PANEL ? op->out - first : PANEL;
    const int64_t item_bytes = op->type == FLOAT32 ? 4 : 2, word_inputs = op->rounds ? 2 : 1;
    const char *weights = (const char *)op->weight + first * op->in * item_bytes;
    const int may_be_sparse = op->sparse && in->rows <= SPARSE_ROWS;
    const char *next_weights = (const char *)op->weight + next_panel * PANEL * op->in * item_bytes;
    memset(own->sums, 0, (size_t)(in->rows * PANEL) * sizeof(float));
    for (int64_t start = 0; start < op->in; start += DEPTH) {
        const int64_t depth = op->in - start < DEPTH ? op->in - start : DEPTH;
        const int64_t word = start / word_inputs, words = depth / word_inputs;
        const void *slice = weights + start * width * item_bytes;
        const char *next = start + DEPTH < op->in ? (const char *)slice + depth * width * item_bytes : next_weights;
        int64_t count = -1;
        if (may_be_sparse)
            count = find_nonzero(tile_words(in, 0, word), in->rows, words, op->rounds ? 0x7fff7fffu : 0x7fffffffu,
                                 own->nonzero);
        const Fetch fetch = fetch_during(in, words, count, next, DEPTH * width * item_bytes);
#if defined(__AVX512BF16__)
        if (op->rounds) {
            if (width < PANEL) {
                widen_pairs(slice, words, width, (uint16_t *)own->slice);
                slice = own->slice;
            }
            multiply_pairs_slice(in, word, slice, words, count, own->nonzero, own->sums, fetch);
            continue;
        }
#endif
        multiply_any_slice(in, word, slice, depth, width, op->type, count, fetch, own);
    }
}

/* Bias, activation and residual, into the output. */
static void finish_panel(const Operation *op, int64_t first_row, int64_t rows, int64_t panel, const float *sums) {
    const int64_t first = panel * PANEL;
    const int64_t width = op->out - first < PANEL ? op->out - first : PANEL;
    for (int64_t row = 0; row < rows; row++) {
        float *to = op->output + (first_row + row) * op->out + first;
        const float *from = sums + row * PANEL;
        const int64_t whole = width - width % LANES;
        for (int64_t i = 0; i < whole; i += LANES) {
            Vector value = add(load(from + i), op->bias ? load(op->bias + first + i) : broadcast(0.0f));
            if (op->finish == STORE_RELU_SQUARED) {
                value = larger(value, broadcast(0.0f));
                value = multiply(value, value);
            }
            store(to + i, op->finish == ADD ? add(load(to + i), value) : value);
        }
        for (int64_t i = whole; i < width; i++) {
            float value = from[i] + (op->bias ? op->bias[first + i] : 0.0f);
            if (op->finish == STORE_RELU_SQUARED) {
                value = value > 0.0f ? value : 0.0f;
                value *= value;
            }
            to[i] = op->finish == ADD ? to[i] + value : value;
        }
    }
}

#endif
