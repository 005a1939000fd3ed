// conv_act on Hopper, for many channels, see conv_act.cu: the first product of expand_project_sm90.cuh, with an epilogue. A CTA holds the
// window under its pixels and goes through the output channels 128 at a time; only weights stream.
//
// Rows are consecutive pixels, or with pooling whole images: their sums are taken within each warp by exchange, over the warps in shared
// memory, in a fixed order.
//
// Budget of a CTA (384 threads, or 256 and two CTAs an SM), with c input channels rounded up to 16 and w pixels of window:
//   shared memory  80 KB (48 KB) of weights under way + 2 (c + 8) w bytes, and 512 a warp and image to pool
//   registers      168 a thread with three warpgroups, 128 with two
//   from L2        the window once, and the weights of its output channels once, for 192 or 128 rows; LowFormer-B1's head, 7x7x256
//                  to 1536 and pooled, two images a CTA and two CTAs for the output channels: 433 KB an image
#include "expand_project_sm90.cuh"

namespace lowkernels {
namespace {

// WARPGROUPS of 64 rows each, and what a CTA has of its SM.
template <int WARPGROUPS, int STAGES, int PER_SM>
struct WideConv {
    static constexpr int kThreads = WARPGROUPS * kWarpgroup, kWarps = WARPGROUPS * 4, kRows = WARPGROUPS * 64, kPerSM = PER_SM;
    static constexpr int kStages = STAGES, kRing = STAGES * kSlabBytes;
};

// The shapes compiled, by the number lowkernels/backends/cuda/hopper_conv.py chooses.
#define LK_WIDE_CONVS(X) X(0, 3, 5, 1) X(1, 2, 3, 2)

constexpr int kMostPooled = 4;  // images of a CTA
constexpr int kSlabGroups = kSlabColumns / kGroup;

struct WideConvTask {
    Task t;
    const void* residual;
    int blocks;  // of 128 columns, of one CTA
    int images;  // of one CTA, where it pools
};

// Adds up over lanes that differ in one bit: of N values each lane keeps half.
template <int N>
LK_DEVICE void fold(float (&v)[kSlabGroups][4], int bit) {
    const bool upper = lane_index() & bit;
#pragma unroll
    for (int j = 0; j < N / 2; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float other = shuffle_xor(upper ? v[j][i] : v[j + N / 2][i], bit);
            v[j][i] = (upper ? v[j + N / 2][i] : v[j][i]) + other;
        }
    }
}

// A thread's share of a CTA's rows and 128 columns: rows `row` and `row` + 8, of each group of 16 columns the four from `column`.
template <typename T, typename C>
struct WideBlock {
    const WideConvTask& c;
    int64_t first, left;  // output pixels: the CTA's first, and how many there are from it on
    int row, column;
    float sums[kSlabColumns / 8][4];

    LK_DEVICE explicit WideBlock(const WideConvTask& task) : c(task) {
        const Geometry& g = c.t.p.g;
        first = static_cast<int64_t>(block_x()) * g.tile_w;
        left = static_cast<int64_t>(g.n) * g.ho * g.wo - first;
        row = warp_index() * 16 + lane_index() / 4;
    }

    LK_DEVICE bool live(int half) const { return row + 8 * half < c.t.p.g.tile_w && row + 8 * half < left; }
    LK_DEVICE float& sum(int group, int half, int i) { return sums[2 * group + i / 2][2 * half + i % 2]; }

