// lowkernels_cuda::*: tensors in, launchers called. The only file that sees torch, and of torch only its stable ABI (2.10 and up).
//
// Schemas and fakes are in lowkernels/backends/cuda/library.py. LOWKERNELS_KEY is the dispatch key, CUDA unless the tests' shim says otherwise.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "api.h"

#ifndef LOWKERNELS_KEY
#define LOWKERNELS_KEY CUDA
#endif

// Read from the file before it is loaded: a library of other sources is refused.
extern "C" __attribute__((visibility("default"), used)) const char lowkernels_cuda_architectures[] =
    "lowkernels-cuda-architectures:" LOWKERNELS_ARCHITECTURES;
extern "C" __attribute__((visibility("default"), used)) const char lowkernels_cuda_version[] = "lowkernels-cuda-version:" LOWKERNELS_VERSION;

#if defined(LOWKERNELS_SHIM)
extern "C" void shim_announce(const void* data, size_t bytes, int output);
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace lk = lowkernels;

// The current stream of a device. The symbol exists in PyTorch built with CUDA only, and this library loads without it too.
void* current_stream(int device) {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const auto function = []() -> Function {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    STD_TORCH_CHECK(function != nullptr, "lowkernels_cuda: this PyTorch has no CUDA streams: libtorch_cuda.so is not loaded");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(function(device, &stream));
    return stream;
}

// One call: whose device is current, and which tensors it may touch.
class Call {
public:
    Call(const char* name, const Tensor& x)
        : name_(name), x_(x), dtype_(x.scalar_type())
#if !defined(LOWKERNELS_SHIM)
          ,
          guard_(x.get_device_index())
#endif
    {
        STD_TORCH_CHECK(dtype_ == ScalarType::Half || dtype_ == ScalarType::BFloat16, name_, ": argument x: allowed dtypes are float16 and bfloat16");
    }

    lk::Dtype dtype() const { return dtype_ == ScalarType::Half ? lk::kHalf : lk::kBf16; }

    // An NHWC tensor in x's dtype.
    const void* image(const Tensor& t, const char* argument, bool output = false) const {
        STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == dtype_, name_, ": argument ", argument, ": must have 4 dimensions and x's dtype");
        const int64_t expected[] = {t.size(1) * t.size(2) * t.size(3), 1, t.size(1) * t.size(3), t.size(1)};
        for (int i = 0; i < 4; i++)
            STD_TORCH_CHECK(t.size(i) <= 1 || t.stride(i) == expected[i], name_, ": argument ", argument, ": must be NHWC in memory");
        return pointer(t, argument, output);
    }

    // Packed weights: contiguous, of x's dtype or fp32, with `count` elements.
    const void* weights(const Tensor& t, const char* argument, int64_t count) const { return packed(t, argument, dtype_, count); }
    const float* floats(const Tensor& t, const char* argument, int64_t count) const {
        return static_cast<const float*>(packed(t, argument, ScalarType::Float, count));
    }

    void* scratch(const Tensor& t, const char* argument, int64_t count) const {
        return const_cast<void*>(packed(t, argument, dtype_, count, true));
    }

    // Of split-K: nothing, or the sums of `splits` CTAs for every element of `out` and tickets.
    lk::Split split(const std::vector<Tensor>& memory, int64_t splits, const Tensor& out) const {
        STD_TORCH_CHECK(splits >= 1 && memory.size() == (splits > 1 ? 2u : 0u), name_, ": arguments split and splits: are ", memory.size(), " tensors and ",
                        splits, "; allowed are none and 1, or two and more");
        if (splits == 1) return {1, nullptr, nullptr, 0, 0};
        float* sums = scratch_floats(memory[0], "split", splits * out.numel());
        const int64_t room = memory[1].numel();
        auto* tickets = static_cast<unsigned*>(const_cast<void*>(packed(memory[1], "split", ScalarType::Int, room, true)));
        return {static_cast<int>(splits), sums, tickets, static_cast<int>(room), 0};
    }

    float* scratch_floats(const Tensor& t, const char* argument, int64_t count) const {
        return static_cast<float*>(const_cast<void*>(packed(t, argument, ScalarType::Float, count, true)));
    }

    void* output(const Tensor& t) const { return const_cast<void*>(image(t, "out", true)); }

    void* stream() const {
#if defined(LOWKERNELS_SHIM)
        return nullptr;
#else
        return current_stream(x_.get_device_index());
#endif
    }

    void check(int error) const {
        STD_TORCH_CHECK(error != lk::kNoSuchConfig, name_, ": there is no such configuration");
        STD_TORCH_CHECK(error == 0, name_, ": the launch failed with CUDA error ", error);
    }

private:
    const void* pointer(const Tensor& t, const char* argument, bool output) const {
        const void* data = t.data_ptr();
        STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name_, ": argument ", argument, ": must start on a multiple of 16 bytes");
        STD_TORCH_CHECK(t.get_device_index() == x_.get_device_index() && t.is_cuda() == x_.is_cuda(), name_, ": argument ", argument,
                        ": must be on x's device");
#if defined(LOWKERNELS_SHIM)
        shim_announce(data, t.numel() * t.element_size(), output);
#else
        (void)output;
#endif
        return data;
    }

    const void* packed(const Tensor& t, const char* argument, ScalarType dtype, int64_t count, bool output = false) const {
        STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.numel() == count, name_, ": argument ", argument,
                        ": was packed for another call: it has ", t.numel(), " elements, needed are ", count);
        return pointer(t, argument, output);
    }

    const char* name_;
    const Tensor& x_;
    ScalarType dtype_;
