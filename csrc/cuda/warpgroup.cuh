// What kernels with Hopper's warpgroup products share: matrices in shared memory and their descriptors, weights streaming through a
// ring, and how results go out.
#pragma once

#include "fragments.cuh"

namespace lowkernels {

constexpr int kWarpgroup = 4 * kWarp;  // threads

// How a K-major matrix lies in shared memory, in the numbers of its descriptor: rows of 16, 128, 64 or 32 bytes, eight of them one
// after another, the 16-byte units of which are exchanged by an exclusive or with bits 7 and up of their address.
enum Swizzle { kNoSwizzle, kSwizzle128, kSwizzle64, kSwizzle32 };

// The descriptor of a matrix that starts at shared address `start`. Eight rows further is `rows_stride` bytes further. Without a
// swizzle the next 16 bytes of a row are `units_stride` bytes further; with one that is not looked at.
LK_DEVICE uint64_t matrix_descriptor(uint32_t start, uint32_t rows_stride, uint32_t units_stride, Swizzle swizzle) {
    const uint32_t low = (start & 0x3ffffu) >> 4 | (units_stride & 0x3ffffu) >> 4 << 16;
    const uint32_t high = (rows_stride & 0x3ffffu) >> 4 | static_cast<uint32_t>(swizzle) << 30;
    return static_cast<uint64_t>(high) << 32 | low;
}

// A slab: 64 of depth times up to 128 columns of weights, one row of 128 bytes for each column, swizzled.
constexpr int kSlabDepth = 64, kSlabColumns = 128, kSlabSteps = kSlabDepth / 16;
constexpr int kSlabBytes = kSlabDepth * kSlabColumns * 2, kSlabUnits = kSlabBytes / 16;

// The operand of the step of depth 16 number `step` of the slab at shared address `slab`.
LK_DEVICE uint64_t slab_operand(uint32_t slab, int step) { return matrix_descriptor(slab + step * 32, 1024, 16, kSwizzle128); }

// The ring of slabs, C::kStages of them, for the warpgroups of a CTA.
template <typename C>
struct Slabs {
    // Under way: one is read, and products on the one before may be.
    static constexpr int kAhead = C::kStages - 2;

    const Bits8* from;
    int left;  // to be copied
    unsigned char* ring;
    int copied = 0, used = 0;

    LK_DEVICE Slabs(const Bits8* slabs, int count, unsigned char* to) : from(slabs), left(count), ring(to) {
#pragma unroll
        for (int i = 0; i < kAhead; i++) copy();
    }

    // Starts the next slab's copies, a group of cp.async even if there are none.
    LK_DEVICE void copy() {
        if (left > 0) {
            Bits8* to = reinterpret_cast<Bits8*>(ring + copied * kSlabBytes);
#pragma unroll
            for (int i = 0; i < (kSlabUnits + C::kThreads - 1) / C::kThreads; i++) {
                const int unit = i * C::kThreads + thread_index();
                if (kSlabUnits % C::kThreads == 0 || unit < kSlabUnits) cp_async<16>(to + unit, from + unit, true);
            }
            from += kSlabUnits;
            left--;
            copied = copied + 1 == C::kStages ? 0 : copied + 1;
        }
        cp_async_commit();
    }

    // The next slab's shared address. At most one product of this warpgroup may be under way, and none on a slab before the last.
    LK_DEVICE uint32_t next() {
        cp_async_wait<kAhead - 1>();
        fence_proxy_async();
        block_sync();  // the slab has landed for every warpgroup, and nobody reads the one before the last
        copy();
        const uint32_t at = shared_address(ring + used * kSlabBytes);
        used = used + 1 == C::kStages ? 0 : used + 1;
        return at;
    }
};

// Bias and residual; then rows lane / 4 and + 8 of a warp's go out, 32 bytes of neighbouring channels at a time. The parts' columns
// follow each other; this lane has four of each 16, from `column` on. `at`: where each row is in `out` and `residual`; -1: nowhere.
template <typename T, int PARTS, int N>
LK_DEVICE void store_rows(const float (&sums)[PARTS][N][4], int column, int columns, const float* bias, const T* residual, T* out, const int64_t (&at)[2]) {
    constexpr int groups = N / 2;
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const int first = column + part * groups * kGroup;
        if (first >= columns) continue;
        // Loads are not made to wait for each other: beyond the last column they read the first one again.
        auto within = [&](int group) { return first + group * kGroup < columns ? first + group * kGroup : first; };
        Float4 biases[groups];
#pragma unroll
        for (int group = 0; group < groups; group++) biases[group] = load4(bias + within(group));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (at[half] < 0) continue;
            Bits4 added[groups] = {};
            if (residual) {
#pragma unroll
                for (int group = 0; group < groups; group++) added[group] = *reinterpret_cast<const Bits4*>(residual + at[half] + within(group));
            }
#pragma unroll
            for (int group = 0; group < groups; group++) {
                if (first + group * kGroup >= columns) continue;
                const float* low = sums[part][2 * group] + 2 * half;
                const float* high = sums[part][2 * group + 1] + 2 * half;
                const Float4 b = biases[group];
                const Bits4 r = added[group];
                const float v[4] = {low[0] + b.v[0] + unpack_low(T{}, r.low), low[1] + b.v[1] + unpack_high(T{}, r.low),
                                    high[0] + b.v[2] + unpack_low(T{}, r.high), high[1] + b.v[3] + unpack_high(T{}, r.high)};
                store4(out + at[half] + first + group * kGroup, v);
            }
        }
    }
}

}  // namespace lowkernels
