/* Attention of one head of one sequence over a cache of 8-bit numbers with a scale for each token.
 *
 * Both products are exact integer dot products, of pairs of 16-bit numbers.  The cache's numbers are widened in registers;
 * a query is rounded to 16 bits, and so are a block's weights, relative to the largest of the block: errors of 2^-16, next
 * to the cache's 2^-8.  Sums of integers have the same bits in any order.
 *
 * So that pairs lie side by side, a head's tile of a block holds keys as [head_dim / 2, block_size, 2], pairs of dimensions,
 * and of an odd head_dim the last dimension after them; values as [block_size / 2, head_dim, 2], pairs of tokens.  Of a
 * tile's scales, first come those of all keys, then those of all values.
 */
#ifndef PERSIMMON_ATTENTION_INT8_H
#define PERSIMMON_ATTENTION_INT8_H

#include "head.h"
#include "integers.h"

#define LARGEST_INT8 127.0f
#define LARGEST_INT16 32767.0f
/* What is smaller is zero: the reciprocals of the smallest numbers are infinite. */
#define TINY 1e-30f
/* Bytes of the cache that are on their way while others are multiplied. */
#define AHEAD_BYTES 8192
/* Sums of scores that a single query has for the same keys, so that additions need not wait for one another. */
#define SPLITS 4

/* Vectors of values whose sums are in registers. */
#if LANES == 16
#define VALUE_VECTORS(queries) 4
#else
#define VALUE_VECTORS(queries) ((queries) == 1 ? 8 : 2)
#endif
#define MAX_VALUE_VECTORS 8

INLINE Integers repeat_pair(const int16_t *from) {
    int32_t pair;
    memcpy(&pair, from, sizeof pair);
    return repeat(pair);
}

/* Adds a pair's products of 16 bits to each sum. */
INLINE Integers dot_pairs(Integers sums, Integers a, Integers b) {
#if defined(__AVX512VNNI__)
    return (Integers)_mm512_dpwssd_epi32(RAW(sums), RAW(a), RAW(b));
#elif defined(__AVXVNNI__)
    return (Integers)_mm256_dpwssd_avx_epi32(RAW(sums), RAW(a), RAW(b));
#elif LANES == 16
    return sums + (Integers)_mm512_madd_epi16(RAW(a), RAW(b));
#else
    return sums + (Integers)_mm256_madd_epi16(RAW(a), RAW(b));
#endif
}

/* The largest magnitude; NaN if there is one.  Numbers without a sign are in the order of their bits, NaN the largest.
 * What follows the numbers, up to a whole vector, is zero. */