#if !defined(LOWKERNELS_SHIM)
    torch::stable::accelerator::DeviceGuard guard_;
#endif
};

int64_t rounded_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

constexpr int64_t kChunk = 64, kGroup = 16, kSlabDepth = 64, kSlabColumns = 128;

lk::Geometry geometry(const Tensor& x, const Tensor& out, int64_t kernel, int64_t stride, int64_t padding, const std::vector<int64_t>& tile,
                      int64_t least_images = 1) {
    STD_TORCH_CHECK(tile.size() == 4 && tile[0] >= least_images && tile[1] > 0 && tile[2] > 0, "lowkernels_cuda: argument tile: must be images, height, width and configuration");
    auto extent = [](const Tensor& t, int i) { return static_cast<int>(t.size(i)); };
    lk::Geometry g{};
    g.n = extent(x, 0), g.c = extent(x, 1), g.h = extent(x, 2), g.w = extent(x, 3);
    g.co = extent(out, 1), g.ho = extent(out, 2), g.wo = extent(out, 3);
    STD_TORCH_CHECK(g.c % 4 == 0 && g.co % 4 == 0, "lowkernels_cuda: channels are ", g.c, " and ", g.co, "; allowed are multiples of 4");
    g.kernel = static_cast<int>(kernel), g.stride = static_cast<int>(stride), g.padding = static_cast<int>(padding);
    g.images = static_cast<int>(tile[0]), g.tile_h = static_cast<int>(tile[1]), g.tile_w = static_cast<int>(tile[2]);
    STD_TORCH_CHECK(out.size(0) == g.n && g.ho == (g.h + 2 * g.padding - g.kernel) / g.stride + 1 &&
                        g.wo == (g.w + 2 * g.padding - g.kernel) / g.stride + 1,
                    "lowkernels_cuda: argument out: has not the shape of the result");
    return g;
}

void check_residual(const lk::Geometry& g, bool residual) {
    STD_TORCH_CHECK(!residual || (g.co == g.c && g.ho == g.h && g.wo == g.w), "lowkernels_cuda: argument residual: x has not the output's shape");
}

