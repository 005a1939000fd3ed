// What separable_conv and mbconv share: a CTA's tile of output pixels, the depthwise convolution over a window in shared memory, and
// the 1x1 product that follows it.
//
// A CTA makes tile_h x tile_w outputs of each of `images` images: the rows of its product, 16 * Config::kTiles at most. Their
// *window* is what the depthwise convolution reads, padding included. Channels go through in chunks of kChunk: window, then
// depthwise into the tile D, then D times the chunk's rows of the 1x1 weight, accumulated in registers over all chunks.
#pragma once

#include "split.cuh"

namespace lowkernels {

constexpr int kChunk = 64;
constexpr int kQuads = kChunk / 4;             // a thread's share of a chunk is four channels
constexpr int kSlots = kThreads / kQuads;      // pixels under way at once
constexpr int kWindowLength = kChunk + 16;     // elements between pixels: rows of stores meet no bank twice, fp32 or 16 bits
constexpr int kTileLength = row_length(kChunk);
static_assert(kSlots == 16, "a thread makes one depthwise row of each 16-row tile");

// TILES 16-row tiles; WARPS of the eight lie along the columns, the others along the rows; GROUPS of 16 columns a warp.
template <int TILES, int WARPS, int GROUPS>
struct Config {
    static constexpr int kTiles = TILES, kColumnWarps = WARPS, kRowWarps = kWarps / WARPS, kGroups = GROUPS;
    static constexpr int kWarpTiles = TILES / kRowWarps;
    static constexpr int kPass = WARPS * GROUPS;               // groups of one CTA
    static constexpr int kPerSM = kWarpTiles * GROUPS > 4 ? 1 : 2;  // CTAs: the accumulators decide
    static constexpr bool kSplits = TILES == 4 && GROUPS == 2;      // compiled for split-K too: registers are to spare
    static_assert(TILES % kRowWarps == 0, "tiles are dealt evenly");
};

// The shapes compiled, by the number lowkernels/backends/cuda/tiling.py chooses: (tiles, warps along columns, groups a warp).
#define LK_CONFIGS(X) X(0, 4, 2, 1) X(1, 4, 8, 1) X(2, 4, 8, 2) X(3, 7, 8, 2)

struct Place {
    int image, y, x;           // first image; first output pixel
    int window_y, window_x;    // first pixel of the window, may lie outside of the image
    int window_h, window_w;
};

LK_DEVICE Place place_of(const Geometry& g, int block) {
    const int tiles_x = ceil_div(g.wo, g.tile_w), tiles = ceil_div(g.ho, g.tile_h) * tiles_x;
    const int tile = block % tiles;
    Place p;
    p.image = block / tiles * g.images;
    p.y = tile / tiles_x * g.tile_h;
    p.x = tile % tiles_x * g.tile_w;
    p.window_y = p.y * g.stride - g.padding;
    p.window_x = p.x * g.stride - g.padding;
    p.window_h = (g.tile_h - 1) * g.stride + g.kernel;
    p.window_w = (g.tile_w - 1) * g.stride + g.kernel;
    return p;
}

// Where in the window each of this thread's output pixels begins. Rows that are no pixel compute the first one's values again.
template <int TILES>
LK_DEVICE void window_starts(const Geometry& g, const Place& p, int (&start)[TILES]) {
    const int pixels = g.tile_h * g.tile_w;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const int row = thread_index() / kQuads + i * kSlots;
        const int image = row / pixels, pixel = row % pixels;
        const int y = image * p.window_h + pixel / g.tile_w * g.stride, x = pixel % g.tile_w * g.stride;
        start[i] = image < g.images ? y * p.window_w + x : 0;
    }
}

// One chunk of the depthwise convolution with bias and activation, window [pixels][kWindowLength] -> tile [rows][kTileLength].
// Taps outside, pixels inside: a tap's weights are read once for all pixels.
template <typename T, typename W, int TILES>
LK_DEVICE void depthwise(const Geometry& g, const Place& p, const W* window, T* tile, const int (&start)[TILES], const float* weight,
                         const float* bias, int channels, int act) {
    const int quad = thread_index() % kQuads;
    const Float4 initial = load4(bias + quad * 4);
    float acc[TILES][4];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int c = 0; c < 4; c++) acc[i][c] = initial.v[c];
    const W* from = window + quad * 4;
    const float* at = weight + quad * 4;
    for (int ky = 0; ky < g.kernel; ky++) {
        for (int kx = 0; kx < g.kernel; kx++) {
            const Float4 w = load4(at);
            at += channels;
            const int offset = ky * p.window_w + kx;
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                const Float4 v = load4(from + (start[i] + offset) * kWindowLength);
#pragma unroll
                for (int c = 0; c < 4; c++) acc[i][c] += v.v[c] * w.v[c];
            }
        }
    }
    activate(act, acc);
