// Split-K, for few images: CTAs with the same outputs and different expanded channels, so that weights are read by more multiprocessors.
//
// Each CTA leaves its sums in global memory and takes a ticket. Who takes the last one adds up all sums in their order, which never
// changes, and goes on as a CTA does that is not split. Nobody waits for anybody.
#pragma once

#include "api.h"
#include "fragments.cuh"

namespace lowkernels {

// A launch's CTAs along x are `count` for each one's outputs, neighbours.
LK_DEVICE int outputs_of_block(const Split& s) {
    int block = block_x();
    recompute(block);  // as what follows from it: kept over the chunks, it would be spilled
    return block / s.count;
}

// This CTA's chunks; of the last CTA the end may be beyond the last chunk.
LK_DEVICE int first_chunk(const Split& s) { return block_x() % s.count * s.chunks; }
LK_DEVICE int end_chunk(const Split& s) {
    int block = block_x();
    recompute(block);
    return (block % s.count + 1) * s.chunks;
}

// Of the output.
LK_DEVICE int64_t elements_of(const Geometry& g) { return static_cast<int64_t>(g.n) * g.ho * g.wo * g.co; }

// This CTA's sums begin here.
LK_DEVICE float* sums_of_block(const Split& s, const Geometry& g) { return s.sums + block_x() % s.count * elements_of(g); }

// Whether all other CTAs of the same outputs have left their sums. `flag` is a word of shared memory that nobody uses; `columns` is the
// number of CTAs along y.
LK_DEVICE bool comes_last(const Split& s, int columns, int* flag) {
    block_sync();  // this CTA's sums are written
    if (thread_index() == 0) *flag = take_ticket(s.tickets + outputs_of_block(s) * columns + block_y(), s.count) == s.count - 1;
    block_sync();  // the flag is there
    return *flag != 0;
}

// Divides `chunks` among a launch's CTAs, of which one that is not split has `grid`. Whether there is a share and a ticket for each.
inline bool divide(Split& s, Grid& grid, int chunks) {
    s.chunks = (chunks + s.count - 1) / s.count;
    if (s.count > 1 && (s.chunks * (s.count - 1) >= chunks || grid.x * grid.y > s.room)) return false;
    grid.x *= s.count;
    return true;
}

// The sums over all CTAs of the four outputs from element `at` on.
LK_DEVICE void add_sums(const Split& s, const Geometry& g, int64_t at, float (&v)[4]) {
    const int64_t elements = elements_of(g);
    clear(v);
    for (int share = 0; share < s.count; share++) {
        const Float4 other = load4_fresh(s.sums + share * elements + at);
#pragma unroll
        for (int c = 0; c < 4; c++) v[c] += other.v[c];
    }
}

}  // namespace lowkernels