void separable_conv(Tensor x, Tensor dw, Tensor dw_bias, Tensor pw, Tensor pw_bias, Tensor out, int64_t kernel, int64_t stride,
                    int64_t padding, int64_t dw_act, int64_t pw_act, bool residual, std::vector<int64_t> tile) {
    const Call call("lowkernels_cuda::separable_conv", x);
    lk::SeparableConv p{};
    p.g = geometry(x, out, kernel, stride, padding, tile);
    const int64_t channels = rounded_up(p.g.c, kChunk), columns = rounded_up(p.g.co, kGroup);
    p.x = call.image(x, "x");
    p.dw = call.floats(dw, "dw", kernel * kernel * channels);
    p.dw_bias = call.floats(dw_bias, "dw_bias", channels);
    p.pw = call.weights(pw, "pw", channels * columns);
    p.pw_bias = call.floats(pw_bias, "pw_bias", columns);
    p.out = call.output(out);
    check_residual(p.g, residual);
    p.dw_act = static_cast<int>(dw_act), p.pw_act = static_cast<int>(pw_act), p.residual = residual;
    call.check(lk::lowkernels_separable_conv(p, call.dtype(), static_cast<int>(tile[3]), call.stream()));
}

// All of conv_act but its weights and how they are divided.
lk::ConvAct convolution(const Call& call, const Tensor& x, const Tensor& bias, const std::vector<Tensor>& residual, const Tensor& out, int64_t kernel,
                        int64_t stride, int64_t padding, int64_t act, bool pool) {
    auto extent = [](const Tensor& t, int i) { return static_cast<int>(t.size(i)); };
    lk::ConvAct p{};
    p.g.n = extent(x, 0), p.g.c = extent(x, 1), p.g.h = extent(x, 2), p.g.w = extent(x, 3), p.g.co = extent(out, 1);
    p.g.kernel = static_cast<int>(kernel), p.g.stride = static_cast<int>(stride), p.g.padding = static_cast<int>(padding);
    p.g.ho = (p.g.h + 2 * p.g.padding - p.g.kernel) / p.g.stride + 1, p.g.wo = (p.g.w + 2 * p.g.padding - p.g.kernel) / p.g.stride + 1;
    STD_TORCH_CHECK(out.size(0) == p.g.n && out.size(2) == (pool ? 1 : p.g.ho) && out.size(3) == (pool ? 1 : p.g.wo),
                    "lowkernels_cuda::conv_act: argument out: has not the shape of the result");
    p.x = call.image(x, "x");
    p.bias = call.floats(bias, "bias", rounded_up(p.g.co, kGroup));
    STD_TORCH_CHECK(residual.size() <= 1, "lowkernels_cuda::conv_act: argument residual: has ", residual.size(), " tensors; allowed are 0 and 1");
    if (!residual.empty()) {
        const Tensor& r = residual[0];
        STD_TORCH_CHECK(r.dim() == 4 && r.size(0) == p.g.n && r.size(1) == p.g.co && r.size(2) == p.g.ho && r.size(3) == p.g.wo,
                        "lowkernels_cuda::conv_act: argument residual: has not the output's shape");
        p.residual = call.image(r, "residual");
    }
    p.out = call.output(out);
    p.act = static_cast<int>(act), p.pool = pool;
    return p;
}

void conv_act(Tensor x, Tensor weight, Tensor bias, std::vector<Tensor> residual, Tensor out, int64_t kernel, int64_t stride, int64_t padding,
              int64_t act, bool pool, int64_t images, int64_t config) {
    const Call call("lowkernels_cuda::conv_act", x);
    STD_TORCH_CHECK(images > 0, "lowkernels_cuda::conv_act: argument images: is ", images, "; allowed is 1 or more");
    lk::ConvAct p = convolution(call, x, bias, residual, out, kernel, stride, padding, act, pool);
    p.weight = call.weights(weight, "weight", rounded_up(kernel * kernel * p.g.c, 16) * rounded_up(p.g.co, kGroup));
    p.images = static_cast<int>(images);
    call.check(lk::lowkernels_conv_act(p, call.dtype(), static_cast<int>(config), call.stream()));
}

