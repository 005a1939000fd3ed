// Mean and variance of an image, for GroupNorm with one group: the same to the last bit on every run.
#pragma once

#include "fragments.cuh"

namespace lowkernels {

// The sum over the block of `value`. Needs WARPS floats that nobody else uses.
template <int WARPS>
LK_DEVICE float block_sum(float value, float* scratch) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
    if (lane_index() == 0) scratch[warp_index()] = value;
    block_sync();
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += scratch[w];
    return sum;
}

// Of some values: their mean and the sum of squared differences from it.
struct Moments {
    float mean, squares;
};

// Of 4 `quads` values, `read(i)` giving the i-th four. In two passes: the second one over differences from the mean, which does not
// cancel. Needs 2 WARPS floats.
template <int WARPS = kWarps, typename I, typename F>
LK_DEVICE Moments moments(I quads, float* scratch, F read) {
    float sum = 0.0f, squares = 0.0f;
    for (I i = thread_index(); i < quads; i += WARPS * kWarp) {
        const Float4 v = read(i);
        sum += (v.v[0] + v.v[1]) + (v.v[2] + v.v[3]);
    }
    const float mean = block_sum<WARPS>(sum, scratch) / static_cast<float>(4 * quads);
    for (I i = thread_index(); i < quads; i += WARPS * kWarp) {
        const Float4 v = read(i);
#pragma unroll
        for (int c = 0; c < 4; c++) squares += (v.v[c] - mean) * (v.v[c] - mean);
    }
    return {mean, block_sum<WARPS>(squares, scratch + WARPS)};
}

}  // namespace lowkernels
