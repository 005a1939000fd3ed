// The register tile every product is made of: up to MR rows by one or two vectors of columns, over the whole depth.
#pragma once
#include "simd.h"

namespace lowkernels::LOWKERNELS_ISA {

// Rows read A as it lies in memory: depth is `segments` pieces of `length` consecutive elements, `segment` apart; rows are
// `pixel` apart. A k x k convolution over NHWC has k segments (one an image row) of k * C elements.
template <class A>
struct Rows {
    const A* data;
    i64 pixel, segment;
    int segments, length;
};

// What to prefetch while a product runs: from `next` to `end`, `advance` bytes (0 to 256) for every four steps of depth.
struct Prefetch {
    const char* next;
    const char* end;
    i64 advance;
};

template <class A>
struct Operand;

template <>
struct Operand<float> {
    static constexpr int step = 1;  // elements of depth one multiplication takes
    // Minus zero, because adding zero is not nothing: it turns -0 into 0.
    LK_INLINE V broadcast(const float* a) { return *a - V{}; }
    LK_INLINE V multiply_add(V acc, V a, const float* b) { return acc + a * load(b); }
};

#if defined(__AVX512BF16__)
template <>
struct Operand<bf16> {
    static constexpr int step = 2;
    LK_INLINE V broadcast(const bf16* a) {
        std::int32_t pair;
        std::memcpy(&pair, a, 4);
        return (V)_mm512_set1_epi32(pair);
    }
    LK_INLINE V multiply_add(V acc, V a, const bf16* b) {
        return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)load(reinterpret_cast<const float*>(b)));
    }
};
#endif

// One step of depth: every row's element (or pair), `offset` bytes into its row, times N vectors of B.
template <class A, int M, int N>
LK_INLINE void multiply_step(V (&acc)[M][N], const char* const* bases, i64 pixel, int offset, const A* b) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
        V value = Operand<A>::broadcast(reinterpret_cast<const A*>(bases[m / 3] + m % 3 * pixel + offset));
#pragma GCC unroll 2
        for (int v = 0; v < N; ++v) acc[m][v] = Operand<A>::multiply_add(acc[m][v], value, b + v * VL * Operand<A>::step);
    }
}

// Elements of depth in one piece of an fp32 product. The pieces' sums are added up: a fully connected layer's 1536 terms in a single sum
// take more of the error budget than PyTorch's own leave. To bf16 products that is nothing.
constexpr int kPiece = 512;

template <class A, int M, int N>
void tile(const Rows<A>& rows, const A* b, float* c, Prefetch& prefetch) {
    constexpr int step = Operand<A>::step, width = N * VL, bases = (M + 2) / 3;
    V acc[M][N] = {};
    const i64 pixel = rows.pixel * i64(sizeof(A));
    const int length = rows.length;
    const char* next = prefetch.next;
    const i64 advance = next < prefetch.end ? prefetch.advance : 0;
    const auto put = [&](bool add) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
            for (int v = 0; v < N; ++v) {
                float* to = c + m * width + v * VL;
                store(to, step == 1 && add ? load(to) + acc[m][v] : acc[m][v]);
            }
    };
    int piece = 0;       // depth in acc
    bool parts = false;  // c holds the pieces before
    for (int s = 0; s < rows.segments; ++s) {
        if constexpr (step == 1) {
            if (piece >= kPiece) {
                put(parts);
                for (auto& row : acc)
                    for (V& sum : row) sum = V{};
                parts = true;
                piece = 0;
            }
            piece += length;
        }
        // Rows are addressed from every third one. The empty assembly keeps the compiler from making a pointer for each row, which
        // it would have to reload from the stack at every step.
        const char* a[bases];
#pragma GCC unroll 5
        for (int i = 0; i < bases; ++i) a[i] = reinterpret_cast<const char*>(rows.data + s * rows.segment) + 3 * i * pixel;
        int k = 0;
        for (; k + 4 * step <= length; k += 4 * step) {
            __builtin_prefetch(next);
            __builtin_prefetch(next + 64);
            __builtin_prefetch(next + 128);
            __builtin_prefetch(next + 192);
            next += advance;
#pragma GCC unroll 5
            for (int i = 0; i < bases; ++i) asm("" : "+r"(a[i]));
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) multiply_step<A, M, N>(acc, a, pixel, u * step * int(sizeof(A)), b + u * width * step);
#pragma GCC unroll 5
            for (int i = 0; i < bases; ++i) a[i] += 4 * step * sizeof(A);
            b += 4 * width * step;
        }
        for (; k < length; k += step) {
            multiply_step<A, M, N>(acc, a, pixel, 0, b);
#pragma GCC unroll 5
            for (int i = 0; i < bases; ++i) a[i] += step * sizeof(A);
            b += width * step;
        }
    }
    prefetch.next = next;
    put(parts);
}

template <class A>
using Tile = void (*)(const Rows<A>&, const A*, float*, Prefetch&);

template <class A>
struct Tiles {
    Tile<A> of[NV][MR];
};

template <int... M>
struct Heights {};
template <int N, int... M>
struct HeightsTo : HeightsTo<N - 1, N, M...> {};
template <int... M>
struct HeightsTo<0, M...> {
    typedef Heights<M...> type;
};

template <class A, int... M>
constexpr Tiles<A> make_tiles(Heights<M...>) {
    return {{{tile<A, M, 1>...}, {tile<A, M, 2>...}}};
}

// `rows` rows (1 to MR), `width` columns (VL or NW); c gets rows x width floats.
template <class A>
LK_INLINE void multiply(int rows, int width, const Rows<A>& a, const A* b, float* c, Prefetch& prefetch) {
    static constexpr Tiles<A> tiles = make_tiles<A>(typename HeightsTo<MR>::type());
    const Tile<A> tile = tiles.of[width / VL - 1][rows - 1];
    if (Operand<A>::step == 1 && a.segments == 1 && a.length > kPiece && a.length % kPiece == 0)
        tile({a.data, a.pixel, kPiece, a.length / kPiece, kPiece}, b, c, prefetch);
    else
        tile(a, b, c, prefetch);
}

}  // namespace lowkernels::LOWKERNELS_ISA
