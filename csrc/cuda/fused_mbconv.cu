// fused_mbconv: dense k x k expansion with activation, 1x1 projection. Tan and Le, "EfficientNetV2", arXiv 2104.00298.
//
// Budget of a CTA (256 threads), with c input channels rounded up to 16 and w pixels of window:
//   shared memory  2 (c + 8) w + 32 KB of weights under way (48 KB where warps split the expanded channels)
//   registers      255 and one CTA an SM; 128 and two up to 64 output columns
//   from L2        window, weights and residual once a CTA; its rows are 256, 128 or 32 as Chain says; LowFormer-B1's 14x14x128,
//                  one image a CTA, L1 keeping all to nothing: 1329 to 1378 KB an image
#include "expand_project.cuh"

namespace lowkernels {
namespace {

template <typename T, typename C>
LK_KERNEL(kThreads, C::kPerSM)
fused_mbconv(Task t) {
    const Shared<T, C> shared(t);
    const Pixels pixels = pixels_of(t.p.g, C::kSplits ? outputs_of_block(t.p.split) : block_x());
    if (thread_index() == 0) *shared.pixels = pixels;
    copy_window(t, pixels, shared.window);
    Weights<C> weights(t, shared.ring);
    make_taps(t, shared.taps);
    Products<T, C> products;
    products.run(t, pixels, shared.window, shared.taps, weights);
    products.add_up(shared.sums());
    if (C::kSplits && t.p.split.count > 1 && !products.join(t, *shared.pixels, reinterpret_cast<int*>(shared.sums()))) return;
    products.store(t, *shared.pixels);
}

template <typename C, typename T>
int launch_config(const ExpandProject& p, void* stream) {
    Task task = task_of<C>(p);
    Grid grid = grid_of<C>(p.g);
    if (p.g.tile_h * p.g.tile_w > C::kRows || (p.split.count > 1 && !C::kSplits) || !divide(task.p.split, grid, task.chunks))
        return kNoSuchConfig;
    return launch(fused_mbconv<T, C>, grid, kThreads, Shared<T, C>::bytes(task), stream, task);
}

}  // namespace

int lowkernels_fused_mbconv(const ExpandProject& p, Dtype dtype, int config, void* stream) {
    switch (config) {
#define LK_CASE(number, tiles, expand, groups, split)                                                                  \
    case number:                                                                                                       \
        return dtype == kHalf ? launch_config<Chain<tiles, expand, groups, split>, half_t>(p, stream)                  \
                              : launch_config<Chain<tiles, expand, groups, split>, bf16_t>(p, stream);
        LK_ALL_CHAINS(LK_CASE)
#undef LK_CASE
        default: return kNoSuchConfig;
    }
}

}  // namespace lowkernels
