/* Vectors of floats as wide as the machine's registers, conversions of 16-bit numbers, and exp. */
#ifndef PERSIMMON_VECTORS_H
#define PERSIMMON_VECTORS_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define LANES 16
typedef __m512 Vector;
INLINE Vector load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store(float *to, Vector v) { _mm512_storeu_ps(to, v); }
INLINE Vector broadcast(float value) { return _mm512_set1_ps(value); }
INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
INLINE Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
INLINE Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
INLINE Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }
INLINE Vector load_float16(const uint16_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)from)); }
INLINE Vector load_bfloat16(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16));
}
INLINE Vector load_int8(const int8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from)));
}
INLINE float sum(Vector v) { return _mm512_reduce_add_ps(v); }
INLINE float maximum(Vector v) { return _mm512_reduce_max_ps(v); }
INLINE Vector first_lanes(Vector v, int count, float other) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(other), (__mmask16)((1u << count) - 1), v);
}
INLINE Vector power_of_two(Vector whole) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), whole); }
INLINE Vector nearest(Vector v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Vector zero_below(Vector x, Vector limit, Vector v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GE_OQ), v);
}
INLINE Vector divide(Vector a, Vector b) { return _mm512_div_ps(a, b); }
INLINE uint32_t nonzero_lanes(Vector v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
INLINE Vector bfloat16_evens(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512((const void *)from), 16));
}
INLINE Vector bfloat16_odds(const uint16_t *from) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_loadu_si512((const void *)from), _mm512_set1_epi32((int)0xffff0000u)));
}
INLINE Vector evens(Vector a, Vector b) {
    const __m512i lanes = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(a, lanes, b);
}
INLINE Vector odds(Vector a, Vector b) {
    const __m512i lanes = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_permutex2var_ps(a, lanes, b);
}
INLINE Vector zip_first(Vector a, Vector b) {
    const __m512i lanes = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(a, lanes, b);
}
INLINE Vector zip_second(Vector a, Vector b) {
    const __m512i lanes = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return _mm512_permutex2var_ps(a, lanes, b);
}
#else
#define LANES 8
typedef __m256 Vector;
INLINE Vector load(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store(float *to, Vector v) { _mm256_storeu_ps(to, v); }
INLINE Vector broadcast(float value) { return _mm256_set1_ps(value); }
INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
INLINE Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
INLINE Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
INLINE Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
INLINE Vector load_float16(const uint16_t *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)from)); }
INLINE Vector load_bfloat16(const uint16_t *from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)from)), 16));
}
INLINE Vector load_int8(const int8_t *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)from)));
}
INLINE float sum(Vector v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
INLINE float maximum(Vector v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
INLINE Vector first_lanes(Vector v, int count, float other) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_blendv_ps(_mm256_set1_ps(other), v,
                            _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)));
}
INLINE Vector power_of_two(Vector whole) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
INLINE Vector nearest(Vector v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Vector zero_below(Vector x, Vector limit, Vector v) {
    return _mm256_and_ps(_mm256_cmp_ps(x, limit, _CMP_GE_OQ), v);
}
INLINE Vector divide(Vector a, Vector b) { return _mm256_div_ps(a, b); }
INLINE uint32_t nonzero_lanes(Vector v) {
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}
INLINE Vector bfloat16_evens(const uint16_t *from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const void *)from), 16));
}
INLINE Vector bfloat16_odds(const uint16_t *from) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(_mm256_loadu_si256((const void *)from), _mm256_set1_epi32((int)0xffff0000u)));
}
INLINE Vector in_halves(Vector v) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), _MM_SHUFFLE(3, 1, 2, 0)));
}
INLINE Vector evens(Vector a, Vector b) { return in_halves(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0))); }
INLINE Vector odds(Vector a, Vector b) { return in_halves(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1))); }
INLINE Vector zip_first(Vector a, Vector b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
INLINE Vector zip_second(Vector a, Vector b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}
#endif

/* e^x for x <= 0, to about one unit in the last place; 0 below -87, 1 at 0.
 * 2^n times a polynomial in the rest, |rest| <= ln(2) / 2 (Cephes' expf, S. Moshier). */
INLINE Vector exponential(Vector x) {
    Vector clamped = larger(x, broadcast(-87.0f));
    Vector whole = nearest(multiply(clamped, broadcast(1.44269504088896341f)));
    Vector rest = multiply_add(whole, broadcast(-0.693359375f), clamped);
    rest = multiply_add(whole, broadcast(2.12194440e-4f), rest);
    Vector p = broadcast(1.9875691500e-4f);
    p = multiply_add(p, rest, broadcast(1.3981999507e-3f));
    p = multiply_add(p, rest, broadcast(8.3334519073e-3f));
    p = multiply_add(p, rest, broadcast(4.1665795894e-2f));
    p = multiply_add(p, rest, broadcast(1.6666665459e-1f));
    p = multiply_add(p, rest, broadcast(5.0000001201e-1f));
    p = add(multiply_add(multiply(rest, rest), p, rest), broadcast(1.0f));
    return zero_below(x, broadcast(-87.0f), multiply(p, power_of_two(whole)));
}

/* To the nearest, ties to even; infinities stay, and NaN stays NaN because its first bits do. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INLINE float from_bfloat16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Infinity beyond 65504. */
INLINE uint16_t to_float16(float value) { return (uint16_t)_cvtss_sh(value, 0); }
INLINE float from_float16(uint16_t value) { return _cvtsh_ss(value); }

INLINE Vector load_as(const void *from, int64_t index, const int type) {
    if (type == FLOAT16) return load_float16((const uint16_t *)from + index);
    if (type == BFLOAT16) return load_bfloat16((const uint16_t *)from + index);
    if (type == INT8) return load_int8((const int8_t *)from + index);
    return load((const float *)from + index);
}

/* Keeps a vector in a register: the compiler would rather load it again for every use, and loads are what is scarce. */
INLINE Vector kept(Vector v) {
#if LANES == 16
    __asm__("" : "+v"(v));
#else
    __asm__("" : "+x"(v));
#endif
    return v;
}

/* 2 * LANES numbers in the order in which they are had for least: of bfloat16 those at even places and those at odd ones,
 * for which two shifts do, of other types the first half and the second. */
typedef struct {
    Vector one, other;
} Pair;

INLINE Pair load_pair_as(const void *from, int64_t index, const int type) {
    if (type == BFLOAT16) {
        const uint16_t *own = (const uint16_t *)from + index;
        return (Pair){bfloat16_evens(own), bfloat16_odds(own)};
    }
    return (Pair){load_as(from, index, type), load_as(from, index + LANES, type)};
}

/* Floats in the order in which `load_pair_as` has numbers of `type`, and back. */
INLINE Pair load_like(const float *from, const int type) {
    const Vector first = load(from), second = load(from + LANES);
    return type == BFLOAT16 ? (Pair){evens(first, second), odds(first, second)} : (Pair){first, second};
}

INLINE void store_like(float *to, Pair pair, const int type) {
    store(to, type == BFLOAT16 ? zip_first(pair.one, pair.other) : pair.one);
    store(to + LANES, type == BFLOAT16 ? zip_second(pair.one, pair.other) : pair.other);
}

INLINE float item_as(const void *from, int64_t index, const int type) {
    if (type == FLOAT16) return from_float16(((const uint16_t *)from)[index]);
    if (type == BFLOAT16) return from_bfloat16(((const uint16_t *)from)[index]);
    if (type == INT8) return (float)((const int8_t *)from)[index];
    return ((const float *)from)[index];
}

INLINE void store_as(void *to, int64_t index, float value, const int type) {
    if (type == FLOAT16) ((uint16_t *)to)[index] = to_float16(value);
    else if (type == BFLOAT16) ((uint16_t *)to)[index] = to_bfloat16(value);
    else ((float *)to)[index] = value;
}

#endif
