// The matrix product of unquantised layers: routers, heads and models that are not quantised.
//
// Weights are [tile][k][16] in float16, bfloat16 or float32 (formats/packed.py) and become
// float32 in registers. A sum over k is cut into kParts parts of part_rows each (of in_features
// alone); within a part products are added by fma in the order of k, then the parts in order.
// Decoding and prefill do the same additions, so a row has the same bits in both.
//
// Decoding: a block a tile and a pass of up to 8 rows. A lane has two columns and one part: the
// four parts of a warp read 32 bytes each (float16) of four rows of the tile. Shared memory:
// the parts' sums [part][row][16] float32.
//
// Prefill: a block 4 tiles x 64 rows, a thread 4 x 4 of them, over steps of kStepRows of k in
// shared memory: weights [k][64], activations [k][64], float32.
#include "cuda/platform.cuh"
#include "packed.h"

namespace {

using namespace exl;

constexpr int kDenseThreads = 256;
constexpr int kWarps = kDenseThreads / 32;
constexpr int kColumnPairs = kTileColumns / 2;
constexpr int kLaneParts = 32 / kColumnPairs;
constexpr int kParts = kLaneParts * kWarps;
// Weights of so many k are under way at once.
constexpr int kUnrolled = 8;

constexpr int kPrefillTiles = 4;
constexpr int kPrefillColumns = kPrefillTiles * kTileColumns;
constexpr int kPrefillRows = 64;
constexpr int kStepRows = 16;
constexpr int kThreadRows = 4;
constexpr int kThreadColumns = 4;
// Of the activations' columns of shared memory: they are written across.
constexpr int kPaddedRows = kPrefillRows + 4;

struct Float32 {
    using Storage = float;
    static __device__ __forceinline__ float2 pair(const Storage* p) {
        return *reinterpret_cast<const float2*>(p);
    }
};
struct Float16 {
    using Storage = uint16_t;
    static __device__ __forceinline__ float2 pair(const Storage* p) {
        return half2_to_float2(*reinterpret_cast<const uint32_t*>(p));
    }
};
struct Bfloat16 {
    using Storage = uint16_t;
    static __device__ __forceinline__ float2 pair(const Storage* p) {
        return bf162_to_float2(*reinterpret_cast<const uint32_t*>(p));
    }
};

// k of a part.
__device__ __forceinline__ int part_rows(int in_features) {
    return (in_features + kParts - 1) / kParts;
}

struct DenseOutput {
    const float* bias;
    float* out;
    int64_t stride;
    int out_features;
    int rows;
    bool add;

    __device__ __forceinline__ void store(float value, int row, int column) const {
        if (row >= rows || column >= out_features) return;
        if (bias != nullptr) value = add_rn(value, bias[column]);
        float* place = out + row * stride + column;
        *place = add ? add_rn(*place, value) : value;
    }
};

template <class Type, int kRows>
__device__ __forceinline__ void dense_decode(const float* x, int rows, int in_features,
                                             const typename Type::Storage* weight,
                                             const DenseOutput& output) {
    EXL_SHARED(char, memory);
    auto* sums = reinterpret_cast<float*>(memory);
    const int tile = static_cast<int>(blockIdx.x);
    const int first_row = static_cast<int>(blockIdx.y) * kRows;
    const int part = warp_id() * kLaneParts + lane_id() / kColumnPairs;
    const int column = lane_id() % kColumnPairs * 2;
    const int length = part_rows(in_features);
    const int end = min((part + 1) * length, in_features);
    const auto* w = weight + static_cast<int64_t>(tile) * in_features * kTileColumns + column;
    const float* inputs[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        inputs[r] = x + static_cast<int64_t>(min(first_row + r, rows - 1)) * in_features;
    }
    float2 acc[kRows] = {};
    int k = part * length;
    for (; k + kUnrolled <= end; k += kUnrolled) {
        float2 pairs[kUnrolled];
#pragma unroll
        for (int i = 0; i < kUnrolled; ++i) {
            pairs[i] = Type::pair(w + static_cast<int64_t>(k + i) * kTileColumns);
        }
#pragma unroll
        for (int i = 0; i < kUnrolled; ++i) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const float value = inputs[r][k + i];
                acc[r].x = fmaf(pairs[i].x, value, acc[r].x);
                acc[r].y = fmaf(pairs[i].y, value, acc[r].y);
            }
        }
    }
    for (; k < end; ++k) {
        const float2 pair = Type::pair(w + static_cast<int64_t>(k) * kTileColumns);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            acc[r].x = fmaf(pair.x, inputs[r][k], acc[r].x);
            acc[r].y = fmaf(pair.y, inputs[r][k], acc[r].y);
        }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        float* place = sums + (part * kRows + r) * kTileColumns + column;
        place[0] = acc[r].x;
        place[1] = acc[r].y;
    }
    block_sync();  // all parts are written
    if (threadIdx.x >= kRows * kTileColumns) return;
    float total = 0.0f;
    for (int p = 0; p < kParts; ++p) {
        total = add_rn(total, sums[p * kRows * kTileColumns + threadIdx.x]);
    }
    output.store(total, first_row + threadIdx.x / kTileColumns,
                 tile * kTileColumns + threadIdx.x % kTileColumns);
}

