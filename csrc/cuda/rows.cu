// Operations on whole rows: embedding, gathering, scattering, gated sums.
//
// Layout: float32, contiguous; embedding tables of any ExlDtype. Work: grid.x: rows, grid.y: pieces
// of kThreads elements of a row. Precondition: row numbers are valid; the caller has checked them
// on the CPU. No shared memory.
#include "cuda/platform.cuh"
#include "packed.h"

namespace exl {

constexpr int kThreads = 256;

__device__ __forceinline__ int element_of_row() {
    return static_cast<int>(blockIdx.y) * kThreads + threadIdx.x;
}

// Element `index` of a table, as float32.
__device__ __forceinline__ float element(const void* table, int32_t dtype, int64_t index) {
    if (dtype == kExlFloat16) return half_to_float(static_cast<const uint16_t*>(table)[index]);
    if (dtype == kExlBfloat16) return bf16_to_float(static_cast<const uint16_t*>(table)[index]);
    return static_cast<const float*>(table)[index];
}

}  // namespace exl

// out[t] = table[ids[t]] * factor.
//
// ids: int32 [rows]; out: float32 [rows, size]. Row id of the table starts at element
// (id / lanes) * lanes * size + id % lanes, and its elements are `lanes` apart: lanes is 1 for
// [vocab, size], and the number of columns of a tile for a head [tiles, size, lanes].
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    embed_kernel(const int32_t* ids, const void* table, int32_t dtype, int32_t lanes,
                 int32_t size, float factor, float* out) {
    using namespace exl;
    const int i = element_of_row();
    if (i >= size) return;
    const int64_t id = ids[blockIdx.x];
    const int64_t start = id / lanes * lanes * size + id % lanes;
    out[static_cast<int64_t>(blockIdx.x) * size + i] =
        element(table, dtype, start + static_cast<int64_t>(i) * lanes) * factor;
}
EXL_KERNEL(embed_kernel);

// out[i] = x[rows[i]]; x: float32 [x_rows, size]; rows: int32 [count]; out: float32 [count, size].
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    gather_rows_kernel(const float* x, const int32_t* rows, int32_t size, float* out) {
    using namespace exl;
    const int i = element_of_row();
    if (i >= size) return;
    const int64_t source = rows[blockIdx.x];
    out[static_cast<int64_t>(blockIdx.x) * size + i] = x[source * size + i];
}
EXL_KERNEL(gather_rows_kernel);

// out[rows[i]] += weights[i] * x[i]; x: float32 [count, size]; rows: int32 [count], distinct;
// weights: float32 [count]; out: float32 [out_rows, size].
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    scatter_add_rows_kernel(const float* x, const int32_t* rows, const float* weights,
                            int32_t size, float* out) {
    using namespace exl;
    const int i = element_of_row();
    if (i >= size) return;
    float* target = out + static_cast<int64_t>(rows[blockIdx.x]) * size + i;
    const float value = x[static_cast<int64_t>(blockIdx.x) * size + i];
    *target = fmaf(weights[blockIdx.x], value, *target);
}
EXL_KERNEL(scatter_add_rows_kernel);

// x[t] += sigmoid(logits[t]) * y[t]; x, y: float32 [rows, size]; logits: float32 [rows].
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    add_gated_rows_kernel(float* x, const float* y, const float* logits, int32_t size) {
    using namespace exl;
    const int i = element_of_row();
    if (i >= size) return;
    const int64_t element = static_cast<int64_t>(blockIdx.x) * size + i;
    const float gate = 1.0f / (1.0f + expf(-logits[blockIdx.x]));
    x[element] = fmaf(gate, y[element], x[element]);
}
EXL_KERNEL(add_gated_rows_kernel);
