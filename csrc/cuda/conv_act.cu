// conv_act: a dense k x k convolution with bias and activation, residual and global average pool in its epilogue.
//
// An implicit product: rows are output pixels, columns output channels, depth is (tap row, tap column, input channel) without gaps, so
// that the three channels of an image cost 27 of depth, and a pixel's depth is gathered from x by cp.async, zeros where the tap lies
// outside. Pixels and weights come in together, chunk by chunk, several chunks ahead. A fully connected layer is the case of one
// pixel an image: its few rows leave all warps to divide the depth.
//
// With `pool` a CTA owns whole images: it goes through their pixels and keeps sums; they are added up in a fixed order.
//
// Budget of a CTA (256 threads) of r rows, c columns and chunks of d depth in s stages:
//   shared memory  s (2 (d + 8) r + 2 d c) + 16 r bytes, and 1 KB a warp where they divide the depth or 16 c a row of warps to pool
//   registers      128 and two CTAs an SM
//   from L2        x k * k times (the input once for every tap) and the CTA's columns of the weights once, for each r rows;
//                  LowFormer-B1's head, 7x7x256 to 1536 and pooled, 64 rows and 128 columns: 1062 KB an image
#include "api.h"
#include "fragments.cuh"

namespace lowkernels {
namespace {

// Warps along the rows, the columns and the depth; of each warp 16-row TILES, GROUPS of 16 columns, and STEPS of 16 of a chunk.
template <int ROWS, int COLUMNS, int DEPTHS, int TILES, int GROUPS, int STEPS, int STAGES>
struct Product {
    static constexpr int kRowWarps = ROWS, kColumnWarps = COLUMNS, kDepthWarps = DEPTHS, kTiles = TILES, kGroups = GROUPS;
    static constexpr int kSteps = STEPS, kStages = STAGES;
    static constexpr int kRows = ROWS * TILES * 16, kPass = COLUMNS * GROUPS, kColumns = kPass * kGroup;
    static constexpr int kChunkSteps = DEPTHS * STEPS, kDepth = kChunkSteps * 16;
    static constexpr int kLength = row_length(kDepth);
    static constexpr int kPixelBytes = kRows * kLength * 2, kStageBytes = kPixelBytes + kPass * kChunkSteps * 512;
    static constexpr bool kPools = DEPTHS == 1 && TILES * GROUPS < 8;  // the largest has no registers left for it
    static_assert(ROWS * COLUMNS * DEPTHS == kWarps, "eight warps");
};

// The shapes compiled, by the number lowkernels/ops/conv_act/cuda.py chooses.
#define LK_PRODUCTS(X) \
    X(0, 2, 4, 1, 4, 2, 2, 4) X(1, 2, 4, 1, 2, 2, 4, 3) X(2, 2, 4, 1, 2, 1, 4, 3) X(3, 4, 2, 1, 2, 1, 2, 3) X(4, 1, 1, 8, 1, 1, 2, 3)

constexpr int kMostImages = 4;  // of a CTA that pools

// Where a row's window begins in x. A row that is no pixel lies so far outside that every tap of it is padding.
struct alignas(16) Row {
    int64_t at;
    int y, x;
};

// Rows are output pixels first to end - 1, in memory order; the first row of all is `first`.
template <typename C>
LK_DEVICE void find_rows(const Geometry& g, Row* rows, int64_t first, int64_t end) {
    const int row = thread_index();
    if (row >= C::kRows) return;
    Row r = {0, -(1 << 30), 0};
    const int64_t index = first + row;
    if (index < end) {
        const int pixels = g.ho * g.wo, pixel = static_cast<int>(index % pixels);
        r.y = pixel / g.wo * g.stride - g.padding;
        r.x = pixel % g.wo * g.stride - g.padding;
        r.at = ((index / pixels * g.h + r.y) * g.w + r.x) * g.c;
    }
    rows[row] = r;
}

// Where in the window a piece of the depth is. It goes on from chunk to chunk without a division.
struct Cursor {
    int channel, kx, ky;

