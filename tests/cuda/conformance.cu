// Every wrapper of csrc/cuda/device.cuh on one warp: lane l reads in[16 l ..] and writes out[8 l ..], words of 32 bits. The same file
// runs on a GPU and in the shim; the test compares them bit by bit.
#include <cstring>

#include "fragments.cuh"

#if defined(LOWKERNELS_SHIM)
extern "C" void shim_announce(const void* data, size_t bytes, int output);
#endif

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
        default: return -1;
    }
}

}  // namespace
}  // namespace lowkernels

// `in` and `out` are on the host, kWarp * kIn and kWarp * kOut words.
extern "C" __attribute__((visibility("default"))) int lowkernels_conformance(int what, const uint32_t* in, uint32_t* out) {
    using namespace lowkernels;
    constexpr size_t in_bytes = kWarp * kIn * 4, out_bytes = kWarp * kOut * 4;
#if defined(LOWKERNELS_SHIM)
    shim_announce(in, in_bytes, 0);
    shim_announce(out, out_bytes, 1);
    return run(what, {in, out});
#else
    uint32_t *device_in = nullptr, *device_out = nullptr;
    int error = cudaMalloc(&device_in, in_bytes);
    if (!error) error = cudaMalloc(&device_out, out_bytes);
    if (!error) error = cudaMemcpy(device_in, in, in_bytes, cudaMemcpyHostToDevice);
    if (!error) error = run(what, {device_in, device_out});
    if (!error) error = cudaMemcpy(out, device_out, out_bytes, cudaMemcpyDeviceToHost);
    cudaFree(device_in);
    cudaFree(device_out);
    return error;
#endif
}
