/* Vectors of integers as wide as the machine's registers, and their dot products.
 *
 * A processor with VNNI multiplies four unsigned bytes of weights by four signed bytes of inputs in one instruction.
 * Others have an instruction for pairs of bytes, one unsigned, whose sum saturates at 16 bits.  It is exact for 8-bit
 * weights where inputs are never negative, and for 4-bit weights, of which sums of sixteen products fit.  All else they
 * multiply as pairs of 16 bits.  The sums are exact, so they are the same integers on every processor.
 */
#ifndef PERSIMMON_INTEGERS_H
#define PERSIMMON_INTEGERS_H

#include "network.h"
#include "vectors.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define BYTE_DOTS 1
#else
#define BYTE_DOTS 0
#endif

/* 8-bit weights of an output that lie together and are multiplied at once: a step takes four bytes of inputs, of one or two
 * each.  Of 4-bit weights four lie together everywhere, each half of a byte. */
#define TOGETHER (BYTE_DOTS ? 4 : 2)
INLINE int64_t step_inputs(const Operation *op) { return op->type == INT4 || op->sparse ? 4 : TOGETHER; }
INLINE int64_t item_bytes_of(const Operation *op) { return 4 / step_inputs(op); }
/* Lines of weights (packing.h) of a step whose weights lie in lines. */
#define STEP_LINES(type) ((type) == INT4 ? 2 : 4)
/* Dot products of four bytes that fit in 16 bits, the weights being of 4 bits: 8 * 2 * 15 * 127 < 2^15. */
#define NARROW_DOTS 8

/* Lanes of 32 bits, unlike the intrinsics' own type, arrays of which the compiler would keep in memory. */
#if LANES == 16
typedef int32_t Integers __attribute__((vector_size(64)));
#define RAW(v) ((__m512i)(v))
INLINE Integers load_integers(const void *from) { return (Integers)_mm512_loadu_si512(from); }
INLINE Integers repeat(int32_t value) { return (Integers)_mm512_set1_epi32(value); }
INLINE Vector to_floats(Integers v) { return _mm512_cvtepi32_ps(RAW(v)); }
INLINE Integers to_integers(Vector v) { return (Integers)_mm512_cvtps_epi32(v); }
INLINE Integers largest_integers(Integers a, Integers b) { return (Integers)_mm512_max_epi32(RAW(a), RAW(b)); }
INLINE int32_t largest_integer(Integers v) { return _mm512_reduce_max_epi32(RAW(v)); }
INLINE int32_t sum_of_integers(Integers v) { return _mm512_reduce_add_epi32(RAW(v)); }
INLINE Integers without_sign(Vector v) { return (Integers)_mm512_castps_si512(v) & repeat(0x7fffffff); }
/* These two saturate. */
INLINE void store_bytes(void *to, Integers v) { _mm_storeu_si128(to, _mm512_cvtsepi32_epi8(RAW(v))); }
INLINE void store_words(void *to, Integers v) { _mm256_storeu_si256(to, _mm512_cvtsepi32_epi16(RAW(v))); }
#else
typedef int32_t Integers __attribute__((vector_size(32)));
#define RAW(v) ((__m256i)(v))
INLINE Integers load_integers(const void *from) { return (Integers)_mm256_loadu_si256(from); }
INLINE Integers repeat(int32_t value) { return (Integers)_mm256_set1_epi32(value); }
INLINE Vector to_floats(Integers v) { return _mm256_cvtepi32_ps(RAW(v)); }
INLINE Integers to_integers(Vector v) { return (Integers)_mm256_cvtps_epi32(v); }
INLINE Integers largest_integers(Integers a, Integers b) { return (Integers)_mm256_max_epi32(RAW(a), RAW(b)); }
INLINE int32_t largest_integer(Integers v) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(RAW(v)), _mm256_extracti128_si256(RAW(v), 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(2, 3, 0, 1))));
}
INLINE int32_t sum_of_integers(Integers v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(RAW(v)), _mm256_extracti128_si256(RAW(v), 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(2, 3, 0, 1))));
}
INLINE Integers without_sign(Vector v) { return (Integers)_mm256_castps_si256(v) & repeat(0x7fffffff); }
INLINE __m128i in_words(Integers v) {
    return _mm_packs_epi32(_mm256_castsi256_si128(RAW(v)), _mm256_extracti128_si256(RAW(v), 1));
}
INLINE void store_words(void *to, Integers v) { _mm_storeu_si128(to, in_words(v)); }
INLINE void store_bytes(void *to, Integers v) { _mm_storel_epi64(to, _mm_packs_epi16(in_words(v), in_words(v))); }
#endif

/* LANES pairs of bytes as pairs of 16 bits. */
INLINE Integers load_pairs(const int8_t *from) {
#if LANES == 16
    return (Integers)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)from));
#else
    return (Integers)_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)from));
#endif
}