    LK_DEVICE void advance(const Geometry& g, int by) {
        channel += by;
        while (channel >= g.c) {
            channel -= g.c;
            if (++kx == g.kernel) kx = 0, ky++;
        }
    }
    LK_DEVICE bool inside(const Geometry& g, const Row& row) const {
        return ky < g.kernel && row.y + ky >= 0 && row.y + ky < g.h && row.x + kx >= 0 && row.x + kx < g.w;
    }
    LK_DEVICE int64_t offset(const Geometry& g) const { return (static_cast<int64_t>(ky) * g.w + kx) * g.c + channel; }
};

// One chunk of the rows' depth. ELEMENTS divides the input channels, or they are looked up one by one (ELEMENTS = 0).
template <typename T, typename C, int ELEMENTS>
LK_DEVICE void copy_pixels(const Geometry& g, const T* x, const Row* rows, T* tile, Cursor& cursor) {
    constexpr int elements = ELEMENTS ? ELEMENTS : 4, pieces = C::kDepth / elements;
    const int piece = thread_index() % pieces;
    for (int row = thread_index() / pieces; row < C::kRows; row += kThreads / pieces) {
        const Row r = rows[row];
        T* to = tile + row * C::kLength + piece * elements;
        if constexpr (ELEMENTS > 0) {
            const bool inside = cursor.inside(g, r);
            cp_async<2 * elements>(to, x + (inside ? r.at + cursor.offset(g) : 0), inside);
        } else {
            Cursor one = cursor;
            uint32_t bits[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                bits[i] = one.inside(g, r) ? x[r.at + one.offset(g)].bits : 0;
                one.advance(g, 1);
            }
            *reinterpret_cast<Bits4*>(to) = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
        }
    }
    cursor.advance(g, C::kDepth);
}

// One chunk of the CTA's columns, [group][step of the chunk][lane], zeros beyond the last group and step.
template <typename C>
LK_DEVICE void copy_weights(const Bits8* weight, unsigned char* to, int groups, int steps, int chunk) {
    const int first = block_y() * C::kPass;
    for (int i = thread_index(); i < C::kPass * C::kChunkSteps * kWarp; i += kThreads) {
        const int group = first + i / (C::kChunkSteps * kWarp), step = chunk * C::kChunkSteps + i / kWarp % C::kChunkSteps;
        const bool inside = group < groups && step < steps;
        const int64_t at = (static_cast<int64_t>(group) * steps + step) * kWarp + i % kWarp;
        cp_async<16>(to + i * 16, weight + (inside ? at : 0), inside);
    }
}

template <typename T>
LK_DEVICE float load1(const T* from) {
    return unpack_low(T{}, from->bits);
}
template <typename T>
LK_DEVICE void store1(T* to, float value) {
    to->bits = static_cast<uint16_t>(pack2(T{}, value, 0.0f));
}

// Four neighbouring channels of one pixel; `columns` that are no multiple of four are read and written one by one.
template <typename T>
LK_DEVICE void add_residual(const T* from, int column, int columns, float (&v)[4]) {
    if (columns % 4 == 0) {
        const Float4 r = load4(from);
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] += r.v[i];
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (column + i < columns) v[i] += load1(from + i);
    }
}
template <typename T>
LK_DEVICE void store_columns(T* to, int column, int columns, const float (&v)[4]) {
    if (columns % 4 == 0) {
        store4(to, v);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (column + i < columns) store1(to + i, v[i]);
    }
}

// A warp's share of the result: which rows and columns, and the fp32 sums.
template <typename T, typename C>
struct Share {
    float acc[C::kTiles][C::kGroups][2][4];
    int row_warp, column_warp, depth_warp, first_group;

    LK_DEVICE void begin() {
        const int warp = warp_index();
        row_warp = warp % C::kRowWarps;
        column_warp = warp / C::kRowWarps % C::kColumnWarps;
        depth_warp = warp / (C::kRowWarps * C::kColumnWarps);
        first_group = block_y() * C::kPass + column_warp * C::kGroups;
    }

    LK_DEVICE void add(unsigned char* stage) {
        const T* tile = reinterpret_cast<const T*>(stage);
        const Bits8* weights = reinterpret_cast<const Bits8*>(stage + C::kPixelBytes) + lane_index();
        uint32_t a[C::kTiles];
#pragma unroll
        for (int m = 0; m < C::kTiles; m++) a[m] = tile_address(tile + (row_warp + m * C::kRowWarps) * 16 * C::kLength, C::kLength);
#pragma unroll
        for (int s = 0; s < C::kSteps; s++) {
            const int step = depth_warp * C::kSteps + s;
            Bits8 b[C::kGroups];
#pragma unroll
            for (int g = 0; g < C::kGroups; g++) b[g] = weights[((column_warp * C::kGroups + g) * C::kChunkSteps + step) * kWarp];
            multiply_step<T>(acc, a, step * 32, C::kTiles, b, C::kGroups);
        }
    }

    // The first of the warps that divided the depth adds up what all of them have, in their order.
    LK_DEVICE void add_depths(Float4* parts) {
        if constexpr (C::kDepthWarps > 1) {
            static_assert(C::kTiles == 1 && C::kGroups == 1 && C::kDepthWarps == kWarps, "one tile and group each");
            Float4* mine = parts + depth_warp * 2 * kWarp + lane_index();
#pragma unroll
            for (int t = 0; t < 2; t++) mine[t * kWarp] = {{acc[0][0][t][0], acc[0][0][t][1], acc[0][0][t][2], acc[0][0][t][3]}};
            block_sync();  // every warp's part is there
            clear(acc);
            for (int d = 0; d < C::kDepthWarps; d++) {
#pragma unroll
                for (int t = 0; t < 2; t++) {
                    const Float4 part = parts[(d * 2 + t) * kWarp + lane_index()];
#pragma unroll
                    for (int i = 0; i < 4; i++) acc[0][0][t][i] += part.v[i];
                }
            }
        }
    }

