// Activations of a gated MLP, shared by the kernels that apply them: the same bits in all.
#pragma once

#include "cuda/platform.cuh"

namespace exl {

enum Activation : int32_t { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

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
