// Stride-1 3x3 convolutions by Winograd's F(2x2, 3x3): 16 products for every 2x2 outputs instead of 36. Where products read bf16, the
// transformed input and weights are rounded to it once, which leaves a fused_mbconv at 1.2 times eager's error.
// Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308, section 4.1.
#pragma once
#include "product.h"

namespace lowkernels::LOWKERNELS_ISA {

// Output rows [y0, y1) of one image, in tiles of 2x2.
struct WinogradBlock {
    i64 h, w, padding;       // of the input
    i64 y0, y1, w_out;
    i64 channels;

    i64 tile_rows() const { return divide_up(y1 - y0, 2); }
    i64 tile_columns() const { return divide_up(w_out, 2); }
    i64 tiles() const { return tile_rows() * tile_columns(); }
    i64 pitch() const { return round_up(channels, VL) + VL; }

    i64 product_floats() const { return 16 * tiles() * NW; }
    // A thread's scratch: products, and the transformed input.
    template <class A>
    i64 own_bytes() const {
        return product_floats() * i64(sizeof(float)) + 16 * tiles() * pitch() * i64(sizeof(A));
    }
};

// B^T d B of one vector of channels of a 4x4 patch, written `plane` apart.
template <class A>
LK_INLINE void transform_patch(const V (&d)[16], A* to, i64 plane) {
    V t[16];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
        t[x] = d[x] - d[8 + x];
        t[4 + x] = d[4 + x] + d[8 + x];
        t[8 + x] = d[8 + x] - d[4 + x];
        t[12 + x] = d[4 + x] - d[12 + x];
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
        const V* r = t + 4 * y;
        store(to + (4 * y) * plane, r[0] - r[2]);
        store(to + (4 * y + 1) * plane, r[1] + r[2]);
        store(to + (4 * y + 2) * plane, r[2] - r[1]);
        store(to + (4 * y + 3) * plane, r[1] - r[3]);
    }
}

template <class A, class T>
void transform_input(const T* image, const WinogradBlock& block, i64 tile_row, A* to) {
    const i64 c = block.channels, pitch = block.pitch(), plane = block.tiles() * pitch, columns = block.tile_columns();
    const i64 top = block.y0 + 2 * tile_row - block.padding;
    for (i64 column = 0; column < columns; ++column) {
        const i64 left = 2 * column - block.padding;
        const T* pixel[16];
        for (int i = 0; i < 16; ++i) {
            i64 y = top + i / 4, x = left + i % 4;
            pixel[i] = y >= 0 && y < block.h && x >= 0 && x < block.w ? image + (y * block.w + x) * c : nullptr;
        }
        A* out = to + (tile_row * columns + column) * pitch;
        i64 at = 0;
        for (; at + VL <= c; at += VL) {
            V d[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) d[i] = pixel[i] ? load(pixel[i] + at) : V{};
            transform_patch(d, out + at, plane);
        }
        if (at < c) {
            V d[16] = {};
            for (int i = 0; i < 16; ++i)
                if (pixel[i]) d[i] = load(pixel[i] + at, c - at);
            transform_patch(d, out + at, plane);
        }
    }
}

// A^T m A of the tiles [begin, end) of one panel, then bias, activation, residual.
template <int ACT, class T>
void transform_output(const float* m, const WinogradBlock& block, const Conv& conv, const Target<T>& target, i64 panel, i64 begin,
                      i64 end) {
    const int width = panel_width(conv.out, panel);
    const i64 column = panel * NW, columns = smaller(width, target.columns - column);
    const i64 plane = (end - begin) * width, per_row = block.tile_columns(), height = block.y1 - block.y0;
    for (i64 tile = begin; tile < end; ++tile) {
        const i64 oy = tile / per_row * 2, ox = tile % per_row * 2, rows = smaller(2, height - oy), pixels = smaller(2, block.w_out - ox);
        const i64 corner = oy * target.run + ox * target.pixel + column;
        for (int v = 0; v < width; v += VL) {
            const float* from = m + (tile - begin) * width + v;
            V t[8];
#pragma GCC unroll 4
            for (int x = 0; x < 4; ++x) {
                V a = load(from + x * plane), b = load(from + (4 + x) * plane);
                V c = load(from + (8 + x) * plane), d = load(from + (12 + x) * plane);
                t[x] = a + b + c;
                t[4 + x] = b - c - d;
            }
            const V bias = load(conv.bias + column + v);
            const Vs<4> y = activate<ACT, T>(Vs<4>{{t[0] + t[1] + t[2] + bias, t[1] - t[2] - t[3] + bias, t[4] + t[5] + t[6] + bias,
                                                    t[5] - t[6] - t[7] + bias}});
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                if (i / 2 >= rows || i % 2 >= pixels) continue;
                const i64 at = corner + i / 2 * target.run + i % 2 * target.pixel + v;
                write(y.v[i], target.data + at, target.residual ? target.residual + at : nullptr, columns - v);
            }
        }
    }
}

// The whole convolution of a block by the team. `own` is the thread's.
template <class A, class T, class U>
void winograd(Team& team, const T* image, const WinogradBlock& block, const Conv& conv, int act, const Target<U>& target,
              char* own, const Conv* then = nullptr) {
    float* products = reinterpret_cast<float*>(own);
    A* transformed = reinterpret_cast<A*>(products + block.product_floats());
    warm<A>(conv, team.rank);
    // A thread that comes so late that the others are done with this phase may read what they write next: there is no unit left for it then.
    for (i64 row = 0; row < block.tile_rows(); ++row) transform_input(image, block, row, transformed);
    const i64 tiles = block.tiles(), pitch = block.pitch(), depth = conv.in, panels = panels_of(conv.out);
    const i64 groups = groups_of(team, panels, divide_up(tiles, MR));
    team.run(panels * groups, [&](i64 unit, i64 next) {
        const i64 panel = unit / groups, begin = unit % groups * tiles / groups, end = (unit % groups + 1) * tiles / groups;
        const int width = panel_width(conv.out, panel);
        const A* weight = winograd_panel<A>(conv, panel);
        const char* after = next >= 0 ? reinterpret_cast<const char*>(winograd_panel<A>(conv, next / groups)) : nullptr;
        const i64 slab = depth * width, count = end - begin, parts = divide_up(count, MR);
        for (int f = 0; f < 16; ++f) {
            // The next slab of weights arrives while this one is used.
            const char* ahead = f < 15 ? reinterpret_cast<const char*>(weight + (f + 1) * slab) : after;
            Prefetch prefetch{ahead, ahead ? ahead + slab * i64(sizeof(A)) : nullptr, 0};
            if (!ahead && then) prefetch = prefetch_panel<A>(*then, team.rank);
            const A* from = transformed + (f * tiles + begin) * pitch;
            float* to = products + f * count * width;
            Rows<A> rows{from, pitch, 0, 1, int(depth)};
            set_pace(prefetch, rows, parts);
            for (i64 part = 0; part < parts; ++part) {
                const i64 first = part * count / parts;
                rows.data = from + first * pitch;
                multiply<A>(int((part + 1) * count / parts - first), width, rows, weight + f * slab, to + first * width, prefetch);
            }
        }
        with_activation(act, [&](auto known) { transform_output<known.value>(products, block, conv, target, panel, begin, end); });
    });
}

}  // namespace lowkernels::LOWKERNELS_ISA
