// Cosines and sines of RoPE angles, exact to float32 rounding at any position.
//
// Purpose: one definition for the kernels that compute angles. position * frequency is computed
// in float64, which holds the product of two 24-bit numbers exactly; whole quarter turns are
// subtracted in float64 too; the sine and cosine of the remainder, at most pi / 4, are computed
// in float32. An angle needs five float64 operations, which is cheap even on cards whose
// float64 rate is a 64th of the float32 rate.
#pragma once

#include "cuda/platform.cuh"

namespace exl {

constexpr double kTwoOverPi = 0.63661977236758134308;
constexpr double kHalfPi = 1.57079632679489661923;

// Taylor series; the first omitted term is below 2e-9 for |x| <= pi / 4.
__device__ __forceinline__ float sine_of_rest(float x) {
    const float s = x * x;
    float p = 1.0f / 362880.0f;
    p = fmaf(p, s, -1.0f / 5040.0f);
    p = fmaf(p, s, 1.0f / 120.0f);
    p = fmaf(p, s, -1.0f / 6.0f);
    return fmaf(p * s, x, x);
}
__device__ __forceinline__ float cosine_of_rest(float x) {
    const float s = x * x;
    float p = -1.0f / 3628800.0f;
    p = fmaf(p, s, 1.0f / 40320.0f);
    p = fmaf(p, s, -1.0f / 720.0f);
    p = fmaf(p, s, 1.0f / 24.0f);
    p = fmaf(p, s, -0.5f);
    return fmaf(p, s, 1.0f);
}

// Returns the cosine (x) and the sine (y) of position * frequency.
__device__ __forceinline__ float2 wave_at(int position, float frequency) {
    const double angle = static_cast<double>(position) * frequency;
    // Rounds to the nearest whole quarter turn. Positions of 31 bits at frequencies <= 1 fit.
    const long long turns = llrint(angle * kTwoOverPi);
    const float rest = static_cast<float>(fma(-static_cast<double>(turns), kHalfPi, angle));
    float cosine = cosine_of_rest(rest), sine = sine_of_rest(rest);
    if (turns & 1) {
        const float swapped = cosine;
        cosine = -sine;
        sine = swapped;
    }
    if (turns & 2) {
        cosine = -cosine;
        sine = -sine;
    }
    return make_float2(cosine, sine);
}

}  // namespace exl
