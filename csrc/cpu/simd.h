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

LK_INLINE void store(float* p, V low, V high) { store(p, low), store(p + VL, high); }
LK_INLINE void store(bf16* p, V low, V high) {
#if defined(__AVX512BF16__)
    __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    std::memcpy(p, &both, sizeof both);
#else
    store(p, low), store(p + VL, high);
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

// The first `count` elements; zeros after them.
template <class T>
LK_INLINE V load(const T* p, i64 count) {
    if (count >= VL) return load(p);
    float values[VL] = {};
    for (i64 i = 0; i < count; ++i) values[i] = to_float(p[i]);
    return load(values);
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

// Several vectors that go through the same formula side by side. One after the other, each step of a polynomial would wait for the
// step before it, and fill the scheduler while it waits.
template <int N>
struct Vs {
    V v[N];
};

#define LK_EACH(op)                                              \
    template <int N>                                             \
    LK_INLINE Vs<N> operator op(Vs<N> a, Vs<N> b) {              \
        for (int i = 0; i < N; ++i) a.v[i] = a.v[i] op b.v[i];   \
        return a;                                                \
    }                                                            \
    template <int N>                                             \
    LK_INLINE Vs<N> operator op(Vs<N> a, float b) {              \
        for (int i = 0; i < N; ++i) a.v[i] = a.v[i] op b;        \
        return a;                                                \
    }                                                            \
    template <int N>                                             \
    LK_INLINE Vs<N> operator op(float a, Vs<N> b) {              \
        for (int i = 0; i < N; ++i) b.v[i] = a op b.v[i];        \
        return b;                                                \
    }
LK_EACH(+)
LK_EACH(-)
LK_EACH(*)
LK_EACH(/)
#undef LK_EACH

// A NaN in x passes through.
LK_INLINE V at_least(V x, float low) { return maximum(V{} + low, x); }
LK_INLINE V at_most(V x, float high) { return minimum(V{} + high, x); }
template <int N>
LK_INLINE Vs<N> at_least(Vs<N> x, float low) {
    for (int i = 0; i < N; ++i) x.v[i] = at_least(x.v[i], low);
    return x;
}
template <int N>
LK_INLINE Vs<N> at_most(Vs<N> x, float high) {
    for (int i = 0; i < N; ++i) x.v[i] = at_most(x.v[i], high);
    return x;
}

LK_INLINE VI lanes() {
    VI lane;
    for (int i = 0; i < VL; ++i) lane[i] = i;
    return lane;
}

// All elements by `combine`, halves with halves.
template <class F>
LK_INLINE float across(V x, const F& combine) {
#pragma GCC unroll 4
    for (int half = VL / 2; half > 0; half /= 2) x = combine(x, __builtin_shuffle(x, lanes() ^ half));
    return x[0];
}

// p * 2^n, n being in the low bits of 1.5 * 2^23 + n; in two factors, so that 2^128 (times p < 1) does not become infinity on the
// way.
LK_INLINE V times_power(V p, V shifted) {
    VI e = (VI)shifted - 0x4b400000;
    VI half = e >> 1;
    return p * (V)((half + 127) << 23) * (V)((e - half + 127) << 23);
}
template <int N>
LK_INLINE Vs<N> times_power(Vs<N> p, Vs<N> shifted) {
    for (int i = 0; i < N; ++i) p.v[i] = times_power(p.v[i], shifted.v[i]);
    return p;
}

// 2^n * p(r) with |r| <= ln 2 / 2; the series to r^7 leaves a relative error of 5e-9. X is V or Vs.
template <class X>
LK_INLINE X exponential(X x) {
    x = at_most(at_least(x, -87.3f), 88.72f);
    X shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer in the low bits
    X n = shifted - 12582912.0f;
    X r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    X p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return times_power(p, shifted);
}

// z * P(z^2) / Q(z^2), a least-maximum fit made for this file: error below 4e-7 everywhere, clamped where erf is 1 in fp32.
template <class X>
LK_INLINE X error_function(X z) {
    z = at_most(at_least(z, -3.95f), 3.95f);
    X t = z * z;
    X p = t * 2.01173975e-06f + 0.000287601666f;
    p = p * t + 0.00391735137f;
    p = p * t + 0.053207159f;
    p = p * t + 0.194036439f;
    p = p * t + 1.12837899f;
    X q = t * 3.78397381e-05f + 0.00119820959f;
    q = q * t + 0.0152707677f;
    q = q * t + 0.115591064f;
    q = q * t + 0.50529182f;
    q = q * t + 1.0f;
    return z * p / q;
}

template <class X>
LK_INLINE X gelu(X x, float) {
    return 0.5f * x * (1.0f + error_function(x * 0.707106781f));
}

// For what is rounded to bf16 next: erf(x / sqrt 2) / 2 as u * P(s), u being x clamped and s from -1 at 0 to 1 at the clamp. A
// least-maximum fit made for this file, exactly 1/2 at the clamp: gelu's error is below 1.4e-4 wherever x is.
template <class X>
LK_INLINE X gelu(X x, bf16) {
    X u = at_most(at_least(x, -4.0f), 4.0f);
    X s = u * u * 0.125f - 1.0f;
    X p = s * -0.00270418078f + 0.00862716511f;
    p = p * s - 0.0135262599f;
    p = p * s + 0.0211614221f;
    p = p * s - 0.036284145f;
    p = p * s + 0.0561718307f;
    p = p * s - 0.0843892023f;
    p = p * s + 0.175943375f;
    return x * (u * p + 0.5f);
}

// For a result of type T; X is V or Vs.
template <int ACT, class T, class X>
LK_INLINE X activate(X x) {
    if constexpr (ACT == RELU) return at_least(x, 0.0f);
    if constexpr (ACT == RELU6) return at_most(at_least(x, 0.0f), 6.0f);
    if constexpr (ACT == HARDSWISH) return x * at_most(at_least(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6);
    if constexpr (ACT == SILU) return x / (1.0f + exponential(0.0f - x));
    if constexpr (ACT == GELU) return gelu(x, T());
    if constexpr (ACT == GELU_TANH) {
        X u = 0.797884561f * (x + 0.044715f * x * x * x);
        return x - x / (exponential(u + u) + 1.0f);
    }
    return x;
}

}  // namespace lowkernels::LOWKERNELS_ISA
