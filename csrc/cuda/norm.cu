// RMSNorm, out = x / sqrt(mean(x^2) + eps) * weight, and LayerNorm, out = (x - mean(x)) /
// sqrt(variance(x) + eps) * weight + bias, for each row.
//
// Layout: float32, contiguous. Work: rows of a model's width have one block each, so that the
// single row of a decode step is read by many threads; rows of a head's width have one warp each.
// Only the width decides which of the two kernels is launched, so a row's result does not depend
// on the other rows. A thread reads an element before it writes it: x and out may be the same.
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

// The mean of a row, in two parts because float32 rounds it: x - shift is exact or nearly so, also
// where the mean is far larger than the deviations.
struct Center {
    float shift, remainder;
    __device__ __forceinline__ float deviation(float x) const { return (x - shift) - remainder; }
};

// Sums over the threads that share a row of LayerNorm.
struct SumOfWarp {
    __device__ __forceinline__ float operator()(float value, int) const { return warp_sum(value); }
};
struct SumOfBlock {
    float* partials;  // for each sum of a row, a float per warp
    __device__ __forceinline__ float operator()(float value, int sum) const {
        return block_sum(value, partials + sum * (kRowThreads / 32));
    }
};

// LayerNorm of a row x [size] by `threads` threads; bias: [size], or null. The squares are those of
// the deviations, because mean(x^2) - mean(x)^2 would cancel.
template <class Sum>
__device__ __forceinline__ void layer_norm_row(const float* x, const float* weight,
                                               const float* bias, float eps, int size, int thread,
                                               int threads, const Sum& sum, float* out) {
    float part = 0.0f;
    for (int i = thread; i < size; i += threads) part += x[i];
    Center center{sum(part, 0) / static_cast<float>(size), 0.0f};
    part = 0.0f;
    for (int i = thread; i < size; i += threads) part += center.deviation(x[i]);
    center.remainder = sum(part, 1) / static_cast<float>(size);
    part = 0.0f;
    for (int i = thread; i < size; i += threads) {
        const float deviation = center.deviation(x[i]);
        part = fmaf(deviation, deviation, part);
    }
    const float scale = norm_scale(sum(part, 2), size, eps);
    for (int i = thread; i < size; i += threads) {
        const float result = normalized(center.deviation(x[i]), scale, weight[i]);
        out[i] = bias == nullptr ? result : add_rn(result, bias[i]);
    }
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

// LayerNorm with one block per row.
//
// x, out: float32 [rows, size]; weight: float32 [periods, size], of which row r takes row
// r % periods; bias: float32 [periods, size], or null. grid.x: rows. Shared memory: three floats
// per warp.
extern "C" __global__ void __launch_bounds__(exl::kRowThreads)
    layer_norm_kernel(const float* x, const float* weight, const float* bias, float eps,
                      int32_t size, int32_t periods, float* out) {
    using namespace exl;
    EXL_SHARED(float, partials);
    const int64_t row = blockIdx.x, start = row % periods * size;
    layer_norm_row(x + row * size, weight + start, bias == nullptr ? nullptr : bias + start, eps,
                   size, threadIdx.x, kRowThreads, SumOfBlock{partials}, out + row * size);
}
EXL_KERNEL(layer_norm_kernel);

// LayerNorm with one warp per row; tensors as in layer_norm_kernel.
extern "C" __global__ void __launch_bounds__(exl::kHeadThreads)
    layer_norm_heads_kernel(const float* x, const float* weight, const float* bias, float eps,
                            int64_t rows, int32_t size, int32_t periods, float* out) {
    using namespace exl;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kHeadThreads / 32) + warp_id();
    if (row >= rows) return;  // whole warps leave
    const int64_t start = row % periods * size;
    layer_norm_row(x + row * size, weight + start, bias == nullptr ? nullptr : bias + start, eps,
                   size, lane_id(), 32, SumOfWarp{}, out + row * size);
}
EXL_KERNEL(layer_norm_heads_kernel);
