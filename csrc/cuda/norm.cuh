// RMSNorm of one row, shared by the kernels that normalise: one sum and one product for all.
#pragma once

#include "cuda/platform.cuh"

namespace exl {

// This thread's part of the sum of squares: every `threads`-th element.
__device__ __forceinline__ float part_of_squares(const float* x, int size, int thread,
                                                 int threads) {
    float sum = 0.0f;
    for (int i = thread; i < size; i += threads) sum = fmaf(x[i], x[i], sum);
    return sum;
}

__device__ __forceinline__ float norm_scale(float sum_of_squares, int size, float eps) {
    return 1.0f / sqrtf(sum_of_squares / static_cast<float>(size) + eps);
}

__device__ __forceinline__ float normalized(float x, float scale, float weight) {
    return mul_rn(mul_rn(x, scale), weight);
}

// The scale of a row that one warp owns; every lane gets it.
__device__ __forceinline__ float norm_scale_of_warp(const float* x, int size, float eps) {
    return norm_scale(warp_sum(part_of_squares(x, size, lane_id(), 32)), size, eps);
}

}  // namespace exl
