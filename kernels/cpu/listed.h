/* Products behind squared ReLU with more rows than share their zeros: each row has a list of its inputs that are not zero.
 *
 * A sum has the same bits as over all inputs: it begins with +0, and what is left out would add zero to it.
 *
 * A row lies as its values [in] float32, their places within their slice [in] bytes, and how many each slice has
 * [in / DEPTH] int32; both lists begin anew with each slice.  A tile in which few inputs are zero lies as tiles.h says,
 * in the same room, and has NOT_LISTED for its last number.
 */
#ifndef PERSIMMON_LISTED_H
#define PERSIMMON_LISTED_H

#include "linear.h"

#define NOT_LISTED (-1)
/* Words of 32 bits that a row takes. */
#define LISTED_WORDS(in) ((in) + (in) / 4 + (in) / DEPTH)
/* Lists are padded with zeros to a multiple of this, and to the longest of the rows that are multiplied together: loops
 * whose length the processor cannot foresee cost more. */
#define LISTED_STEP 4
/* Rows whose sums are in registers together: enough that additions need not wait for one another. */
#define LISTED_ROWS (LANES == 16 ? 2 : 1)

/* Whether a product of `rows` rows has lists, where enough inputs are zero. */
INLINE int lists_nonzero(const Operation *op, int64_t rows) {
    return op->sparse && rows > SPARSE_ROWS && op->in % DEPTH == 0 && !op->rounds && !op->integer && op->type <= FLOAT32;
}

/* One row's list of a slice. */
typedef struct {
    const float *values;
    const uint8_t *places;
    int64_t count;
} Listed;

INLINE Listed listed_slice(const uint32_t *row, int64_t in, int64_t slice) {
    const uint8_t *places = (const uint8_t *)(row + in);
    const int32_t *counts = (const int32_t *)(places + in);
    return (Listed){(const float *)row + slice * DEPTH, places + slice * DEPTH, counts[slice]};
}

/* How many of a row's inputs are not zero. */
static int64_t count_nonzero(const float *from, int64_t in) {
    int64_t count = 0;
    for (int64_t i = 0; i < in; i += LANES) count += __builtin_popcount(nonzero_lanes(load(from + i)));
    return count;
}

#if LANES == 8
/* For each set of lanes their numbers, one after the other, a byte each. */
static uint64_t lanes_of[256];

__attribute__((constructor)) static void fill_lanes(void) {
    for (int set = 0; set < 256; set++)
        for (int lane = 7; lane >= 0; lane--)
            if (set >> lane & 1) lanes_of[set] = lanes_of[set] << 8 | (uint64_t)lane;
}
#endif

/* Writes a row's lists. */
static void list_row(const float *from, int64_t in, uint32_t *row) {
    uint8_t *all_places = (uint8_t *)(row + in);
    int32_t *counts = (int32_t *)(all_places + in);
    for (int64_t slice = 0; slice < in / DEPTH; slice++) {
        float *values = (float *)row + slice * DEPTH;
        uint8_t *places = all_places + slice * DEPTH;
        int count = 0;
        /* What is written beyond the end of a list lies within its slice. */
        for (int i = 0; i < DEPTH; i += LANES) {
            const Vector input = load(from + slice * DEPTH + i);
            const uint32_t nonzero = nonzero_lanes(input);
#if LANES == 16
            const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const __m512i found = _mm512_maskz_compress_epi32((__mmask16)nonzero, lanes);
            store(values + count, _mm512_maskz_compress_ps((__mmask16)nonzero, input));
            _mm_storeu_si128((void *)(places + count), _mm512_cvtepi32_epi8(_mm512_add_epi32(found, _mm512_set1_epi32(i))));
#else
            const uint64_t found = lanes_of[nonzero], all = found + (uint64_t)i * 0x0101010101010101u;
            const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)found));
            store(values + count, _mm256_permutevar8x32_ps(input, lanes));
            memcpy(places + count, &all, sizeof all);
#endif
            count += __builtin_popcount(nonzero);
        }
        counts[slice] = count;
    }
}

/* Pads the lists of rows that are multiplied together. */
static void pad_lists(uint32_t *first, int64_t in, int64_t rows) {
    for (int64_t slice = 0; slice < in / DEPTH; slice++) {
        int64_t longest = 0;
        for (int64_t row = 0; row < rows; row++) {
            const int64_t count = listed_slice(first + row * LISTED_WORDS(in), in, slice).count;
            longest = count > longest ? count : longest;
        }
        longest = (longest + LISTED_STEP - 1) / LISTED_STEP * LISTED_STEP;
        for (int64_t row = 0; row < rows; row++) {
            uint32_t *own = first + row * LISTED_WORDS(in);
            float *values = (float *)own + slice * DEPTH;
            uint8_t *places = (uint8_t *)(own + in);
            int32_t *count = (int32_t *)(places + in) + slice;
            for (int64_t i = *count; i < longest; i++) {
                values[i] = 0.0f;
                places[slice * DEPTH + i] = 0;
            }
            *count = (int32_t)longest;
        }
    }
}

