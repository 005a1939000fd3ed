// lowkernels_cpu::*: checks what Python packed, chooses the instruction set, and calls the kernels. The only file that sees torch.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <pthread.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "reader.h"

#define LK_DECLARE(isa)                 \
    namespace isa {                     \
    extern const Kernels* const fp32;   \
    extern const Kernels* const half;   \
    }

namespace lowkernels {

#if defined(__x86_64__)
LK_DECLARE(avx2)
LK_DECLARE(avx512)
LK_DECLARE(avx512_bf16)
#elif defined(__aarch64__)
LK_DECLARE(neon)
#endif

void reject(const std::string& problem) { TORCH_CHECK(false, "lowkernels_cpu: ", problem); }

namespace {

struct Isa {
    const char* name;
    bool supported;
    const Kernels *fp32, *half;
};

// Best first.
const std::vector<Isa>& instruction_sets() {
#if defined(__x86_64__)
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                               __builtin_cpu_supports("avx512cd");
    static const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    static const std::vector<Isa> sets = {
        {"avx512_bf16", avx512_bf16, avx512::fp32, avx512_bf16::half},
        {"avx512", avx512, avx512::fp32, avx512::half},
        {"avx2", avx2, avx2::fp32, avx2::half},
    };
#elif defined(__aarch64__)
    static const std::vector<Isa> sets = {{"neon", true, neon::fp32, neon::half}};
#else
    static const std::vector<Isa> sets;
#endif
    return sets;
}

const Isa& chosen() {
    static const Isa& isa = []() -> const Isa& {
        const char* wanted = std::getenv("LOWKERNELS_CPU_ISA");
        std::string allowed;
        for (const Isa& isa : instruction_sets()) {
            if (!isa.supported) continue;
            if (!wanted || !*wanted || std::string(wanted) == isa.name) return isa;
            allowed += allowed.empty() ? isa.name : std::string(", ") + isa.name;
        }
        TORCH_CHECK(false, "lowkernels: ", wanted && *wanted ? std::string("LOWKERNELS_CPU_ISA is '") + wanted + "'; this processor has " + allowed
                                                             : std::string("this processor has no AVX2 with FMA"));
    }();
    return isa;
}

const Kernels& kernels(at::ScalarType dtype) {
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "lowkernels_cpu: dtype is ", dtype, "; allowed are float32 and bfloat16");
    return dtype == at::kFloat ? *chosen().fp32 : *chosen().half;
}

// Scratch memory is kept by each calling thread: a fresh allocation of a megabyte costs more in page faults than a small block takes.
void* workspace(std::size_t bytes) {
    thread_local std::unique_ptr<char, void (*)(void*)> memory(nullptr, std::free);
    thread_local std::size_t size = 0;
    if (bytes > size) {
        memory.reset();
        size = 0;
        const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
        memory.reset(static_cast<char*>(std::aligned_alloc(4096, rounded)));
        TORCH_CHECK(memory != nullptr, "lowkernels_cpu: could not allocate ", rounded, " bytes of scratch memory");
        size = rounded;
    }
    return memory.get();
}

// The threads of an OpenMP pool do not survive a fork, and entering a parallel region in the child can wait for them for ever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Context context(double multiplications) {
    constexpr double worth_a_team = 1e5;
    const bool alone = forked || at::in_parallel_region() || multiplications < worth_a_team;
    thread_local Helpers helpers;
    return {alone ? 1 : at::get_num_threads(), &helpers, workspace};
}

using Packed = at::TensorList;

Reader read(Packed packed, const at::Tensor& x) {
    const bool bytes = packed.size() == 1 && packed[0].device().is_cpu() && packed[0].is_contiguous() && packed[0].scalar_type() == at::kByte;
    if (!bytes) reject("packed is not what pack made");
    return Reader(packed[0].const_data_ptr(), packed[0].numel(), kernels(x.scalar_type()), static_cast<int>(x.scalar_type()));
}

