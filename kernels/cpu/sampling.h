/* One token from a row of logits: temperature, then min-p, top-k and top-p, each on what the one before kept, then a draw.
 *
 * A draw is the inverse of the cumulative distribution, in the order of ids, at a number that depends on the row's seed,
 * sample and position: what `model.sampler` does in torch.
 */
#ifndef PERSIMMON_SAMPLING_H
#define PERSIMMON_SAMPLING_H

#include <stdlib.h>

#include "network.h"
#include "vectors.h"

/* Ranks of equal width, 1 / RANKS_PER_UNIT in units of the scaled logit, the highest token first; the last is for all that
 * is further away. */
#define RANKS 4096
#define RANKS_PER_UNIT 64
/* Ids whose weights are added up before one of them is looked for. */
#define DRAW_BLOCK 64

typedef struct {
    float scaled; /* (logit - highest) / temperature */
    int32_t id;
} Candidate;

/* The first of the largest; any place in a row of NaN. */
static int64_t place_of_highest(const float *row, int64_t size, float *highest) {
    Vector most = broadcast(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) most = larger(load(row + i), most);
    float best = maximum(most);
    for (; i < size; i++) best = row[i] > best ? row[i] : best;
    int64_t place = 0;
    while (place < size && !(row[place] >= best)) place++;
    *highest = best;
    return place < size ? place : 0;
}

