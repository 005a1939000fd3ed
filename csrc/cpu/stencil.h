// GroupNorm statistics and depthwise convolutions.
#pragma once
#include "product.h"

namespace lowkernels::LOWKERNELS_ISA {

// Mean and sum of squared deviations of a piece of an image. Pieces have a fixed size and are merged in order, in double.
struct Moments {
    double mean, deviation;
};

constexpr i64 PIECE = 8192;

LK_INLINE i64 pieces_of(i64 elements) { return divide_up(elements, PIECE); }
LK_INLINE i64 piece_size(i64 elements, i64 piece) { return smaller(PIECE, elements - piece * PIECE); }

template <class T>
double sum(const T* x, i64 count, float shift, bool squared) {
    V total[4] = {};
    i64 i = 0;
    for (; i + 4 * VL <= count; i += 4 * VL)
        for (int j = 0; j < 4; ++j) {
            V d = load(x + i + j * VL) - shift;
            total[j] += squared ? d * d : d;
        }
    double rest = 0;
    for (; i < count; ++i) {
        double d = to_float(x[i]) - shift;
        rest += squared ? d * d : d;
    }
    V all = (total[0] + total[1]) + (total[2] + total[3]);
    for (int j = 0; j < VL; ++j) rest += all[j];
    return rest;
}

template <class T>
Moments moments(const T* x, i64 count) {
    double mean = sum(x, count, 0.0f, false) / double(count);
    float shift = float(mean);
    // About `shift`, which is the mean but for rounding.
    double offset = mean - shift;
    return {mean, sum(x, count, shift, true) - offset * offset * double(count)};
}

struct Scale {
    float mean, rstd;
};

LK_INLINE Scale merge(const Moments* pieces, i64 elements, double eps) {
    double count = 0, mean = 0, deviation = 0;
    for (i64 i = 0; i < pieces_of(elements); ++i) {
        double more = double(piece_size(elements, i)), all = count + more, delta = pieces[i].mean - mean;
        mean += delta * more / all;
        deviation += pieces[i].deviation + delta * delta * count * more / all;
        count = all;
    }
    return {float(mean), float(1.0 / __builtin_sqrt((deviation < 0 ? 0 : deviation) / count + eps))};
}

// (x - mean) * rstd * weight + bias for `width` channels from `channel` on.
struct Affine {
    float mean;
    V scale[NV], shift[NV];

    Affine(const Norm& norm, Scale s, i64 channel, int width) : mean(norm.weight ? s.mean : 0.0f) {
        for (int v = 0; v < width / VL; ++v) {
            scale[v] = norm.weight ? load(norm.weight + channel + v * VL) * s.rstd : V{} + 1.0f;
            shift[v] = norm.weight ? load(norm.bias + channel + v * VL) : V{};
        }
    }
};

// `rows` x `columns` pixels of an image from (top, left) on, `width` of its channels, normalised, zero outside.
template <class T>
void fill_panel(float* to, const T* image, i64 h, i64 w, i64 c, i64 top, i64 rows, i64 left, i64 columns, i64 channel, int width,
                const Affine& affine) {
    for (i64 r = 0; r < rows; ++r, to += columns * width) {
        const i64 y = top + r;
        if (y < 0 || y >= h) {
            std::memset(to, 0, columns * width * sizeof(float));
            continue;
        }
        const i64 from = larger(left, 0), until = larger(smaller(left + columns, w), from);
        std::memset(to, 0, (from - left) * width * sizeof(float));
        std::memset(to + (until - left) * width, 0, (left + columns - until) * width * sizeof(float));
        for (i64 x = from; x < until; ++x) {
            const T* pixel = image + (y * w + x) * c + channel;
            float* out = to + (x - left) * width;
            for (int v = 0; v < width / VL; ++v) {
                V value;
                if (channel + (v + 1) * VL <= c) {
                    value = load(pixel + v * VL);
                } else {
                    float values[VL] = {};
                    for (i64 j = 0; channel + v * VL + j < c; ++j) values[j] = to_float(pixel[v * VL + j]);
                    value = load(values);
                }
                store(out + v * VL, (value - affine.mean) * affine.scale[v] + affine.shift[v]);
            }
        }
    }
}

// One vector of channels of P neighbouring outputs. K is the kernel's size where that is known.
template <int P, int K>
void depthwise_pixels(const float* in, i64 row, i64 pixel, i64 step, i64 k, const float* weight, i64 padded, float* c, int width) {
    if (K > 0) k = K;
    V acc[P] = {};
    for (i64 y = 0; y < k; ++y) {
#pragma GCC unroll 5
        for (i64 x = 0; x < k; ++x) {
            V w = load(weight + (y * k + x) * padded);
#pragma GCC unroll 8
            for (int p = 0; p < P; ++p) acc[p] += load(in + y * row + x * pixel + p * step) * w;
        }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) store(c + p * width, acc[p]);
}

typedef void (*DepthwisePixels)(const float*, i64, i64, i64, i64, const float*, i64, float*, int);

template <int... P>
LK_INLINE DepthwisePixels depthwise_of(i64 pixels, i64 k, Heights<P...>) {
    static constexpr DepthwisePixels any[] = {depthwise_pixels<P, 0>...}, three[] = {depthwise_pixels<P, 3>...},
                                     five[] = {depthwise_pixels<P, 5>...};
    return (k == 3 ? three : k == 5 ? five : any)[pixels - 1];
}

// A panel of a depthwise convolution: `rows` x `pixels` outputs from a panel `columns` wide, written `out_pixel` apart.
template <class A>
void depthwise_panel(const float* in, i64 columns, int width, const Depthwise& conv, i64 channel, i64 stride, int act, i64 rows,
                     i64 pixels, A* out, i64 out_pixel) {
    alignas(64) float c[8 * NW];
    const i64 row = columns * width, step = stride * width, groups = divide_up(pixels, 8);
    for (i64 group = 0; group < groups; ++group) {
        // Pixels of a row, equally many at a time.
        const i64 x = group * pixels / groups, count = (group + 1) * pixels / groups - x;
        const DepthwisePixels apply = depthwise_of(count, conv.k, HeightsTo<8>::type());
        for (i64 y = 0; y < rows; ++y) {
            for (int v = 0; v < width; v += VL)
                apply(in + y * stride * row + x * step + v, row, width, step, conv.k, conv.weight + channel + v, conv.padded, c + v, width);
            finish<A, A>(act, c, count, width, conv.bias + channel, out + (y * pixels + x) * out_pixel, nullptr, out_pixel, width);
        }
    }
}

}  // namespace lowkernels::LOWKERNELS_ISA