void conv_act_sm90(Tensor x, Tensor slabs, Tensor bias, std::vector<Tensor> residual, Tensor out, int64_t kernel, int64_t stride, int64_t padding,
                   int64_t act, bool pool, int64_t images, int64_t pixels, int64_t column_ctas, int64_t config) {
    const Call call("lowkernels_cuda::conv_act_sm90", x);
    STD_TORCH_CHECK(images > 0 && pixels > 0 && column_ctas > 0, "lowkernels_cuda::conv_act_sm90: arguments images, pixels and column_ctas: are ", images,
                    ", ", pixels, " and ", column_ctas, "; allowed is 1 or more");
    lk::ConvAct p = convolution(call, x, bias, residual, out, kernel, stride, padding, act, pool);
    p.weight = call.weights(slabs, "slabs", rounded_up(kernel * kernel * rounded_up(p.g.c, 16), kSlabDepth) * rounded_up(p.g.co, kSlabColumns));
    p.g.images = 0, p.g.tile_h = 1, p.g.tile_w = static_cast<int>(pixels);
    p.images = static_cast<int>(images), p.column_ctas = static_cast<int>(column_ctas);
    call.check(lk::lowkernels_conv_act_sm90(p, call.dtype(), static_cast<int>(config), call.stream()));
}

// All of mbconv but the weights of its products.
lk::MBConv bottleneck(const Call& call, const Tensor& x, const Tensor& expand_bias, const Tensor& dw, const Tensor& dw_bias, const Tensor& project_bias,
                      const Tensor& out, int64_t kernel, int64_t stride, int64_t padding, int64_t act, bool residual, const std::vector<int64_t>& tile) {
    lk::MBConv p{};
    p.g = geometry(x, out, kernel, stride, padding, tile);
    const int64_t hidden = expand_bias.numel(), expanded = rounded_up(hidden, kChunk);
    STD_TORCH_CHECK(hidden % 4 == 0, "lowkernels_cuda::mbconv: argument expand_bias: has ", hidden, " elements; allowed are multiples of 4");
    p.expanded = static_cast<int>(hidden);
    p.x = call.image(x, "x");
    p.expand_bias = call.floats(expand_bias, "expand_bias", hidden);
    p.dw = call.floats(dw, "dw", kernel * kernel * expanded);
    p.dw_bias = call.floats(dw_bias, "dw_bias", expanded);
    p.project_bias = call.floats(project_bias, "project_bias", rounded_up(p.g.co, kGroup));
    p.out = call.output(out);
    check_residual(p.g, residual);
    p.act = static_cast<int>(act), p.residual = residual;
    return p;
}

void mbconv(Tensor x, Tensor expand, Tensor expand_bias, Tensor dw, Tensor dw_bias, Tensor project, Tensor project_bias, Tensor out,
            std::vector<Tensor> split, int64_t kernel, int64_t stride, int64_t padding, int64_t act, bool residual, std::vector<int64_t> tile, int64_t splits) {
    const Call call("lowkernels_cuda::mbconv", x);
    lk::SplitMBConv p{bottleneck(call, x, expand_bias, dw, dw_bias, project_bias, out, kernel, stride, padding, act, residual, tile), call.split(split, splits, out)};
    const int64_t expanded = rounded_up(p.expanded, kChunk);
    p.expand = call.weights(expand, "expand", rounded_up(p.g.c, 16) * expanded);
    p.project = call.weights(project, "project", expanded * rounded_up(p.g.co, kGroup));
    call.check(lk::lowkernels_mbconv(p, call.dtype(), static_cast<int>(tile[3]), call.stream()));
}

void mbconv_sm90(Tensor x, Tensor slabs, Tensor expand_bias, Tensor dw, Tensor dw_bias, Tensor project_bias, Tensor out, int64_t kernel, int64_t stride,
                 int64_t padding, int64_t act, bool residual, std::vector<int64_t> tile) {
    const Call call("lowkernels_cuda::mbconv_sm90", x);
    lk::MBConv p = bottleneck(call, x, expand_bias, dw, dw_bias, project_bias, out, kernel, stride, padding, act, residual, tile);
    // For each two slabs' columns of the output both products' slabs, the expansion's of half as many columns and twice the depth.
    const int64_t columns = 2 * kSlabColumns, ctas = rounded_up(p.g.co, columns) / columns;
    const int64_t elements = rounded_up(p.expanded, kChunk) * (rounded_up(p.g.c, 2 * kSlabDepth) + columns);
    p.expand = call.weights(slabs, "slabs", ctas * elements);
    call.check(lk::lowkernels_mbconv_sm90(p, call.dtype(), static_cast<int>(tile[3]), call.stream()));
}

