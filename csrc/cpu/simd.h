// Vectors of floats in GCC's vector extension: one source for AVX-512, AVX2 and NEON.
// Everything lives in a namespace of the instruction set's own: the same inline function compiled twice for different
// instruction sets must never be merged by the linker. For that reason no C++ library templates are used in kernel files.
#pragma once
#include <cstring>

#include "api.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LK_INLINE static inline __attribute__((always_inline))

namespace lowkernels::LOWKERNELS_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16, MR = 14;
#elif defined(__AVX2__)
constexpr int VL = 8, MR = 6;
#else
constexpr int VL = 4, MR = 10;
#endif
constexpr int NV = 2;        // vectors of a full panel
constexpr int NW = NV * VL;  // its width

typedef float V __attribute__((vector_size(VL * 4)));
typedef std::int32_t VI __attribute__((vector_size(VL * 4)));
typedef std::uint32_t VU __attribute__((vector_size(VL * 4)));
typedef std::uint16_t VH __attribute__((vector_size(VL * 2)));
typedef float VMem __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef std::uint16_t VHMem __attribute__((vector_size(VL * 2), aligned(2), may_alias));

LK_INLINE i64 divide_up(i64 a, i64 b) { return (a + b - 1) / b; }
LK_INLINE i64 round_up(i64 a, i64 b) { return divide_up(a, b) * b; }
LK_INLINE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
LK_INLINE i64 larger(i64 a, i64 b) { return a > b ? a : b; }

LK_INLINE V load(const float* p) { return *reinterpret_cast<const VMem*>(p); }
LK_INLINE void store(float* p, V v) { *reinterpret_cast<VMem*>(p) = v; }

LK_INLINE V load(const bf16* p) {
    VH half = *reinterpret_cast<const VHMem*>(p);
    return (V)(__builtin_convertvector(half, VU) << 16);
}

// Round to nearest even; a NaN keeps its sign and stays a NaN.
LK_INLINE void store(bf16* p, V v) {
#if defined(__AVX512BF16__)
    __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &half, sizeof half);
#else
    VU bits = (VU)v;
    VU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    VU nan = (bits >> 16) | 0x40u;
    VU is_nan = (VU)(v != v);
    *reinterpret_cast<VHMem*>(p) = __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), VH);
#endif
}

LK_INLINE float to_float(float x) { return x; }
LK_INLINE float to_float(bf16 x) {
    std::uint32_t bits = std::uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
LK_INLINE void from_float(float* p, float x) { *p = x; }
LK_INLINE void from_float(bf16* p, float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    p->bits = x != x ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// The larger, or the smaller, of two; b where one is a NaN.
#if defined(__AVX512F__)
LK_INLINE V maximum(V a, V b) { return (V)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
LK_INLINE V minimum(V a, V b) { return (V)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
#elif defined(__AVX2__)
LK_INLINE V maximum(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
LK_INLINE V minimum(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
#else
LK_INLINE V maximum(V a, V b) { return a > b ? a : b; }
LK_INLINE V minimum(V a, V b) { return a < b ? a : b; }
#endif

// A NaN in x passes through.
LK_INLINE V at_least(V x, float low) { return maximum(V{} + low, x); }
LK_INLINE V at_most(V x, float high) { return minimum(V{} + high, x); }

// All elements by `combine`, halves with halves.
template <class F>
LK_INLINE float across(V x, const F& combine) {
    VI lane;
    for (int i = 0; i < VL; ++i) lane[i] = i;
#pragma GCC unroll 4
    for (int half = VL / 2; half > 0; half /= 2) x = combine(x, __builtin_shuffle(x, lane ^ half));
    return x[0];
}

// 2^n * p(r) with |r| <= ln 2 / 2; the series to r^7 leaves a relative error of 5e-9.
LK_INLINE V exponential(V x) {
    x = at_most(at_least(x, -87.3f), 88.72f);
    V shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer in the low bits
    V n = shifted - 12582912.0f;
    V r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    V p = V{} + 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // In two factors, so that 2^128 (times p < 1) does not become infinity on the way.
    VI e = (VI)shifted - 0x4b400000;
    VI half = e >> 1;
    V low = (V)((half + 127) << 23), high = (V)((e - half + 127) << 23);
    return p * low * high;
}

// z * P(z^2) / Q(z^2), a least-maximum fit made for this file: error below 4e-7 everywhere, clamped where erf is 1 in fp32.
LK_INLINE V error_function(V z, float) {
    z = at_most(at_least(z, -3.95f), 3.95f);
    V t = z * z;
    V p = t * 2.01173975e-06f + 0.000287601666f;
    p = p * t + 0.00391735137f;
    p = p * t + 0.053207159f;
    p = p * t + 0.194036439f;
    p = p * t + 1.12837899f;
    V q = t * 3.78397381e-05f + 0.00119820959f;
    q = q * t + 0.0152707677f;
    q = q * t + 0.115591064f;
    q = q * t + 0.50529182f;
    q = q * t + 1.0f;
    return z * p / q;
}

// For what is rounded to bf16 next, z * P(s) with s from -1 at z = 0 to 1 at the clamp: error below 4e-5, and no division.
LK_INLINE V error_function(V z, bf16) {
    constexpr float clamp = 3.2f;
    z = at_most(at_least(z, -clamp), clamp);
    V s = z * z * (2 / (clamp * clamp)) - 1.0f;
    V p = s * 0.0125127705f - 0.0296183f;
    p = p * s + 0.031731296f;
    p = p * s - 0.04501114f;
    p = p * s + 0.080241755f;
    p = p * s - 0.11604049f;
    p = p * s + 0.15451579f;
    p = p * s - 0.21715091f;
    p = p * s + 0.44132873f;
    return z * p;
}

// For a result of type T.
template <int ACT, class T>
LK_INLINE V activate(V x) {
    if constexpr (ACT == RELU) return at_least(x, 0.0f);
    if constexpr (ACT == RELU6) return at_most(at_least(x, 0.0f), 6.0f);
    if constexpr (ACT == HARDSWISH) return x * at_most(at_least(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6);
    if constexpr (ACT == SILU) return x / (1.0f + exponential(-x));
    if constexpr (ACT == GELU) return 0.5f * x * (1.0f + error_function(x * 0.707106781f, T()));
    if constexpr (ACT == GELU_TANH) {
        V u = 0.797884561f * (x + 0.044715f * x * x * x);
        return x - x / (exponential(u + u) + 1.0f);
    }
    return x;
}

}  // namespace lowkernels::LOWKERNELS_ISA
