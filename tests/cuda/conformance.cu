// Every wrapper of csrc/cuda/device.cuh on one warp: lane l reads in[16 l ..] and writes out[8 l ..], words of 32 bits; those of
// warpgroups on one warpgroup. The same file runs on a GPU and in the shim; the test compares them bit by bit.
#include <cstring>

#include "on_host.h"
#include "warpgroup.cuh"

namespace lowkernels {
namespace {

constexpr int kIn = 16, kOut = 8;

struct Params {
    const uint32_t* in;
    uint32_t* out;
};

LK_DEVICE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

LK_DEVICE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

template <typename T>
LK_DEVICE void product(const uint32_t* in, uint32_t* out) {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    float d[4];
    for (int i = 0; i < 4; i++) d[i] = float_of(in[8 + i]);
    mma(T{}, d, a, in[4], in[5]);
    for (int i = 0; i < 4; i++) out[i] = bits_of(d[i]);
}

template <typename T>
LK_DEVICE void conversions(const uint32_t* in, uint32_t* out) {
    out[0] = pack2(T{}, float_of(in[8]), float_of(in[9]));
    out[1] = bits_of(unpack_low(T{}, in[0]));
    out[2] = bits_of(unpack_high(T{}, in[0]));
}

template <int WHAT>
LK_KERNEL(kWarp, 1)
wrapper(Params p) {
    const int lane = lane_index();
    const uint32_t* in = p.in + lane * kIn;
    uint32_t result[kOut] = {};
    uint32_t* rows = reinterpret_cast<uint32_t*>(dynamic_shared());
    if constexpr (WHAT == 0 || WHAT == 1) {
        // A row of 16 bytes from each lane, read in an order of the input's choosing.
        for (int i = 0; i < 4; i++) rows[lane * 4 + i] = in[i];
        block_sync();
        uint32_t r[4];
        if constexpr (WHAT == 0)
            ldmatrix_x4(r, shared_address(rows + in[15] % kWarp * 4));
        else
            ldmatrix_x4_transposed(r, shared_address(rows + in[15] % kWarp * 4));
        for (int i = 0; i < 4; i++) result[i] = r[i];
    } else if constexpr (WHAT == 2) {
        product<half_t>(in, result);
    } else if constexpr (WHAT == 3) {
        product<bf16_t>(in, result);
    } else if constexpr (WHAT == 4) {
        for (int i = 0; i < 8; i++) rows[lane * 8 + i] = 0xffffffffu;
        warp_sync();
        cp_async<16>(rows + lane * 8, in, in[15] % 2 != 0);
        cp_async_commit();
        cp_async<8>(rows + lane * 8 + 4, in + 4, in[14] % 2 != 0);
        cp_async_commit();
        cp_async_wait<1>();
        for (int i = 0; i < 4; i++) result[i] = rows[lane * 8 + i];
        cp_async_wait<0>();
        for (int i = 4; i < 8; i++) result[i] = rows[lane * 8 + i];
    } else if constexpr (WHAT == 5) {
        conversions<half_t>(in, result);
    } else if constexpr (WHAT == 6) {
        conversions<bf16_t>(in, result);
    } else if constexpr (WHAT == 7) {
        for (int i = 0; i < 5; i++) result[i] = bits_of(shuffle_xor(float_of(in[8 + i]), 1 << i));
    } else {
        result[0] = bits_of(exponential(float_of(in[8])));
        result[1] = bits_of(error_function(float_of(in[9])));
        result[2] = bits_of(hyperbolic_tangent(float_of(in[10])));
        result[3] = bits_of(reciprocal_root(float_of(in[11]) * float_of(in[11]) + 1e-3f));
    }
    for (int i = 0; i < kOut; i++) p.out[lane * kOut + i] = result[i];
}

// acc[64 x COLUMNS] + a[64 x 64] b[64 x COLUMNS]. in: b as it lies in shared memory; a's registers of four steps of depth 16 by thread,
// or with SHARED a as it lies there, swizzled as b; the accumulators by thread. out: the accumulators.
template <typename T, int COLUMNS, Swizzle SWIZZLE, bool SHARED>
LK_KERNEL(kWarpgroup, 1)
warpgroup_product(Params p) {
    if constexpr (kWarpgroupProducts) {
        constexpr int bytes = COLUMNS * 128, sums = COLUMNS / 2, copied = bytes + (SHARED ? 64 * 128 : 0);
        unsigned char* b = dynamic_shared() + 1024;
        for (int i = thread_index() * 16; i < copied; i += kWarpgroup * 16) cp_async<16>(b + i, p.in + i / 4, true);
        cp_async_commit();
        const uint32_t* words = p.in + bytes / 4 + thread_index() * 16;
        uint32_t a[4][4];
        if (!SHARED)
            for (int i = 0; i < 16; i++) a[i / 4][i % 4] = words[i];
        const uint32_t* initial = p.in + bytes / 4 + kWarpgroup * 16 + thread_index() * sums;
        float d[COLUMNS / 8][4];
        for (int i = 0; i < sums; i++) d[i / 4][i % 4] = float_of(initial[i]);
        cp_async_wait<0>();
        fence_proxy_async();
        block_sync();
        // Steps of depth 16 within a row, and bytes of a step's eight columns.
        constexpr int steps = SWIZZLE == kNoSwizzle ? 1 : 8 >> SWIZZLE, eight = SWIZZLE == kNoSwizzle ? 256 : 2048 >> SWIZZLE;
        const uint32_t at = shared_address(b);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; step++) {
            const uint32_t start = at + step / steps * (COLUMNS / 8 * eight) + step % steps * 32;
            const uint64_t second = matrix_descriptor(start, eight, 128, SWIZZLE);
            if constexpr (SHARED)
                wgmma(T{}, d, matrix_descriptor(at + bytes + step / steps * (8 * eight) + step % steps * 32, eight, 128, SWIZZLE), second, true);
            else
                wgmma(T{}, d, a[step], second, true);
            if (step % 2) wgmma_commit();
        }
        wgmma_wait<1>();
        wgmma_wait<0>();
        wgmma_settle(d);
        for (int i = 0; i < sums; i++) p.out[thread_index() * sums + i] = bits_of(d[i / 4][i % 4]);
    } else {
        refuse();
    }
}

template <typename T, int COLUMNS, Swizzle SWIZZLE, bool SHARED = false>
int launch_product(const Params& p) {
    return launch(warpgroup_product<T, COLUMNS, SWIZZLE, SHARED>, {1, 1}, kWarpgroup, 1024 + (COLUMNS + 64 * SHARED) * 128, nullptr, p);
}

int run(int what, const Params& p) {
    constexpr size_t shared = kWarp * 32;
    switch (what) {
        case 0: return launch(wrapper<0>, {1, 1}, kWarp, shared, nullptr, p);
        case 1: return launch(wrapper<1>, {1, 1}, kWarp, shared, nullptr, p);
        case 2: return launch(wrapper<2>, {1, 1}, kWarp, shared, nullptr, p);
        case 3: return launch(wrapper<3>, {1, 1}, kWarp, shared, nullptr, p);
        case 4: return launch(wrapper<4>, {1, 1}, kWarp, shared, nullptr, p);
        case 5: return launch(wrapper<5>, {1, 1}, kWarp, shared, nullptr, p);
        case 6: return launch(wrapper<6>, {1, 1}, kWarp, shared, nullptr, p);
        case 7: return launch(wrapper<7>, {1, 1}, kWarp, shared, nullptr, p);
        case 8: return launch(wrapper<8>, {1, 1}, kWarp, shared, nullptr, p);
        case 9: return launch_product<half_t, 64, kSwizzle128>(p);
        case 10: return launch_product<bf16_t, 64, kSwizzle128>(p);
        case 11: return launch_product<half_t, 128, kSwizzle128>(p);
        case 12: return launch_product<bf16_t, 128, kSwizzle128>(p);
        case 13: return launch_product<half_t, 64, kSwizzle64>(p);
        case 14: return launch_product<half_t, 64, kSwizzle32>(p);
        case 15: return launch_product<half_t, 64, kNoSwizzle>(p);
        case 16: return launch_product<half_t, 64, kSwizzle128, true>(p);
        case 17: return launch_product<bf16_t, 64, kSwizzle128, true>(p);
        case 18: return launch_product<half_t, 128, kSwizzle128, true>(p);
        case 19: return launch_product<bf16_t, 128, kSwizzle128, true>(p);
        case 20: return launch_product<half_t, 64, kSwizzle64, true>(p);
        default: return -1;
    }
}

}  // namespace
}  // namespace lowkernels

// `in` and `out` are on the host.
extern "C" __attribute__((visibility("default"))) int lowkernels_conformance(int what, const uint32_t* in, size_t in_bytes, uint32_t* out,
                                                                             size_t out_bytes) {
    using namespace lowkernels;
    return on_device(in, in_bytes, out, out_bytes, [&](const uint32_t* from, uint32_t* to) { return run(what, {from, to}); });
}
