// The launchers csrc/cuda/bind.cpp calls, passed on to whichever library of kernels the tests have chosen.
#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "api.h"

namespace {

void* chosen = nullptr;

void* launcher(const char* name) {
    void* found = chosen ? dlsym(chosen, name) : nullptr;
    if (!found) throw std::runtime_error(std::string("no library of kernels with ") + name + " is chosen");
    return found;
}

}  // namespace

#define FORWARD(name, Params)                                                                            \
    int name(const Params& p, Dtype dtype, int config, void* stream) {                                   \
        return reinterpret_cast<decltype(&name)>(launcher(#name))(p, dtype, config, stream);             \
    }

namespace lowkernels {
extern "C" {
FORWARD(lowkernels_conv_act, ConvAct)
FORWARD(lowkernels_separable_conv, SeparableConv)
FORWARD(lowkernels_mbconv, SplitMBConv)
FORWARD(lowkernels_fused_mbconv, ExpandProject)
FORWARD(lowkernels_conv_act_sm90, ConvAct)
FORWARD(lowkernels_fused_mbconv_sm90, ExpandProject)
FORWARD(lowkernels_gn_mlp_sm90, ExpandProject)
FORWARD(lowkernels_mbconv_sm90, MBConv)
FORWARD(lowkernels_gn_mlp, ExpandProject)
FORWARD(lowkernels_lowtention, Lowtention)
}
}  // namespace lowkernels

extern "C" const char* shim_choose(const char* path) {
    void* opened = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!opened) return dlerror();
    chosen = opened;
    return nullptr;
}