// What fused_mbconv and gn_mlp have in common.
void chain(const Call& call, lk::ExpandProject& p, const Tensor& x, const Tensor& expand, const Tensor& expand_bias, const Tensor& project,
           const Tensor& project_bias, const Tensor& out, int64_t act, bool residual) {
    const int64_t taps = static_cast<int64_t>(p.g.kernel) * p.g.kernel, columns = rounded_up(p.g.co, kGroup), hidden = expand_bias.numel();
    STD_TORCH_CHECK(hidden % 4 == 0, "lowkernels_cuda: argument expand_bias: has ", hidden, " elements; allowed are multiples of 4");
    const int64_t expanded = rounded_up(hidden, kGroup);
    STD_TORCH_CHECK(p.g.images == 1 || (p.g.images == 0 && p.g.tile_h == 1), "lowkernels_cuda: argument tile: is of ", p.g.images,
                    " images; allowed are 1, or 0 with height 1");
    p.expanded = static_cast<int>(hidden);
    p.x = call.image(x, "x");
    p.expand = call.weights(expand, "expand", taps * rounded_up(p.g.c, 16) * expanded);
    p.expand_bias = call.floats(expand_bias, "expand_bias", hidden);
    p.project = call.weights(project, "project", expanded * columns);
    p.project_bias = call.floats(project_bias, "project_bias", columns);
    p.out = call.output(out);
    check_residual(p.g, residual);
    p.act = static_cast<int>(act), p.residual = residual;
}

void fused_mbconv(Tensor x, Tensor expand, Tensor expand_bias, Tensor project, Tensor project_bias, Tensor out, std::vector<Tensor> split, int64_t kernel,
                  int64_t stride, int64_t padding, int64_t act, bool residual, std::vector<int64_t> tile, int64_t splits) {
    const Call call("lowkernels_cuda::fused_mbconv", x);
    lk::ExpandProject p{};
    p.g = geometry(x, out, kernel, stride, padding, tile, 0);
    chain(call, p, x, expand, expand_bias, project, project_bias, out, act, residual);
    p.split = call.split(split, splits, out);
    call.check(lk::lowkernels_fused_mbconv(p, call.dtype(), static_cast<int>(tile[3]), call.stream()));
}

// Of an image one column of pixels: nothing depends on where a row of it ends.
void one_column(lk::Geometry& g) {
    const int64_t pixels = static_cast<int64_t>(g.h) * g.w;
    STD_TORCH_CHECK(pixels < (int64_t{1} << 31), "lowkernels_cuda::gn_mlp: argument x: has ", pixels, " pixels an image; allowed are less than 2^31");
    g.h = g.ho = static_cast<int>(pixels), g.w = g.wo = 1;
}

void normalisation(const Call& call, lk::ExpandProject& p, const Tensor& weight, const Tensor& bias, const std::vector<Tensor>& partial, double eps) {
    const int64_t channels = rounded_up(p.g.c, 4);
    p.norm_weight = call.floats(weight, "norm_weight", channels);
    p.norm_bias = call.floats(bias, "norm_bias", channels);
    p.eps = static_cast<float>(eps);
    STD_TORCH_CHECK(partial.size() <= 1, "lowkernels_cuda::gn_mlp: argument partial: has ", partial.size(), " tensors; allowed are 0 and 1");
    if (partial.empty()) return;
    STD_TORCH_CHECK(p.g.n > 0, "lowkernels_cuda::gn_mlp: argument x: has no images");
    p.pieces = static_cast<int>(partial[0].numel() / (2 * int64_t{p.g.n}));
    p.partial = call.scratch_floats(partial[0], "partial", 2 * int64_t{p.g.n} * p.pieces);
}

void gn_mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor expand, Tensor expand_bias, Tensor project, Tensor project_bias,
            std::vector<Tensor> partial, Tensor out, std::vector<Tensor> split, double eps, int64_t act, bool residual, std::vector<int64_t> tile,
            int64_t splits) {
    const Call call("lowkernels_cuda::gn_mlp", x);
    lk::ExpandProject p{};
    p.g = geometry(x, out, 1, 1, 0, tile, 0);
    one_column(p.g);
    chain(call, p, x, expand, expand_bias, project, project_bias, out, act, residual);
    normalisation(call, p, norm_weight, norm_bias, partial, eps);
    p.split = call.split(split, splits, out);
    call.check(lk::lowkernels_gn_mlp(p, call.dtype(), static_cast<int>(tile[3]), call.stream()));
}

