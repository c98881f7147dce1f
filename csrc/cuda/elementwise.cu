// Elementwise operations: activations, gates, sums, limits, soft caps.
//
// Layout: float32, contiguous. Work: one element per thread, neighbours adjacent. The kernels are
// bound by memory and take a few microseconds beside the products around them. Grid: blocks of
// kThreads elements. No shared memory.
#include "cuda/row_functions.cuh"

namespace exl {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t element_index() {
    return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

}  // namespace exl

// out = activation(gate) * up; gate, up, out: float32 [elements]. out may be gate or up.
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    gate_kernel(const float* gate, const float* up, float* out, int64_t elements,
                int32_t activation) {
    const int64_t i = exl::element_index();
    if (i < elements) out[i] = exl::gated(gate[i], up[i], activation);
}
EXL_KERNEL(gate_kernel);

// out = activation(x); x, out: float32 [elements], may be the same.
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    activate_kernel(const float* x, float* out, int64_t elements, int32_t activation) {
    const int64_t i = exl::element_index();
    if (i < elements) out[i] = exl::activated(x[i], activation);
}
EXL_KERNEL(activate_kernel);

// x += y * factor; x, y: float32 [elements]. With a factor of 1 these are the bits of a sum.
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    add_kernel(float* x, const float* y, float factor, int64_t elements) {
    const int64_t i = exl::element_index();
    if (i < elements) x[i] = fmaf(y[i], factor, x[i]);
}
EXL_KERNEL(add_kernel);

// x = min(max(x, -limit), limit); x: float32 [elements]. Comparisons instead of fminf and fmaxf,
// so that NaN stays NaN.
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    clamp_kernel(float* x, float limit, int64_t elements) {
    const int64_t i = exl::element_index();
    if (i >= elements) return;
    if (x[i] > limit) x[i] = limit;
    if (x[i] < -limit) x[i] = -limit;
}
EXL_KERNEL(clamp_kernel);

// x = cap * tanh(x / cap); x: float32 [elements].
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    softcap_kernel(float* x, float cap, int64_t elements) {
    const int64_t i = exl::element_index();
    if (i < elements) x[i] = cap * tanhf(x[i] / cap);
}
EXL_KERNEL(softcap_kernel);
