// Products of few rows with unquantised layers; see linear_dense.cuh for the arithmetic.
//
// Layout: weights [tiles, in_features, 16], x float32 [rows, in_features].
//
// Work per block: one tile and a pass of up to 8 rows. Work per warp: every n-th part, n being the
// number of warps; after each round the sums of its parts are added in order by 128 threads, one
// per output. A warp reads its parts through a ring of slices in shared memory, which
// asynchronous copies fill (16 bytes per lane, 512 consecutive) across the borders of parts.
// Activations are loaded from the rows and prepared in registers, 4 of each 16 k per lane.
//
// Shared memory: rings [warp][kRingBytes], then sums float32 [warp][8][16].
//
// Preconditions: at least 4 warps per block, for 128 outputs.
#include "cuda/linear_dense.cuh"

namespace exl {

constexpr int kMaxDecodeThreads = 512;
// 6 slices of 16-bit weights or 3 slices of float32, 1 or 2 KiB each; one slice is being read.
constexpr int kRingBytes = 6144;
constexpr int kPassOutputs = kFragmentRows * kTileColumns;

template <class Type>
class TileReader {
public:
    static constexpr int kSliceBytes = kSliceBlocks * Product<Type>::kBlockBytes;

    __device__ __forceinline__ TileReader(char* ring, const void* tile, int in_features, int warps)
        : ring_(ring),
          tile_(tile),
          in_features_(in_features),
          skipped_k_((warps - 1) * kPartK),
          next_k_(warp_id() * kPartK) {
#pragma unroll
        for (int i = 0; i < kSlots - 1; ++i) copy_next();
    }
    // Returns the next slice; the slice before it may be overwritten.
    __device__ __forceinline__ const char* read() {
        copy_async_wait<kSlots - 2>();
        warp_sync();  // all copies of this slice have arrived, all reads of the last one are done
        copy_next();
        const char* slice = ring_ + read_slot_ * kSliceBytes;
        read_slot_ = read_slot_ + 1 == kSlots ? 0 : read_slot_ + 1;
        return slice;
    }
    __device__ __forceinline__ void finish() { copy_async_wait<0>(); }

private:
    static constexpr int kSlots = kRingBytes / kSliceBytes;

    __device__ __forceinline__ void copy_next() {
        copy_slice<Type>(ring_ + slot_ * kSliceBytes, tile_, next_k_, in_features_);
        copy_async_commit();
        slot_ = slot_ + 1 == kSlots ? 0 : slot_ + 1;
        next_k_ += kSliceK;
        if (next_k_ % kPartK == 0) next_k_ += skipped_k_;
    }
    char* ring_;
    const void* tile_;
    int in_features_;
    int skipped_k_;
    int next_k_;
    int slot_ = 0;
    int read_slot_ = 0;
};

// One part of a pass of rows; this lane has row lane / 4.
struct PartInputs {
    const float* row;
    int first;
    int end;
    bool aligned;