void check_image(const at::Tensor& x, i64 channels) {
    TORCH_CHECK(x.device().is_cpu() && x.dim() == 4 && x.size(1) == channels && x.is_contiguous(at::MemoryFormat::ChannelsLast),
                "lowkernels_cpu: x is ", x.sizes(), "; allowed is (N, ", channels, ", H, W) on the CPU, NHWC in memory");
}

at::Tensor empty_image(const at::Tensor& x, i64 channels, i64 h, i64 w) {
    return at::empty({x.size(0), channels, h, w}, x.options(), at::MemoryFormat::ChannelsLast);
}

Images images(const at::Tensor& x, const at::Tensor& out, i64 h_out, i64 w_out) {
    return {x.const_data_ptr(), out.mutable_data_ptr(), x.size(0), x.size(2), x.size(3), h_out, w_out};
}

void check_residual(bool residual, const at::Tensor& x, const at::Tensor& out) {
    TORCH_CHECK(!residual || x.sizes() == out.sizes(), "lowkernels_cpu: residual: the output ", out.sizes(), " has not the shape of x ", x.sizes());
}

at::Tensor conv_act(const at::Tensor& x, const std::optional<at::Tensor>& residual, Packed packed, i64 act, i64 stride, i64 padding, bool pool) {
    Reader reader = read(packed, x);
    const i64 channels = reader.number();
    const Conv conv = reader.conv();
    reader.finish();
    check_image(x, channels);
    const i64 h = extent(x.size(2), conv.k, stride, padding), w = extent(x.size(3), conv.k, stride, padding);
    at::Tensor out = pool ? at::empty({x.size(0), conv.out}, x.options()) : empty_image(x, conv.out, h, w);
    if (residual) {
        check_image(*residual, conv.out);
        TORCH_CHECK(residual->size(0) == x.size(0) && residual->size(2) == h && residual->size(3) == w && residual->scalar_type() == x.scalar_type(),
                    "lowkernels_cpu: residual is ", residual->sizes());
    }
    const ConvAct call{images(x, out, h, w), conv, residual ? residual->const_data_ptr() : nullptr, channels, int(act), stride, padding, pool};
    reader.kernels_for_dtype().conv_act(call, context(double(x.size(0) * h * w) * double(conv.k * conv.k * conv.in * conv.out)));
    return out;
}

at::Tensor inverted_residual(const at::Tensor& x, Packed packed, bool expands, i64 expand_act, i64 depthwise_act, i64 project_act,
                             i64 stride, i64 padding, bool residual) {
    Reader reader = read(packed, x);
    InvertedResidual call{};
    if (expands) call.expand = reader.conv();
    call.depthwise = reader.depthwise();
    call.project = reader.conv();
    reader.finish();
    check_image(x, expands ? call.expand.in : call.depthwise.channels);
    const i64 h = extent(x.size(2), call.depthwise.k, stride, padding), w = extent(x.size(3), call.depthwise.k, stride, padding);
    at::Tensor out = empty_image(x, call.project.out, h, w);
    check_residual(residual, x, out);
    call.images = images(x, out, h, w);
    call.expand_act = int(expand_act), call.depthwise_act = int(depthwise_act), call.project_act = int(project_act);
    call.stride = stride, call.padding = padding, call.residual = residual;
    const double work = double(x.size(0) * x.size(2) * x.size(3)) * double(call.depthwise.channels) * double(x.size(1));
    reader.kernels_for_dtype().inverted_residual(call, context(work));
    return out;
}