/* How a step multiplies: four bytes, unsigned weights by signed inputs; two of 16 bits; four bytes as the first, but added
 * up in 16 bits; four bytes, signed weights by unsigned inputs of 7 bits: 2 * 127 * 128 < 2^15. */
enum { DOT_BYTES, DOT_PAIRS, DOT_NARROW, DOT_POSITIVE };
typedef int16_t Words __attribute__((vector_size(LANES * 4)));

#if LANES == 16
#define PAIR_SUMS(a, b) ((Integers)_mm512_madd_epi16(RAW(a), RAW(b)))
#define BYTE_PAIR_SUMS(unsigned_bytes, bytes) (_mm512_maddubs_epi16(RAW(unsigned_bytes), RAW(bytes)))
#define ONES _mm512_set1_epi16(1)
#else
#define PAIR_SUMS(a, b) ((Integers)_mm256_madd_epi16(RAW(a), RAW(b)))
#define BYTE_PAIR_SUMS(unsigned_bytes, bytes) (_mm256_maddubs_epi16(RAW(unsigned_bytes), RAW(bytes)))
#define ONES _mm256_set1_epi16(1)
#endif

/* What a step adds to sums. */
INLINE Integers dot(Integers sums, Integers weights, Integers inputs, const int how) {
#if LANES == 16 && BYTE_DOTS
    (void)how;
    return (Integers)_mm512_dpbusd_epi32(RAW(sums), RAW(weights), RAW(inputs));
#elif BYTE_DOTS
    (void)how;
    return (Integers)_mm256_dpbusd_avx_epi32(RAW(sums), RAW(weights), RAW(inputs));
#else
    if (how == DOT_PAIRS) return sums + PAIR_SUMS(weights, inputs);
    if (how == DOT_NARROW) return (Integers)((Words)sums + (Words)BYTE_PAIR_SUMS(weights, inputs));
    return sums + PAIR_SUMS(BYTE_PAIR_SUMS(inputs, weights), ONES);
#endif
}

#if !BYTE_DOTS
/* Adds sums of 16 bits, two for each output. */
INLINE Integers add_narrow(Integers sums, Integers narrow) { return sums + PAIR_SUMS(narrow, ONES); }
#endif

/* Sixteen bytes of each of four vectors, put together four by four: in every part of 16 bytes, first[0..3], then
 * first[4..7] in the second vector, and so on. */
INLINE void join_four(Integers a, Integers b, Integers c, Integers d, uint8_t *to) {
#if LANES == 16
    const __m512i ab = _mm512_unpacklo_epi8(RAW(a), RAW(b)), cd = _mm512_unpacklo_epi8(RAW(c), RAW(d));
    const __m512i last_ab = _mm512_unpackhi_epi8(RAW(a), RAW(b)), last_cd = _mm512_unpackhi_epi8(RAW(c), RAW(d));
    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(ab, cd));
    _mm512_storeu_si512(to + 64, _mm512_unpackhi_epi16(ab, cd));
    _mm512_storeu_si512(to + 128, _mm512_unpacklo_epi16(last_ab, last_cd));
    _mm512_storeu_si512(to + 192, _mm512_unpackhi_epi16(last_ab, last_cd));
#else
    const __m256i ab = _mm256_unpacklo_epi8(RAW(a), RAW(b)), cd = _mm256_unpacklo_epi8(RAW(c), RAW(d));
    const __m256i last_ab = _mm256_unpackhi_epi8(RAW(a), RAW(b)), last_cd = _mm256_unpackhi_epi8(RAW(c), RAW(d));
    _mm256_storeu_si256((void *)to, _mm256_unpacklo_epi16(ab, cd));
    _mm256_storeu_si256((void *)(to + 32), _mm256_unpackhi_epi16(ab, cd));
    _mm256_storeu_si256((void *)(to + 64), _mm256_unpacklo_epi16(last_ab, last_cd));
    _mm256_storeu_si256((void *)(to + 96), _mm256_unpackhi_epi16(last_ab, last_cd));
#endif
}

/* Where `join_four` must find an output's number in a line of PANEL, so that outputs come in their order. */
INLINE int64_t place_in_line(int64_t column) {
    const int64_t parts = LANES / 4, vector = LANES * 4; /* parts of 16 bytes, of vectors of `vector` bytes */
    const int64_t within = column % vector;
    return column - within + within / 4 % parts * 16 + within / LANES * 4 + within % 4;
}

/* Halves of bytes. */
INLINE Integers low_halves(Integers v) { return v & repeat(0x0f0f0f0f); }
INLINE Integers high_halves(Integers v) { return (Integers)((uint32_t __attribute__((vector_size(LANES * 4))))v >> 4) & repeat(0x0f0f0f0f); }

/* A word of inputs in every lane, kept in a register for all the weights that it multiplies. */
INLINE Integers repeat_word(const uint32_t *from) {
    Integers v = repeat((int32_t)*from);
#if LANES == 16
    __asm__("" : "+v"(v));
#else
    __asm__("" : "+x"(v));
#endif
    return v;
}

#endif
