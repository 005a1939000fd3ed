// The tests' own kernels on what lies on the host, on a GPU as in the shim.
#pragma once

#include "device.cuh"

#if defined(LOWKERNELS_SHIM)
extern "C" void shim_announce(const void* data, size_t bytes, int output);
#endif

namespace lowkernels {

// Calls launch(in, out) with copies that the device can reach; a cudaError_t.
template <typename In, typename Out, typename F>
int on_device(const In* in, size_t in_bytes, Out* out, size_t out_bytes, F launch) {
#if defined(LOWKERNELS_SHIM)
    shim_announce(in, in_bytes, 0);
    shim_announce(out, out_bytes, 1);
    return launch(in, out);
#else
    void *device_in = nullptr, *device_out = nullptr;
    int error = cudaMalloc(&device_in, in_bytes);
    if (!error) error = cudaMalloc(&device_out, out_bytes);
    if (!error) error = cudaMemcpy(device_in, in, in_bytes, cudaMemcpyHostToDevice);
    if (!error) error = launch(static_cast<const In*>(device_in), static_cast<Out*>(device_out));
    if (!error) error = cudaMemcpy(out, device_out, out_bytes, cudaMemcpyDeviceToHost);
    cudaFree(device_in);
    cudaFree(device_out);
    return error;
#endif
}

}  // namespace lowkernels
