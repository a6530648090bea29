/* LayerNorm of one row, of a width that may be known to the compiler. */
#ifndef PERSIMMON_NORM_H
#define PERSIMMON_NORM_H

#include "vectors.h"

/* (x - mean) / sqrt(variance + eps) * weight + bias; `to` may be `from`. */
INLINE void layer_norm(const float *from, float *to, const float *weight, const float *bias, float eps,
                       const int64_t width) {
    const int64_t whole = width - width % LANES;
    Vector parts = broadcast(0.0f);
    float rest = 0.0f;
    for (int64_t i = 0; i < whole; i += LANES) parts = add(parts, load(from + i));
    for (int64_t i = whole; i < width; i++) rest += from[i];
    const float mean = (sum(parts) + rest) / (float)width;
    parts = broadcast(0.0f);
    rest = 0.0f;
    for (int64_t i = 0; i < whole; i += LANES) {
        const Vector deviation = subtract(load(from + i), broadcast(mean));
        parts = multiply_add(deviation, deviation, parts);
    }
    for (int64_t i = whole; i < width; i++) rest += (from[i] - mean) * (from[i] - mean);
    const float scale = 1.0f / sqrtf((sum(parts) + rest) / (float)width + eps);
    for (int64_t i = 0; i < whole; i += LANES) {
        const Vector normed = multiply(subtract(load(from + i), broadcast(mean)), broadcast(scale));
        store(to + i, multiply_add(normed, load(weight + i), load(bias + i)));
    }
    for (int64_t i = whole; i < width; i++) to[i] = (from[i] - mean) * scale * weight[i] + bias[i];
}

#endif