at::Tensor fused_mbconv(const at::Tensor& x, Packed packed, i64 act, i64 stride, i64 padding, bool residual) {
    Reader reader = read(packed, x);
    FusedMBConv call{};
    call.conv = reader.conv();
    call.project = reader.conv();
    reader.finish();
    check_image(x, call.conv.in);
    const i64 h = extent(x.size(2), call.conv.k, stride, padding), w = extent(x.size(3), call.conv.k, stride, padding);
    at::Tensor out = empty_image(x, call.project.out, h, w);
    check_residual(residual, x, out);
    call.images = images(x, out, h, w);
    call.act = int(act), call.stride = stride, call.padding = padding, call.residual = residual;
    const double work = double(x.size(0) * h * w) * double(call.conv.k * call.conv.k * call.conv.in * call.conv.out);
    reader.kernels_for_dtype().fused_mbconv(call, context(work));
    return out;
}

at::Tensor lowtention(const at::Tensor& x, Packed packed, double eps, i64 heads, i64 stride, bool residual) {
    Reader reader = read(packed, x);
    Lowtention call{};
    call.norm = reader.norm(x.size(1), eps);
    call.depthwise = reader.depthwise();
    call.qkv = reader.conv();
    for (int i = 0; i < (stride == 1 ? 1 : 4); ++i) call.up[i] = reader.conv();
    reader.finish();
    check_image(x, call.depthwise.channels);
    at::Tensor out = empty_image(x, call.up[0].out, x.size(2), x.size(3));
    check_residual(residual, x, out);
    call.images = images(x, out, x.size(2), x.size(3));
    call.heads = heads, call.stride = stride, call.residual = residual;
    const double work = double(x.size(0) * x.size(2) * x.size(3)) * double(call.up[0].in * call.up[0].out);
    reader.kernels_for_dtype().lowtention(call, context(work));
    return out;
}

at::Tensor gn_mlp(const at::Tensor& x, Packed packed, double eps, i64 act, bool residual) {
    Reader reader = read(packed, x);
    GnMlp call{};
    call.norm = reader.norm(x.size(1), eps);
    call.fc1 = reader.conv();
    call.fc2 = reader.conv();
    reader.finish();
    check_image(x, call.fc1.in);
    at::Tensor out = empty_image(x, call.fc2.out, x.size(2), x.size(3));
    check_residual(residual, x, out);
    call.images = images(x, out, x.size(2), x.size(3));
    call.act = int(act), call.residual = residual;
    reader.kernels_for_dtype().gn_mlp(call, context(double(x.size(0) * x.size(2) * x.size(3)) * double(call.fc1.in * call.fc1.out)));
    return out;
}

// What stands between operators in a model's head. Weight and bias are fp32.
at::Tensor norm_act(const at::Tensor& x, const at::Tensor* weight, const at::Tensor* bias, double eps, i64 act) {
    const i64 channels = weight ? x.size(-1) : x.numel();
    TORCH_CHECK(x.device().is_cpu() && (weight ? x.dim() == 2 && x.is_contiguous() && weight->numel() == channels : x.is_non_overlapping_and_dense()),
                "lowkernels_cpu: norm_act: x is ", x.sizes());
    at::Tensor out = at::empty_like(x);
    if (out.numel() == 0) return out;
    const Norm norm{weight ? weight->const_data_ptr<float>() : nullptr, bias ? bias->const_data_ptr<float>() : nullptr, eps};
    kernels(x.scalar_type()).norm_act({x.const_data_ptr(), out.mutable_data_ptr(), x.numel() / channels, channels, norm, int(act)});
    return out;
}

at::Tensor pool(const at::Tensor& x) {
    check_image(x, x.dim() == 4 ? x.size(1) : 0);
    at::Tensor out = empty_image(x, x.size(1), 1, 1);
    kernels(x.scalar_type()).pool({x.const_data_ptr(), out.mutable_data_ptr(), x.size(0), x.size(2) * x.size(3), x.size(1)});
    return out;
}

