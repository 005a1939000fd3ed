// Reading packed weights, without torch.
#pragma once
#include <string>

#include "api.h"

namespace lowkernels {

// Raises the caller's kind of error.
[[noreturn]] void reject(const std::string& problem);

inline i64 extent(i64 size, i64 k, i64 stride, i64 padding) { return (size + 2 * padding - k) / stride + 1; }

// Reads what lowkernels/backends/cpu/pack.py made: one block of bytes, a header of integers and then the sections in order, each beginning at
// a multiple of 64 bytes.
class Reader {
public:
    Reader(const void* block, i64 bytes, const Kernels& kernels, int dtype)
        : kernels_(kernels), base_(static_cast<const char*>(block)), bytes_(bytes) {
        const i64 count = bytes_ >= 8 ? *reinterpret_cast<const i64*>(base_) : -1;
        if (count < 4 || count > bytes_ / 8) reject("packed is not what pack made");
        header_ = reinterpret_cast<const i64*>(base_);
        end_ = header_ + count;
        used_ = count * 8;
        const i64 mine[3] = {kernels_.vector, kernels_.bf16_weights, dtype};
        for (int i = 0; i < 3; ++i) {
            if (header_[i + 1] == mine[i]) continue;
            const char* const what[3] = {"floats in a vector", "bf16 products", "dtype"};
            reject(std::string("packed was made for ") + what[i] + " " + std::to_string(header_[i + 1]) + "; this call has " +
                   std::to_string(mine[i]) + ". Pack again on this machine for this dtype.");
        }
        header_ += 4;
    }

    const Kernels& kernels_for_dtype() const { return kernels_; }

    i64 number() {
        if (header_ == end_) reject("packed was made for another operator");
        return *header_++;
    }

    Conv conv() {
        Conv conv{};
        conv.k = number(), conv.in = number(), conv.out = number();
        const i64 elements = conv.in * columns(conv.out);
        const bool transformed = number();
        const i64 taps = transformed ? 16 : conv.k * conv.k;
        (transformed ? conv.winograd : conv.weight) =
            kernels_.bf16_weights ? static_cast<const void*>(section<bf16>(taps * elements)) : section<float>(taps * elements);
        conv.bias = section<float>(panels(conv.out));
        return conv;
    }

    Depthwise depthwise() {
        Depthwise conv{};
        conv.k = number(), conv.channels = number(), conv.padded = panels(conv.channels);
        conv.weight = section<float>(conv.k * conv.k * conv.padded);
        conv.bias = section<float>(conv.padded);
        return conv;
    }

    Norm norm(i64 channels, double eps) {
        if (!number()) return {nullptr, nullptr, eps};
        const float* weight = section<float>(panels(channels));
        return {weight, section<float>(panels(channels)), eps};
    }

    // To be called after everything was read.
    void finish() const {
        if (header_ != end_ || used_ != bytes_) reject("packed was made for another operator");
    }

private:
    i64 panels(i64 channels) const { return (channels + 2 * kernels_.vector - 1) / (2 * kernels_.vector) * 2 * kernels_.vector; }
    i64 columns(i64 channels) const { return (channels + kernels_.vector - 1) / kernels_.vector * kernels_.vector; }

    template <class T>
    const T* section(i64 elements) {
        const i64 from = (used_ + 63) / 64 * 64;
        used_ = from + elements * i64(sizeof(T));
        if (elements < 0 || used_ > bytes_) reject("packed was made for another operator");
        return reinterpret_cast<const T*>(base_ + from);
    }

    const Kernels& kernels_;
    const char* base_;
    const i64 *header_, *end_;
    i64 bytes_, used_;
};

}  // namespace lowkernels
