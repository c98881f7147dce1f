// Rotary position embedding: the table of cosines and sines, and the rotation of queries and keys.
//
// Layout: float32, contiguous. Work: one angle per thread; one head per warp. A recorded step
// rotates queries and keys in cache_write.cu instead, by the same function. No shared memory.
#include "cuda/angles.cuh"
#include "cuda/row_functions.cuh"

namespace exl {

constexpr int kThreads = 128;

}  // namespace exl

// Computes out[row] = (cos, sin) of positions[row] * inv_freq[i], times `factor`.
//
// positions: int32 [rows]; inv_freq: float32 [half]; out: float32 [rows, 2, half].
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    rope_table_kernel(const int32_t* positions, const float* inv_freq, float factor,
                      int32_t rows, int32_t half, float* out) {
    using namespace exl;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= static_cast<int64_t>(rows) * half) return;
    const int64_t row = index / half;
    const int i = static_cast<int>(index - row * half);
    const float2 wave = wave_at(positions[row], inv_freq[i]);
    out[row * 2 * half + i] = wave.x * factor;
    out[(row * 2 + 1) * half + i] = wave.y * factor;
}
EXL_KERNEL(rope_table_kernel);

// Rotates x in place, one head per warp; see rotate_head.
//
// x: float32 [rows, heads, head_dim]; table: float32 [rows, 2, half] of rope_table_kernel; mean:
// float32 [heads, head_dim], or null.
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    rope_kernel(float* x, const float* table, const float* mean, int32_t rows, int32_t heads,
                int32_t head_dim, int32_t half, int32_t interleaved) {
    using namespace exl;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp_id();
    if (warp >= static_cast<int64_t>(rows) * heads) return;  // whole warps leave
    const int64_t row = warp / heads;
    const float* cos = table + row * 2 * half;
    rotate_head(x + warp * head_dim, cos, cos + half, head_dim, half, interleaved != 0, nullptr,
                0.0f, mean == nullptr ? nullptr : mean + warp % heads * head_dim);
}
EXL_KERNEL(rope_kernel);