// Calls that take each other's outputs, made one after another.
class Chain : public torch::CustomClassHolder {
public:
    // `numbers` and `reals` are the operator's integers and booleans, and its floats, in order; conv_act's residual, which is its x, is a 1.
    // `linear` is a conv_act of rows (N, C). What is no operator: layer_norm, activation, pool and flatten.
    void add(const std::string& name, std::vector<at::Tensor> packed, const std::vector<i64>& numbers, const std::vector<double>& reals) {
        const auto expect = [&](std::size_t integers, std::size_t floats) {
            TORCH_CHECK(numbers.size() == integers && reals.size() == floats, "lowkernels_cpu: Chain: ", numbers.size(), " numbers and ", reals.size(),
                        " reals for ", name);
        };
        if (name == "conv_act") {
            expect(5, 0);
            steps_.push_back([=, n = numbers](const at::Tensor& x) {
                return conv_act(x, n[0] ? std::optional<at::Tensor>(x) : std::nullopt, packed, n[1], n[2], n[3], n[4]);
            });
        } else if (name == "inverted_residual") {
            expect(7, 0);
            steps_.push_back([=, n = numbers](const at::Tensor& x) { return inverted_residual(x, packed, n[0], n[1], n[2], n[3], n[4], n[5], n[6]); });
        } else if (name == "fused_mbconv") {
            expect(4, 0);
            steps_.push_back([=, n = numbers](const at::Tensor& x) { return fused_mbconv(x, packed, n[0], n[1], n[2], n[3]); });
        } else if (name == "lowtention") {
            expect(3, 1);
            steps_.push_back([=, n = numbers, eps = reals[0]](const at::Tensor& x) { return lowtention(x, packed, eps, n[0], n[1], n[2]); });
        } else if (name == "gn_mlp") {
            expect(2, 1);
            steps_.push_back([=, n = numbers, eps = reals[0]](const at::Tensor& x) { return gn_mlp(x, packed, eps, n[0], n[1]); });
        } else if (name == "linear") {
            expect(5, 0);
            steps_.push_back([=, n = numbers](const at::Tensor& x) {
                TORCH_CHECK(x.dim() == 2 && !n[0], "lowkernels_cpu: linear: x is ", x.sizes());
                return conv_act(x.view({x.size(0), x.size(1), 1, 1}), std::nullopt, packed, n[1], n[2], n[3], n[4]).flatten(1);
            });
        } else if (name == "layer_norm") {
            expect(0, 1);
            TORCH_CHECK(packed.size() == 2 && packed[0].scalar_type() == at::kFloat && packed[1].scalar_type() == at::kFloat &&
                            packed[0].numel() == packed[1].numel() && packed[0].is_contiguous() && packed[1].is_contiguous(),
                        "lowkernels_cpu: layer_norm: weight and bias are not two vectors of float32");
            steps_.push_back([=, eps = reals[0]](const at::Tensor& x) { return norm_act(x, &packed[0], &packed[1], eps, NONE); });
        } else if (name == "activation") {
            expect(1, 0);
            steps_.push_back([=, act = numbers[0]](const at::Tensor& x) { return norm_act(x, nullptr, nullptr, 0, act); });
        } else if (name == "pool") {
            expect(0, 0);
            steps_.push_back([](const at::Tensor& x) { return pool(x); });
        } else if (name == "flatten") {
            expect(0, 0);
            steps_.push_back([](const at::Tensor& x) { return x.flatten(1); });
        } else {
            TORCH_CHECK(false, "lowkernels_cpu: Chain: no operator ", name);
        }
    }

    at::Tensor run(at::Tensor x) const {
        for (const auto& step : steps_) x = step(x);
        return x;
    }

private:
    std::vector<std::function<at::Tensor(const at::Tensor&)>> steps_;
};

