// Sums over a block, for GroupNorm with one group: the same to the last bit on every run.
#pragma once

#include "fragments.cuh"

namespace lowkernels {

// The sum of `value` over a warp, to its place among those of all warps.
LK_DEVICE void leave_sum(float value, float* sums) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
    if (lane_index() == 0) sums[warp_index()] = value;
}

template <int WARPS>
LK_DEVICE float total(const float* sums) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[w];
    return sum;
}

}  // namespace lowkernels
