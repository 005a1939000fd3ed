// What the kernels of mbconv share: how the window keeps expanded values, and which of its pixels are inputs.
#pragma once

#include "window.cuh"

namespace lowkernels {

// Expanded values are not rounded to bf16 before the depthwise convolution.
template <typename T>
struct Kept;
template <>
struct Kept<half_t> {
    using type = half_t;
};
template <>
struct Kept<bf16_t> {
    using type = float;
};

// The part of the window that lies in the image: the rows of X are its pixels.
struct Inside {
    int y, x, h, w;
};

LK_DEVICE Inside inside_of(const Geometry& g, const Place& p) {
    Inside in;
    in.y = p.window_y > 0 ? p.window_y : 0;
    in.x = p.window_x > 0 ? p.window_x : 0;
    const int end_y = p.window_y + p.window_h, end_x = p.window_x + p.window_w;
    in.h = (end_y < g.h ? end_y : g.h) - in.y;
    in.w = (end_x < g.w ? end_x : g.w) - in.x;
    return in;
}

// Which pixel of the window a row of X is; -1: none.
LK_DEVICE int window_pixel(const Geometry& g, const Place& p, const Inside& in, int row) {
    const int number = row / (in.h * in.w), pixel = row % (in.h * in.w);
    const int y = number * p.window_h + in.y - p.window_y + pixel / in.w, x = in.x - p.window_x + pixel % in.w;
    return number < g.images ? y * p.window_w + x : -1;
}

}  // namespace lowkernels
