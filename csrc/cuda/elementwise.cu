// Operations on single elements: gates, sums, soft caps. float32, contiguous.
//
// A thread an element, in neighbouring order: these are a few microseconds beside the products
// around them, and bound by memory.
#include "cuda/activation.cuh"

namespace exl {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t element_index() {
    return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

}  // namespace exl

// out = activation(gate) * up. out may be gate or up.
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    gate_kernel(const float* gate, const float* up, float* out, int64_t elements,
                int32_t activation) {
    const int64_t i = exl::element_index();
    if (i < elements) out[i] = exl::activated(gate[i], activation) * up[i];
}
EXL_KERNEL(gate_kernel);

// x += y.
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    add_kernel(float* x, const float* y, int64_t elements) {
    const int64_t i = exl::element_index();
    if (i < elements) x[i] += y[i];
}
EXL_KERNEL(add_kernel);

// x = cap * tanh(x / cap).
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    softcap_kernel(float* x, float cap, int64_t elements) {
    const int64_t i = exl::element_index();
    if (i < elements) x[i] = cap * tanhf(x[i] / cap);
}
EXL_KERNEL(softcap_kernel);
