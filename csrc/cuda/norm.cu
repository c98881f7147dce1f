// RMSNorm: out = x / sqrt(mean(x^2) + eps) * weight, for each row.
//
// Layout: float32, contiguous. Work: rows of a model's width have one block each, so that the
// single row of a decode step is read by many threads; rows of a head's width have one warp each.
// Only the width decides which of the two kernels is launched, so a row's result does not depend
// on the other rows. A row is read before it is written: x and out may be the same.
#include "cuda/row_functions.cuh"

namespace exl {

constexpr int kRowThreads = 512;
constexpr int kHeadThreads = 128;

// Sum over the block in the order of warps; every thread gets it. `partials`: a float per warp.
__device__ __forceinline__ float block_sum(float value, float* partials) {
    const float sum = warp_sum(value);
    if (lane_id() == 0) partials[warp_id()] = sum;
    block_sync();  // partials are read by all
    float total = 0.0f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) total += partials[warp];
    return total;
}

}  // namespace exl

// RMSNorm with one block per row.
//
// x, out: float32 [rows, size]; weight: float32 [size]. grid.x: rows. Shared memory: a float per
// warp.
extern "C" __global__ void __launch_bounds__(exl::kRowThreads)
    rms_norm_kernel(const float* x, const float* weight, float eps, int32_t size, float* out) {
    using namespace exl;
    EXL_SHARED(float, partials);
    const int thread = threadIdx.x;
    const float* row = x + static_cast<int64_t>(blockIdx.x) * size;
    float* target = out + static_cast<int64_t>(blockIdx.x) * size;
    const float sum = block_sum(part_of_squares(row, size, thread, kRowThreads), partials);
    const float scale = norm_scale(sum, size, eps);
    for (int i = thread; i < size; i += kRowThreads) {
        target[i] = normalized(row[i], scale, weight[i]);
    }
}
EXL_KERNEL(rms_norm_kernel);

// RMSNorm with one warp per row. x, out: float32 [rows, size]; weight: float32 [size].
extern "C" __global__ void __launch_bounds__(exl::kHeadThreads)
    rms_norm_heads_kernel(const float* x, const float* weight, float eps, int64_t rows,
                          int32_t size, float* out) {
    using namespace exl;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kHeadThreads / 32) + warp_id();
    if (row >= rows) return;  // whole warps leave
    const float* source = x + row * size;
    const float scale = norm_scale_of_warp(source, size, eps);
    for (int i = lane_id(); i < size; i += 32) {
        out[row * size + i] = normalized(source[i], scale, weight[i]);
    }
}
EXL_KERNEL(rms_norm_heads_kernel);
