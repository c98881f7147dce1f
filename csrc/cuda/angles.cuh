// Cosines and sines of angles of RoPE, exact to float32's rounding at any position.
//
// position * frequency in float64, which holds the product of two 24-bit numbers exactly, and
// the same for taking whole quarter turns off; the sine and cosine of the rest, at most pi / 4,
// in float32. That is five float64 operations an angle, which also cards with a 64th of the
// float32 rate do in passing.
#pragma once

#include "cuda/platform.cuh"

namespace exl {

constexpr double kTwoOverPi = 0.63661977236758134308;
constexpr double kHalfPi = 1.57079632679489661923;

// Taylor's series; the first term left out is below 2e-9 for |x| <= pi / 4.
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

// Cosine (x) and sine (y) of position * frequency.
__device__ __forceinline__ float2 wave_at(int position, float frequency) {
    const double angle = static_cast<double>(position) * frequency;
    // To the nearest whole quarter turn; positions of 31 bits at frequencies <= 1 fit.
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
