// Products of many rows with unquantised layers; see linear_dense.cuh for the arithmetic.
//
// Two kernels. dense_prepare converts activations once: `inputs` [row][slice][8] of 16 bytes, four
// k each, and `scales` float32 [row][part], which multiply the sums of parts. Work per warp: one
// part of one row.
//
// dense_prefill multiplies. Work per block: 8 tiles (128 columns) x 64 rows, slice by slice. Work
// per warp: 4 tiles x 32 rows, so that the 4 KiB that a warp reads of shared memory for each block
// of k serve 32 products of fragments twice. Copies run kSlots - 1 slices ahead.
//
// Shared memory of dense_prefill: kSlots tile buffers of weights [8 tiles][2 blocks], then
// activations [64 rows][8] of 16 bytes, rotated by half a row in odd rows because 8 lanes read
// 2 rows x 4. At the end the results, float32 [64][128 + 4], which are stored row by row.
#include "cuda/linear_dense.cuh"

namespace exl {

constexpr int kPrepareThreads = 256;

constexpr int kPrefillWarps = 4;
constexpr int kWarpTiles = 4;
constexpr int kWarpRowTiles = 4;
constexpr int kWarpRows = kWarpRowTiles * kFragmentRows;
constexpr int kPrefillTiles = 2 * kWarpTiles;
constexpr int kPrefillRows = 2 * kWarpRows;
constexpr int kSliceChunks = kSliceK / 4;
// Shared memory that every card gives a block without a request for more.
constexpr int kPrefillBytes = 48 << 10;
constexpr int kPrefillColumns = kPrefillTiles * kTileColumns;
// Floats per row of results. The padding of 4 spreads the 4 pairs of rows x 8 columns that a warp
// writes over 32 banks.
constexpr int kResultPitch = kPrefillColumns + 4;
static_assert(kPrefillRows * kResultPitch * 4 <= kPrefillBytes, "");
static_assert(kPrefillColumns == kPrefillWarps * 32, "a thread a column");

template <class Type>
__device__ __forceinline__ void dense_prepare(const float* x, int in_features, uint4* inputs,
                                              float* scales) {
    const int parts = dense_parts(in_features), slices = dense_slices(in_features);
    const int part = static_cast<int>(blockIdx.x) * (kPrepareThreads / 32) + warp_id();
    if (part >= parts) return;
    const int64_t row = blockIdx.y;
    const bool aligned = inputs_aligned(x, in_features);
    float4 values[2];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int k = part * kPartK + (i * 32 + lane_id()) * 4;
        values[i] = load_inputs(x + row * in_features, k, in_features, aligned);
        largest = fmaxf(largest, largest_of(values[i]));
    }
    largest = warp_max(largest);
    const RowScale scale = Product<Type>::row_scale(largest);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int chunk = part * (kPartK / 4) + i * 32 + lane_id();
        if (chunk >= slices * kSliceChunks) continue;
        inputs[row * slices * kSliceChunks + chunk] =
            Product<Type>::prepare(values[i], scale.scale, largest);
    }
    if (lane_id() == 0) scales[row * parts + part] = scale.inverse;
}

__device__ __forceinline__ int swizzled_chunk(int row, int chunk) {
    return row * kSliceChunks + (chunk ^ (row % 2 * 4));
}

// The tile buffer of one slice in shared memory.
template <class Type>
struct PrefillBuffer {
    static constexpr int kTileBytes = kSliceBlocks * Product<Type>::kBlockBytes;
    static constexpr int kInputsOffset = kPrefillTiles * kTileBytes;
    static constexpr int kBytes = kInputsOffset + kPrefillRows * kSliceChunks * kChunkBytes;

    char* memory;

    __device__ __forceinline__ void copy(const void* weight, const uint4* inputs, int slice,
                                         int in_features, int tiles, int rows, int first_tile,
                                         int first_row) const {
        constexpr int64_t kKBytes = kTileColumns * sizeof(typename Type::Weight);
        const int slices = dense_slices(in_features);
#pragma unroll
        for (int i = 0; i < kPrefillTiles; i += kPrefillWarps) {
            const int tile = i + warp_id();
            const char* source = static_cast<const char*>(weight) +
                                 kKBytes * (first_tile + tile) * in_features;
            copy_slice<Type>(memory + tile * kTileBytes, source, slice * kSliceK, in_features,
                             first_tile + tile < tiles);
        }
#pragma unroll
        for (int i = 0; i < kPrefillRows * kSliceChunks; i += kPrefillWarps * 32) {
            const int row = (i + threadIdx.x) / kSliceChunks, chunk = threadIdx.x % kSliceChunks;
            const int64_t source = static_cast<int64_t>(first_row + row) * slices + slice;
            copy_async16(memory + kInputsOffset + swizzled_chunk(row, chunk) * kChunkBytes,
                         inputs + source * kSliceChunks + chunk, first_row + row < rows);
        }
    }
    // Adds this slice to a warp's sums; the warp's tiles and rows begin at `tile` and `row`.
    __device__ __forceinline__ void multiply(
        int tile, int row, float (&sums)[kWarpTiles][kWarpRowTiles][4]) const {
        const auto* inputs = reinterpret_cast<const uint4*>(memory + kInputsOffset);
#pragma unroll
        for (int block = 0; block < kSliceBlocks; ++block) {
            uint4 x[kWarpRowTiles];
#pragma unroll
            for (int n = 0; n < kWarpRowTiles; ++n) {
                x[n] = inputs[swizzled_chunk(row + n * kFragmentRows + lane_id() / 4,
                                             block * 4 + lane_id() % 4)];
            }
            const char* blocks = memory + tile * kTileBytes + block * Product<Type>::kBlockBytes;
            Product<Type>::multiply(blocks, kTileBytes, x, sums);
        }
    }
};