// Tensors, and what was their version and where was their data: a chain asks on every call whether any has changed. From Python that
// is one cache miss after another, some ten for each tensor; here the processor has many under way at once. What Python looks at next, dicts
// and other objects, is brought into the cache meanwhile.
class Watch : public torch::CustomClassHolder {
public:
    // A negative version is not looked at: inference tensors count none. `dicts` and `objects` are addresses of what the caller keeps alive.
    Watch(std::vector<at::Tensor> tensors, std::vector<i64> versions, std::vector<i64> pointers, std::vector<i64> dicts, std::vector<i64> objects)
        : tensors_(std::move(tensors)),
          versions_(std::move(versions)),
          pointers_(std::move(pointers)),
          dicts_(std::move(dicts)),
          objects_(std::move(objects)) {
        TORCH_CHECK(tensors_.size() == versions_.size() && tensors_.size() == pointers_.size(), "lowkernels_cpu: Watch: lists of different lengths");
    }

    bool unchanged() const {
        const auto ask = [](const void* address, i64 bytes) {
            for (i64 i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(address) + i);
        };
        for (const i64 dict : dicts_) ask(reinterpret_cast<const void*>(dict), 64);
        for (const i64 object : objects_) ask(reinterpret_cast<const void*>(object), 64);
        for (const auto& tensor : tensors_) ask(tensor.unsafeGetTensorImpl(), 128);
        for (const i64 dict : dicts_) {
            // The fifth word of a dict is where its keys and values are, in CPython; elsewhere this hint is of no use, and does no harm.
            const void* entries;
            std::memcpy(&entries, reinterpret_cast<const char*>(dict) + 32, sizeof entries);
            ask(entries, 192);
        }
        bool same = true;
        for (std::size_t i = 0; i < tensors_.size(); ++i) {
            const c10::TensorImpl& tensor = *tensors_[i].unsafeGetTensorImpl();
            const bool version = versions_[i] < 0 || i64(tensor.version_counter().current_version()) == versions_[i];
            same &= version & (reinterpret_cast<i64>(tensor.data()) == pointers_[i]);
        }
        return same;
    }

private:
    std::vector<at::Tensor> tensors_;
    std::vector<i64> versions_, pointers_, dicts_, objects_;
};

// The instruction set's name, and what packing depends on: floats in a vector, whether bf16 weights stay bf16.
std::tuple<std::string, i64, bool> layout(bool half) {
    const Kernels& k = kernels(half ? at::kBFloat16 : at::kFloat);
    return {chosen().name, k.vector, k.bf16_weights};
}

}  // namespace
}  // namespace lowkernels

TORCH_LIBRARY(lowkernels_cpu, m) {
    m.def("conv_act(Tensor x, Tensor? residual, Tensor[] packed, int act, int stride, int padding, bool pool) -> Tensor");
    m.def(
        "inverted_residual(Tensor x, Tensor[] packed, bool expands, int expand_act, int depthwise_act, int project_act, int stride, "
        "int padding, bool residual) -> Tensor");
    m.def("fused_mbconv(Tensor x, Tensor[] packed, int act, int stride, int padding, bool residual) -> Tensor");
    m.def("lowtention(Tensor x, Tensor[] packed, float eps, int heads, int stride, bool residual) -> Tensor");
    m.def("gn_mlp(Tensor x, Tensor[] packed, float eps, int act, bool residual) -> Tensor");
    m.def("layout(bool half) -> (str, int, bool)", lowkernels::layout);
    m.class_<lowkernels::Chain>("Chain")
        .def(torch::init<>())
        .def("add", &lowkernels::Chain::add)
        .def("run", [](const c10::intrusive_ptr<lowkernels::Chain>& self, at::Tensor x) { return self->run(std::move(x)); });
    m.class_<lowkernels::Watch>("Watch")
        .def(torch::init<std::vector<at::Tensor>, std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>>())
        .def("unchanged", &lowkernels::Watch::unchanged);
}

TORCH_LIBRARY_IMPL(lowkernels_cpu, CPU, m) {
    m.impl("conv_act", lowkernels::conv_act);
    m.impl("inverted_residual", lowkernels::inverted_residual);
    m.impl("fused_mbconv", lowkernels::fused_mbconv);
    m.impl("lowtention", lowkernels::lowtention);
    m.impl("gn_mlp", lowkernels::gn_mlp);
}