    LK_DEVICE void add_biases(const ConvAct& p) {
#pragma unroll
        for (int i = 0; i < C::kGroups; i++)
            if ((first_group + i) * kGroup < p.g.co) add_bias(acc, i, load4(p.bias + (first_group + i) * kGroup + lane_index() % 4 * 4));
    }

    LK_DEVICE int row_of(int m, int half) const { return (row_warp + m * C::kRowWarps) * 16 + half * 8 + lane_index() / 4; }
    LK_DEVICE int column_of(int i) const { return (first_group + i) * kGroup + lane_index() % 4 * 4; }

    // The values of group i in one row, which is output pixel `index`, with the residual.
    LK_DEVICE void values(const ConvAct& p, int m, int half, int i, int64_t index, float (&v)[4]) const {
        four_columns(acc[m][i], half, v);
        const int column = column_of(i);
        if (p.residual) add_residual(static_cast<const T*>(p.residual) + index * p.g.co + column, column, p.g.co, v);
    }

    // Activates and stores tile after tile: activated all at once, the largest shape's spilled for sm_100 and sm_120.
    LK_DEVICE void store(const ConvAct& p, int64_t first, int64_t end) {
        if (C::kDepthWarps > 1 && depth_warp) return;
#pragma unroll
        for (int m = 0; m < C::kTiles; m++) {
            activate(p.act, acc[m]);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int64_t index = first + row_of(m, half);
                if (index >= end) continue;
#pragma unroll
                for (int i = 0; i < C::kGroups; i++) {
                    const int column = column_of(i);
                    if (column >= p.g.co) continue;
                    float v[4];
                    values(p, m, half, i, index, v);
                    store_columns(static_cast<T*>(p.out) + index * p.g.co + column, column, p.g.co, v);
                }
            }
        }
    }

    // Adds to `total` this lane's rows among begin to end - 1, which are output pixels from `first` on.
    LK_DEVICE void add_rows(const ConvAct& p, float (&total)[C::kGroups][4], int64_t first, int begin, int end) const {
#pragma unroll
        for (int m = 0; m < C::kTiles; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = row_of(m, half);
                if (row < begin || row >= end) continue;
#pragma unroll
                for (int i = 0; i < C::kGroups; i++) {
                    if (column_of(i) >= p.g.co) continue;
                    float v[4];
                    values(p, m, half, i, first + row, v);
#pragma unroll
                    for (int c = 0; c < 4; c++) total[i][c] += v[c];
                }
            }
        }
    }

    // The warp's total of each of its columns, to sums [warps along the rows][columns of the CTA].
    LK_DEVICE void sum_lanes(float (&total)[C::kGroups][4], float* sums) const {
#pragma unroll
        for (int i = 0; i < C::kGroups; i++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
#pragma unroll
                for (int lanes = 4; lanes < kWarp; lanes *= 2) total[i][c] += shuffle_xor(total[i][c], lanes);
            }
            if (lane_index() < 4) store4(sums + row_warp * C::kColumns + (column_warp * C::kGroups + i) * kGroup + lane_index() * 4, total[i]);
        }
    }
};

