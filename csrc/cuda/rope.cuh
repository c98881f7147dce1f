// Rotation of one head, shared by the kernels that rotate: the same bits in all. Where a model
// normalises heads first (Qwen3), that as well, as rms_norm_heads_kernel does.
#pragma once

#include "cuda/norm.cuh"

namespace exl {

// Rotates one head in place, normalised first where `weight` is given. Lanes own pairs.
__device__ __forceinline__ void rotate_head(float* x, const float* cos, const float* sin,
                                            int head_dim, int half, const float* weight,
                                            float eps) {
    float scale = 1.0f;
    if (weight != nullptr) scale = norm_scale_of_warp(x, head_dim, eps);
    for (int i = lane_id(); i < half; i += 32) {
        float first = x[i], second = x[half + i];
        if (weight != nullptr) {
            first = normalized(first, scale, weight[i]);
            second = normalized(second, scale, weight[half + i]);
        }
        x[i] = fmaf(first, cos[i], -mul_rn(second, sin[i]));
        x[half + i] = fmaf(second, cos[i], mul_rn(first, sin[i]));
    }
    if (weight == nullptr) return;
    for (int i = 2 * half + lane_id(); i < head_dim; i += 32) {
        x[i] = normalized(x[i], scale, weight[i]);
    }
}

}  // namespace exl