/* Lists the inputs of a tile's rows; or puts their words side by side, if more than five eighths of them are not zero. */
static void place_listed_tile(uint32_t *to, int64_t in, const char *const *from, int64_t rows) {
    int64_t count = 0;
    for (int64_t row = 0; row < rows; row++) count += count_nonzero((const float *)from[row], in);
    if (count * 8 > rows * in * 5) {
        place_tile(to, in, from, rows);
        ((int32_t *)to)[rows * LISTED_WORDS(in) - 1] = NOT_LISTED;
        return;
    }
    for (int64_t row = 0; row < rows; row++) list_row((const float *)from[row], in, to + row * LISTED_WORDS(in));
    for (int64_t row = 0; row < rows; row += LISTED_ROWS)
        pad_lists(to + row * LISTED_WORDS(in), in, rows - row < LISTED_ROWS ? rows - row : LISTED_ROWS);
}

/* sums[row, :] += value * slice[place, :] for what `rows` neighbouring rows list, in order. */
INLINE void multiply_lists(const Listed *own, const void *slice, float *sums, Fetch *fetch, const int type,
                           const int rows) {
    Vector total[LISTED_ROWS][PANEL / LANES];
#pragma GCC unroll 2
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int v = 0; v < PANEL / LANES; v++) total[row][v] = load(sums + row * PANEL + v * LANES);
    for (int64_t first = 0; first < own[0].count; first += LISTED_STEP) {
        fetch_more(fetch);
#pragma GCC unroll 4
        for (int i = 0; i < LISTED_STEP; i++)
#pragma GCC unroll 2
            for (int row = 0; row < rows; row++) {
                const Vector input = broadcast(own[row].values[first + i]);
                const int64_t at = (int64_t)own[row].places[first + i] * PANEL;
#pragma GCC unroll 8
                for (int v = 0; v < PANEL / LANES; v++)
                    total[row][v] = multiply_add(input, load_as(slice, at + v * LANES, type), total[row][v]);
            }
    }
#pragma GCC unroll 2
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int v = 0; v < PANEL / LANES; v++) store(sums + row * PANEL + v * LANES, total[row][v]);
}

/* All rows times slice number `number`, [DEPTH, PANEL] of `type`; meanwhile `bytes` at `next` are fetched. */
INLINE void multiply_listed_slice(const Inputs *in, int64_t inputs, int64_t number, const void *slice, float *sums,
                                  const char *next, int64_t bytes, const int type) {
    const int64_t lines = (bytes + LINE_BYTES - 1) / LINE_BYTES;
    int64_t steps = 0;
    for (int64_t row = 0; row < in->rows; row++)
        steps += listed_slice(in->at + row * in->words, inputs, number).count / LISTED_STEP;
    Fetch fetch = {next, next + bytes, steps ? (lines * LISTED_ROWS + steps - 1) / steps : 0};
    Fetch of_tiles = fetch_of(next, bytes, in, DEPTH / FETCH_DEPTH(in->tile));
    for (int64_t row = 0; row < in->rows; row += in->tile) {
        const int64_t some = rows_of_tile(in, row);
        const uint32_t *words = in->at + row * in->words;
        float *own_sums = sums + row * PANEL;
        if (((const int32_t *)words)[some * in->words - 1] == NOT_LISTED) {
            const float *own = (const float *)words + number * DEPTH * some;
#define ALL_INPUTS(n) multiply_tile(own, slice, DEPTH, NULL, own_sums, &of_tiles, type, n, 0)
            FOR_ROWS(some, ALL_INPUTS)
#undef ALL_INPUTS
            continue;
        }
        for (int64_t first = 0; first < some; first += LISTED_ROWS) {
            Listed own[LISTED_ROWS];
            for (int64_t i = 0; i < LISTED_ROWS && first + i < some; i++)
                own[i] = listed_slice(words + (first + i) * in->words, inputs, number);
            if (some - first >= LISTED_ROWS) multiply_lists(own, slice, own_sums + first * PANEL, &fetch, type, LISTED_ROWS);
            else multiply_lists(own, slice, own_sums + first * PANEL, &fetch, type, 1);
        }
    }
}

/* As multiply_panel. */
static void multiply_listed_panel(const Operation *op, const Inputs *in, int64_t panel, int64_t next_panel,
                                  Workspace *own) {
    const int64_t first = panel * PANEL, width = op->out - first < PANEL ? op->out - first : PANEL;
    const int64_t item_bytes = op->type == FLOAT32 ? 4 : 2;
    const char *weights = (const char *)op->weight + first * op->in * item_bytes;
    const char *next_weights = (const char *)op->weight + next_panel * PANEL * op->in * item_bytes;
    memset(own->sums, 0, (size_t)(in->rows * PANEL) * sizeof(float));
    for (int64_t start = 0; start < op->in; start += DEPTH) {
        const void *slice = weights + start * width * item_bytes;
        const int64_t bytes = DEPTH * width * item_bytes;
        const char *next = start + DEPTH < op->in ? (const char *)slice + bytes : next_weights;
        if (width < PANEL || op->type != FLOAT32) {
            widen_any_slice(slice, DEPTH, width, op->type, own->slice);
            slice = own->slice;
        }
        multiply_listed_slice(in, op->in, start / DEPTH, slice, own->sums, next, bytes, FLOAT32);
    }
}

#endif