template <typename T, typename C, bool POOL>
LK_KERNEL(kThreads, 2)
conv_act(ConvAct p) {
    const int pixels = p.g.ho * p.g.wo, groups = ceil_div(p.g.co, kGroup);
    const int depth = p.g.kernel * p.g.kernel * p.g.c, steps = ceil_div(depth, 16), chunks = ceil_div(depth, C::kDepth);
    const int images = POOL ? p.images : 1;
    // The output pixels of this CTA; a block of them is as many as there are rows.
    const int64_t all = static_cast<int64_t>(p.g.n) * pixels, mine = POOL ? static_cast<int64_t>(images) * pixels : C::kRows;
    const int64_t begin = block_x() * mine, end = begin + mine < all ? begin + mine : all;

    unsigned char* stages = dynamic_shared();
    Row* rows = reinterpret_cast<Row*>(stages + C::kStages * C::kStageBytes);
    float* sums = reinterpret_cast<float*>(rows + C::kRows);

    Share<T, C> share;
    share.begin();
    float total[C::kGroups][4];
    clear(total);
    for (int64_t first = begin; first < end; first += C::kRows) {
        find_rows<C>(p.g, rows, first, end);
        block_sync();  // the rows are known, and nobody reads the block before
        Cursor cursor = {0, 0, 0};
        const bool eights = p.g.c % 8 == 0, fours = p.g.c % 4 == 0;
        cursor.advance(p.g, eights ? thread_index() % (C::kDepth / 8) * 8 : thread_index() % (C::kDepth / 4) * 4);
        auto copy = [&](int chunk) {
            unsigned char* to = stages + chunk % C::kStages * C::kStageBytes;
            const T* x = static_cast<const T*>(p.x);
            if (chunk < chunks) {
                if (eights)
                    copy_pixels<T, C, 8>(p.g, x, rows, reinterpret_cast<T*>(to), cursor);
                else if (fours)
                    copy_pixels<T, C, 4>(p.g, x, rows, reinterpret_cast<T*>(to), cursor);
                else
                    copy_pixels<T, C, 0>(p.g, x, rows, reinterpret_cast<T*>(to), cursor);
                copy_weights<C>(static_cast<const Bits8*>(p.weight), to + C::kPixelBytes, groups, steps, chunk);
            }
            cp_async_commit();  // an empty group, too: they are counted
        };
        clear(share.acc);
#pragma unroll 1
        for (int chunk = 1 - C::kStages; chunk < chunks; chunk++) {
            if (chunk >= 0) {
                cp_async_wait<C::kStages - 2>();
                block_sync();  // the chunk has landed, and nobody reads the one before
            }
            copy(chunk + C::kStages - 1);
            if (chunk >= 0) share.add(stages + chunk % C::kStages * C::kStageBytes);
        }
        share.add_depths(reinterpret_cast<Float4*>(sums));
        share.add_biases(p);
        if constexpr (POOL) {
            activate(p.act, share.acc);
            for (int image = 0; image < images; image++) {
                // Several images are all in one block.
                if (images > 1) clear(total);
                const int64_t last = images > 1 && first + (image + 1) * pixels < end ? first + (image + 1) * pixels : end;
                share.add_rows(p, total, first, image * pixels, last - first < C::kRows ? static_cast<int>(last - first) : C::kRows);
                if (first + C::kRows >= end) share.sum_lanes(total, sums + image * C::kRowWarps * C::kColumns);
            }
        } else {
            share.store(p, first, end);
        }
    }
    if constexpr (POOL) {
        block_sync();  // the sums of all warps are there
        for (int i = thread_index(); i < images * C::kColumns; i += kThreads) {
            const int image = i / C::kColumns, column = block_y() * C::kColumns + i % C::kColumns;
            if (begin + static_cast<int64_t>(image) * pixels >= end || column >= p.g.co) continue;
            float sum = 0.0f;
            for (int warp = 0; warp < C::kRowWarps; warp++) sum += sums[(image * C::kRowWarps + warp) * C::kColumns + i % C::kColumns];
            const int64_t number = static_cast<int64_t>(block_x()) * images + image;
            store1(static_cast<T*>(p.out) + number * p.g.co + column, sum / static_cast<float>(pixels));
        }
    }
}

template <typename C, bool POOL>
int launch_product(const ConvAct& p, Dtype dtype, void* stream) {
    const int64_t pixels = static_cast<int64_t>(p.g.ho) * p.g.wo;
    if (POOL && p.images > 1 && (p.images > kMostImages || p.images * pixels > C::kRows)) return kNoSuchConfig;
    const int64_t mine = POOL ? p.images * pixels : C::kRows;
    const Grid grid = {(p.g.n * pixels + mine - 1) / mine, (p.g.co + C::kColumns - 1) / C::kColumns};
    const size_t sums = C::kDepthWarps > 1 ? kWarps * 1024 : POOL ? sizeof(float) * p.images * C::kRowWarps * C::kColumns : 0;
    const size_t shared = C::kStages * C::kStageBytes + C::kRows * sizeof(Row) + sums;
    if (dtype == kHalf) return launch(conv_act<half_t, C, POOL>, grid, kThreads, shared, stream, p);
    return launch(conv_act<bf16_t, C, POOL>, grid, kThreads, shared, stream, p);
}

template <typename C>
int launch_config(const ConvAct& p, Dtype dtype, void* stream) {
    if (!p.pool) return launch_product<C, false>(p, dtype, stream);
    if constexpr (C::kPools) return launch_product<C, true>(p, dtype, stream);
    return kNoSuchConfig;
}

}  // namespace

int lowkernels_conv_act(const ConvAct& p, Dtype dtype, int config, void* stream) {
    switch (config) {
#define LK_CASE(number, ...) \
    case number: return launch_config<Product<__VA_ARGS__>>(p, dtype, stream);
        LK_PRODUCTS(LK_CASE)
#undef LK_CASE
        default: return kNoSuchConfig;
    }
}

}  // namespace lowkernels