// As chain, for the kernels of Hopper: all weights are in `slabs`.
void wide_chain(const Call& call, lk::ExpandProject& p, const Tensor& x, const Tensor& slabs, const Tensor& expand_bias, const Tensor& project_bias,
                const Tensor& out, int64_t act, bool residual) {
    const int64_t taps = static_cast<int64_t>(p.g.kernel) * p.g.kernel, hidden = expand_bias.numel(), expanded = rounded_up(hidden, kSlabColumns);
    STD_TORCH_CHECK(hidden % 4 == 0, "lowkernels_cuda: argument expand_bias: has ", hidden, " elements; allowed are multiples of 4");
    STD_TORCH_CHECK(p.g.images == 1 || (p.g.images == 0 && p.g.tile_h == 1), "lowkernels_cuda: argument tile: is of ", p.g.images,
                    " images; allowed are 1, or 0 with height 1");
    p.expanded = static_cast<int>(hidden);
    p.x = call.image(x, "x");
    p.expand = call.weights(slabs, "slabs", expanded * (rounded_up(taps * rounded_up(p.g.c, 16), kSlabDepth) + rounded_up(p.g.co, kSlabColumns)));
    p.expand_bias = call.floats(expand_bias, "expand_bias", hidden);
    p.project_bias = call.floats(project_bias, "project_bias", rounded_up(p.g.co, kGroup));
    p.out = call.output(out);
    check_residual(p.g, residual);
    p.act = static_cast<int>(act), p.residual = residual;
}

void fused_mbconv_sm90(Tensor x, Tensor slabs, Tensor expand_bias, Tensor project_bias, Tensor out, int64_t kernel, int64_t stride, int64_t padding,
                       int64_t act, bool residual, std::vector<int64_t> tile) {
    const Call call("lowkernels_cuda::fused_mbconv_sm90", x);
    lk::ExpandProject p{};
    p.g = geometry(x, out, kernel, stride, padding, tile, 0);
    wide_chain(call, p, x, slabs, expand_bias, project_bias, out, act, residual);
    call.check(lk::lowkernels_fused_mbconv_sm90(p, call.dtype(), static_cast<int>(tile[3]), call.stream()));
}

void gn_mlp_sm90(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor slabs, Tensor expand_bias, Tensor project_bias, std::vector<Tensor> partial,
                 Tensor out, double eps, int64_t act, bool residual, std::vector<int64_t> tile) {
    const Call call("lowkernels_cuda::gn_mlp_sm90", x);
    lk::ExpandProject p{};
    p.g = geometry(x, out, 1, 1, 0, tile, 0);
    one_column(p.g);
    wide_chain(call, p, x, slabs, expand_bias, project_bias, out, act, residual);
    normalisation(call, p, norm_weight, norm_bias, partial, eps);
    call.check(lk::lowkernels_gn_mlp_sm90(p, call.dtype(), static_cast<int>(tile[3]), call.stream()));
}

