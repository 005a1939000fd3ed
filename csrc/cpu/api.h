// What the registration file and the kernels agree on: plain structs, no torch, no C++ library types.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lowkernels {

using i64 = std::int64_t;

struct bf16 {
    std::uint16_t bits;
};

enum Activation : int { NONE, RELU, RELU6, HARDSWISH, SILU, GELU, GELU_TANH };

// A dense k x k convolution, packed in panels of output channels: [panel][k * k * in][panel width].
// `winograd` is null, or, instead of `weight`, the F(2x2, 3x3) transform of it: [panel][16][in][panel width].
// Biases are padded with zeros to whole panels.
struct Conv {
    const void* weight;
    const void* winograd;
    const float* bias;
    i64 k, in, out;
};

// Depthwise: [k * k][padded channels], fp32.
struct Depthwise {
    const float* weight;
    const float* bias;
    i64 k, channels, padded;
};

struct Norm {
    const float* weight;  // null: no normalisation
    const float* bias;
    double eps;
};

// NHWC images. Activations are of the call's dtype.
struct Images {
    const void* x;
    void* out;
    i64 n, h, w, h_out, w_out;
};

struct ConvAct {
    Images images;
    Conv conv;
    const void* residual;  // of the output's shape before pooling, or null
    i64 channels;          // of x; conv.in may be rounded up with zeros
    int act;
    i64 stride, padding;
    bool pool;
};

// mbconv; and separable_conv, which has no expansion (expand.weight is null).
struct InvertedResidual {
    Images images;
    Conv expand;
    Depthwise depthwise;
    Conv project;
    int expand_act, depthwise_act, project_act;
    i64 stride, padding;
    bool residual;
};

struct FusedMBConv {
    Images images;
    Conv conv, project;
    int act;
    i64 stride, padding;
    bool residual;
};

struct Lowtention {
    Images images;
    Norm norm;
    Depthwise depthwise;
    Conv qkv;
    Conv up[4];  // stride 1: up[0], a 3x3 convolution; stride 2: 2x2 convolutions, one per output parity (y, x)
    i64 heads, stride;
    bool residual;
};

struct GnMlp {
    Images images;
    Norm norm;
    Conv fc1, fc2;
    int act;
    bool residual;
};

// Rows of channels: normalised, each by its own statistics (no weight: not at all), then activated. `channels` is all there is to it
// where only an activation is asked for. Weight and bias are not padded.
struct NormAct {
    const void* x;
    void* out;
    i64 n, channels;
    Norm norm;
    int act;
};

// The mean of each channel over an NHWC image's pixels.
struct Pool {
    const void* x;
    void* out;
    i64 n, pixels, channels;
};

// How a calling thread's helpers have been doing: on busy cores, waiting for them can cost far more than they contribute.
struct Helpers {
    int alone = 0;    // calls still to be made without them
    int backoff = 0;  // calls to make without them the next time they cost more than they help
};

struct Context {
    int threads;
    Helpers* helpers;
    void* (*workspace)(std::size_t bytes);  // 64-byte aligned, valid until the calling thread asks again
};

// One instruction set's kernels for one activation dtype.
struct Kernels {
    void (*conv_act)(const ConvAct&, const Context&);
    void (*inverted_residual)(const InvertedResidual&, const Context&);
    void (*fused_mbconv)(const FusedMBConv&, const Context&);
    void (*lowtention)(const Lowtention&, const Context&);
    void (*gn_mlp)(const GnMlp&, const Context&);
    void (*norm_act)(const NormAct&);
    void (*pool)(const Pool&);
    int vector;        // floats in a vector; panels are two vectors wide, the last one may be one
    bool bf16_weights; // products read bf16 pairs; otherwise fp32
};

}  // namespace lowkernels
