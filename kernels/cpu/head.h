/* What attention works on: one head of one sequence, its queries and keys after LayerNorm and rotary embedding, and where
 * its tokens lie in the cache.  Knows no type of the cache. */
#ifndef PERSIMMON_HEAD_H
#define PERSIMMON_HEAD_H

#include "network.h"
#include "norm.h"
#include "vectors.h"

/* Queries that share the keys and values in registers. */
#define QUERIES 4
/* Keys whose weights wait together; a multiple of every block size.  Across segments, sums are rescaled to the highest
 * score so far (online softmax, Milakov and Gimelshein, arXiv:1805.02867). */
#define SEGMENT 1024
#define MAX_DIM 256

/* What one head of one sequence works on. */
typedef struct {
    const Operation *op;
    const float *qkv;      /* the head's query of the sequence's first token; the next token's lies `stride` on */
    int64_t stride;
    float *out;            /* likewise, `out_stride` on */
    int64_t out_stride;
    int64_t head;
    int64_t start;         /* position of the first token */
    int64_t count;
    const int32_t *table;
    const float *cosine, *sine; /* the first token's angles; the next one's lie rotary / 2 on */
    const char *next;      /* the keys that the same thread reads next, a tile; or null */
} Head;

/* LayerNorm, where there is one, then rotary embedding of token number `token` of the sequence's in this step; `which` is
 * 0 for queries and 1 for keys. */
INLINE void norm_and_turn(const Head *own, const float *from, int64_t token, int which, float *to, const int64_t dim) {
    const Operation *op = own->op;
    if (op->norm_weight) {
        const float *weight = op->norm_weight + which * dim, *bias = op->norm_bias + which * dim;
        layer_norm(from, to, weight, bias, (float)op->eps, dim);
    } else {
        memcpy(to, from, (size_t)dim * sizeof(float));
    }
    const int64_t half = op->rotary / 2;
    const float *cosine = own->cosine + token * half, *sine = own->sine + token * half;
    for (int64_t i = 0; i < half; i++) {
        const float left = to[i], right = to[half + i];
        to[i] = left * cosine[i] - right * sine[i];
        to[half + i] = right * cosine[i] + left * sine[i];
    }
}

/* The place of a head's tile in the cache, in numbers. */
INLINE int64_t tile_of(const Head *own, int64_t block, const int64_t dim) {
    return ((int64_t)own->table[block] * own->op->heads + own->head) * own->op->block_size * dim;
}

/* The address of a number in the cache. */
INLINE const char *address(const void *from, int64_t index, const int type) {
    return (const char *)from + index * (type == FLOAT32 ? 4 : type == INT8 ? 1 : 2);
}

#endif