// Steps of k [k, k + count) into shared memory.
template <class Type>
__device__ __forceinline__ void load_step(const float* x, int rows, int in_features, int tiles,
                                          const typename Type::Storage* weight, int first_row,
                                          int first_tile, int k, int count, float* w_step,
                                          float* x_step) {
    for (int i = threadIdx.x; i < count * kPrefillColumns / 2; i += kDenseThreads) {
        const int step = i / (kPrefillColumns / 2), column = i % (kPrefillColumns / 2) * 2;
        const int64_t tile = min(first_tile + column / kTileColumns, tiles - 1);
        const float2 pair = Type::pair(weight + (tile * in_features + k + step) * kTileColumns +
                                       column % kTileColumns);
        w_step[step * kPrefillColumns + column] = pair.x;
        w_step[step * kPrefillColumns + column + 1] = pair.y;
    }
    for (int i = threadIdx.x; i < kStepRows * kPrefillRows; i += kDenseThreads) {
        const int row = i / kStepRows, step = i % kStepRows;
        const int64_t source = min(first_row + row, rows - 1);
        if (step < count) x_step[step * kPaddedRows + row] = x[source * in_features + k + step];
    }
}

template <class Type>
__device__ __forceinline__ void dense_prefill(const float* x, int rows, int in_features,
                                              const typename Type::Storage* weight,
                                              const DenseOutput& output) {
    EXL_SHARED(char, memory);
    auto* w_step = reinterpret_cast<float*>(memory);
    float* x_step = w_step + kStepRows * kPrefillColumns;
    const int first_row = static_cast<int>(blockIdx.x) * kPrefillRows;
    const int first_tile = static_cast<int>(blockIdx.y) * kPrefillTiles;
    const int tiles = (output.out_features + kTileColumns - 1) / kTileColumns;
    const int column = threadIdx.x % (kPrefillColumns / kThreadColumns) * kThreadColumns;
    const int row = threadIdx.x / (kPrefillColumns / kThreadColumns) * kThreadRows;
    float totals[kThreadRows][kThreadColumns] = {};
    const int length = part_rows(in_features);
    for (int start = 0; start < in_features; start += length) {
        float acc[kThreadRows][kThreadColumns] = {};
        const int end = min(start + length, in_features);
        for (int k = start; k < end; k += kStepRows) {
            const int count = min(kStepRows, end - k);
            block_sync();  // the step before has been used
            load_step<Type>(x, rows, in_features, tiles, weight, first_row, first_tile, k, count,
                            w_step, x_step);
            block_sync();  // this step is in
#pragma unroll 4
            for (int step = 0; step < count; ++step) {
                const float4 w = *reinterpret_cast<const float4*>(
                    w_step + step * kPrefillColumns + column);
                const float4 v =
                    *reinterpret_cast<const float4*>(x_step + step * kPaddedRows + row);
                const float ws[4] = {w.x, w.y, w.z, w.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    acc[i / 4][i % 4] = fmaf(ws[i % 4], vs[i / 4], acc[i / 4][i % 4]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            totals[i / 4][i % 4] = add_rn(totals[i / 4][i % 4], acc[i / 4][i % 4]);
        }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        output.store(totals[i / 4][i % 4], first_row + row + i / 4,
                     first_tile * kTileColumns + column + i % 4);
    }
}

}  // namespace

// x float32 [rows, in_features], weight [tiles, in_features, 16], bias float32 [out_features]
// or null. out = x @ W + bias, or out += ... where `add`.
//   decode: grid.x tiles, grid.y passes of 1, 4 or 8 rows;
//   prefill: grid.x blocks of 64 rows, grid.y of 4 tiles.
#define EXL_DENSE_KERNEL(name, product, type)                                                  \
    extern "C" __global__ void __launch_bounds__(kDenseThreads, 2)                             \
        name(const float* x, int32_t rows, int32_t in_features, int32_t out_features,          \
             const void* weight, const float* bias, float* out, int64_t out_stride,            \
             int32_t add) {                                                                    \
        const DenseOutput output = {bias, out, out_stride, out_features, rows, add != 0};      \
        product(x, rows, in_features, static_cast<const typename type::Storage*>(weight),      \
                output);                                                                       \
    }                                                                                          \
    EXL_KERNEL(name)
#define EXL_DENSE(suffix, type)                                                                \
    EXL_DENSE_KERNEL(dense_decode_1_##suffix##_kernel, (dense_decode<type, 1>), type);         \
    EXL_DENSE_KERNEL(dense_decode_4_##suffix##_kernel, (dense_decode<type, 4>), type);         \
    EXL_DENSE_KERNEL(dense_decode_8_##suffix##_kernel, (dense_decode<type, 8>), type);         \
    EXL_DENSE_KERNEL(dense_prefill_##suffix##_kernel, (dense_prefill<type>), type)

EXL_DENSE(float32, Float32);
EXL_DENSE(float16, Float16);
EXL_DENSE(bfloat16, Bfloat16);
