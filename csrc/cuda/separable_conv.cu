// separable_conv: depthwise k x k, then 1x1, each with bias and activation. Howard et al., "MobileNets", arXiv 1704.04861.
//
// A chunk of 64 channels of the window comes in by cp.async while the chunk before is worked on; the depthwise result goes through
// the shared-memory tile D, never through global memory.
//
// Budget of a CTA (256 threads), with the window of w pixels:
//   shared memory  2 * 160 w (160 w where there is one chunk) + 2304 * tiles bytes
//   registers      128 and two CTAs an SM up to 128 output columns; 255 and one above
//   from L2        the window once and all 1x1 weights once a CTA (four times up to 32 columns), the depthwise weights once a warp,
//                  the residual; 14x14x512 in tiles of 7x14, L1 keeping all to nothing: 1544 to 2244 KB an image
#include "window.cuh"

namespace lowkernels {
namespace {

template <typename T, int PIECE>
LK_DEVICE void copy_window(const SeparableConv& p, const Place& place, T* window, int chunk) {
    constexpr int elements = PIECE / 2, pieces = kChunk / elements;
    const int pixels = place.window_h * place.window_w;
    for (int i = thread_index(); i < p.g.images * pixels * pieces; i += kThreads) {
        const int position = i / pieces, channel = i % pieces * elements;
        const int image = place.image + position / pixels;
        const int y = place.window_y + position % pixels / place.window_w, x = place.window_x + position % pixels % place.window_w;
        const bool inside = image < p.g.n && y >= 0 && y < p.g.h && x >= 0 && x < p.g.w && chunk * kChunk + channel < p.g.c;
        const int64_t at = ((static_cast<int64_t>(image) * p.g.h + y) * p.g.w + x) * p.g.c + chunk * kChunk + channel;
        cp_async<PIECE>(window + position * kWindowLength + channel, static_cast<const T*>(p.x) + (inside ? at : 0), inside);
    }
    cp_async_commit();
}

template <typename T, typename C>
LK_KERNEL(kThreads, C::kPerSM)
separable_conv(SeparableConv p) {
    const Place place = place_of(p.g, block_x());
    const int chunks = ceil_div(p.g.c, kChunk), channels = chunks * kChunk;
    const int window_size = p.g.images * place.window_h * place.window_w * kWindowLength;
    T* tile = reinterpret_cast<T*>(dynamic_shared());
    T* windows = tile + C::kTiles * 16 * kTileLength;

    auto copy = [&](int chunk) {
        T* to = windows + chunk % 2 * window_size;
        if (p.g.c % 8 == 0)
            copy_window<T, 16>(p, place, to, chunk);
        else
            copy_window<T, 8>(p, place, to, chunk);
    };

    int start[C::kTiles];
    window_starts(p.g, place, start);
    Projection<T, C> projection;
    projection.begin(p.g.co);
    copy(0);
    for (int chunk = 0; chunk < chunks; chunk++) {
        cp_async_wait<0>();
        block_sync();  // the window has landed, and nobody reads the other window or D any more
        if (chunk + 1 < chunks) copy(chunk + 1);
        depthwise(p.g, place, windows + chunk % 2 * window_size, tile, start, p.dw + chunk * kChunk, p.dw_bias + chunk * kChunk, channels,
                  p.dw_act);
        block_sync();  // D is whole
        projection.add(tile, static_cast<const Bits8*>(p.pw), channels / 16, chunk);
    }
    projection.store(p.g, place, p.pw_bias, p.pw_act, p.residual ? static_cast<const T*>(p.x) : nullptr, static_cast<T*>(p.out));
}

template <typename C>
int launch_config(const SeparableConv& p, Dtype dtype, void* stream) {
    if (p.g.images * p.g.tile_h * p.g.tile_w > C::kTiles * 16) return kNoSuchConfig;
    const size_t window = static_cast<size_t>(p.g.images) * ((p.g.tile_h - 1) * p.g.stride + p.g.kernel) *
                          ((p.g.tile_w - 1) * p.g.stride + p.g.kernel) * kWindowLength;
    const size_t shared = 2 * (C::kTiles * 16 * kTileLength + (p.g.c > kChunk ? 2 : 1) * window);
    const Grid grid = grid_of(p.g, C::kPass);
    if (dtype == kHalf) return launch(separable_conv<half_t, C>, grid, kThreads, shared, stream, p);
    return launch(separable_conv<bf16_t, C>, grid, kThreads, shared, stream, p);
}

}  // namespace

int lowkernels_separable_conv(const SeparableConv& p, Dtype dtype, int config, void* stream) {
    switch (config) {
#define LK_CASE(number, tiles, warps, groups) \
    case number: return launch_config<Config<tiles, warps, groups>>(p, dtype, stream);
        LK_CONFIGS(LK_CASE)
#undef LK_CASE
        default: return kNoSuchConfig;
    }
}

}  // namespace lowkernels
