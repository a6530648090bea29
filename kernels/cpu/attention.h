/* Attention of one head of one sequence over a cache of floats, and which kind of cache there is.
 *
 * A head's tokens of a block are one tile of the cache: values [block_size, head_dim] as they come, keys turned,
 * [head_dim, block_size], so that a vector holds one dimension of many keys and scores need no sum across lanes.
 *
 * A query meets its keys segment by segment, whatever other queries run with it, so its bits do not depend on them.
 */
#ifndef PERSIMMON_ATTENTION_H
#define PERSIMMON_ATTENTION_H

#include "attention_int8.h"
#include "head.h"

/* Dimensions of values next to them, in pairs of vectors; and keys whose scores are summed together. */
#if LANES == 16
#define MAX_PAIRS 2
#define SCORE_WIDTH(queries) (2 * LANES)
#else
#define MAX_PAIRS 1
#define SCORE_WIDTH(queries) ((queries) == 1 ? 2 * LANES : LANES)
#endif

/* What a cache of `type` holds of a number: float16 saturates, since one infinity makes all that its sequence computes
 * later NaN. */
INLINE float storable(float value, const int type) {
    if (type != FLOAT16) return value;
    return value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value;
}

/* Writes the keys and values of all of the sequence's tokens in this step. */
INLINE void store_keys_values(const Head *own, const int64_t dim, const int type) {
    const int64_t block_size = own->op->block_size;
    float key[MAX_DIM];
    for (int64_t i = 0; i < own->count; i++) {
        const float *qkv = own->qkv + i * own->stride;
        const int64_t position = own->start + i, place = position % block_size;
        const int64_t tile = tile_of(own, position / block_size, dim);
        norm_and_turn(own, qkv + dim, i, 1, key, dim);
        for (int64_t d = 0; d < dim; d++)
            store_as(own->op->keys, tile + d * block_size + place, storable(key[d], type), type);
        for (int64_t d = 0; d < dim; d++)
            store_as(own->op->values, tile + place * dim + d, storable(qkv[2 * dim + d], type), type);
    }
}

/* Fetches `count` numbers into the processor's cache. */
INLINE void fetch(const char *from, const int numbers, const int type) {
    for (int64_t byte = 0; byte < numbers * (type == FLOAT32 ? 4 : 2); byte += 64) __builtin_prefetch(from + byte);
}

/* How well `queries` neighbouring queries match the keys of one segment, masked where a key comes after a query.  A score
 * is the sum of two sums, over the even and over the odd dimensions, so that fewer additions wait for one another.
 * `width` keys at a time, LANES or twice as many. */
INLINE void score_segment(const Head *own, const float query[][MAX_DIM], int64_t position, int64_t begin, int64_t end,
                          float scores[][SEGMENT], const int64_t dim, const int type, const int queries,
                          const int width) {
    const Operation *op = own->op;
    const int64_t block_size = op->block_size;
    const int pairs = width > LANES;
    for (int64_t at = begin; at < end; at += width) {
        const int64_t columns = tile_of(own, at / block_size, dim) + at % block_size;
        /* The next block is on its way meanwhile: keys, or after the last of them the first values. */
        const int64_t next_block = at / block_size + 1;
        const char *ahead = next_block * block_size < end
                                ? address(op->keys, tile_of(own, next_block, dim) + at % block_size, type)
                                : address(op->values, tile_of(own, begin / block_size, dim) + at % block_size, type);
        Pair even[QUERIES], odd[QUERIES];
#pragma GCC unroll 4
        for (int q = 0; q < queries; q++) even[q].one = even[q].other = odd[q].one = odd[q].other = broadcast(0.0f);
#define SCORE(d, total)                                                                                               \
    {                                                                                                                 \
        const int64_t from = columns + (d) * block_size;                                                              \
        const Vector none = broadcast(0.0f);                                                                          \
        Pair key = pairs ? load_pair_as(op->keys, from, type) : (Pair){load_as(op->keys, from, type), none};          \
        if (queries > 1) key = (Pair){kept(key.one), kept(key.other)};                                                \
        if (queries == 1) fetch(address(ahead, (d) * block_size, type), width, type);                                 \
        _Pragma("GCC unroll 4") for (int q = 0; q < queries; q++) {                                                   \
            const Vector own_query = broadcast(query[q][d]);                                                          \
            total[q].one = multiply_add(own_query, key.one, total[q].one);                                            \
            if (pairs) total[q].other = multiply_add(own_query, key.other, total[q].other);                           \
        }                                                                                                             \
    }
        int64_t d = 0;
        for (; d + 2 <= dim; d += 2) {
            SCORE(d, even)
            SCORE(d + 1, odd)
        }
        if (d < dim) SCORE(d, even)
#undef SCORE
#pragma GCC unroll 4
        for (int q = 0; q < queries; q++) {
            float *to = scores[q] + (at - begin);
            const Pair score = {add(even[q].one, odd[q].one), add(even[q].other, odd[q].other)};
            if (pairs) store_like(to, score, type);
            else store(to, score.one);
            for (int64_t lane = 0; lane < width; lane += LANES) {
                const int64_t seen = position + q + 1 - at - lane;
                if (seen < LANES) store(to + lane, first_lanes(load(to + lane), seen < 0 ? 0 : (int)seen, -INFINITY));
            }
        }
    }
}

