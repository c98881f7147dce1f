// Products of few rows with unquantised layers; see linear_dense.cuh.
//
// Work: a block a tile and a pass of up to 8 rows. Its warps take parts in turn, as many at a
// time as there are warps; after each turn the parts' sums are added in order, by 128 threads
// that hold one output each.
//
// A warp reads its parts through a ring of stages in shared memory that asynchronous copies
// fill 16 bytes a lane, 512 in a row, from one part to its next without a break. Activations
// come straight from the rows and are prepared in registers, 4 of each 16 k a lane.
//
// Shared memory: [warp][kRingBytes] rings, then [warp][8][16] float32 sums.
#include "cuda/linear_dense.cuh"

namespace exl {

constexpr int kMostDecodeThreads = 512;
constexpr int kRingBytes = 6144;
constexpr int kPassOutputs = kFragmentRows * kTileColumns;

template <class Type>
class TileReader {
public:
    static constexpr int kStageBytes = kStageBlocks * Product<Type>::kBlockBytes;

    __device__ __forceinline__ TileReader(char* ring, const void* tile, int in_features, int warps)
        : ring_(ring), tile_(tile), in_features_(in_features), skipped_((warps - 1) * kPartK),
          next_(warp_id() * kPartK) {
#pragma unroll
        for (int i = 0; i < kSlots - 1; ++i) copy_next();
    }
    // The next stage; the one before is given up.
    __device__ __forceinline__ const char* read() {
        copy_async_wait<kSlots - 2>();
        warp_sync();  // all lanes' copies of this stage are in, all reads of the one before done
        copy_next();
        const char* stage = ring_ + read_slot_ * kStageBytes;
        read_slot_ = read_slot_ + 1 == kSlots ? 0 : read_slot_ + 1;
        return stage;
    }
    __device__ __forceinline__ void finish() { copy_async_wait<0>(); }

private:
    static constexpr int kSlots = kRingBytes / kStageBytes;

    __device__ __forceinline__ void copy_next() {
        copy_stage<Type>(ring_ + slot_ * kStageBytes, tile_, next_, in_features_);
        copy_async_commit();
        slot_ = slot_ + 1 == kSlots ? 0 : slot_ + 1;
        next_ += kStageK;
        if (next_ % kPartK == 0) next_ += skipped_;
    }
    char* ring_;
    const void* tile_;
    int in_features_;
    int skipped_;
    int next_;
    int slot_ = 0;
    int read_slot_ = 0;
};

// One part of a pass of rows, of which this lane has row lane / 4.
struct PartInputs {
    const float* row;
    int first;
    int end;
    bool aligned;

    __device__ __forceinline__ float4 load(int block) const {
        return load_inputs(row, first + block * kBlockK + lane_id() % 4 * 4, end, aligned);
    }
    // Of the row, in all of its four lanes.
    __device__ __forceinline__ float largest() const {
        float most = 0.0f;
#pragma unroll 8
        for (int i = 0; i < kPartBlocks; ++i) most = fmaxf(most, largest_of(load(i)));
        most = fmaxf(most, shfl_xor(most, 1));
        return fmaxf(most, shfl_xor(most, 2));
    }
};

// Adds a part to the sums of this lane's columns and rows, and returns what they are to be
// multiplied by where this lane has its row.
//
// Activations are read twice, the second time from the first-level cache: held in registers
// they would cost half of the warps that fit.
template <class Type>
__device__ __forceinline__ float sum_part(const PartInputs& inputs, TileReader<Type>& reader,
                                          int stages, float (&sums)[1][1][4]) {
    const float largest = inputs.largest();
    const RowScale scale = Product<Type>::row_scale(largest);
    float4 next[kStageBlocks];
#pragma unroll
    for (int i = 0; i < kStageBlocks; ++i) next[i] = inputs.load(i);
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
        uint4 x[kStageBlocks][1];
#pragma unroll
        for (int i = 0; i < kStageBlocks; ++i) {
            x[i][0] = Product<Type>::prepare(next[i], scale.scale, largest);
            next[i] = inputs.load((stage + 1) * kStageBlocks + i);
        }
        const char* blocks = reader.read();
#pragma unroll
        for (int i = 0; i < kStageBlocks; ++i) {
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
    for (int turn = 0; turn < parts; turn += warps) {
        const int part = turn + warp_id();
        if (part < parts) {
            const PartInputs inputs = {x_row, part * kPartK, end, aligned};
            const int stages = min(kPartStages, dense_stages(in_features - part * kPartK));
            float acc[1][1][4] = {};
            const float mine = sum_part(inputs, reader, stages, acc);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = lane_id() % 4 * 2 + i % 2;
                const float inverse = shfl(mine, 4 * r);
                sums[warp_id() * kPassOutputs + r * kTileColumns + lane_id() / 4 + i / 2 * 8] =
                    mul_rn(acc[0][0][i], inverse);
            }
        }
        block_sync();  // all parts of this turn are written
        for (int p = 0; threadIdx.x < kPassOutputs && p < min(warps, parts - turn); ++p) {
            total = add_rn(total, sums[p * kPassOutputs + threadIdx.x]);
        }
        block_sync();  // they are read, and may be written over
    }
    reader.finish();
    if (threadIdx.x >= kPassOutputs) return;
    output.store(total, first_row + threadIdx.x / kTileColumns,
                 tile * kTileColumns + threadIdx.x % kTileColumns);
}

}  // namespace exl

// x float32 [rows, in_features], weight [tiles, in_features, 16], bias float32 [out_features]
// or null. out = x @ W + bias, or out += ... where `add`. grid.x: passes of 8 rows, tile by tile;
// at least 4 warps a block.
#define EXL_DENSE_DECODE(name, type)                                                           \
    extern "C" __global__ void __launch_bounds__(exl::kMostDecodeThreads)                      \
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