/* A number in [0, 1) of 53 bits: Philox4x32-10 (Salmon et al., SC 2011), seed as key, (position, sample) as counter. */
static double uniform(const Draw *own) {
    uint32_t c0 = (uint32_t)own->position, c1 = (uint32_t)own->sample_index, c2 = 0, c3 = 0;
    uint32_t k0 = (uint32_t)own->seed, k1 = (uint32_t)((uint64_t)own->seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t left = (uint64_t)c0 * 0xD2511F53u, right = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(right >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)right;
        c2 = (uint32_t)(left >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)left;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (double)(((uint64_t)c0 << 21) ^ ((uint64_t)c1 >> 11)) * 0x1p-53;
}

INLINE int64_t rank_of(float scaled) {
    const float distance = -scaled * RANKS_PER_UNIT;
    return distance < RANKS - 1 ? (int64_t)distance : RANKS - 1;
}

INLINE float scaled(float logit, float highest, float temperature) { return (logit - highest) / temperature; }

static int higher_first(const void *left, const void *right) {
    const Candidate *a = left, *b = right;
    if (a->scaled != b->scaled) return a->scaled > b->scaled ? -1 : 1;
    return a->id < b->id ? -1 : 1;
}

/* The candidates of one rank, the highest first, and of equals the lowest id. */
static int64_t candidates_of(int64_t rank, const float *row, const float *weights, int64_t size, float highest,
                             float temperature, Candidate *found) {
    int64_t count = 0;
    for (int64_t id = 0; id < size; id++) {
        if (!(weights[id] > 0.0f)) continue;
        const float own = scaled(row[id], highest, temperature);
        if (rank_of(own) == rank) found[count++] = (Candidate){own, (int32_t)id};
    }
    qsort(found, (size_t)count, sizeof *found, higher_first);
    return count;
}

/* Sets the weights to zero that top-k and top-p rule out. */
static void truncate_weights(const Draw *own, const float *row, int64_t size, float highest, float *weights,
                             Candidate *candidates) {
    const float temperature = (float)own->temperature;
    int64_t counts[RANKS] = {0};
    double masses[RANKS] = {0};
    for (int64_t id = 0; id < size; id++) {
        if (!(weights[id] > 0.0f)) continue;
        const int64_t rank = rank_of(scaled(row[id], highest, temperature));
        counts[rank]++;
        masses[rank] += weights[id];
    }
    /* What top-k keeps: all ranks before `last_rank`, and `last_count` of that. */
    int64_t last_rank = RANKS - 1, last_count = counts[RANKS - 1], sorted_rank = -1, sorted_count = 0;
    if (own->top_k > 0) {
        int64_t before = 0;
        for (last_rank = 0; last_rank < RANKS - 1 && before + counts[last_rank] < own->top_k; last_rank++)
            before += counts[last_rank];
        last_count = own->top_k - before < counts[last_rank] ? own->top_k - before : counts[last_rank];
        if (last_count < counts[last_rank]) {
            sorted_rank = last_rank;
            sorted_count = candidates_of(last_rank, row, weights, size, highest, temperature, candidates);
            masses[last_rank] = 0.0;
            for (int64_t i = 0; i < last_count; i++) masses[last_rank] += weights[candidates[i].id];
        }
    }
    if (own->top_p < 1.0) {
        double total = 0.0, before = 0.0;
        for (int64_t rank = 0; rank <= last_rank; rank++) total += masses[rank];
        const double wanted = own->top_p * total;
        int64_t rank = 0;
        while (rank < last_rank && before + masses[rank] < wanted) before += masses[rank++];
        const int64_t most = rank == last_rank ? last_count : counts[rank];
        if (rank != sorted_rank) sorted_count = candidates_of(rank, row, weights, size, highest, temperature, candidates);
        sorted_rank = last_rank = rank;
        for (last_count = 0; last_count < most && (before < wanted || (rank == 0 && last_count == 0)); last_count++)
            before += weights[candidates[last_count].id];
    }
    for (int64_t id = 0; id < size; id++)
        if (weights[id] > 0.0f && rank_of(scaled(row[id], highest, temperature)) > last_rank) weights[id] = 0.0f;
    for (int64_t i = last_count; last_rank == sorted_rank && i < sorted_count; i++) weights[candidates[i].id] = 0.0f;
}

/* The sum of up to DRAW_BLOCK weights, always in the same order. */
INLINE double block_sum(const float *weights, int64_t count) {
    double parts[8] = {0}, total = 0.0;
    for (int64_t i = 0; i < count; i++) parts[i % 8] += weights[i];
    for (int i = 0; i < 8; i++) total += parts[i];
    return total;
}

/* A token of a row. */
static int64_t draw_token(const Draw *own, const float *row, int64_t size, float *weights, Candidate *candidates) {
    float highest;
    const int64_t best = place_of_highest(row, size, &highest);
    if (own->temperature == 0.0 || !isfinite(highest)) return best;
    const float temperature = (float)own->temperature;
    const float least = own->min_p > 0.0 ? logf((float)own->min_p) : -INFINITY;
    const Vector limit = broadcast(least);
    int64_t id = 0;
    for (; id + LANES <= size; id += LANES) {
        const Vector value = divide(subtract(load(row + id), broadcast(highest)), broadcast(temperature));
        store(weights + id, zero_below(value, limit, exponential(value)));
    }
    for (; id < size; id++) {
        float lanes[LANES];
        const float value = scaled(row[id], highest, temperature);
        store(lanes, exponential(broadcast(value)));
        weights[id] = value >= least ? lanes[0] : 0.0f;
    }
    if ((own->top_k > 0 && own->top_k < size) || own->top_p < 1.0)
        truncate_weights(own, row, size, highest, weights, candidates);
    double total = 0.0, before = 0.0;
    for (int64_t i = 0; i < size; i += DRAW_BLOCK) total += block_sum(weights + i, size - i < DRAW_BLOCK ? size - i : DRAW_BLOCK);
    const double target = uniform(own) * total;
    int64_t last = best;
    for (int64_t first = 0; first < size; first += DRAW_BLOCK) {
        const int64_t count = size - first < DRAW_BLOCK ? size - first : DRAW_BLOCK;
        const double after = before + block_sum(weights + first, count);
        if (after > target) {
            for (int64_t i = first; i < first + count; i++) {
                if (!(weights[i] > 0.0f)) continue;
                last = i;
                before += weights[i];
                if (before > target) return i;
            }
            return last; /* added up in another order, the block's weights are a little less */
        }
        before = after;
    }
    return last;
}

#endif
