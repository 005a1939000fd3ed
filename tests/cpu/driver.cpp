// Runs the kernels of one instruction set without torch: for sanitizers, and for processors that are emulated.
// Reads calls from one file, each as test_cpu_driver.py writes it, and writes their outputs to another, one after the other.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "reader.h"

#define LK_NAMESPACE lowkernels::LOWKERNELS_ISA
namespace LK_NAMESPACE {
extern const lowkernels::Kernels* const fp32;
extern const lowkernels::Kernels* const half;
}

using namespace lowkernels;

void lowkernels::reject(const std::string& problem) {
    std::fprintf(stderr, "%s\n", problem.c_str());
    std::exit(1);
}

namespace {

// Exactly as large as asked for, so that the address sanitizer sees every byte beyond.
std::vector<void*> scratch;

void* workspace(std::size_t bytes) {
    scratch.push_back(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    return scratch.back();
}

void read(std::FILE* file, void* to, std::size_t bytes) {
    if (std::fread(to, 1, bytes, file) != bytes) reject("the file is too short");
}

char* read_bytes(std::FILE* file, i64 bytes) {
    char* block = static_cast<char*>(std::malloc(bytes ? bytes : 1));
    read(file, block, bytes);
    return block;
}

enum Operator : i64 { CONV_ACT, SEPARABLE_CONV, MBCONV, FUSED_MBCONV, LOWTENTION, GN_MLP };

struct Call {
    i64 op, half, dtype, threads, n, channels, h, w, stride, padding, residual, pool, heads, acts[3];
    double eps;
    i64 packed_bytes, x_bytes, residual_bytes, out_bytes;
};

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) reject("usage: driver CALLS OUTPUTS");
    std::FILE* in = std::fopen(arguments[1], "rb");
    std::FILE* out = std::fopen(arguments[2], "wb");
    if (!in || !out) reject("cannot open the files");
    for (Call call; std::fread(&call, sizeof call, 1, in) == 1;) {
        char* packed = read_bytes(in, call.packed_bytes);
        char* x = read_bytes(in, call.x_bytes);
        char* residual = call.residual_bytes ? read_bytes(in, call.residual_bytes) : nullptr;
        char* y = static_cast<char*>(std::malloc(call.out_bytes));
        const Kernels& kernels = call.half ? *LK_NAMESPACE::half : *LK_NAMESPACE::fp32;
        Reader reader(packed, call.packed_bytes, kernels, int(call.dtype));
        Helpers helpers;
        const Context context{int(call.threads), &helpers, workspace};
        auto images = [&](i64 k) {
            return Images{x, y, call.n, call.h, call.w, extent(call.h, k, call.stride, call.padding),
                          extent(call.w, k, call.stride, call.padding)};
        };
        const bool add = call.residual != 0;
        if (call.op == CONV_ACT) {
            const i64 channels = reader.number();
            const Conv conv = reader.conv();
            kernels.conv_act({images(conv.k), conv, residual, channels, int(call.acts[0]), call.stride, call.padding, call.pool != 0},
                             context);
        } else if (call.op == SEPARABLE_CONV || call.op == MBCONV) {
            InvertedResidual block{};
            if (call.op == MBCONV) block.expand = reader.conv();
            block.depthwise = reader.depthwise();
            block.project = reader.conv();
            block.images = images(block.depthwise.k);
            block.expand_act = int(call.acts[0]), block.depthwise_act = int(call.acts[1]), block.project_act = int(call.acts[2]);
            block.stride = call.stride, block.padding = call.padding, block.residual = add;
            kernels.inverted_residual(block, context);
        } else if (call.op == FUSED_MBCONV) {
            FusedMBConv block{};
            block.conv = reader.conv();
            block.project = reader.conv();
            block.images = images(block.conv.k);
            block.act = int(call.acts[0]), block.stride = call.stride, block.padding = call.padding, block.residual = add;
            kernels.fused_mbconv(block, context);
        } else if (call.op == LOWTENTION) {
            Lowtention block{};
            block.norm = reader.norm(call.channels, call.eps);
            block.depthwise = reader.depthwise();
            block.qkv = reader.conv();
            for (int i = 0; i < (call.stride == 1 ? 1 : 4); ++i) block.up[i] = reader.conv();
            block.images = {x, y, call.n, call.h, call.w, call.h, call.w};
            block.heads = call.heads, block.stride = call.stride, block.residual = add;
            kernels.lowtention(block, context);
        } else {
            GnMlp block{};
            block.norm = reader.norm(call.channels, call.eps);
            block.fc1 = reader.conv();
            block.fc2 = reader.conv();
            block.images = {x, y, call.n, call.h, call.w, call.h, call.w};
            block.act = int(call.acts[0]), block.residual = add;
            kernels.gn_mlp(block, context);
        }
        reader.finish();
        std::fwrite(y, 1, call.out_bytes, out);
        std::free(packed), std::free(x), std::free(residual), std::free(y);
        for (void* block : scratch) std::free(block);
        scratch.clear();
    }
    return std::fclose(out);
}
