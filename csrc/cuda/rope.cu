// Rotary position embedding: the table of angles, and the rotation of queries and keys.
//
// Angles: position * inv_freq in float64, which holds the product of two 24-bit numbers
// exactly, and the same for taking whole quarter turns off; the sine and cosine of the rest,
// at most pi / 4, in float32. That is five float64 operations an angle, which also cards with
// a 64th of the float32 rate do in passing.
//
// Rotation: a warp a head. A recorded step rotates queries and keys on the keys' way into the
// cache instead (cache_write.cu), by the same function.
#include "cuda/rope.cuh"

namespace exl {

constexpr int kThreads = 128;
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

}  // namespace exl

// out [rows, 2, half]: cos, then sin, of positions[row] * inv_freq[i], times factor.
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    rope_table_kernel(const int32_t* positions, const float* inv_freq, float factor,
                      int32_t rows, int32_t half, float* out) {
    using namespace exl;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= static_cast<int64_t>(rows) * half) return;
    const int64_t row = index / half;
    const int i = static_cast<int>(index - row * half);
    const double angle = static_cast<double>(positions[row]) * inv_freq[i];
    // To the nearest whole quarter turn; positions of 31 bits at inv_freq <= 1 fit.
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
    out[row * 2 * half + i] = cosine * factor;
    out[(row * 2 + 1) * half + i] = sine * factor;
}
EXL_KERNEL(rope_table_kernel);

// x [rows, heads, head_dim] in place. A warp a head.
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    rope_kernel(float* x, const float* table, int32_t rows, int32_t heads, int32_t head_dim,
                int32_t half) {
    using namespace exl;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp_id();
    if (warp >= static_cast<int64_t>(rows) * heads) return;  // whole warps
    const int64_t row = warp / heads;
    const float* cos = table + row * 2 * half;
    rotate_head(x + warp * head_dim, cos, cos + half, head_dim, half, nullptr, 0.0f);
}
EXL_KERNEL(rope_kernel);
