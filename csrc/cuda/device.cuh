// What the kernels know of the machine. This is the only file with PTX or compiler intrinsics; the kernels are plain C++ on top of it.
//
// Compiled by nvcc it is the device. With LOWKERNELS_SHIM the tests' shim.h provides the same names, and the kernels run on a CPU.
//
// Terms: a *fragment* is one warp's share of a matrix in registers, laid out as mma.m16n8k16 wants it; a *group* is 16 columns, two
// n8 fragments. Lane l of a warp has row = l / 4 (and row + 8) and quad = l % 4.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowkernels {

// 16-bit floats are bits; arithmetic is fp32.
struct half_t {
    uint16_t bits;
};
struct bf16_t {
    uint16_t bits;
};

struct alignas(8) Bits4 {
    uint32_t low, high;  // four 16-bit floats
};
struct alignas(16) Bits8 {
    uint32_t word[4];
};
struct alignas(16) Float4 {
    float v[4];
};

}  // namespace lowkernels

#if defined(LOWKERNELS_SHIM)
#include "shim.h"
#else

#include <cuda_runtime.h>

#define LK_DEVICE __device__ __forceinline__
#define LK_KERNEL(threads, ctas) __global__ void __launch_bounds__(threads, ctas)

namespace lowkernels {

LK_DEVICE int thread_index() { return threadIdx.x; }
LK_DEVICE int block_x() { return blockIdx.x; }
LK_DEVICE int block_y() { return blockIdx.y; }

LK_DEVICE unsigned char* dynamic_shared() {
    // The pattern of a 128-byte swizzle repeats every 1024 bytes.
    extern __shared__ __align__(1024) unsigned char lowkernels_shared[];
    return lowkernels_shared;
}

LK_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

LK_DEVICE void block_sync() { __syncthreads(); }
LK_DEVICE void warp_sync() { __syncwarp(); }
LK_DEVICE float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

// What follows from `value` is computed anew rather than kept in registers since an earlier time.
LK_DEVICE void recompute(int& value) { asm volatile("" : "+r"(value)); }

// Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8, 16 bytes each.
LK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

LK_DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// d[16 x 8] += a[16 x 16] b[16 x 8], fp32 accumulators.
LK_DEVICE void mma(half_t, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

LK_DEVICE void mma(bf16_t, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Hopper's warpgroup products exist for sm_90a only. A *warpgroup* is 128 threads from a multiple of 128.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kWarpgroupProducts = true;
#else
constexpr bool kWarpgroupProducts = false;
#endif

// For code that no GPU may reach: better no result than a wrong one.
LK_DEVICE void refuse() { __trap(); }

// Registers written by ordinary instructions are ordered before the products that follow.
LK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING of the latest groups are still under way.
template <int PENDING>
LK_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// After the wait for a product: without it the compiler may use its accumulators before.
template <int N>
LK_DEVICE void wgmma_settle(float (&d)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; j++) asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}

// What this thread has written to shared memory is ordered before what the warpgroup products after the next barrier read of it.
LK_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The accumulators d[64 x 8 J] (+)= a[64 x 16] b[16 x 8 J], under way until the wait: neither `d` nor what `a` and `b` say may be touched
// before. Warp w of the group has rows 16 w to 16 w + 15 of d[j] as mma has them; of `a` too where it is in registers. Where it is
// not, and always for `b`, it describes a matrix in shared memory, K-major.
#define LK_FOUR(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define LK_SUMS_64 LK_FOUR(0), LK_FOUR(1), LK_FOUR(2), LK_FOUR(3), LK_FOUR(4), LK_FOUR(5), LK_FOUR(6), LK_FOUR(7)
#define LK_SUMS_128 \
    LK_SUMS_64, LK_FOUR(8), LK_FOUR(9), LK_FOUR(10), LK_FOUR(11), LK_FOUR(12), LK_FOUR(13), LK_FOUR(14), LK_FOUR(15)
#define LK_NUMBERS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
    "%27, %28, %29, %30, %31"
#define LK_NUMBERS_128 \
    LK_NUMBERS_64 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, " \
    "%57, %58, %59, %60, %61, %62, %63"
// `from` says where the operands are and `number` the predicate's operand; the last flags are for transposed matrices in shared memory.
#define LK_WGMMA(columns, type, from, number, flags, ...) \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " number ", 0; wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type \
                 " {" LK_NUMBERS_##columns "}, " from ", p, 1, 1, " flags ";}" \
                 : LK_SUMS_##columns \
                 : __VA_ARGS__, "l"(b), "r"(static_cast<int>(accumulate)))
#define LK_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define LK_WGMMA_OF(t, type) \
    LK_DEVICE void wgmma(t, float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
        LK_WGMMA(64, type, "{%32, %33, %34, %35}, %36", "%37", "0", LK_REGISTERS); \
    } \
    LK_DEVICE void wgmma(t, float (&d)[16][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
        LK_WGMMA(128, type, "{%64, %65, %66, %67}, %68", "%69", "0", LK_REGISTERS); \
    } \
    LK_DEVICE void wgmma(t, float (&d)[8][4], uint64_t a, uint64_t b, bool accumulate) { \
        LK_WGMMA(64, type, "%32, %33", "%34", "0, 0", "l"(a)); \
    } \
    LK_DEVICE void wgmma(t, float (&d)[16][4], uint64_t a, uint64_t b, bool accumulate) { \
        LK_WGMMA(128, type, "%64, %65", "%66", "0, 0", "l"(a)); \
    }
LK_WGMMA_OF(half_t, "f16")
LK_WGMMA_OF(bf16_t, "bf16")
#undef LK_WGMMA_OF
#undef LK_REGISTERS
#undef LK_WGMMA
#undef LK_NUMBERS_128
#undef LK_NUMBERS_64
#undef LK_SUMS_128
#undef LK_SUMS_64
#undef LK_FOUR

// Takes one of `count` tickets: 0, 1, 2 and so on; after the last one it begins anew. What the CTA wrote to global memory before a
// barrier before this is there for who takes a later one, and reads it with load4_fresh.
LK_DEVICE int take_ticket(unsigned* next, int count) {
    __threadfence();
    const unsigned mine = atomicInc(next, static_cast<unsigned>(count) - 1);
    __threadfence();
    return static_cast<int>(mine);
}

// Past the L1 cache, which does not know of other multiprocessors' writes.
LK_DEVICE Float4 load4_fresh(const float* from) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(from));
    return {{v.x, v.y, v.z, v.w}};
}

