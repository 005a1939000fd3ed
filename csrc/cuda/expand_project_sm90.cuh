// expand_project.cuh for Hopper: the same two products back to back, by warpgroups. Both take their first operand from registers: the
// first product by ldmatrix from the window, at the shifted addresses of its taps; the second one's are the first one's accumulators,
// activated and rounded. Weights are in slabs of 64 rows times 128 columns, laid out beforehand as shared memory has them, and stream
// through a ring in the order of their use: all warpgroups multiply the same slab at the same time.
//
// Of one warpgroup, a step of depth 16 and 128 columns, of the 64 cycles its tensor cores need: it reads 4 KB of weights (32 cycles of
// shared memory) and 2 KB of inputs (16). The slabs' arrival adds 32 / WARPGROUPS. With three warpgroups that is 59 of 64 cycles.
// From L2 a CTA of 192 rows reads 21 bytes a cycle; of 128 rows, 32.
//
// While a product is under way its warpgroup loads the next step's inputs, or activates the next 16 expanded channels.
#pragma once

#include "expand_project.cuh"
#include "warpgroup.cuh"

namespace lowkernels {

// WARPGROUPS of 64 rows each, output channels up to COLUMNS.
template <int WARPGROUPS, int COLUMNS>
struct WideChain {
    static constexpr int kThreads = WARPGROUPS * kWarpgroup, kWarps = WARPGROUPS * 4, kRows = WARPGROUPS * 64, kColumns = COLUMNS;
    static constexpr int kStages = 5, kRing = kStages * kSlabBytes;
    static constexpr int kParts = (COLUMNS + kSlabColumns - 1) / kSlabColumns, kPartColumns = COLUMNS / kParts;  // of the output channels
    // Second operands of the second product: with several parts, those of a slab's depth are needed once for each.
    static constexpr int kKept = kParts > 1 ? kSlabSteps : 2;

    // Slabs are packed for as many parts as the output channels need.
    static bool serves(const Geometry& g) {
        return g.tile_h * g.tile_w <= kRows && g.co <= kColumns && (g.co + kSlabColumns - 1) / kSlabColumns == kParts;
    }
};

// The shapes compiled, by the number lowkernels/backends/cuda/hopper.py chooses.
#define LK_WIDE_CHAINS(X) X(0, 3, 64) X(1, 3, 128) X(2, 2, 128) X(3, 2, 256)

// Of the expanded channels, what the first product makes at a time.
constexpr int kWideChunk = kSlabColumns, kWideSlabs = kWideChunk / kSlabDepth;

// 16 rows of a warp as first operands: the window under them, at the shifted address of each step's tap.
struct WindowRows {
    const int* taps;
    uint32_t row, zeros;  // shared addresses: this lane's row, and 16 zeros
    int steps;

    template <typename T>
    LK_DEVICE WindowRows(const Task& t, const Pixels& pixels, const T* window, const int* taps_of, const T* zeros_at)
        : taps(taps_of), zeros(shared_address(zeros_at)), steps(t.steps) {
        const Pixels::Pixel pixel = pixels.at(t, warp_index() * 16 + lane_index() % 16);
        // Rows that are no pixel compute something and are not stored.
        const int at = pixel.live ? pixel.window_row * t.layout.pitch + pixel.window_column * t.layout.pixel : 0;
        row = shared_address(window + at + lane_index() / 16 * 8);
    }

    // Steps that fill up the last slab have no taps, and weights of zero.
    LK_DEVICE void load(uint32_t (&a)[4], int step) const { ldmatrix_x4(a, step < steps ? row + taps[step] : zeros); }

    // sums = the rows times the next `count` slabs.
    template <typename T, typename C>
    LK_DEVICE void multiply(T, float (&sums)[kSlabColumns / 8][4], Slabs<C>& slabs, int count) const {
        uint32_t a[2][4];
        load(a[0], 0);
        for (int slab = 0; slab < count; slab++) {
            const uint32_t weights = slabs.next();
#pragma unroll
            for (int step = 0; step < kSlabSteps; step++) {
                wgmma_fence();
                wgmma(T{}, sums, a[step % 2], slab_operand(weights, step), slab + step > 0);
                wgmma_commit();
                wgmma_wait<1>();
                load(a[(step + 1) % 2], slab * kSlabSteps + step + 1);
            }
        }
        wgmma_wait<0>();
        wgmma_settle(sums);
    }
};

template <typename T, typename C>
struct WideProducts {
    float out[C::kParts][C::kPartColumns / 8][4];