    // Bias, activation and residual, in place. A quarter of the columns at a time: more need more registers than there are.
    LK_DEVICE void finish(int block) {
        const ExpandProject& p = c.t.p;
        column = block * kSlabColumns + lane_index() % 4 * 4;
        constexpr int groups = kSlabGroups / 4;
#pragma unroll
        for (int begin = 0; begin < kSlabGroups; begin += groups) {
            float v[groups][2][4];
#pragma unroll
            for (int g = 0; g < groups; g++) {
                // Loads are not made to wait for each other: beyond the last column they read the first one again.
                const int at = column + (begin + g) * kGroup;
                const Float4 bias = load4(p.expand_bias + (at < p.g.co ? at : 0));
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int i = 0; i < 4; i++) v[g][half][i] = sum(begin + g, half, i) + bias.v[i];
            }
            activate(p.act, v);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                Float4 residual[groups] = {};
                if (c.residual && live(half)) {
                    const T* from = static_cast<const T*>(c.residual) + (first + row + 8 * half) * p.g.co;
#pragma unroll
                    for (int g = 0; g < groups; g++) {
                        const int at = column + (begin + g) * kGroup;
                        residual[g] = load4(from + (at < p.g.co ? at : 0));
                    }
                }
#pragma unroll
                for (int g = 0; g < groups; g++)
#pragma unroll
                    for (int i = 0; i < 4; i++) sum(begin + g, half, i) = v[g][half][i] + residual[g].v[i];
            }
        }
    }

    LK_DEVICE void store() {
        const ExpandProject& p = c.t.p;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (!live(half)) continue;
            T* to = static_cast<T*>(p.out) + (first + row + 8 * half) * p.g.co + column;
#pragma unroll
            for (int group = 0; group < kSlabGroups; group++) {
                if (column + group * kGroup >= p.g.co) continue;
                const float v[4] = {sum(group, half, 0), sum(group, half, 1), sum(group, half, 2), sum(group, half, 3)};
                store4(to + group * kGroup, v);
            }
        }
    }

    // The sums over each image's rows that this warp has, to totals [image][warp][column].
    LK_DEVICE void sum_rows(float* totals) {
        const int pixels = c.t.p.g.ho * c.t.p.g.wo, warp_row = warp_index() * 16;
        for (int image = 0; image < c.images; image++) {
            const int begin = image * pixels, end = begin + pixels;
            if (warp_row >= end || warp_row + 16 <= begin) continue;
            float v[kSlabGroups][4];
            const bool upper = row >= begin && row < end, lower = row + 8 >= begin && row + 8 < end;
#pragma unroll
            for (int group = 0; group < kSlabGroups; group++)
#pragma unroll
                for (int i = 0; i < 4; i++) v[group][i] = (upper ? sum(group, 0, i) : 0.0f) + (lower ? sum(group, 1, i) : 0.0f);
            fold<8>(v, 16);
            fold<4>(v, 8);
            fold<2>(v, 4);
            // This lane is left with group lane / 4.
            store4(totals + (image * C::kWarps + warp_index()) * kSlabColumns + lane_index() * 4, v[0]);
        }
    }

    // Each image's mean of the 128 columns.
    LK_DEVICE void store_means(const float* totals, int block) const {
        const Geometry& g = c.t.p.g;
        const int pixels = g.ho * g.wo;
        for (int i = thread_index(); i < c.images * kSlabColumns; i += C::kThreads) {
            const int image = i / kSlabColumns, at = block * kSlabColumns + i % kSlabColumns;
            if (static_cast<int64_t>(image) * pixels >= left || at >= g.co) continue;
            float total = 0.0f;
            for (int warp = image * pixels / 16; warp * 16 < (image + 1) * pixels; warp++)
                total += totals[(image * C::kWarps + warp) * kSlabColumns + i % kSlabColumns];
            const int64_t number = static_cast<int64_t>(block_x()) * c.images + image;
            static_cast<T*>(c.t.p.out)[number * g.co + at].bits = static_cast<uint16_t>(pack2(T{}, total / static_cast<float>(pixels), 0.0f));
        }
    }
};