/* Adds the values of one segment's keys, weighted, to `width` sums from `first` on: LANES, or an even number of vectors.
 * `after` is what will be read then, a tile. */
INLINE void add_values(const Head *own, int64_t begin, int64_t end, float weights[][SEGMENT], float sums[][MAX_DIM],
                       int64_t first, const char *after, const int64_t dim, const int type, const int queries,
                       const int width) {
    const Operation *op = own->op;
    const int64_t block_size = op->block_size;
    const int pairs = width / (2 * LANES);
    const Vector none = broadcast(0.0f);
    Pair total[QUERIES][MAX_PAIRS];
#pragma GCC unroll 4
    for (int q = 0; q < queries; q++) {
        if (pairs == 0) total[q][0] = (Pair){load(sums[q] + first), none};
#pragma GCC unroll 2
        for (int p = 0; p < pairs; p++) total[q][p] = load_like(sums[q] + first + p * 2 * LANES, type);
    }
    for (int64_t block = begin; block < end; block += block_size) {
        const int64_t tile = tile_of(own, block / block_size, dim) + first;
        const int64_t keys = end - block < block_size ? end - block : block_size;
        /* The row of values that lies a block ahead is on its way meanwhile, or, in rows as long, what comes after. */
        const int64_t next = block + block_size;
        const char *ahead = next < end ? address(op->values, tile_of(own, next / block_size, dim) + first, type) : after;
        const char *behind = address(after, first + (next - end) * dim, type);
        for (int64_t key = 0; key < keys; key++) {
            if (queries == 1) fetch(address(next + key < end ? ahead : behind, key * dim, type), width, type);
            Pair value[MAX_PAIRS];
            if (pairs == 0) value[0] = (Pair){load_as(op->values, tile + key * dim, type), none};
#pragma GCC unroll 2
            for (int p = 0; p < pairs; p++) value[p] = load_pair_as(op->values, tile + key * dim + p * 2 * LANES, type);
#pragma GCC unroll 4
            for (int q = 0; q < queries; q++) {
                const Vector weight = broadcast(weights[q][block - begin + key]);
                if (pairs == 0) total[q][0].one = multiply_add(weight, value[0].one, total[q][0].one);
#pragma GCC unroll 2
                for (int p = 0; p < pairs; p++) {
                    total[q][p].one = multiply_add(weight, value[p].one, total[q][p].one);
                    total[q][p].other = multiply_add(weight, value[p].other, total[q][p].other);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int q = 0; q < queries; q++) {
        if (pairs == 0) store(sums[q] + first, total[q][0].one);
#pragma GCC unroll 2
        for (int p = 0; p < pairs; p++) store_like(sums[q] + first + p * 2 * LANES, total[q][p], type);
    }
}

/* Attention of `queries` neighbouring tokens, the first of them number `first` of the sequence's in this step. */
INLINE void attend(const Head *own, int64_t first, const int64_t dim, const int type, const int queries) {
    const Operation *op = own->op;
    const int64_t position = own->start + first;
    float query[QUERIES][MAX_DIM], sums[QUERIES][MAX_DIM], weights[QUERIES][SEGMENT];
    float highest[QUERIES], total[QUERIES];
    const float scale = 1.0f / sqrtf((float)dim);
    for (int q = 0; q < queries; q++) {
        norm_and_turn(own, own->qkv + (first + q) * own->stride, first + q, 0, query[q], dim);
        for (int64_t d = 0; d < dim; d++) {
            query[q][d] *= scale;
            sums[q][d] = 0.0f;
        }
        highest[q] = -INFINITY;
        total[q] = 0.0f;
    }
    const int64_t length = position + queries; /* keys that the last of them sees */
    for (int64_t begin = 0; begin < length; begin += SEGMENT) {
        const int64_t end = length - begin < SEGMENT ? length : begin + SEGMENT;
        if (op->block_size % SCORE_WIDTH(queries) == 0)
            score_segment(own, query, position, begin, end, weights, dim, type, queries, SCORE_WIDTH(queries));
        else
            score_segment(own, query, position, begin, end, weights, dim, type, queries, LANES);
        for (int q = 0; q < queries; q++) {
            Vector most = broadcast(-INFINITY), some = broadcast(0.0f);
            for (int64_t at = 0; at < end - begin; at += LANES) most = larger(most, load(weights[q] + at));
            const float before = highest[q], now = maximum(most) > before ? maximum(most) : before;
            for (int64_t at = 0; at < end - begin; at += LANES) {
                const Vector weight = exponential(subtract(load(weights[q] + at), broadcast(now)));
                store(weights[q] + at, weight);
                some = add(some, weight);
            }
            highest[q] = now;
            if (begin == 0) {
                total[q] = sum(some);
                continue;
            }
            float shrink[LANES];
            store(shrink, exponential(broadcast(before - now)));
            total[q] = total[q] * shrink[0] + sum(some);
            for (int64_t d = 0; d < dim; d++) sums[q][d] *= shrink[0];
        }
        const int64_t more = end < length ? end / op->block_size : 0;
        const char *after = end < length || !own->next ? address(op->keys, tile_of(own, more, dim), type) : own->next;
        int64_t d = 0;
        for (; d + MAX_PAIRS * 2 * LANES <= dim; d += MAX_PAIRS * 2 * LANES)
            add_values(own, begin, end, weights, sums, d, after, dim, type, queries, MAX_PAIRS * 2 * LANES);
        for (; d + LANES <= dim; d += LANES)
            add_values(own, begin, end, weights, sums, d, after, dim, type, queries, LANES);
        for (; d < dim; d++)
            for (int64_t at = begin; at < end; at++) {
                const int64_t place = tile_of(own, at / op->block_size, dim) + at % op->block_size * dim + d;
                const float value = item_as(op->values, place, type);
                for (int q = 0; q < queries; q++) sums[q][d] = fmaf(weights[q][at - begin], value, sums[q][d]);
            }
    }
    for (int q = 0; q < queries; q++)
        for (int64_t d = 0; d < dim; d++) own->out[(first + q) * own->out_stride + d] = sums[q][d] / total[q];
}

INLINE void attend_all(const Head *own, const int64_t dim, const int type) {
    store_keys_values(own, dim, type);
    int64_t first = 0;
    for (; first + QUERIES <= own->count; first += QUERIES) attend(own, first, dim, type, QUERIES);
    for (; first < own->count; first++) attend(own, first, dim, type, 1);
}

static void attend_head(const Head *own) {
    const Operation *op = own->op;
    if (op->head_dim == 64) { /* Adept's; the compiler unrolls what it knows */
        if (op->type == INT8) attend_all_int8(own, 64);
        else if (op->type == FLOAT16) attend_all(own, 64, FLOAT16);
        else if (op->type == BFLOAT16) attend_all(own, 64, BFLOAT16);
        else attend_all(own, 64, FLOAT32);
    } else {
        if (op->type == INT8) attend_all_int8(own, op->head_dim);
        else if (op->type == FLOAT16) attend_all(own, op->head_dim, FLOAT16);
        else if (op->type == BFLOAT16) attend_all(own, op->head_dim, BFLOAT16);
        else attend_all(own, op->head_dim, FLOAT32);
    }
}

#endif
