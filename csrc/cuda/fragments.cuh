// Products of fragments, and what is done to their results: the part every kernel shares.
#pragma once

#include "device.cuh"

namespace lowkernels {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kGroup = 16;  // columns

LK_DEVICE int lane_index() { return thread_index() % kWarp; }
LK_DEVICE int warp_index() { return thread_index() / kWarp; }

template <typename I>
constexpr LK_DEVICE I ceil_div(I a, I b) {
    return (a + b - 1) / b;
}

// Elements between rows of a 16-bit matrix in shared memory, `columns` a multiple of 16: an odd number of 16-byte units, so that
// ldmatrix meets no bank twice.
constexpr LK_DEVICE int row_length(int columns) { return columns + 8; }

// The numbers of lowkernels/backends/cuda/pack.py.
enum Activation { kNone, kRelu, kRelu6, kHardswish, kSilu, kGelu, kGeluTanh };

LK_DEVICE float clamp6(float x) { return x < 0.0f ? 0.0f : (x > 6.0f ? 6.0f : x); }

template <typename F>
LK_DEVICE void for_each(float& v, F f) {
    v = f(v);
}
template <typename V, int N, typename F>
LK_DEVICE void for_each(V (&v)[N], F f) {
#pragma unroll
    for (int i = 0; i < N; i++) for_each(v[i], f);
}

// The choice is made once for all of `v`, an array of any rank. Comparisons are written so that a NaN stays one.
template <typename V>
LK_DEVICE void activate(int act, V& v) {
    switch (act) {
        case kRelu: for_each(v, [](float x) { return x < 0.0f ? 0.0f : x; }); break;
        case kRelu6: for_each(v, [](float x) { return clamp6(x); }); break;
        case kHardswish: for_each(v, [](float x) { return x * clamp6(x + 3.0f) * (1.0f / 6.0f); }); break;
        case kSilu: for_each(v, [](float x) { return x / (1.0f + exponential(-x)); }); break;
        case kGelu: for_each(v, [](float x) { return 0.5f * x * (1.0f + error_function(x * 0.70710678f)); }); break;
        case kGeluTanh:
            for_each(v, [](float x) { return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x))); });
            break;
        default: break;
    }
}

LK_DEVICE void store4(half_t* to, const float (&v)[4]) {
    *reinterpret_cast<Bits4*>(to) = {pack2(half_t{}, v[0], v[1]), pack2(half_t{}, v[2], v[3])};
}
LK_DEVICE void store4(bf16_t* to, const float (&v)[4]) {
    *reinterpret_cast<Bits4*>(to) = {pack2(bf16_t{}, v[0], v[1]), pack2(bf16_t{}, v[2], v[3])};
}
LK_DEVICE void store4(float* to, const float (&v)[4]) { *reinterpret_cast<Float4*>(to) = {{v[0], v[1], v[2], v[3]}}; }

template <typename T>
LK_DEVICE Float4 load4(const T* from) {
    const Bits4 bits = *reinterpret_cast<const Bits4*>(from);
    return {{unpack_low(T{}, bits.low), unpack_high(T{}, bits.low), unpack_low(T{}, bits.high), unpack_high(T{}, bits.high)}};
}
template <>
LK_DEVICE Float4 load4<float>(const float* from) {
    return *reinterpret_cast<const Float4*>(from);
}

// Where this lane's row of a 16 x 16 tile starts for ldmatrix, the tile's first row being `rows` with `length` elements between rows.
template <typename T>
LK_DEVICE uint32_t tile_address(const T* rows, int length) {
    const int lane = lane_index();
    return shared_address(rows + (lane % 16) * length + lane / 16 * 8);
}

// One step of depth 16: acc[m][g] += a[m] (16 x 16, in shared memory) times b[g] (16 x 16, fragments in registers).
template <typename T, int M, int G>
LK_DEVICE void multiply_step(float (&acc)[M][G][2][4], const uint32_t (&a)[M], uint32_t offset, int rows, const Bits8 (&b)[G], int groups) {
#pragma unroll
    for (int m = 0; m < M; m++) {
        if (m < rows) {
            uint32_t fragment[4];
            ldmatrix_x4(fragment, a[m] + offset);
#pragma unroll
            for (int g = 0; g < G; g++) {
                if (g < groups) {
                    mma(T{}, acc[m][g][0], fragment, b[g].word[0], b[g].word[1]);
                    mma(T{}, acc[m][g][1], fragment, b[g].word[2], b[g].word[3]);
                }
            }
        }
    }
}

// acc[m][g] += A B over `steps` of depth 16. Weights come from global memory in fragment order, [group][stride steps][lane]: each
// warp reads its own groups, 512 contiguous bytes a step and group, one step ahead. `a` are tile_address()es; only the first `rows`
// and `groups` of the registers take part.
template <typename T, int M, int G>
LK_DEVICE void multiply(float (&acc)[M][G][2][4], const uint32_t (&a)[M], int rows, const Bits8* weights, int stride, int steps, int groups) {
    const Bits8* from = weights + lane_index();
    Bits8 now[G] = {}, next[G] = {};
#pragma unroll
    for (int g = 0; g < G; g++)
        if (g < groups) now[g] = from[g * stride * kWarp];
    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps) {
#pragma unroll
            for (int g = 0; g < G; g++)
                if (g < groups) next[g] = from[(g * stride + step + 1) * kWarp];
        }
        multiply_step<T>(acc, a, step * 32, rows, now, groups);
#pragma unroll
        for (int g = 0; g < G; g++) now[g] = next[g];
    }
}

// Columns are dealt to fragments so that a lane has four neighbours, 4 * (lane % 4) of its group, in rows lane / 4 and lane / 4 + 8.
LK_DEVICE void four_columns(const float (&acc)[2][4], int half, float (&v)[4]) {
    v[0] = half ? acc[0][2] : acc[0][0];
    v[1] = half ? acc[0][3] : acc[0][1];
    v[2] = half ? acc[1][2] : acc[1][0];
    v[3] = half ? acc[1][3] : acc[1][1];
}

// Adds a group's bias to its columns.
template <int M, int G>
LK_DEVICE void add_bias(float (&acc)[M][G][2][4], int g, const Float4& bias) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][g][t][i] += bias.v[2 * t + i % 2];
}

template <typename V>
LK_DEVICE void clear(V& v) {
    for_each(v, [](float) { return 0.0f; });
}

}  // namespace lowkernels
