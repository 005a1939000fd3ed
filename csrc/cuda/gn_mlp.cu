// gn_mlp: GroupNorm with one group, 1x1 expansion with activation, 1x1 projection.
//
// Pixels are rows of a matrix, whatever image they are of. A CTA normalises its rows in shared memory, once, in fp32; the products are
// expand_project.cuh's with a single tap. Statistics of images that lie whole in a CTA come from there; of others from global memory,
// read by every CTA that needs them, or, of large images, from a launch before that leaves the moments of pieces of them.
//
// Budget of a CTA (256 threads), with c channels rounded up to 16 and r rows:
//   shared memory  2 (c + 8) r + 64 + c / 4 bytes + 32 KB of weights under way (48 KB where warps split the expanded channels)
//   registers      255 and one CTA an SM; 128 and two up to 64 output columns
//   from L2        its rows, all weights and the residual once; images that it shares with other CTAs twice more; LowFormer-B1's
//                  14x14x128, one image a CTA, L1 keeping all to nothing: 305 to 354 KB an image
#include "normalise.cuh"

namespace lowkernels {
namespace {

constexpr size_t kScratch = 2 * kWarps * sizeof(float);

template <typename T, typename C>
LK_KERNEL(kThreads, C::kPerSM)
gn_mlp(Task t) {
    const Shared<T, C> shared(t);
    const Pixels pixels = pixels_of(t.p.g, C::kSplits ? outputs_of_block(t.p.split) : block_x());
    if (thread_index() == 0) *shared.pixels = pixels;
    copy_window(t, pixels, shared.window);
    Weights<C> weights(t, shared.ring);
    make_taps(t, shared.taps);
    cp_async_wait<C::kStages - 1>();  // the window; weights may still be under way
    normalise(t, pixels, shared.window, reinterpret_cast<float*>(shared.taps + t.steps));
    Products<T, C> products;
    products.run(t, pixels, shared.window, shared.taps, weights);
    products.add_up(shared.sums());
    if (C::kSplits && t.p.split.count > 1 && !products.join(t, *shared.pixels, reinterpret_cast<int*>(shared.sums()))) return;
    products.store(t, *shared.pixels);
}

template <typename C, typename T>
int launch_config(const ExpandProject& p, void* stream) {
    if (p.g.tile_h * p.g.tile_w > C::kRows || (p.split.count > 1 && !C::kSplits)) return kNoSuchConfig;
    Task task = task_of<C>(p);
    Grid grid = grid_of<C>(p.g);
    if (!divide(task.p.split, grid, task.chunks)) return kNoSuchConfig;
    const int error = launch_partial_moments<T>(p, stream);
    if (error != 0) return error;
    return launch(gn_mlp<T, C>, grid, kThreads, Shared<T, C>::bytes(task) + kScratch, stream, task);
}

}  // namespace

int lowkernels_gn_mlp(const ExpandProject& p, Dtype dtype, int config, void* stream) {
    switch (config) {
#define LK_CASE(number, tiles, expand, groups, split)                                                                  \
    case number:                                                                                                       \
        return dtype == kHalf ? launch_config<Chain<tiles, expand, groups, split>, half_t>(p, stream)                  \
                              : launch_config<Chain<tiles, expand, groups, split>, bf16_t>(p, stream);
        LK_CHAINS(LK_CASE)
#undef LK_CASE
        default: return kNoSuchConfig;
    }
}

}  // namespace lowkernels
