// gn_mlp on Hopper, see gn_mlp.cu and expand_project_sm90.cuh.
//
// Budget of a CTA (384 or 256 threads), with c channels rounded up to 16 and r rows:
//   shared memory  80 KB of weights under way + 2 (c + 8) r bytes
//   registers      168 a thread with three warpgroups, 255 with two; one CTA an SM
//   from L2        its rows, all weights and the residual once; images that it shares with other CTAs twice more; LowFormer-B1's
//                  14x14x128, 192 rows, L1 keeping all to nothing: 360 to 556 KB an image
#include "expand_project_sm90.cuh"
#include "normalise.cuh"

namespace lowkernels {
namespace {

template <typename T, typename C>
LK_KERNEL(C::kThreads, 1)
gn_mlp_sm90(Task t) {
    if constexpr (kWarpgroupProducts) {
        const WideShared<T> shared(t, C::kRing);
        const Pixels pixels = pixels_of(t.p.g, block_x());
        if (thread_index() < kGroup / 4) *reinterpret_cast<Bits4*>(shared.zeros + thread_index() * 4) = {};
        copy_window<T, C::kWarps>(t, pixels, shared.window);
        Slabs<C> slabs(static_cast<const Bits8*>(t.p.expand), t.chunks * t.pieces, shared.ring);
        make_taps<C::kWarps>(t, shared.taps);
        cp_async_wait<Slabs<C>::kAhead>();  // the window; slabs may still be under way
        normalise<T, C::kWarps>(t, pixels, shared.window, reinterpret_cast<float*>(shared.taps + t.steps));
        block_sync();  // the rows are normalised, and the zeros and the taps are there
        WideProducts<T, C> products;
        products.run(t, WindowRows(t, pixels, shared.window, shared.taps, shared.zeros), slabs);
        products.store(t, pixels);
    } else {
        refuse();
    }
}

template <typename C, typename T>
int launch_config(const ExpandProject& p, void* stream) {
    if (!C::serves(p.g)) return kNoSuchConfig;
    const int error = launch_partial_moments<T>(p, stream);
    if (error != 0) return error;
    const Task task = wide_task_of<C>(p);
    const size_t shared = WideShared<T>::bytes(task, C::kRing) + 2 * C::kWarps * sizeof(float);
    return launch(gn_mlp_sm90<T, C>, wide_grid_of(p.g), C::kThreads, shared, stream, task);
}

}  // namespace

int lowkernels_gn_mlp_sm90(const ExpandProject& p, Dtype dtype, int config, void* stream) {
    switch (config) {
#define LK_CASE(number, warpgroups, columns)                                                         \
    case number:                                                                                     \
        return dtype == kHalf ? launch_config<WideChain<warpgroups, columns>, half_t>(p, stream)     \
                              : launch_config<WideChain<warpgroups, columns>, bf16_t>(p, stream);
        LK_WIDE_CHAINS(LK_CASE)
#undef LK_CASE
        default: return kNoSuchConfig;
    }
}

}  // namespace lowkernels
