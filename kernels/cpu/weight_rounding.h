/* Weights rounded to 8 or 4 bits, each group of a row with the scale of least squared error among those that are tried.
 *
 * A group is gone over once for each scale, while it lies in the nearest cache.  Sums are those of sixteen lanes, however
 * wide registers are, so the bits are the same on every processor.
 */
#ifndef PERSIMMON_WEIGHT_ROUNDING_H
#define PERSIMMON_WEIGHT_ROUNDING_H

#include "integers.h"

#define SIXTEEN (16 / LANES)

/* Numbers of sixteen lanes. */
typedef struct {
    Vector part[SIXTEEN];
} Sixteen;

/* A group of weights. */
typedef struct {
    const void *weights;
    int64_t first;   /* its first weight among these */
    int64_t count;
    float lowest, highest; /* number that a weight may become */
} WeightGroup;

/* What a scale makes of a group. */
typedef struct {
    float scale;    /* as it is stored */
    float error;    /* the sum of squared errors, in squares of the scale */
    float products; /* the sum of weights times their numbers, in scales */
    float squares;  /* the sum of squared numbers */
} Attempt;

INLINE Vector smaller(Vector a, Vector b) {
#if LANES == 16
    return _mm512_min_ps(a, b);
#else
    return _mm256_min_ps(a, b);
#endif
}

INLINE Sixteen no_sixteen(void) {
    Sixteen zero;
    for (int i = 0; i < SIXTEEN; i++) zero.part[i] = broadcast(0.0f);
    return zero;
}

/* In the order in which one register of sixteen lanes is summed. */
INLINE float sum_of_sixteen(Sixteen all) { return sum(SIXTEEN == 1 ? all.part[0] : add(all.part[0], all.part[SIXTEEN - 1])); }

/* Sixteen weights from the one with number `i`; zeros beyond the group. */
INLINE Sixteen sixteen_weights(const WeightGroup *own, int64_t i, const int type) {
    Sixteen some;
    if (own->count - i >= 16) {
        for (int part = 0; part < SIXTEEN; part++)
            some.part[part] = load_as(own->weights, own->first + i + part * LANES, type);
        return some;
    }
    float padded[16] = {0};
    for (int64_t lane = 0; lane < own->count - i; lane++) padded[lane] = item_as(own->weights, own->first + i + lane, type);
    for (int part = 0; part < SIXTEEN; part++) some.part[part] = load(padded + part * LANES);
    return some;
}

/* The numbers that weights become, already divided by their scale. */
INLINE Vector rounded_weights(const WeightGroup *own, Vector divided) {
    return larger(smaller(nearest(divided), broadcast(own->highest)), broadcast(own->lowest));
}

/* A group's weight of the largest magnitude, the one above zero of two; what is not finite may be missed. */
INLINE float largest_weight(const WeightGroup *own, const int type) {
    Vector highest = broadcast(-INFINITY), opposite = broadcast(-INFINITY);
    for (int64_t i = 0; i < own->count; i += 16) {
        const Sixteen some = sixteen_weights(own, i, type);
        for (int part = 0; part < SIXTEEN; part++) {
            highest = larger(highest, some.part[part]);
            opposite = larger(opposite, subtract(broadcast(0.0f), some.part[part]));
        }
    }
    const float above = maximum(highest), below = -maximum(opposite);
    return above > -below ? above : below;
}

/* A scale as it is read back.  One so small that its inverse is not finite is replaced by the smallest normal number. */
INLINE float stored_scale(float scale, int64_t scale_type) {
    float stored = scale;
    if (scale_type == FLOAT16) stored = from_float16(to_float16(scale));
    else if (scale_type == BFLOAT16) stored = from_bfloat16(to_bfloat16(scale));
    if (fabsf(stored) < 0x1p-126f) return scale_type == FLOAT16 ? 0x1p-14f : 0x1p-126f;
    return stored;
}

INLINE Attempt attempt(const WeightGroup *own, float scale, const int type) {
    const Vector inverse = broadcast(1.0f / scale);
    Sixteen errors = no_sixteen(), products = no_sixteen(), squares = no_sixteen();
    for (int64_t i = 0; i < own->count; i += 16) {
        const Sixteen some = sixteen_weights(own, i, type);
        for (int part = 0; part < SIXTEEN; part++) {
            const Vector divided = multiply(some.part[part], inverse), number = rounded_weights(own, divided);
            const Vector error = subtract(divided, number);
            errors.part[part] = multiply_add(error, error, errors.part[part]);
            products.part[part] = multiply_add(divided, number, products.part[part]);
            squares.part[part] = multiply_add(number, number, squares.part[part]);
        }
    }
    return (Attempt){scale, sum_of_sixteen(errors), sum_of_sixteen(products), sum_of_sixteen(squares)};
}

