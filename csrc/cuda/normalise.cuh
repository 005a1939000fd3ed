// GroupNorm with one group, of the rows of a CTA in shared memory: what both kernels of gn_mlp do before their products.
#pragma once

#include "expand_project.cuh"
#include "statistics.cuh"

namespace lowkernels {

// The sum over the block of `value`. Needs WARPS floats that nobody else uses.
template <int WARPS>
LK_DEVICE float block_sum(float value, float* scratch) {
    leave_sum(value, scratch);
    block_sync();
    return total<WARPS>(scratch);
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

// Quads of four elements of an image, and of one of the pieces that partial_moments makes of it.
LK_DEVICE int64_t image_quads(const ExpandProject& p) { return static_cast<int64_t>(p.g.h) * (p.g.c / 4); }
LK_DEVICE int64_t piece_quads(const ExpandProject& p) { return ceil_div(image_quads(p), static_cast<int64_t>(p.pieces)); }

template <typename T>
LK_KERNEL(kThreads, 2)
partial_moments(ExpandProject p) {
    const int64_t image = block_x() / p.pieces, begin = block_x() % p.pieces * piece_quads(p), left = image_quads(p) - begin;
    const T* x = static_cast<const T*>(p.x) + (image * image_quads(p) + begin) * 4;
    Moments m = {0.0f, 0.0f};
    if (left > 0) {
        const int64_t quads = left < piece_quads(p) ? left : piece_quads(p);
        m = moments(quads, reinterpret_cast<float*>(dynamic_shared()), [&](int64_t i) { return load4(x + i * 4); });
    }
    if (thread_index() != 0) return;
    p.partial[2 * block_x()] = m.mean;
    p.partial[2 * block_x() + 1] = m.squares;
}

// The moments of an image from those of its pieces, in their order. Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm
// for computing sample variances", 1982.
LK_DEVICE Moments combine(const ExpandProject& p, int64_t image) {
    Moments all = {0.0f, 0.0f};
    float count = 0.0f;
    for (int piece = 0; piece < p.pieces; piece++) {
        const int64_t left = image_quads(p) - piece * piece_quads(p);
        if (left <= 0) break;
        const float here = 4.0f * static_cast<float>(left < piece_quads(p) ? left : piece_quads(p));
        const float* m = p.partial + 2 * (image * p.pieces + piece);
        const float difference = m[0] - all.mean, share = here / (count + here);
        all.mean += difference * share;
        all.squares += m[1] + difference * difference * count * share;
        count += here;
    }
    return all;
}

// Normalises the CTA's rows where they are, one image after another. Every thread has waited for its copies.
template <typename T, int WARPS = kWarps>
LK_DEVICE void normalise(const Task& t, const Pixels& pixels, T* window, float* scratch) {
    const ExpandProject& p = t.p;
    const int quads = p.g.c / 4;
    block_sync();  // the rows have landed
    for (int row = 0; row < pixels.rows;) {
        const int64_t image = (pixels.first + row) / p.g.h;
        const int64_t rest = (image + 1) * p.g.h - pixels.first;
        const int end = rest < pixels.rows ? static_cast<int>(rest) : pixels.rows;
        Moments m;
        if (p.partial) {
            m = combine(p, image);
        } else if (end - row == p.g.h) {
            const T* rows = window + row * t.layout.pitch;
            m = moments<WARPS>((end - row) * quads, scratch, [&](int i) { return load4(rows + i / quads * t.layout.pitch + i % quads * 4); });
        } else {
            const T* x = static_cast<const T*>(p.x) + image * image_quads(p) * 4;
            m = moments<WARPS>(image_quads(p), scratch, [&](int64_t i) { return load4(x + i * 4); });
        }
        const float rstd = reciprocal_root(m.squares / static_cast<float>(4 * image_quads(p)) + p.eps);
        for (int i = thread_index(); i < (end - row) * quads; i += WARPS * kWarp) {
            const int channel = i % quads * 4;
            T* at = window + (row + i / quads) * t.layout.pitch + channel;
            const Float4 v = load4(at), weight = load4(p.norm_weight + channel), bias = load4(p.norm_bias + channel);
            float out[4];
#pragma unroll
            for (int c = 0; c < 4; c++) out[c] = (v.v[c] - m.mean) * (rstd * weight.v[c]) + bias.v[c];
            store4(at, out);
        }
        row = end;
    }
}

// The launch before, for images whose statistics are not taken where they are needed.
template <typename T>
int launch_partial_moments(const ExpandProject& p, void* stream) {
    if (!p.partial) return 0;
    return launch(partial_moments<T>, Grid{static_cast<int64_t>(p.g.n) * p.pieces, 1}, kThreads, 2 * kWarps * sizeof(float), stream, p);
}

}  // namespace lowkernels