// Copies BYTES from global to shared memory, or fills with zeros without reading where `valid` is false.
template <int BYTES>
LK_DEVICE void cp_async(void* to, const void* from, bool valid) {
    static_assert(BYTES == 8 || BYTES == 16, "cp.async copies 8 or 16 bytes here");
    const int bytes = valid ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

LK_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are still under way.
template <int PENDING>
LK_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Two floats, rounded to nearest even, low first.
LK_DEVICE uint32_t pack2(half_t, float low, float high) {
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

LK_DEVICE uint32_t pack2(bf16_t, float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

LK_DEVICE float unpack_low(half_t, uint32_t bits) {
    float value;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(value) : "r"(bits));
    return value;
}

LK_DEVICE float unpack_high(half_t, uint32_t bits) {
    float value;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(bits));
    return value;
}

LK_DEVICE float unpack_low(bf16_t, uint32_t bits) { return __uint_as_float(bits << 16); }
LK_DEVICE float unpack_high(bf16_t, uint32_t bits) { return __uint_as_float(bits & 0xffff0000u); }

LK_DEVICE float exponential(float x) { return expf(x); }
LK_DEVICE float error_function(float x) { return erff(x); }
LK_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
LK_DEVICE float reciprocal_root(float x) { return 1.0f / sqrtf(x); }

struct Grid {
    int64_t x;
    int y;
};

// Returns a cudaError_t; 0 is success.
template <typename Params>
int launch(void (*kernel)(Params), Grid grid, int threads, size_t shared, void* stream, const Params& params) {
    // Above 48 KB a kernel has to be told, on each device. The call is cheap next to a launch.
    if (shared > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) {
            cudaGetLastError();  // or the next caller would be told of this one
            return error;
        }
    }
    kernel<<<dim3(static_cast<unsigned>(grid.x), grid.y), threads, shared, static_cast<cudaStream_t>(stream)>>>(params);
    return cudaGetLastError();
}

}  // namespace lowkernels

#endif
