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

    // Bias and residual; then the CTA's pixels go out, 32 bytes of neighbouring channels at a time.
    LK_DEVICE void store(const Task& t, const Pixels& pixels) {
        const ExpandProject& p = t.p;
#pragma unroll
        for (int part = 0; part < C::kParts; part++) {
            const int first = part * C::kPartColumns + lane_index() % 4 * 4;
            if (first >= p.g.co) continue;
            // Loads are not made to wait for each other: beyond the last column they read the first one again.
            auto column = [&](int group) { return first + group * kGroup < p.g.co ? first + group * kGroup : first; };
            constexpr int groups = C::kPartColumns / kGroup;
            Float4 bias[groups];
#pragma unroll
            for (int group = 0; group < groups; group++) bias[group] = load4(p.project_bias + column(group));
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const Pixels::Pixel pixel = pixels.at(t, warp_index() * 16 + half * 8 + lane_index() / 4);
                if (!pixel.live) continue;
                const int64_t at = ((pixels.first + pixel.row) * p.g.wo + pixel.x) * p.g.co;
                Bits4 residual[groups] = {};
                if (p.residual) {
                    const T* x = static_cast<const T*>(p.x) + at;
#pragma unroll
                    for (int group = 0; group < groups; group++) residual[group] = *reinterpret_cast<const Bits4*>(x + column(group));
                }
#pragma unroll
                for (int group = 0; group < groups; group++) {
                    if (first + group * kGroup >= p.g.co) continue;
                    const float* low = out[part][2 * group] + 2 * half;
                    const float* high = out[part][2 * group + 1] + 2 * half;
                    const Bits4 r = residual[group];
                    const float v[4] = {low[0] + bias[group].v[0] + unpack_low(T{}, r.low), low[1] + bias[group].v[1] + unpack_high(T{}, r.low),
                                        high[0] + bias[group].v[2] + unpack_low(T{}, r.high), high[1] + bias[group].v[3] + unpack_high(T{}, r.high)};
                    store4(static_cast<T*>(p.out) + at + first + group * kGroup, v);
                }
            }
        }
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
