// mbconv: 1x1 expansion, depthwise k x k, 1x1 projection. Sandler et al., "MobileNetV2", arXiv 1801.04381.
//
// A CTA keeps the inputs under its tile's window (X) in shared memory, expands 64 channels of them at a time into a window with a
// border of zeros, convolves, and accumulates the projection in registers. Expanded values are fp16 for fp16 inputs and fp32 for
// bf16: they are not rounded to bf16 before the depthwise convolution. They never see global memory.
//
// Budget of a CTA (256 threads), with c input channels rounded up to 16, r inputs rounded up to 16, w pixels of window:
//   shared memory  2 (c + 8) r + 4 r + (160 or 320) w + 2304 * tiles bytes
//   registers      128 and two CTAs an SM up to 128 output columns; 255 and one above
//   from L2        X once, and the residual; all projection weights once a CTA (four times up to 32 columns), expansion weights up
//                  to 2 * ceil(r / 96) times, the depthwise weights once a warp; LowFormer-B1's 7x7x256, two images a CTA, L1
//                  keeping all to nothing: 554 to 1217 KB an image
#include <type_traits>

#include "mbconv.cuh"

namespace lowkernels {
namespace {

constexpr int kChunkGroups = kChunk / kGroup;
constexpr int kExpandWarps = kWarps / kChunkGroups;  // along the rows
constexpr int kExpandTiles = 3;                      // of a warp at a time; a fourth spills

LK_DEVICE int rounded_up(int a, int b) { return ceil_div(a, b) * b; }

// X [rows][row_length(c)], zero where there is no image or no channel.
template <typename T, int PIECE>
LK_DEVICE void copy_inputs(const MBConv& p, const Place& place, const Inside& in, T* inputs, int rows, int depth) {
    constexpr int elements = PIECE / 2;
    const int pieces = depth / elements, pixels = in.h * in.w;
    for (int i = thread_index(); i < rows * pieces; i += kThreads) {
        const int row = i / pieces, channel = i % pieces * elements;
        const int number = row / pixels, image = place.image + number;
        const int y = in.y + row % pixels / in.w, x = in.x + row % pixels % in.w;
        const bool valid = number < p.g.images && image < p.g.n && channel < p.g.c;
        const int64_t at = ((static_cast<int64_t>(image) * p.g.h + y) * p.g.w + x) * p.g.c + channel;
        cp_async<PIECE>(inputs + row * row_length(depth) + channel, static_cast<const T*>(p.x) + (valid ? at : 0), valid);
    }
    cp_async_commit();
}

// One chunk: X times 64 columns of the expansion, bias and activation, into the window. `target` says which pixel each row of X is.
template <typename T, typename W>
LK_DEVICE void expand(const MBConv& p, const T* inputs, const int* target, int rows, int depth, W* window, int chunk) {
    const int warp = warp_index(), lane = lane_index();
    const int group = chunk * kChunkGroups + warp % kChunkGroups, column = lane % 4 * 4;
    const Bits8* weight = static_cast<const Bits8*>(p.expand) + static_cast<int64_t>(group) * (depth / 16) * kWarp;
    const bool live = group * kGroup + column < p.expanded;
    const Float4 bias = live ? load4(p.expand_bias + group * kGroup + column) : Float4{};
    const int tiles = rows / 16;
    for (int first = warp / kChunkGroups; first < tiles; first += kExpandWarps * kExpandTiles) {
        const int mine = ceil_div(tiles - first, kExpandWarps);
        uint32_t a[kExpandTiles];
#pragma unroll
        for (int m = 0; m < kExpandTiles; m++)
            a[m] = tile_address(inputs + (first + m * kExpandWarps) * 16 * row_length(depth), row_length(depth));
        float acc[kExpandTiles][1][2][4];
        clear(acc);
        multiply<T>(acc, a, mine, weight, 0, depth / 16, 1);
        add_bias(acc, 0, bias);
        activate(p.act, acc);
        if (!live) clear(acc);  // whatever the inputs: an infinity times a weight of zero would be NaN
#pragma unroll
        for (int m = 0; m < kExpandTiles; m++) {
            if (m >= mine) continue;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int pixel = target[(first + m * kExpandWarps) * 16 + half * 8 + lane / 4];
                if (pixel < 0) continue;
                float v[4];
                four_columns(acc[m][0], half, v);
                store4(window + pixel * kWindowLength + warp % kChunkGroups * kGroup + column, v);
            }
        }
    }
}

// The CTA's outputs and its chunks.
LK_DEVICE int outputs_of(const MBConv&) { return block_x(); }
LK_DEVICE int outputs_of(const SplitMBConv& p) { return outputs_of_block(p.split); }
LK_DEVICE int first_of(const MBConv&) { return 0; }
LK_DEVICE int first_of(const SplitMBConv& p) { return first_chunk(p.split); }
LK_DEVICE int end_of(const MBConv&, int chunks) { return chunks; }
LK_DEVICE int end_of(const SplitMBConv& p, int chunks) {
    const int end = end_chunk(p.split);
    return end < chunks ? end : chunks;
}

// P: MBConv, or SplitMBConv with split-K.
template <typename T, typename C, typename P>
LK_KERNEL(kThreads, C::kPerSM)
mbconv(P p) {
    using W = typename Kept<T>::type;
    const Place place = place_of(p.g, outputs_of(p));
    const Inside in = inside_of(p.g, place);
    const int depth = rounded_up(p.g.c, 16), chunks = ceil_div(p.expanded, kChunk);
    const int rows = rounded_up(p.g.images * in.h * in.w, 16);
    const int window_pixels = p.g.images * place.window_h * place.window_w;
    // Sizes are multiples of 16 bytes.
    T* tile = reinterpret_cast<T*>(dynamic_shared());
    W* window = reinterpret_cast<W*>(tile + C::kTiles * 16 * kTileLength);
    T* inputs = reinterpret_cast<T*>(window + window_pixels * kWindowLength);
    int* target = reinterpret_cast<int*>(inputs + rows * row_length(depth));

    if (p.g.c % 8 == 0)
        copy_inputs<T, 16>(p, place, in, inputs, rows, depth);
    else
        copy_inputs<T, 8>(p, place, in, inputs, rows, depth);
    for (int row = thread_index(); row < rows; row += kThreads) target[row] = window_pixel(p.g, place, in, row);
    // The border stays zero; padding comes after the activation, so no bias may reach it.
    constexpr int quads = kWindowLength / 4;
    const float zeros[4] = {};
    for (int i = thread_index(); i < window_pixels * quads; i += kThreads) store4(window + i * 4, zeros);

    int start[C::kTiles];
    window_starts(p.g, place, start);
    Projection<T, C> projection;
    projection.begin(p.g.co);
    cp_async_wait<0>();
    block_sync();  // X, the targets and the border are there
    for (int chunk = first_of(p); chunk < end_of(p, chunks); chunk++) {
        expand(p, inputs, target, rows, depth, window, chunk);
        block_sync();  // the window is whole, and nobody reads D any more
        depthwise(p.g, place, window, tile, start, p.dw + chunk * kChunk, p.dw_bias + chunk * kChunk, chunks * kChunk, p.act);
        block_sync();  // D is whole, and nobody reads the window any more
        projection.add(tile, static_cast<const Bits8*>(p.project), chunks * (kChunk / 16), chunk);
    }
    if constexpr (std::is_same_v<P, SplitMBConv>) {
        if (!projection.join(p.g, place, p.split, ceil_div(p.g.co, C::kPass * kGroup), reinterpret_cast<int*>(tile))) return;
    }
    projection.store(p.g, place, p.project_bias, kNone, p.residual ? static_cast<const T*>(p.x) : nullptr, static_cast<T*>(p.out));
}

template <typename C, typename T>
int launch_config(const SplitMBConv& p, void* stream) {
    if (p.g.images * p.g.tile_h * p.g.tile_w > C::kTiles * 16) return kNoSuchConfig;
    auto smaller = [](int a, int b) { return a < b ? a : b; };
    const size_t window_h = (p.g.tile_h - 1) * p.g.stride + p.g.kernel, window_w = (p.g.tile_w - 1) * p.g.stride + p.g.kernel;
    const size_t window = p.g.images * window_h * window_w * kWindowLength * sizeof(typename Kept<T>::type);
    const size_t inside = static_cast<size_t>(p.g.images) * smaller(window_h, p.g.h) * smaller(window_w, p.g.w);
    const size_t rows = (inside + 15) / 16 * 16, depth = (p.g.c + 15) / 16 * 16;
    const size_t shared = C::kTiles * 16 * kTileLength * 2 + window + rows * ((depth + 8) * 2 + sizeof(int));
    Grid grid = grid_of(p.g, C::kPass);
    if (p.split.count > 1) {
        if constexpr (C::kSplits) {
            SplitMBConv divided = p;
            if (!divide(divided.split, grid, (p.expanded + kChunk - 1) / kChunk)) return kNoSuchConfig;
            return launch(mbconv<T, C, SplitMBConv>, grid, kThreads, shared, stream, divided);
        } else {
            return kNoSuchConfig;
        }
    }
    return launch(mbconv<T, C, MBConv>, grid, kThreads, shared, stream, static_cast<const MBConv&>(p));
}

}  // namespace

int lowkernels_mbconv(const SplitMBConv& p, Dtype dtype, int config, void* stream) {
    switch (config) {
#define LK_CASE(number, tiles, warps, groups)                                                                            \
    case number:                                                                                                         \
        return dtype == kHalf ? launch_config<Config<tiles, warps, groups>, half_t>(p, stream)                           \
                              : launch_config<Config<tiles, warps, groups>, bf16_t>(p, stream);
        LK_CONFIGS(LK_CASE)
#undef LK_CASE
        default: return kNoSuchConfig;
    }
}

}  // namespace lowkernels