INLINE float largest_magnitude(const float *from, const int64_t count) {
    Integers most = repeat(0);
    for (int64_t i = 0; i < count; i += LANES) most = largest_integers(most, without_sign(load(from + i)));
    const int32_t bits = largest_integer(most);
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* A row of a head, followed by zeros up to a whole vector. */
INLINE const float *padded(const float *row, float *copy, const int64_t dim) {
    if (dim % LANES == 0) return row;
    memset(copy, 0, MAX_DIM * sizeof(float));
    memcpy(copy, row, (size_t)dim * sizeof(float));
    return copy;
}

/* Rounds a row as `reference_cache.quantize_rows` does; returns its scale. */
INLINE uint16_t round_for_cache(const float *row, int8_t *numbers, const int64_t dim) {
    float copy[MAX_DIM];
    row = padded(row, copy, dim);
    const uint16_t rounded = to_bfloat16(largest_magnitude(row, dim) / LARGEST_INT8);
    const float scale = from_bfloat16(rounded);
    const int usable = scale > 0.0f && scale < INFINITY;
    for (int64_t d = 0; d < dim; d += LANES) {
        /* Packing saturates at 127, and no number rounds below -127.49, but where the scale is subnormal. */
        const Integers whole = to_integers(divide(load(row + d), broadcast(usable ? scale : 1.0f)));
        store_bytes(numbers + d, usable ? largest_integers(whole, repeat(-127)) : repeat(0));
    }
    return rounded;
}

/* Where the scales of a head's keys of a block begin; those of its values come block_size later. */
INLINE uint16_t *scales_of(const Head *own, int64_t block) {
    const Operation *op = own->op;
    return op->cache_scales + ((int64_t)own->table[block] * op->heads + own->head) * 2 * op->block_size;
}

/* Writes the keys and values of all of the sequence's tokens in this step. */
INLINE void store_keys_values_int8(const Head *own, const int64_t dim) {
    const Operation *op = own->op;
    const int64_t block_size = op->block_size;
    float key[MAX_DIM];
    int8_t numbers[MAX_DIM + LANES];
    for (int64_t i = 0; i < own->count; i++) {
        const float *qkv = own->qkv + i * own->stride;
        const int64_t position = own->start + i, place = position % block_size, block = position / block_size;
        const int64_t tile = tile_of(own, block, dim);
        uint16_t *scales = scales_of(own, block);
        norm_and_turn(own, qkv + dim, i, 1, key, dim);
        scales[place] = round_for_cache(key, numbers, dim);
        int8_t *keys = (int8_t *)op->keys + tile;
        for (int64_t d = 0; d + 2 <= dim; d += 2) {
            keys[d * block_size + 2 * place] = numbers[d];
            keys[d * block_size + 2 * place + 1] = numbers[d + 1];
        }
        if (dim % 2) keys[(dim - 1) * block_size + place] = numbers[dim - 1];
        scales[block_size + place] = round_for_cache(qkv + 2 * dim, numbers, dim);
        int8_t *values = (int8_t *)op->values + tile + place / 2 * 2 * dim + place % 2;
        for (int64_t d = 0; d < dim; d++) values[2 * d] = numbers[d];
    }
}

/* What comes AHEAD_BYTES after a tile: within a segment all keys are read, then all values; then the next segment or the
 * next head follows.  `number` counts a segment's tiles. */
INLINE const char *tile_ahead(const Head *own, int64_t begin, int64_t end, int64_t length, int64_t number,
                              const int64_t dim) {
    const Operation *op = own->op;
    const int64_t block_size = op->block_size, first = begin / block_size;
    const int64_t blocks = (end - begin + block_size - 1) / block_size;
    const int64_t tile_bytes = block_size * dim;
    int64_t block = first + number + (AHEAD_BYTES + tile_bytes - 1) / tile_bytes, head = 0;
    if (block >= first + blocks) {
        block -= blocks;
        if (block < first + blocks) return (const char *)op->values + tile_of(own, block, dim);
        head = end == length;
        if (head) block -= first + blocks;
        if (block * block_size >= length || (head && !own->next)) return NULL;
    }
    const uint16_t *scales = scales_of(own, block) + head * 2 * block_size;
    __builtin_prefetch(scales);
    __builtin_prefetch(scales + block_size);
    return (const char *)op->keys + tile_of(own, block, dim) + head * tile_bytes;
}

/* How well `queries` neighbouring queries, whose scales are `factors`, match the keys of one segment, masked where a key
 * comes after a query; `vectors` of keys at a time. */
INLINE void score_int8(const Head *own, const int16_t query[][MAX_DIM], const float *factors, int64_t position,
                       int64_t begin, int64_t end, int64_t length, float scores[][SEGMENT], const int64_t dim,
                       const int queries, const int vectors) {
    const Operation *op = own->op;
    const int64_t block_size = op->block_size, pairs = dim / 2;
    const int splits = queries == 1 ? SPLITS : 1;
    const int row_bytes = 2 * vectors * LANES;
    const char *ahead = NULL;
    for (int64_t at = begin; at < end; at += vectors * LANES) {
        const int64_t block = at / block_size, place = at % block_size;
        const int8_t *keys = (const int8_t *)op->keys + tile_of(own, block, dim) + 2 * place;
        const uint16_t *scales = scales_of(own, block) + place;
        if (queries == 1 && place == 0) {
            ahead = tile_ahead(own, begin, end, length, block - begin / block_size, dim);
            if (!ahead) ahead = (const char *)keys;
        }
        Integers total[QUERIES][SPLITS][2];
#pragma GCC unroll 4
        for (int q = 0; q < queries; q++)
#pragma GCC unroll 4
            for (int s = 0; s < splits; s++)
#pragma GCC unroll 2
                for (int v = 0; v < vectors; v++) total[q][s][v] = repeat(0);
#define SCORE(pair, s)                                                                                                 \
    {                                                                                                                  \
        const int8_t *from = keys + (pair) * 2 * block_size;                                                           \
        Integers key[2];                                                                                               \
        _Pragma("GCC unroll 2") for (int v = 0; v < vectors; v++) key[v] = load_pairs(from + 2 * v * LANES);           \
        _Pragma("GCC unroll 4") for (int q = 0; q < queries; q++) {                                                    \
            const Integers own_query = repeat_pair(query[q] + 2 * (pair));                                          \
            _Pragma("GCC unroll 2") for (int v = 0; v < vectors; v++) total[q][s][v] =                                 \
                dot_pairs(total[q][s][v], key[v], own_query);                                                       \
        }                                                                                                              \
    }
        int64_t pair = 0;
        for (; pair + splits <= pairs; pair += splits) {
#pragma GCC unroll 4
            for (int s = 0; s < splits; s++) {
                if (queries == 1 && (row_bytes >= 64 || s % (64 / row_bytes) == 0)) __builtin_prefetch(ahead + s * row_bytes);
                SCORE(pair + s, s)
            }
            ahead += splits * row_bytes;
        }
        for (; pair < pairs; pair++) SCORE(pair, 0)
#undef SCORE
#pragma GCC unroll 4
        for (int q = 0; q < queries; q++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                Integers whole = total[q][0][v];
#pragma GCC unroll 4
                for (int s = 1; s < splits; s++) whole += total[q][s][v];
                Vector score = to_floats(whole);
                if (dim % 2) {
                    float last[LANES];
                    const int8_t *from = (const int8_t *)op->keys + tile_of(own, block, dim) + (dim - 1) * block_size + place;
                    for (int lane = 0; lane < LANES; lane++) last[lane] = (float)(from[v * LANES + lane] * query[q][dim - 1]);
                    score = add(score, load(last));
                }
                score = multiply(score, multiply(broadcast(factors[q]), load_bfloat16(scales + v * LANES)));
                float *to = scores[q] + (at - begin) + v * LANES;
                const int64_t seen = position + q + 1 - at - v * LANES;
                store(to, seen < LANES ? first_lanes(score, seen < 0 ? 0 : (int)seen, -INFINITY) : score);
            }
    }
}

/* Turns the scores of one segment's keys into weights for the numbers of their values: 16-bit numbers, and for each block
 * a power of two that they are multiplied by.  `seen` keys from the first are not masked.  Returns the sum of the weights
 * without their values' scales; NaN if one of these is not finite. */
INLINE float weigh_int8(const Head *own, const float *scores, int64_t begin, int64_t end, int64_t seen, float highest,
                        int16_t *weights, float *factors) {
    const Operation *op = own->op;
    const int64_t block_size = op->block_size;
    const Vector zero = broadcast(0.0f);
    Vector some = zero, finite = zero;
    for (int64_t block = begin; block < end; block += block_size) {
        const int64_t count = end - block < block_size ? end - block : block_size, first = block - begin;
        const uint16_t *scales = scales_of(own, block / block_size) + block_size;
        float scaled[64];
        Vector most = zero;
        for (int64_t at = 0; at < count; at += LANES) {
            const Vector weight = exponential(subtract(load(scores + first + at), broadcast(highest)));
            Vector own_scaled = multiply(weight, load_bfloat16(scales + at));
            const int64_t left = seen - first - at;
            if (left < LANES) own_scaled = first_lanes(own_scaled, left < 0 ? 0 : (int)left, 0.0f);
            some = add(some, weight);
            finite = multiply_add(own_scaled, zero, finite);
            most = larger(most, own_scaled);
            store(scaled + at, own_scaled);
        }
        /* The largest is at least 2^14 of the factor, and saturates where it rounds to 2^15. */
        uint32_t exponent;
        const float largest = maximum(most) > TINY ? maximum(most) : TINY;
        memcpy(&exponent, &largest, sizeof exponent);
        exponent &= 0x7f800000u;
        const uint32_t factor = exponent - (14u << 23), inverse = (254u << 23) - factor;
        memcpy(factors + first / block_size, &factor, sizeof factor);
        float by;
        memcpy(&by, &inverse, sizeof by);
        for (int64_t at = 0; at < count; at += LANES)
            store_words(weights + first + at, to_integers(multiply(load(scaled + at), broadcast(by))));
    }
    return sum(add(some, finite));
}

/* Adds the values of one segment's keys, weighted, to `vectors` of sums from `first` on. */
INLINE void add_values_int8(const Head *own, int64_t begin, int64_t end, int64_t length, const int16_t weights[][SEGMENT],
                            const float factors[][SEGMENT / 16], float sums[][MAX_DIM], int64_t first, const int64_t dim,
                            const int queries, const int vectors) {
    const Operation *op = own->op;
    const int64_t block_size = op->block_size;
    const int64_t blocks = (end - begin + block_size - 1) / block_size;
    for (int64_t block = begin; block < end; block += block_size) {
        const int64_t keys = end - block < block_size ? end - block : block_size, number = (block - begin) / block_size;
        const int8_t *tile = (const int8_t *)op->values + tile_of(own, block / block_size, dim) + 2 * first;
        const char *ahead = NULL;
        if (queries == 1) ahead = tile_ahead(own, begin, end, length, blocks + number, dim);
        ahead = ahead ? ahead + 2 * first : (const char *)tile;
        Integers total[QUERIES][MAX_VALUE_VECTORS];
#pragma GCC unroll 4
        for (int q = 0; q < queries; q++)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) total[q][v] = repeat(0);
        for (int64_t key = 0; key < keys; key += 2) {
            Integers value[MAX_VALUE_VECTORS];
            if (queries == 1)
                for (int byte = 0; byte < 2 * vectors * LANES; byte += 64) __builtin_prefetch(ahead + key * dim + byte);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) value[v] = load_pairs(tile + key * dim + 2 * v * LANES);
#pragma GCC unroll 4
            for (int q = 0; q < queries; q++) {
                const Integers weight = repeat_pair(weights[q] + (block - begin) + key);
#pragma GCC unroll 8
                for (int v = 0; v < vectors; v++) total[q][v] = dot_pairs(total[q][v], value[v], weight);
            }
        }
#pragma GCC unroll 4
        for (int q = 0; q < queries; q++) {
            const Vector factor = broadcast(factors[q][number]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) {
                float *to = sums[q] + first + v * LANES;
                store(to, multiply_add(factor, to_floats(total[q][v]), load(to)));
            }
        }
    }
}

