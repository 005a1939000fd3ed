// out[64 x 128] = a[64 x depth] b[depth x 128], fp32 out: the smallest kernel with everything the Hopper tier does with a warpgroup. `a`
// comes from rows in shared memory by ldmatrix, one step ahead of the products; `b` in slabs by cp.async, in three stages.
#include "on_host.h"
#include "warpgroup.cuh"

namespace lowkernels {
namespace {

constexpr int kStages = 3;

struct Params {
    const half_t *a, *slabs;
    float* out;
    int depth;
};

LK_KERNEL(kWarpgroup, 1)
gemm(Params p) {
    if constexpr (kWarpgroupProducts) {
        unsigned char* stages = dynamic_shared();
        half_t* rows = reinterpret_cast<half_t*>(stages + kStages * kSlabBytes);
        const int lane = lane_index(), warp = warp_index(), length = row_length(p.depth), slabs = p.depth / kSlabDepth;
        for (int i = thread_index() * 8; i < 64 * p.depth; i += kWarpgroup * 8) cp_async<16>(rows + i / p.depth * length + i % p.depth, p.a + i, true);
        auto copy = [&](int slab) {
            if (slab < slabs) {
                unsigned char* to = stages + slab % kStages * kSlabBytes;
                const half_t* from = p.slabs + slab * (kSlabBytes / 2);
                for (int i = thread_index() * 8; i < kSlabBytes / 2; i += kWarpgroup * 8) cp_async<16>(to + i * 2, from + i, true);
            }
            cp_async_commit();
        };
        copy(0);
        float d[16][4];
        uint32_t a[2][4];
        const uint32_t from = tile_address(rows + warp * 16 * length, length);
        for (int slab = 0; slab < slabs; slab++) {
            cp_async_wait<0>();
            fence_proxy_async();
            block_sync();  // this slab has landed, and nobody reads the one before the last any more
            copy(slab + 1);
            if (slab == 0) ldmatrix_x4(a[0], from);
            const uint32_t at = shared_address(stages + slab % kStages * kSlabBytes);
#pragma unroll
            for (int step = 0; step < kSlabSteps; step++) {
                wgmma_fence();
                wgmma(half_t{}, d, a[step % 2], slab_operand(at, step), slab + step > 0);
                wgmma_commit();
                wgmma_wait<1>();
                const int next = slab * kSlabSteps + step + 1;
                ldmatrix_x4(a[(step + 1) % 2], from + (next < slabs * kSlabSteps ? next : 0) * 32);
            }
        }
        wgmma_wait<0>();
        wgmma_settle(d);
        for (int j = 0; j < 16; j++)
            for (int i = 0; i < 4; i++) p.out[(warp * 16 + lane / 4 + i / 2 * 8) * kSlabColumns + j * 8 + lane % 4 * 2 + i % 2] = d[j][i];
    } else {
        refuse();
    }
}

}  // namespace
}  // namespace lowkernels

// `in`: a, then the slabs of b.
extern "C" __attribute__((visibility("default"))) int lowkernels_gemm(const uint16_t* in, int depth, float* out) {
    using namespace lowkernels;
    const size_t in_bytes = static_cast<size_t>(64 + kSlabColumns) * depth * 2, shared = kStages * kSlabBytes + 64 * (depth + 8) * 2;  // rows of row_length
    return on_device(in, in_bytes, out, 64 * kSlabColumns * sizeof(float), [&](const uint16_t* from, float* to) {
        const half_t* a = reinterpret_cast<const half_t*>(from);
        return launch(gemm, {1, 1}, kWarpgroup, shared, nullptr, Params{a, a + 64 * depth, to, depth});
    });
}