    __device__ __forceinline__ float4 load(int block) const {
        return load_inputs(row, first + block * kBlockK + lane_id() % 4 * 4, end, aligned);
    }
    // The largest magnitude of the row, the same in all of its four lanes.
    __device__ __forceinline__ float largest() const {
        float largest_magnitude = 0.0f;
#pragma unroll 8
        for (int i = 0; i < kPartBlocks; ++i) {
            largest_magnitude = fmaxf(largest_magnitude, largest_of(load(i)));
        }
        largest_magnitude = fmaxf(largest_magnitude, shfl_xor(largest_magnitude, 1));
        return fmaxf(largest_magnitude, shfl_xor(largest_magnitude, 2));
    }
};

// Adds a part to the sums of this lane's columns and rows. Returns the inverse scale of the row
// of this lane.
//
// Activations are read twice, the second time from the L1 cache, because holding them in registers
// would halve the number of resident warps.
template <class Type>
__device__ __forceinline__ float sum_part(const PartInputs& inputs, TileReader<Type>& reader,
                                          int slices, float (&sums)[1][1][4]) {
    const float largest = inputs.largest();
    const RowScale scale = Product<Type>::row_scale(largest);
    float4 next[kSliceBlocks];
#pragma unroll
    for (int i = 0; i < kSliceBlocks; ++i) next[i] = inputs.load(i);
#pragma unroll 1
    for (int slice = 0; slice < slices; ++slice) {
        uint4 x[kSliceBlocks][1];
#pragma unroll
        for (int i = 0; i < kSliceBlocks; ++i) {
            x[i][0] = Product<Type>::prepare(next[i], scale.scale, largest);
            next[i] = inputs.load((slice + 1) * kSliceBlocks + i);
        }
        const char* blocks = reader.read();
#pragma unroll
        for (int i = 0; i < kSliceBlocks; ++i) {
            Product<Type>::multiply(blocks + i * Product<Type>::kBlockBytes, 0, x[i], sums);
        }
    }
    return scale.inverse;
}

template <class Type>
__device__ __forceinline__ void dense_decode(const float* x, int in_features, int passes,
                                             const void* weight, const DenseOutput& output) {
    EXL_SHARED(char, memory);
    const int warps = static_cast<int>(blockDim.x) / 32;
    const int tile = static_cast<int>(blockIdx.x) / passes;
    const int first_row = static_cast<int>(blockIdx.x) % passes * kFragmentRows;
    auto* sums = reinterpret_cast<float*>(memory + warps * kRingBytes);
    const auto* tiles = static_cast<const typename Type::Weight*>(weight);
    TileReader<Type> reader(memory + warp_id() * kRingBytes,
                            tiles + static_cast<int64_t>(tile) * in_features * kTileColumns,
                            in_features, warps);
    const int row = first_row + lane_id() / 4;
    const float* x_row = x + static_cast<int64_t>(min(row, output.rows - 1)) * in_features;
    const int end = row < output.rows ? in_features : 0;
    const bool aligned = inputs_aligned(x, in_features);
    const int parts = dense_parts(in_features);
    float total = 0.0f;
    for (int round = 0; round < parts; round += warps) {
        const int part = round + warp_id();
        if (part < parts) {
            const PartInputs inputs = {x_row, part * kPartK, end, aligned};
            const int slices = min(kPartSlices, dense_slices(in_features - part * kPartK));
            float acc[1][1][4] = {};
            const float inverse_scale = sum_part(inputs, reader, slices, acc);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = lane_id() % 4 * 2 + i % 2;
                const float inverse = shfl(inverse_scale, 4 * r);
                sums[warp_id() * kPassOutputs + r * kTileColumns + lane_id() / 4 + i / 2 * 8] =
                    mul_rn(acc[0][0][i], inverse);
            }
        }
        block_sync();  // all parts of this round are written
        for (int p = 0; threadIdx.x < kPassOutputs && p < min(warps, parts - round); ++p) {
            total = add_rn(total, sums[p * kPassOutputs + threadIdx.x]);
        }
        block_sync();  // the parts have been read and may be overwritten
    }
    reader.finish();
    if (threadIdx.x >= kPassOutputs) return;
    output.store(total, first_row + threadIdx.x / kTileColumns,
                 tile * kTileColumns + threadIdx.x % kTileColumns);
}

}  // namespace exl

// out = x @ W + bias, or out += x @ W + bias if `add`.
//
// x: float32 [rows, in_features]; weight: [tiles, in_features, 16]; bias: float32 [out_features] or
// null; out: float32 [rows, out_stride]. grid.x: tiles x passes of 8 rows, the passes of a tile
// adjacent.
#define EXL_DENSE_DECODE(name, type)                                                           \
    extern "C" __global__ void __launch_bounds__(exl::kMaxDecodeThreads)                      \
        name(const float* x, int32_t rows, int32_t in_features, int32_t out_features,          \
             int32_t passes, const void* weight, const float* bias, float* out,                \
             int64_t out_stride, int32_t add) {                                                \
        exl::dense_decode<exl::type>(x, in_features, passes, weight,                           \
                                     {bias, out, out_stride, out_features, rows, add != 0});   \
    }                                                                                          \
    EXL_KERNEL(name)

EXL_DENSE_DECODE(dense_decode_float32_kernel, Float32);
EXL_DENSE_DECODE(dense_decode_float16_kernel, Float16);
EXL_DENSE_DECODE(dense_decode_bfloat16_kernel, Bfloat16);