template <class Type>
__device__ __forceinline__ void dense_prefill(const uint4* inputs, const float* scales,
                                              int in_features, const void* weight,
                                              const DenseOutput& output) {
    using Buffer = PrefillBuffer<Type>;
    constexpr int kSlots = kPrefillBytes / Buffer::kBytes;
    EXL_SHARED(char, memory);
    const int first_row = static_cast<int>(blockIdx.x) * kPrefillRows;
    const int first_tile = static_cast<int>(blockIdx.y) * kPrefillTiles;
    const int tile = warp_id() / 2 * kWarpTiles, row = warp_id() % 2 * kWarpRows;
    const int tiles = ceil_div(output.out_features, kTileColumns);
    const int slices = dense_slices(in_features), parts = dense_parts(in_features);
    const auto copy = [&](int slice) {
        if (slice < slices) {
            Buffer{memory + slice % kSlots * Buffer::kBytes}.copy(
                weight, inputs, slice, in_features, tiles, output.rows, first_tile, first_row);
        }
        copy_async_commit();
    };
    float sums[kWarpTiles][kWarpRowTiles][4] = {}, totals[kWarpTiles][kWarpRowTiles][4] = {};
    for (int slice = 0; slice < kSlots - 1; ++slice) copy(slice);
    for (int slice = 0; slice < slices; ++slice) {
        copy_async_wait<kSlots - 2>();
        block_sync();  // all copies of this slice have arrived, all reads of the last one are done
        copy(slice + kSlots - 1);
        Buffer{memory + slice % kSlots * Buffer::kBytes}.multiply(tile, row, sums);
        if ((slice + 1) % kPartSlices != 0 && slice + 1 < slices) continue;
#pragma unroll
        for (int n = 0; n < 2 * kWarpRowTiles; ++n) {
            const int r = first_row + row + n / 2 * kFragmentRows + lane_id() % 4 * 2 + n % 2;
            const float inverse =
                scales[min(r, output.rows - 1) * static_cast<int64_t>(parts) + slice / kPartSlices];
#pragma unroll
            for (int i = 0; i < 2 * kWarpTiles; ++i) {
                float& sum = sums[i / 2][n / 2][i % 2 * 2 + n % 2];
                float& total = totals[i / 2][n / 2][i % 2 * 2 + n % 2];
                total = add_rn(total, mul_rn(sum, inverse));
                sum = 0.0f;
            }
        }
    }
    copy_async_wait<0>();
    block_sync();  // all tile buffers have been read
    auto* results = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int i = 0; i < kWarpTiles * kWarpRowTiles * 4; ++i) {
        const int m = i / (kWarpRowTiles * 4), n = i / 4 % kWarpRowTiles;
        const int r = row + n * kFragmentRows + lane_id() % 4 * 2 + i % 2;
        const int column = (tile + m) * kTileColumns + lane_id() / 4 + i % 4 / 2 * 8;
        results[r * kResultPitch + column] = totals[m][n][i % 4];
    }
    block_sync();  // all results are written
#pragma unroll 4
    for (int r = 0; r < kPrefillRows; ++r) {
        output.store(results[r * kResultPitch + threadIdx.x], first_row + r,
                     first_tile * kTileColumns + threadIdx.x);
    }
}

}  // namespace exl

// Converts activations for dense_prefill.
//
// x: float32 [rows, in_features]; inputs: 16 bytes [rows][slices][8]; scales: float32
// [rows, parts]. grid.x: 8 parts per block, grid.y: rows.
#define EXL_DENSE_PREPARE(name, type)                                                          \
    extern "C" __global__ void __launch_bounds__(exl::kPrepareThreads)                         \
        name(const float* x, int32_t in_features, void* inputs, float* scales) {               \
        exl::dense_prepare<exl::type>(x, in_features, static_cast<uint4*>(inputs), scales);    \
    }                                                                                          \
    EXL_KERNEL(name)

// out = x @ W + bias, or out += x @ W + bias if `add`.
//
// inputs, scales: of dense_prepare; weight: [tiles, in_features, 16]; bias: float32 [out_features]
// or null; out: float32 [rows, out_stride]. grid.x: blocks of 64 rows, grid.y: of 8 tiles.
#define EXL_DENSE_PREFILL(name, type)                                                          \
    extern "C" __global__ void __launch_bounds__(exl::kPrefillWarps * 32, 2)                   \
        name(const void* inputs, const float* scales, int32_t rows, int32_t in_features,       \
             int32_t out_features, const void* weight, const float* bias, float* out,          \
             int64_t out_stride, int32_t add) {                                                \
        exl::dense_prefill<exl::type>(static_cast<const uint4*>(inputs), scales, in_features,  \
                                      weight,                                                  \
                                      {bias, out, out_stride, out_features, rows, add != 0});  \
    }                                                                                          \
    EXL_KERNEL(name)

EXL_DENSE_PREPARE(dense_prepare_float32_kernel, Float32);
EXL_DENSE_PREPARE(dense_prepare_float16_kernel, Float16);
EXL_DENSE_PREPARE(dense_prepare_bfloat16_kernel, Bfloat16);
EXL_DENSE_PREFILL(dense_prefill_float32_kernel, Float32);
EXL_DENSE_PREFILL(dense_prefill_float16_kernel, Float16);
EXL_DENSE_PREFILL(dense_prefill_bfloat16_kernel, Bfloat16);
