// Kernels for tests/test_cuda_emulation.py: each wrapper of platform.cuh once, and every way
// in which a kernel may go wrong.
#include "cuda/platform.cuh"

using namespace exl;

namespace {
// Reverses a block's values through shared memory. Without the barrier the result depends on
// which thread runs first.
template <bool kBarrier>
__device__ void reverse(const float* in, float* out) {
    EXL_SHARED(char, memory);
    auto* values = reinterpret_cast<float*>(memory);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x;
    values[threadIdx.x] = in[first + threadIdx.x];
    if (kBarrier) block_sync();
    out[first + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}
}  // namespace

extern "C" __global__ void __launch_bounds__(256) reverse_kernel(const float* in, float* out) {
    reverse<true>(in, out);
}
EXL_KERNEL(reverse_kernel);

extern "C" __global__ void __launch_bounds__(256) racing_kernel(const float* in, float* out) {
    reverse<false>(in, out);
}
EXL_KERNEL(racing_kernel);

extern "C" __global__ void __launch_bounds__(256)
    sum_kernel(const float* in, float* out, int32_t rounds) {
    float value = in[threadIdx.x];
    for (int i = 0; i < rounds; i++) value = warp_sum(value) * (1.0f / 32.0f);
    out[threadIdx.x] = value;
}
EXL_KERNEL(sum_kernel);