template <typename T, typename C, bool POOL>
LK_KERNEL(C::kThreads, C::kPerSM)
conv_act_sm90(WideConvTask c) {
    if constexpr (kWarpgroupProducts) {
        const Task& t = c.t;
        const int totals = POOL ? c.images * C::kWarps * kSlabColumns * 4 : 0;
        const WideShared<T> shared(t, C::kRing + totals);
        const Pixels pixels = pixels_of(t.p.g, block_x());
        if (thread_index() < kGroup / 4) *reinterpret_cast<Bits4*>(shared.zeros + thread_index() * 4) = {};
        copy_window<T, C::kWarps>(t, pixels, shared.window);
        const int first = block_y() * c.blocks, end = first + c.blocks < t.chunks ? first + c.blocks : t.chunks;
        const Bits8* weights = static_cast<const Bits8*>(t.p.expand) + static_cast<int64_t>(first) * t.pieces * kSlabUnits;
        Slabs<C> slabs(weights, (end - first) * t.pieces, shared.ring);
        make_taps<C::kWarps>(t, shared.taps);
        cp_async_wait<Slabs<C>::kAhead>();
        block_sync();  // the window, the zeros and the taps are there
        const WindowRows rows(t, pixels, shared.window, shared.taps, shared.zeros);
        WideBlock<T, C> mine(c);
        for (int block = first; block < end; block++) {
            rows.multiply(T{}, mine.sums, slabs, t.pieces);
            mine.finish(block);
            if constexpr (POOL) {
                float* sums = reinterpret_cast<float*>(shared.ring + C::kRing);
                mine.sum_rows(sums);
                block_sync();  // the sums of all warps are there; before the next ones, every slab has a barrier
                mine.store_means(sums, block);
            } else {
                mine.store();
            }
        }
    } else {
        refuse();
    }
}

template <typename C, bool POOL>
int launch_product(const ConvAct& p, Dtype dtype, void* stream) {
    const int64_t plane = static_cast<int64_t>(p.g.ho) * p.g.wo;
    if (p.g.tile_w > C::kRows || p.g.c % 4 || p.g.co % 4) return kNoSuchConfig;
    if (POOL && (p.images > kMostPooled || p.g.tile_w != p.images * plane)) return kNoSuchConfig;
    WideConvTask c{};
    Task& t = c.t;
    t.p.g = p.g;
    t.p.x = p.x, t.p.expand = p.weight, t.p.expand_bias = p.bias, t.p.out = p.out, t.p.act = p.act;
    t.layout = layout_of(p.g);
    t.depth = (p.g.c + 15) / 16 * 32;
    t.steps = p.g.kernel * p.g.kernel * (t.depth / 32);
    t.pieces = (t.steps + kSlabSteps - 1) / kSlabSteps;
    t.chunks = (p.g.co + kSlabColumns - 1) / kSlabColumns;
    c.residual = p.residual;
    c.blocks = (t.chunks + p.column_ctas - 1) / p.column_ctas;
    c.images = p.images;
    const Grid grid = {(p.g.n * plane + p.g.tile_w - 1) / p.g.tile_w, (t.chunks + c.blocks - 1) / c.blocks};
    const int totals = POOL ? p.images * C::kWarps * kSlabColumns * 4 : 0;
    const size_t shared = WideShared<half_t>::bytes(t, C::kRing + totals);
    if (dtype == kHalf) return launch(conv_act_sm90<half_t, C, POOL>, grid, C::kThreads, shared, stream, c);
    return launch(conv_act_sm90<bf16_t, C, POOL>, grid, C::kThreads, shared, stream, c);
}

}  // namespace

int lowkernels_conv_act_sm90(const ConvAct& p, Dtype dtype, int config, void* stream) {
    switch (config) {
#define LK_CASE(number, ...)                                                              \
    case number:                                                                          \
        return p.pool ? launch_product<WideConv<__VA_ARGS__>, true>(p, dtype, stream)     \
                      : launch_product<WideConv<__VA_ARGS__>, false>(p, dtype, stream);
        LK_WIDE_CONVS(LK_CASE)
#undef LK_CASE
        default: return kNoSuchConfig;
    }
}

}  // namespace lowkernels
