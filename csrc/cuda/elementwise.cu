// Operations on single elements: gates, sums, soft caps. float32, contiguous.
//
// A thread an element, in neighbouring order: these are a few microseconds beside the products
// around them, and bound by memory.
#include "cuda/platform.cuh"

namespace exl {

constexpr int kThreads = 256;
enum Activation : int32_t { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

__device__ __forceinline__ int64_t element_index() {
    return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

__device__ __forceinline__ float activated(float x, int32_t activation) {
    if (activation == kSilu) return x / (1.0f + expf(-x));
    if (activation == kGeluTanh) {
        // x/2 (1 + tanh u) = x / (1 + e^-2u), which does not cancel for negative u.
        constexpr float kMinusTwoRootTwoOverPi = -1.5957691216f;  // -2 sqrt(2 / pi)
        constexpr float kCubic = 0.044715f;
        const float inner = fmaf(kCubic * x * x, x, x);
        return x / (1.0f + expf(kMinusTwoRootTwoOverPi * inner));
    }
    // x/2 erfc(-x / sqrt 2), which does not cancel for negative x.
    constexpr float kMinusRootHalf = -0.70710678f;
    return 0.5f * x * erfcf(kMinusRootHalf * x);
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