/* The same for a single dimension. */
INLINE void add_value_int8(const Head *own, int64_t begin, int64_t end, const int16_t weights[][SEGMENT],
                           const float factors[][SEGMENT / 16], float sums[][MAX_DIM], int64_t d, const int64_t dim,
                           const int queries) {
    const int64_t block_size = own->op->block_size;
    for (int64_t block = begin; block < end; block += block_size) {
        const int64_t keys = end - block < block_size ? end - block : block_size;
        const int8_t *tile = (const int8_t *)own->op->values + tile_of(own, block / block_size, dim) + 2 * d;
        for (int q = 0; q < queries; q++) {
            int32_t total = 0;
            for (int64_t key = 0; key < keys; key++)
                total += weights[q][block - begin + key] * tile[key / 2 * 2 * dim + key % 2];
            sums[q][d] = fmaf(factors[q][(block - begin) / block_size], (float)total, sums[q][d]);
        }
    }
}

/* Attention of `queries` neighbouring tokens, the first of them number `first` of the sequence's in this step. */
INLINE void attend_int8(const Head *own, int64_t first, const int64_t dim, const int queries) {
    const Operation *op = own->op;
    const int64_t position = own->start + first;
    float turned[MAX_DIM], sums[QUERIES][MAX_DIM], scores[QUERIES][SEGMENT];
    float factors[QUERIES], block_factors[QUERIES][SEGMENT / 16], highest[QUERIES], total[QUERIES];
    int16_t query[QUERIES][MAX_DIM], weights[QUERIES][SEGMENT];
    for (int q = 0; q < queries; q++) {
        norm_and_turn(own, own->qkv + (first + q) * own->stride, first + q, 0, turned, dim);
        for (int64_t d = dim; d % LANES; d++) turned[d] = 0.0f;
        const float most = largest_magnitude(turned, dim);
        const float inverse = most > TINY && most < INFINITY ? LARGEST_INT16 / most : 0.0f;
        for (int64_t d = 0; d < dim; d += LANES)
            store_words(query[q] + d, to_integers(multiply(load(turned + d), broadcast(inverse))));
        factors[q] = most / LARGEST_INT16 / sqrtf((float)dim);
        for (int64_t d = 0; d < dim; d++) sums[q][d] = 0.0f;
        highest[q] = -INFINITY;
        total[q] = 0.0f;
    }
    const int64_t length = position + queries; /* keys that the last of them sees */
    for (int64_t begin = 0; begin < length; begin += SEGMENT) {
        const int64_t end = length - begin < SEGMENT ? length : begin + SEGMENT;
        if (op->block_size % (2 * LANES) == 0)
            score_int8(own, query, factors, position, begin, end, length, scores, dim, queries, 2);
        else
            score_int8(own, query, factors, position, begin, end, length, scores, dim, queries, 1);
        for (int q = 0; q < queries; q++) {
            Vector most = broadcast(-INFINITY);
            for (int64_t at = 0; at < end - begin; at += LANES) most = larger(most, load(scores[q] + at));
            const float before = highest[q], now = maximum(most) > before ? maximum(most) : before;
            const int64_t seen = position + q + 1 - begin;
            const float some = weigh_int8(own, scores[q], begin, end, seen, now, weights[q], block_factors[q]);
            highest[q] = now;
            if (begin == 0) {
                total[q] = some;
                continue;
            }
            float shrink[LANES];
            store(shrink, exponential(broadcast(before - now)));
            total[q] = total[q] * shrink[0] + some;
            for (int64_t d = 0; d < dim; d++) sums[q][d] *= shrink[0];
        }
        int64_t d = 0;
        for (; d + VALUE_VECTORS(queries) * LANES <= dim; d += VALUE_VECTORS(queries) * LANES)
            add_values_int8(own, begin, end, length, weights, block_factors, sums, d, dim, queries, VALUE_VECTORS(queries));
        for (; d + LANES <= dim; d += LANES)
            add_values_int8(own, begin, end, length, weights, block_factors, sums, d, dim, queries, 1);
        for (; d < dim; d++) add_value_int8(own, begin, end, weights, block_factors, sums, d, dim, queries);
    }
    for (int q = 0; q < queries; q++)
        for (int64_t d = 0; d < dim; d++) own->out[(first + q) * own->out_stride + d] = sums[q][d] / total[q];
}

INLINE void attend_all_int8(const Head *own, const int64_t dim) {
    store_keys_values_int8(own, dim);
    int64_t first = 0;
    for (; first + QUERIES <= own->count; first += QUERIES) attend_int8(own, first, dim, QUERIES);
    for (; first < own->count; first++) attend_int8(own, first, dim, 1);
}

#endif
