// What Hopper's warpgroup products take of shared memory: matrices and their descriptors.
#pragma once

#include "fragments.cuh"

namespace lowkernels {

constexpr int kWarpgroup = 4 * kWarp;  // threads

// How a K-major matrix lies in shared memory, in the numbers of its descriptor: rows of 16, 128, 64 or 32 bytes, eight of them one
// after another, the 16-byte units of which are exchanged by an exclusive or with bits 7 and up of their address.
enum Swizzle { kNoSwizzle, kSwizzle128, kSwizzle64, kSwizzle32 };

// The descriptor of a matrix that starts at shared address `start`. Eight rows further is `rows_stride` bytes further. Without a
// swizzle the next 16 bytes of a row are `units_stride` bytes further; with one that is not looked at.
LK_DEVICE uint64_t matrix_descriptor(uint32_t start, uint32_t rows_stride, uint32_t units_stride, Swizzle swizzle) {
    const uint32_t low = (start & 0x3ffffu) >> 4 | (units_stride & 0x3ffffu) >> 4 << 16;
    const uint32_t high = (rows_stride & 0x3ffffu) >> 4 | static_cast<uint32_t>(swizzle) << 30;
    return static_cast<uint64_t>(high) << 32 | low;
}

// A slab: 64 of depth times up to 128 columns of weights, one row of 128 bytes for each column, swizzled.
constexpr int kSlabDepth = 64, kSlabColumns = 128, kSlabSteps = kSlabDepth / 16;
constexpr int kSlabBytes = kSlabDepth * kSlabColumns * 2, kSlabUnits = kSlabBytes / 16;

// The second operand of the step of depth 16 number `step` of the slab at shared address `slab`.
LK_DEVICE uint64_t slab_operand(uint32_t slab, int step) { return matrix_descriptor(slab + step * 32, 1024, 16, kSwizzle128); }

}  // namespace lowkernels
