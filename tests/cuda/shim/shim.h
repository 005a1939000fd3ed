// The kernels' machine on a CPU: the names of csrc/cuda/device.cuh, carried out by shim.cpp.
//
// Kernel files are compiled with -fsanitize=thread but not linked with its runtime: shim.cpp has the functions that g++ calls at
// every memory access. What stands here is inlined, so that an access is reported at the kernel's own line.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define LK_DEVICE inline __attribute__((always_inline))
#define LK_KERNEL(threads, ctas) void

extern "C" {
int shim_thread();
int shim_block_x();
int shim_block_y();
unsigned char* shim_shared();
void shim_sync(int whole_block, const char* file, int line);
float shim_shuffle_xor(float value, int lanes, const char* file, int line);
void shim_ldmatrix(uint32_t* r, uint32_t address, int transposed, const char* file, int line);
void shim_mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, int bf16, const char* file, int line);
void shim_cp_async(void* to, const void* from, int bytes, int valid);
void shim_cp_async_commit();
void shim_cp_async_wait(int pending);
// `a`: registers, or null for the matrix in shared memory that `a_matrix` describes.
void shim_wgmma(float* d, int columns, const uint32_t* a, unsigned long long a_matrix, unsigned long long b, int bf16, int accumulate,
                const char* file, int line);
void shim_wgmma_fence();
void shim_wgmma_commit();
void shim_wgmma_wait(int pending, const char* file, int line);
void shim_fence_proxy_async();
int shim_ticket(unsigned* next, int count);
void shim_load4_fresh(float* to, const float* from);
int shim_launch(void (*body)(const void*), const void* params, long long grid_x, int grid_y, int threads, size_t shared);
}

namespace lowkernels {

#define LK_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

LK_DEVICE int thread_index() { return shim_thread(); }
LK_DEVICE int block_x() { return shim_block_x(); }
LK_DEVICE int block_y() { return shim_block_y(); }
LK_DEVICE unsigned char* dynamic_shared() { return shim_shared(); }
LK_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - shim_shared()); }

LK_DEVICE void block_sync(LK_HERE) { shim_sync(1, file, line); }
LK_DEVICE void warp_sync(LK_HERE) { shim_sync(0, file, line); }
LK_DEVICE float shuffle_xor(float value, int lanes, LK_HERE) { return shim_shuffle_xor(value, lanes, file, line); }
LK_DEVICE void recompute(int&) {}
LK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, LK_HERE) { shim_ldmatrix(r, address, 0, file, line); }
LK_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t address, LK_HERE) { shim_ldmatrix(r, address, 1, file, line); }
LK_DEVICE void mma(half_t, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, LK_HERE) {
    shim_mma(d, a, b0, b1, 0, file, line);
}
LK_DEVICE void mma(bf16_t, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, LK_HERE) {
    shim_mma(d, a, b0, b1, 1, file, line);
}

LK_DEVICE int take_ticket(unsigned* next, int count) { return shim_ticket(next, count); }
LK_DEVICE Float4 load4_fresh(const float* from) {
    Float4 v;
    shim_load4_fresh(v.v, from);
    return v;
}

template <int BYTES>
LK_DEVICE void cp_async(void* to, const void* from, bool valid) {
    static_assert(BYTES == 8 || BYTES == 16, "cp.async copies 8 or 16 bytes here");
    shim_cp_async(to, from, BYTES, valid);
}
LK_DEVICE void cp_async_commit() { shim_cp_async_commit(); }
template <int PENDING>
LK_DEVICE void cp_async_wait() {
    shim_cp_async_wait(PENDING);
}

constexpr bool kWarpgroupProducts = true;
LK_DEVICE void refuse() {}
LK_DEVICE void wgmma_fence() { shim_wgmma_fence(); }
LK_DEVICE void wgmma_commit() { shim_wgmma_commit(); }
template <int PENDING>
LK_DEVICE void wgmma_wait(LK_HERE) {
    shim_wgmma_wait(PENDING, file, line);
}
template <int N>
LK_DEVICE void wgmma_settle(float (&)[N][4]) {}
LK_DEVICE void fence_proxy_async() { shim_fence_proxy_async(); }
constexpr int is_bf16(half_t) { return 0; }
constexpr int is_bf16(bf16_t) { return 1; }
template <typename T, int N>
LK_DEVICE void wgmma(T t, float (&d)[N][4], const uint32_t (&a)[4], uint64_t b, bool accumulate, LK_HERE) {
    shim_wgmma(d[0], 8 * N, a, 0, b, is_bf16(t), accumulate, file, line);
}
template <typename T, int N>
LK_DEVICE void wgmma(T t, float (&d)[N][4], uint64_t a, uint64_t b, bool accumulate, LK_HERE) {
    shim_wgmma(d[0], 8 * N, nullptr, a, b, is_bf16(t), accumulate, file, line);
}

inline __attribute__((always_inline)) uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
inline __attribute__((always_inline)) uint32_t to_half(float x) {
    return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
}
inline __attribute__((always_inline)) float from_half(uint32_t bits) {
    return static_cast<float>(__builtin_bit_cast(_Float16, static_cast<uint16_t>(bits)));
}
inline __attribute__((always_inline)) uint32_t to_bf16(float x) {
    const uint32_t bits = float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;  // what cvt makes of every NaN
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

LK_DEVICE uint32_t pack2(half_t, float low, float high) { return to_half(low) | to_half(high) << 16; }
LK_DEVICE uint32_t pack2(bf16_t, float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
LK_DEVICE float unpack_low(half_t, uint32_t bits) { return from_half(bits & 0xffffu); }
LK_DEVICE float unpack_high(half_t, uint32_t bits) { return from_half(bits >> 16); }
LK_DEVICE float unpack_low(bf16_t, uint32_t bits) { return __builtin_bit_cast(float, bits << 16); }
LK_DEVICE float unpack_high(bf16_t, uint32_t bits) { return __builtin_bit_cast(float, bits & 0xffff0000u); }

LK_DEVICE float exponential(float x) { return std::exp(x); }
LK_DEVICE float error_function(float x) { return std::erf(x); }
LK_DEVICE float hyperbolic_tangent(float x) { return std::tanh(x); }
LK_DEVICE float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }

struct Grid {
    int64_t x;
    int y;
};

template <typename Params>
struct Bound {
    void (*kernel)(Params);
    const Params* params;
    static void run(const void* self) {
        const auto* bound = static_cast<const Bound*>(self);
        bound->kernel(*bound->params);
    }
};

template <typename Params>
int launch(void (*kernel)(Params), Grid grid, int threads, size_t shared, void*, const Params& params) {
    const Bound<Params> bound{kernel, &params};
    return shim_launch(&Bound<Params>::run, &bound, grid.x, grid.y, threads, shared);
}

}  // namespace lowkernels
