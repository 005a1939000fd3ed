// The launchers: plain structs in, a cudaError_t out (0: success, -1: a combination that is not compiled). No torch, no CUDA headers.
// All pointers are to the current device; activations are NHWC, weights as lowkernels/backends/cuda/pack.py lays them out.
#pragma once

#include <cstdint>

namespace lowkernels {

enum Dtype { kHalf, kBf16 };

struct Geometry {
    int n, h, w, c;
    int ho, wo, co;
    int kernel, stride, padding;
    int images, tile_h, tile_w;  // outputs of one CTA
};

// Split-K: `count` CTAs have the same outputs, each with a share of the expanded channels. They leave their sums in `sums`
// [count][elements of out]; who takes the last of a CTA's tickets adds them up. Tickets are 0 before a launch and after it; there is one
// for each CTA of a launch that is not split. count 1: not split, and no memory.
struct Split {
    int count;
    float* sums;
    unsigned* tickets;
    int room;    // tickets there are
    int chunks;  // of expanded channels, of a CTA; the last one has the rest. The launcher's
};

struct SeparableConv {
    Geometry g;
    const void* x;
    const float *dw, *dw_bias;  // [k * k][channels], [channels], channels = c rounded up to whole chunks
    const void* pw;             // fragments, depth = channels
    const float* pw_bias;       // [co rounded up to whole groups]
    void* out;
    int dw_act, pw_act;
    bool residual;
};

struct ConvAct {
    Geometry g;  // its tile is for Hopper's kernels only: images 0, tile_w consecutive pixels a CTA
    int images;       // of one CTA, where it pools
    int column_ctas;  // CTAs that the columns are divided among; Hopper's kernels only
    const void* x;
    const void* weight;  // fragments, depth = (tap row, tap column, channel) rounded up to 16; for Hopper's kernels slabs
    const float* bias;   // [co rounded up to whole groups]
    const void* residual;  // as out before pooling, or null
    void* out;             // [n][ho][wo][co], or [n][co] with pool
    int act;
    bool pool;
};

struct MBConv {
    Geometry g;
    int expanded;  // channels; weights are of whole chunks
    const void *x, *expand;  // of Hopper's kernel `expand` has the slabs of both products, and project is null
    const float *expand_bias, *dw, *dw_bias;  // expand_bias: [expanded]
    const void* project;
    const float* project_bias;
    void* out;
    int act;
    bool residual;
};

// Apart: the kernels that are not split need every register, and spilled where their parameters were larger.
struct SplitMBConv : MBConv {
    Split split;
};

struct Lowtention {
    int n, h, w, c, co;
    int grid_h, grid_w, tokens;  // after the depthwise convolution; tokens = grid_h * grid_w
    int heads, inner;            // channels of all heads together, each head rounded up to 16
    int kernel, stride;
    int images;  // of one CTA; 1 for three launches
    int shares;  // CTAs with the same images, each with a share of the outputs; 1 for three launches
    float eps, scale;  // scale: 1 / sqrt(channels of a head), not rounded up
    const void* x;
    const float *norm_weight, *norm_bias;  // null: no normalisation
    const float *dw, *dw_bias;             // channels = c rounded up to 16
    const void* qkv;                       // fragments; columns q of all heads, k of all heads, v of all heads
    const void* up;                        // fragments for each parity of the output pixel; depth = (tap row, tap column, inner)
    const float* up_bias;
    void *qkv_rows, *attended;  // scratch [n][tokens][3 inner] and [n][tokens][inner] for three launches; null for one
    void* out;
    bool residual;
};

// Two products back to back (expand_project.cuh): fused_mbconv, and gn_mlp with the pixels of an image as one column. In `g`, images is
// 1 for tiles of tile_h x tile_w outputs, or 0 for tile_w consecutive ones, whatever image they are of (then tile_h is 1).
struct ExpandProject {
    Geometry g;
    Split split;   // 1 for Hopper's kernels
    int expanded;  // channels; weights are of whole groups
    const void *x, *expand;
    const float* expand_bias;  // [expanded]
    const void* project;
    const float* project_bias;
    const float *norm_weight, *norm_bias;  // gn_mlp
    float* partial;                        // gn_mlp: [n][pieces][mean, sum of squared differences]; null: not needed
    int pieces;
    float eps;
    void* out;
    int act;
    bool residual;
};

extern "C" {
int lowkernels_conv_act(const ConvAct& p, Dtype dtype, int config, void* stream);
int lowkernels_separable_conv(const SeparableConv& p, Dtype dtype, int config, void* stream);
int lowkernels_mbconv(const SplitMBConv& p, Dtype dtype, int config, void* stream);
int lowkernels_fused_mbconv(const ExpandProject& p, Dtype dtype, int config, void* stream);
int lowkernels_gn_mlp(const ExpandProject& p, Dtype dtype, int config, void* stream);
// For compute capability 9.0. Of two products `expand` has the slabs of both, `project` is null, of whole chunks of 128 expanded channels
// (mbconv: 64).
int lowkernels_conv_act_sm90(const ConvAct& p, Dtype dtype, int config, void* stream);
int lowkernels_fused_mbconv_sm90(const ExpandProject& p, Dtype dtype, int config, void* stream);
int lowkernels_mbconv_sm90(const MBConv& p, Dtype dtype, int config, void* stream);
int lowkernels_gn_mlp_sm90(const ExpandProject& p, Dtype dtype, int config, void* stream);
// Its shape follows from its arguments; the configuration is not looked at.
int lowkernels_lowtention(const Lowtention& p, Dtype dtype, int config, void* stream);
}

constexpr int kNoSuchConfig = -1;

}  // namespace lowkernels