void lowtention(Tensor x, std::vector<Tensor> norm, Tensor dw, Tensor dw_bias, Tensor qkv, Tensor up, Tensor up_bias, std::vector<Tensor> scratch, Tensor out,
                double eps, double scale, int64_t heads, int64_t inner, int64_t kernel, int64_t stride, int64_t images, int64_t shares,
                bool residual) {
    const Call call("lowkernels_cuda::lowtention", x);
    STD_TORCH_CHECK(stride == 1 || stride == 2, "lowkernels_cuda::lowtention: argument stride: is ", stride, "; allowed are 1 and 2");
    STD_TORCH_CHECK(heads > 0 && inner % (16 * heads) == 0, "lowkernels_cuda::lowtention: argument inner: is ", inner, " for ", heads, " heads");
    STD_TORCH_CHECK(images > 0 && (images == 1 || scratch.empty()), "lowkernels_cuda::lowtention: argument images: is ", images,
                    "; allowed is 1, or more without scratch");
    STD_TORCH_CHECK(shares > 0 && (shares == 1 || scratch.empty()), "lowkernels_cuda::lowtention: argument shares: is ", shares,
                    "; allowed is 1, or more without scratch");
    lk::Lowtention p{};
    auto extent = [](const Tensor& t, int i) { return static_cast<int>(t.size(i)); };
    p.n = extent(x, 0), p.c = extent(x, 1), p.h = extent(x, 2), p.w = extent(x, 3), p.co = extent(out, 1);
    STD_TORCH_CHECK(p.c % 4 == 0 && p.co % 4 == 0, "lowkernels_cuda: channels are ", p.c, " and ", p.co, "; allowed are multiples of 4");
    STD_TORCH_CHECK(out.size(0) == p.n && out.size(2) == p.h && out.size(3) == p.w, "lowkernels_cuda: argument out: has not the shape of the result");
    STD_TORCH_CHECK(!residual || p.co == p.c, "lowkernels_cuda: argument residual: x has not the output's shape");
    p.grid_h = static_cast<int>((p.h + stride - 1) / stride), p.grid_w = static_cast<int>((p.w + stride - 1) / stride);
    p.tokens = p.grid_h * p.grid_w;
    p.heads = static_cast<int>(heads), p.inner = static_cast<int>(inner);
    p.kernel = static_cast<int>(kernel), p.stride = static_cast<int>(stride), p.images = static_cast<int>(images), p.shares = static_cast<int>(shares);
    p.eps = static_cast<float>(eps), p.scale = static_cast<float>(scale);
    const int64_t depth = rounded_up(p.c, kGroup), columns = rounded_up(p.co, kGroup), taps = stride == 1 ? 9 : 16;
    p.x = call.image(x, "x");
    STD_TORCH_CHECK(norm.empty() || norm.size() == 2, "lowkernels_cuda::lowtention: argument norm: has ", norm.size(), " tensors; allowed are 0 and 2");
    if (!norm.empty()) {
        p.norm_weight = call.floats(norm[0], "norm[0]", depth);
        p.norm_bias = call.floats(norm[1], "norm[1]", depth);
    }
    p.dw = call.floats(dw, "dw", kernel * kernel * depth);
    p.dw_bias = call.floats(dw_bias, "dw_bias", depth);
    p.qkv = call.weights(qkv, "qkv", depth * 3 * inner);
    p.up = call.weights(up, "up", taps * inner * columns);
    p.up_bias = call.floats(up_bias, "up_bias", columns);
    STD_TORCH_CHECK(scratch.empty() || scratch.size() == 2, "lowkernels_cuda::lowtention: argument scratch: has ", scratch.size(),
                    " tensors; allowed are 0 and 2");
    if (!scratch.empty()) {
        const int64_t rows = static_cast<int64_t>(p.n) * p.tokens;
        p.qkv_rows = call.scratch(scratch[0], "scratch[0]", rows * 3 * inner);
        p.attended = call.scratch(scratch[1], "scratch[1]", rows * inner);
    }
    p.out = call.output(out);
    p.residual = residual;
    call.check(lk::lowkernels_lowtention(p, call.dtype(), 0, call.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lowkernels_cuda, LOWKERNELS_KEY, m) {
    m.impl("conv_act", TORCH_BOX(&conv_act));
    m.impl("separable_conv", TORCH_BOX(&separable_conv));
    m.impl("mbconv", TORCH_BOX(&mbconv));
    m.impl("fused_mbconv", TORCH_BOX(&fused_mbconv));
    m.impl("gn_mlp", TORCH_BOX(&gn_mlp));
    m.impl("conv_act_sm90", TORCH_BOX(&conv_act_sm90));
    m.impl("fused_mbconv_sm90", TORCH_BOX(&fused_mbconv_sm90));
    m.impl("gn_mlp_sm90", TORCH_BOX(&gn_mlp_sm90));
    m.impl("mbconv_sm90", TORCH_BOX(&mbconv_sm90));
    m.impl("lowtention", TORCH_BOX(&lowtention));
}