#pragma unroll
    for (int i = 0; i < TILES; i++) store4(tile + (thread_index() / kQuads + i * kSlots) * kTileLength + quad * 4, acc[i]);
}

// The 1x1 product behind the depthwise convolution: its accumulators, its weights and its output.
template <typename T, typename C>
struct Projection {
    float acc[C::kWarpTiles][C::kGroups][2][4];
    int first_group, groups, first_tile;

    LK_DEVICE void begin(int columns) {
        const int warp = warp_index();
        first_group = block_y() * C::kPass + warp % C::kColumnWarps * C::kGroups;
        groups = ceil_div(columns, kGroup) - first_group;
        first_tile = warp / C::kColumnWarps;
        clear(acc);
    }

    // Adds tile [rows][kTileLength] times the chunk's rows of the weight, which has `steps` steps of depth altogether.
    LK_DEVICE void add(const T* tile, const Bits8* weight, int steps, int chunk) {
        if (groups <= 0) return;
        constexpr int depth = kChunk / 16;
        uint32_t a[C::kWarpTiles];
#pragma unroll
        for (int m = 0; m < C::kWarpTiles; m++)
            a[m] = tile_address(tile + (first_tile + m * C::kRowWarps) * 16 * kTileLength, kTileLength);
        const Bits8* from = weight + (static_cast<int64_t>(first_group) * steps + chunk * depth) * kWarp;
        multiply<T>(acc, a, C::kWarpTiles, from, steps, depth, groups);
    }

    // Leaves its sums for the CTA that comes last, or takes all CTAs' if it does.
    LK_DEVICE bool join(const Geometry& g, const Place& p, const Split& s, int columns, int* flag) {
        float* mine = sums_of_block(s, g);
        for_each_output(g, p, [&](int m, int i, int half, int64_t at) {
            float v[4];
            four_columns(acc[m][i], half, v);
            store4(mine + at, v);
        });
        if (!comes_last(s, columns, flag)) return false;
        for_each_output(g, p, [&](int m, int i, int half, int64_t at) {
            float v[4];
            add_sums(s, g, at, v);
#pragma unroll
            for (int c = 0; c < 4; c++) acc[m][i][c / 2][2 * half + c % 2] = v[c];
        });
        return true;
    }

    // f(tile, group, half, where) for this lane's outputs, four neighbouring columns at a time.
    template <typename F>
    LK_DEVICE void for_each_output(const Geometry& g, const Place& p, F f) const {
        const int pixels = g.tile_h * g.tile_w;
#pragma unroll
        for (int m = 0; m < C::kWarpTiles; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = (first_tile + m * C::kRowWarps) * 16 + half * 8 + lane_index() / 4;
                const int number = row / pixels, pixel = row % pixels;
                const int image = p.image + number, y = p.y + pixel / g.tile_w, x = p.x + pixel % g.tile_w;
                if (number >= g.images || image >= g.n || y >= g.ho || x >= g.wo) continue;
                const int64_t at = ((static_cast<int64_t>(image) * g.ho + y) * g.wo + x) * g.co;
#pragma unroll
                for (int i = 0; i < C::kGroups; i++) {
                    const int column = (first_group + i) * kGroup + lane_index() % 4 * 4;
                    if (column < g.co) f(m, i, half, at + column);
                }
            }
        }
    }

    // Bias, activation, residual; then the CTA's pixels go out, 32 bytes of neighbouring channels at a time.
    LK_DEVICE void store(const Geometry& g, const Place& p, const float* bias, int act, const T* residual, T* out) {
#pragma unroll
        for (int i = 0; i < C::kGroups; i++)
            if (i < groups) add_bias(acc, i, load4(bias + (first_group + i) * kGroup + lane_index() % 4 * 4));
        activate(act, acc);
        for_each_output(g, p, [&](int m, int i, int half, int64_t at) {
            float v[4];
            four_columns(acc[m][i], half, v);
            if (residual) {
                const Float4 r = load4(residual + at);
#pragma unroll
                for (int c = 0; c < 4; c++) v[c] += r.v[c];
            }
            store4(out + at, v);
        });
    }
};

inline Grid grid_of(const Geometry& g, int pass) {
    const int64_t tiles = static_cast<int64_t>((g.ho + g.tile_h - 1) / g.tile_h) * ((g.wo + g.tile_w - 1) / g.tile_w);
    return {(g.n + g.images - 1) / g.images * tiles, (g.co + pass * kGroup - 1) / (pass * kGroup)};
}

}  // namespace lowkernels
