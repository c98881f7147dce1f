// Functions of rows that several kernels apply: activations, RMSNorm, rotary embedding.
//
// Purpose: one definition of each, so that a fused kernel gives the same bits as separate ones.
// Layout: float32, a row or a head contiguous. Work: one thread or one warp, see each function. No
// shared memory.
#pragma once

#include "common.h"
#include "cuda/platform.cuh"

namespace exl {

// ---- Activations -----------------------------------------------------------------------------

__device__ __forceinline__ float activated(float x, int32_t activation) {
    if (activation == kSilu) return x / (1.0f + expf(-x));
    if (activation == kGeluTanh) {
        // x/2 (1 + tanh u) = x / (1 + e^-2u); the second form has no cancellation for negative x.
        const float inner = fmaf(kGeluCubic * x * x, x, x);
        return x / (1.0f + expf(kMinusTwoRootTwoOverPi * inner));
    }
    // x/2 erfc(-x / sqrt 2), which has no cancellation for negative x.
    if (activation == kGelu) return 0.5f * x * erfcf(kMinusRootHalf * x);
    if (activation == kQuickGelu) return x / (1.0f + expf(kMinusQuickGelu * x));
    const float relu = x < 0.0f ? 0.0f : x;  // NaN stays NaN
    return activation == kRelu2 ? relu * relu : relu;
}

// activation(gate) * up. Comparisons instead of fminf and fmaxf, so that NaN stays NaN.
__device__ __forceinline__ float gated(float gate, float up, int32_t activation) {
    if (activation == kClampedSwiglu) {
        if (gate > kSwigluLimit) gate = kSwigluLimit;
        if (up > kSwigluLimit) up = kSwigluLimit;
        if (up < -kSwigluLimit) up = -kSwigluLimit;
        return mul_rn(activated(gate, kQuickGelu), add_rn(up, 1.0f));
    }
    return mul_rn(activated(gate, activation), up);
}

// ---- RMSNorm ---------------------------------------------------------------------------------

// One thread's part of the sum of squares of x [size]: every `threads`-th element.
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

// The scale of a row x [size] that one warp handles; every lane gets it.
__device__ __forceinline__ float norm_scale_of_warp(const float* x, int size, float eps) {
    return norm_scale(warp_sum(part_of_squares(x, size, lane_id(), 32)), size, eps);
}

// ---- Rotary embedding ------------------------------------------------------------------------

// Rotates one head x [head_dim] in place, by one warp; each lane handles pairs: elements i and
// half + i, or 2 * i and 2 * i + 1 if `interleaved`. If `weight` is not null, the head is
// normalised first (Qwen3), as in rms_norm_heads_kernel. Then `mean` [head_dim] is subtracted, if it
// is not null.
__device__ __forceinline__ void rotate_head(float* x, const float* cos, const float* sin,
                                            int head_dim, int half, bool interleaved,
                                            const float* weight, float eps, const float* mean) {
    float scale = 1.0f;
    if (weight != nullptr) scale = norm_scale_of_warp(x, head_dim, eps);
    const int step = interleaved ? 2 : 1, distance = interleaved ? 1 : half;
    for (int i = lane_id(); i < half; i += 32) {
        const int a = step * i, b = a + distance;
        float first = x[a], second = x[b];
        if (weight != nullptr) {
            first = normalized(first, scale, weight[a]);
            second = normalized(second, scale, weight[b]);
        }
        if (mean != nullptr) {
            first = add_rn(first, -mean[a]);
            second = add_rn(second, -mean[b]);
        }
        x[a] = fmaf(first, cos[i], -mul_rn(second, sin[i]));
        x[b] = fmaf(second, cos[i], mul_rn(first, sin[i]));
    }
    if (weight == nullptr && mean == nullptr) return;
    for (int i = 2 * half + lane_id(); i < head_dim; i += 32) {
        float value = x[i];
        if (weight != nullptr) value = normalized(value, scale, weight[i]);
        x[i] = mean == nullptr ? value : add_rn(value, -mean[i]);
    }
}

}  // namespace exl