/* Takes a scale in place of the best one if it is finite and its error is smaller. */
INLINE void try_scale(const WeightGroup *own, float scale, Attempt *best, const int type) {
    if (!isfinite(scale) || scale == best->scale) return;
    const Attempt tried = attempt(own, scale, type);
    const float ratio = tried.scale / best->scale;
    if (tried.error * ratio * ratio < best->error) *best = tried;
}

INLINE void store_numbers(const WeightGroup *own, float scale, void *numbers, const int type, const int bits) {
    const Vector inverse = broadcast(1.0f / scale);
    for (int64_t i = 0; i < own->count; i += 16) {
        const Sixteen some = sixteen_weights(own, i, type);
        int8_t bytes[16];
        for (int part = 0; part < SIXTEEN; part++)
            store_bytes(bytes + part * LANES, to_integers(rounded_weights(own, multiply(some.part[part], inverse))));
        const int64_t count = own->count - i < 16 ? own->count - i : 16;
        if (bits == 8) {
            memcpy((int8_t *)numbers + own->first + i, bytes, (size_t)count);
            continue;
        }
        uint64_t halves[2];
        memcpy(halves, bytes, sizeof halves);
        /* The low half of a byte plus 8 is that half with its highest bit changed. */
        for (int half = 0; half < 2; half++)
            halves[half] = _pext_u64(halves[half] ^ 0x0808080808080808u, 0x0f0f0f0f0f0f0f0fu);
        const uint64_t joined = halves[0] | halves[1] << 32;
        memcpy((uint8_t *)numbers + (own->first + i) / 2, &joined, (size_t)count / 2);
    }
}

/* Rounds a group; false if it has no finite scale. */
INLINE int round_group(const WeightRounding *own, int64_t group, const int type, const int bits) {
    const WeightGroup some = {.weights = own->weights,
                              .first = group * own->group,
                              .count = own->group,
                              .lowest = bits == 8 ? -128.0f : -8.0f,
                              .highest = bits == 8 ? 127.0f : 7.0f};
    const float largest = largest_weight(&some, type);
    const float first = stored_scale((float)(-largest / own->steps[0]), own->scale_type);
    if (!isfinite(first)) return 0;
    Attempt best = attempt(&some, first, type);
    if (!isfinite(best.error)) return 0;
    for (int64_t i = 1; i < own->step_count; i++)
        try_scale(&some, stored_scale((float)(-largest / own->steps[i]), own->scale_type), &best, type);
    for (int64_t i = 0; i < own->refits && best.squares > 0.0f; i++)
        try_scale(&some, stored_scale(best.products * best.scale / best.squares, own->scale_type), &best, type);
    store_as(own->scales, group, best.scale, (int)own->scale_type);
    store_numbers(&some, best.scale, own->numbers, type, bits);
    return 1;
}

INLINE int round_groups(const WeightRounding *own, int64_t row, const int type, const int bits) {
    const int64_t groups = own->in / own->group;
    for (int64_t group = row * groups; group < (row + 1) * groups; group++)
        if (!round_group(own, group, type, bits)) return 0;
    return 1;
}

static int round_groups_of(const WeightRounding *own, int64_t row) {
    const int bits = (int)own->bits;
    if (own->type == FLOAT16) return bits == 8 ? round_groups(own, row, FLOAT16, 8) : round_groups(own, row, FLOAT16, 4);
    if (own->type == BFLOAT16) return bits == 8 ? round_groups(own, row, BFLOAT16, 8) : round_groups(own, row, BFLOAT16, 4);
    return bits == 8 ? round_groups(own, row, FLOAT32, 8) : round_groups(own, row, FLOAT32, 4);
}

/* One row; `failed` becomes the first row that fails. */
static void round_weights_part(const void *context, int64_t phase, int64_t row, int64_t thread) {
    (void)phase, (void)thread;
    const WeightRounding *own = context;
    if (round_groups_of(own, row)) return;
    int64_t failed = __atomic_load_n(own->failed, __ATOMIC_RELAXED);
    while (row < failed && !__atomic_compare_exchange_n(own->failed, &failed, row, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        ;
}

#endif
