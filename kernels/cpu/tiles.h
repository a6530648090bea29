/* How a product is cut into tiles, and how its inputs lie for them.
 *
 * A tile multiplies a few rows by some vectors of outputs, all sums in registers.  It takes inputs as words of 32 bits, one
 * for each row: a float, two numbers of 16 bits or four bytes.  The words of a tile's rows lie side by side, [words, rows],
 * so that a tile reads one stream from front to back; rows apart by a power of two would fall on each other in the
 * first-level cache.
 */
#ifndef PERSIMMON_TILES_H
#define PERSIMMON_TILES_H

#include "network.h"
#include "vectors.h"

/* Rows that share the weights in registers. */
#define TILE_ROWS 6
/* Rows whose sums wait together. */
#define ROWS_AT_ONCE 96
/* Vectors of outputs that a tile of this many rows computes: as many sums as fit in the registers, and enough of them
 * that additions need not wait for one another. */
#if LANES == 16
#define MAX_VECTORS 4
#define TILE_VECTORS(rows) 4
#else
#define MAX_VECTORS 8
#define TILE_VECTORS(rows) ((rows) == 1 ? 8 : (rows) <= 3 ? 4 : 2)
#endif

#define FOR_ROWS(rows, call)                                                                                          \
    switch (rows) {                                                                                                   \
        case 1: call(1); break;                                                                                       \
        case 2: call(2); break;                                                                                       \
        case 3: call(3); break;                                                                                       \
        case 4: call(4); break;                                                                                       \
        case 5: call(5); break;                                                                                       \
        default: call(6); break;                                                                                      \
    }

/* Rows of each tile but the last, which may have fewer: the largest share that tiles of TILE_ROWS can have alike. */
INLINE int64_t tile_rows(int64_t rows) {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    return (rows + tiles - 1) / tiles;
}

INLINE int64_t tile_count(int64_t rows) { return (rows + tile_rows(rows) - 1) / tile_rows(rows); }

/* Puts the words of a tile's rows side by side. */
INLINE void place_tile(uint32_t *to, int64_t words, const char *const *from, int64_t rows) {
    const int64_t size = sizeof *to, whole = words - words % 4;
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2) { /* four words of two rows at a time */
        for (int64_t i = 0; i < whole; i += 4) {
            const __m128i one = _mm_loadu_si128((const void *)(from[row] + i * size));
            const __m128i other = _mm_loadu_si128((const void *)(from[row + 1] + i * size));
            const __m128d first = _mm_castsi128_pd(_mm_unpacklo_epi32(one, other));
            const __m128d last = _mm_castsi128_pd(_mm_unpackhi_epi32(one, other));
            _mm_storel_pd((double *)(to + i * rows + row), first);
            _mm_storeh_pd((double *)(to + (i + 1) * rows + row), first);
            _mm_storel_pd((double *)(to + (i + 2) * rows + row), last);
            _mm_storeh_pd((double *)(to + (i + 3) * rows + row), last);
        }
        for (int64_t i = whole; i < words; i++)
            for (int64_t j = row; j < row + 2; j++) memcpy(to + i * rows + j, from[j] + i * size, (size_t)size);
    }
    if (rows == 1) memcpy(to, from[0], (size_t)(words * size));
    else if (row < rows)
        for (int64_t i = 0; i < words; i++) memcpy(to + i * rows + row, from[row] + i * size, (size_t)size);
}

/* Some rows of a product's inputs: whole tiles. */
typedef struct {
    const uint32_t *at; /* the first one's words */
    int64_t words;      /* of a row */
    int64_t rows;
    int64_t tile;       /* rows of each tile but the last of all */
} Inputs;

/* `rows` rows from `first` on, where tiles begin, of `all`. */
INLINE Inputs some_inputs(const void *inputs, int64_t words, int64_t all, int64_t first, int64_t rows) {
    return (Inputs){(const uint32_t *)inputs + first * words, words, rows, tile_rows(all)};
}

/* How many rows the tile has that begins at `row`. */
INLINE int64_t rows_of_tile(const Inputs *own, int64_t row) {
    return own->rows - row < own->tile ? own->rows - row : own->tile;
}

/* Its words from number `word` of each row on. */
INLINE const uint32_t *tile_words(const Inputs *own, int64_t row, int64_t word) {
    return own->at + row * own->words + word * rows_of_tile(own, row);
}

/* How often a slice of PANEL outputs is read: once by each tile for each of its vectors of outputs. */
INLINE int64_t passes_of(const Inputs *own) {
    return (own->rows + own->tile - 1) / own->tile * (PANEL / (TILE_VECTORS(own->tile) * LANES));
}

/* Memory that is fetched while something else is multiplied. */
typedef struct {
    const char *at, *end;
    int64_t lines; /* at once */
} Fetch;

#define LINE_BYTES 64

/* `times`: how often `fetch_more` is called in each pass. */
INLINE Fetch fetch_of(const char *at, int64_t bytes, const Inputs *in, int64_t times) {
    const int64_t calls = times * passes_of(in), lines = (bytes + LINE_BYTES - 1) / LINE_BYTES;
    return (Fetch){at, at + bytes, (lines + calls - 1) / calls};
}

INLINE void fetch_more(Fetch *fetch) {
    for (int64_t i = 0; i < fetch->lines && fetch->at < fetch->end; i++, fetch->at += LINE_BYTES)
        __builtin_prefetch(fetch->at);
}

#endif