    LK_DEVICE void run(const Task& t, const WindowRows& rows, Slabs<C>& slabs) {
        int channel = lane_index() % 4 * 4;  // this lane's first of the chunk's

        float hidden[kWideChunk / 8][4];
        uint32_t b[C::kKept][4];
        for (int chunk = 0; chunk < t.chunks; chunk++) {
            rows.multiply(T{}, hidden, slabs, t.expand_pieces);
#pragma unroll
            for (int slab = 0; slab < kWideSlabs; slab++) {
#pragma unroll
                for (int part = 0; part < C::kParts; part++) {
                    const uint32_t weights = slabs.next();
#pragma unroll
                    for (int step = 0; step < kSlabSteps; step++) {
                        const int group = slab * kSlabSteps + step;
                        if (part == 0) expanded(t, channel + group * kGroup, hidden[2 * group], hidden[2 * group + 1], b[step % C::kKept]);
                        wgmma_fence();
                        wgmma(T{}, out[part], b[step % C::kKept], slab_operand(weights, step), chunk + group > 0);
                        wgmma_commit();
                        wgmma_wait<1>();
                    }
                }
            }
            channel += kWideChunk;
        }
        wgmma_wait<0>();
#pragma unroll
        for (int part = 0; part < C::kParts; part++) wgmma_settle(out[part]);
    }

    // 16 expanded channels as the second product's first operand. Those that fill up the slab are zero, whatever the inputs: an
    // infinity times a weight of zero would be NaN.
    LK_DEVICE static void expanded(const Task& t, int channel, const float (&low)[4], const float (&high)[4], uint32_t (&b)[4]) {
        const bool live = channel < t.p.expanded;
        const Float4 bias = live ? load4(t.p.expand_bias + channel) : Float4{};
        float v[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[0][i] = low[i] + bias.v[i % 2];
            v[1][i] = high[i] + bias.v[2 + i % 2];
        }
        activate(t.p.act, v);
#pragma unroll
        for (int i = 0; i < 4; i++) b[i] = live ? pack2(T{}, v[i / 2][i % 2 * 2], v[i / 2][i % 2 * 2 + 1]) : 0;
    }

    LK_DEVICE void store(const Task& t, const Pixels& pixels) {
        const ExpandProject& p = t.p;
        int64_t at[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Pixels::Pixel pixel = pixels.at(t, warp_index() * 16 + half * 8 + lane_index() / 4);
            at[half] = pixel.live ? ((pixels.first + pixel.row) * p.g.wo + pixel.x) * p.g.co : -1;
        }
        store_rows<T>(out, lane_index() % 4 * 4, p.g.co, p.project_bias, p.residual ? static_cast<const T*>(p.x) : nullptr,
                      static_cast<T*>(p.out), at);
    }
};

inline Grid wide_grid_of(const Geometry& g) {
    const int64_t tiles = static_cast<int64_t>((g.ho + g.tile_h - 1) / g.tile_h) * ((g.wo + g.tile_w - 1) / g.tile_w);
    const int64_t pixels = static_cast<int64_t>(g.n) * g.ho * g.wo;
    return {g.images == 0 ? (pixels + g.tile_w - 1) / g.tile_w : g.n * tiles, 1};
}

template <typename C>
Task wide_task_of(const ExpandProject& p) {
    Task t{};
    t.p = p;
    t.layout = layout_of(p.g);
    t.depth = (p.g.c + 15) / 16 * 32;
    t.steps = p.g.kernel * p.g.kernel * (t.depth / 32);
    t.expanded = (p.expanded + kGroup - 1) / kGroup;
    t.expand_pieces = (t.steps + kSlabSteps - 1) / kSlabSteps;
    t.pieces = t.expand_pieces + kWideSlabs * C::kParts;
    t.chunks = (p.expanded + kWideChunk - 1) / kWideChunk;
    return t;
}

// A CTA's shared memory: the ring and whatever else comes `first`, 16 zeros, the window, the taps.
template <typename T>
struct WideShared {
    unsigned char* ring;
    T *zeros, *window;
    int* taps;

    LK_DEVICE WideShared(const Task& t, int first) {
        ring = dynamic_shared();
        zeros = reinterpret_cast<T*>(ring + first);
        window = zeros + kGroup;
        taps = reinterpret_cast<int*>(window + t.layout.rows * t.layout.pitch);
    }

    static size_t bytes(const Task& t, int first) {
        return first + (kGroup + static_cast<size_t>(t.layout.rows) * t.layout.pitch) * 2 + t.steps * sizeof(int);
    }
};

}  // namespace lowkernels
