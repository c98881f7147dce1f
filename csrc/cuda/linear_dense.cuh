// Matrix products of unquantised layers (routers, heads, models that are not quantised): what
// decoding and prefill share, which is all of the arithmetic.
//
// Weights are [tile][k][16] in float16, bfloat16 or float32 (formats/packed.py). A *block* is 16
// k of a tile, one run of bytes; a *stage* 32 k, what is copied at a time; a *part* 256 k.
//
// float16 and bfloat16 go through tensor cores: weights are the A operand (16 columns x 16 k),
// activations the B operand, whose 8 columns are rows. An activation is the sum of two numbers
// of the weights' type, high and low, each multiplied by itself and added to the same float32:
// what is lost of it is at most 2^-22 (float16) or 2^-18 (bfloat16) of its size. A row is scaled
// by a power of two for each part, so that its largest is a number that both can hold; what
// float16 cannot hold beside it is below 2^-39 of the largest.
//
// Tensor cores cut off what they add rather than rounding it, so a sum within them is as short
// as a part: 32 additions. Parts are scaled back and added in order in float32. With float32,
// and with bfloat16 where tensor cores do not know it (compute capability 7.5), a part is summed
// by fma in the order of k, and the rest is the same.
//
// So a row has the same bits whatever rows go with it, in decoding and in prefill: a product of
// fragments depends on its own row alone, and all additions are in the order of k.
#pragma once

#include "cuda/platform.cuh"
#include "packed.h"

namespace exl {

constexpr int kBlockK = 16;
constexpr int kStageBlocks = 2;
constexpr int kStageK = kStageBlocks * kBlockK;
constexpr int kPartStages = 8;
constexpr int kPartK = kPartStages * kStageK;
constexpr int kPartBlocks = kPartK / kBlockK;
// Rows of activations of one product of fragments.
constexpr int kFragmentRows = 8;
constexpr int kChunkBytes = 16;

__device__ __forceinline__ int dense_parts(int in_features) {
    return (in_features + kPartK - 1) / kPartK;
}
__device__ __forceinline__ int dense_stages(int in_features) {
    return (in_features + kStageK - 1) / kStageK;
}

// Powers of two, one the other's inverse.
struct RowScale {
    float scale, inverse;
};

// `largest` comes between 2^kExponent and twice that, as far as both factors are normal.
template <int kExponent>
__device__ __forceinline__ RowScale scale_to(float largest) {
    const int exponent = static_cast<int>(float_bits(largest) >> 23);
    const int field = max(1, min(254 + kExponent - exponent, 253));
    return {bits_float(static_cast<uint32_t>(field) << 23),
            bits_float(static_cast<uint32_t>(254 - field) << 23)};
}

struct Float16 {
    using Weight = uint16_t;
    static constexpr bool kTensorCores = true;
    // Half of what float16 ends at: rounding up must not reach it.
    static constexpr int kExponent = 14;
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        return floats_to_half2(low, high);
    }
    static __device__ __forceinline__ float2 unpack(uint32_t bits) {
        return half2_to_float2(bits);
    }
    static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2]) {
        mma_f16_16x8x16(d, a, b);
    }
};
struct Bfloat16 {
    using Weight = uint16_t;
    static constexpr bool kTensorCores = kHasBf16Mma;
    static constexpr int kExponent = 0;
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        return floats_to_bf162(low, high);
    }
    static __device__ __forceinline__ float2 unpack(uint32_t bits) {
        return bf162_to_float2(bits);
    }
    static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2]) {
        mma_bf16_16x8x16(d, a, b);
    }
    static __device__ __forceinline__ float value(uint16_t weight) {
        return bf16_to_float(weight);
    }
};
struct Float32 {
    using Weight = float;
    static constexpr bool kTensorCores = false;
    static __device__ __forceinline__ float value(float weight) { return weight; }
};

// How blocks lie in shared memory, what activations become, and how both are multiplied.
//
// Four activations of a row, k = 4 * t .. + 3 of a block, become the 16 bytes that lane
// 4 * row + t multiplies with: the mma's fragments with their k in an order of its own, in which
// the weights are read too.
template <class Type, bool kTensorCores = Type::kTensorCores>
struct Product {
    static constexpr int kBlockBytes = kBlockK * kTileColumns * 2;

    // Where the i-th 16 bytes of a block are kept: k = i / 2, columns 8 * (i % 2) .. + 7. Four
    // matrices of 8 k x 8 columns, one a register of the fragment; matrix m is (columns m % 2,
    // k % 4 / 2 = m / 2). The rows of a matrix are turned by 2 * m, so that neither 8 lanes that
    // copy nor 8 that read a matrix meet in a bank.
    static __device__ __forceinline__ int place(int i) {
        const int k = i / 2, matrix = i % 2 + k / 2 % 2 * 2, row = k / 4 * 2 + k % 2;
        return (matrix * 8 + (row ^ (2 * matrix))) * kChunkBytes;
    }
    static __device__ __forceinline__ RowScale row_scale(float largest) {
        return scale_to<Type::kExponent>(largest);
    }
    // An infinity stays one: it has no low part, which would be no number.
    static __device__ __forceinline__ uint4 prepare(float4 v, float scale, float largest) {
        const float values[4] = {mul_rn(v.x, scale), mul_rn(v.y, scale), mul_rn(v.z, scale),
                                 mul_rn(v.w, scale)};
        uint32_t high[2], low[2];
        const bool finite = float_bits(largest) < 0x7F800000u;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float a = values[2 * i], b = values[2 * i + 1];
            high[i] = Type::pack(a, b);
            const float2 taken = Type::unpack(high[i]);
            low[i] = finite ? Type::pack(add_rn(a, -taken.x), add_rn(b, -taken.y)) : 0u;
        }
        return make_uint4(high[0], high[1], low[0], low[1]);
    }
    // Adds a block of each of kTiles tiles, `stride` bytes apart, times 8 rows each of kRowTiles:
    // d[i] of a lane is column lane / 4 + 8 * (i / 2), row 2 * (lane % 4) + i % 2.
    template <int kTiles, int kRowTiles>
    static __device__ __forceinline__ void multiply(const char* blocks, int stride,
                                                    const uint4 (&x)[kRowTiles],
                                                    float (&sums)[kTiles][kRowTiles][4]) {
        const int matrix = lane_id() / 8, row = lane_id() % 8;
        blocks += (matrix * 8 + (row ^ (2 * matrix))) * kChunkBytes;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            uint32_t a[4];
            load_matrix_x4_transposed(a, blocks + tile * stride);
#pragma unroll
            for (int n = 0; n < kRowTiles; ++n) {
                const uint32_t high[2] = {x[n].x, x[n].y}, low[2] = {x[n].z, x[n].w};
                Type::multiply(sums[tile][n], a, high);
                Type::multiply(sums[tile][n], a, low);
            }
        }
    }
};

// The same without tensor cores; blocks as in device memory, activations as they are.
template <class Type>
struct Product<Type, false> {
    using Weight = typename Type::Weight;
    static constexpr int kBlockBytes = kBlockK * kTileColumns * sizeof(Weight);

    static __device__ __forceinline__ int place(int i) { return i * kChunkBytes; }
    static __device__ __forceinline__ RowScale row_scale(float) { return {1.0f, 1.0f}; }
    static __device__ __forceinline__ uint4 prepare(float4 v, float, float) {
        return make_uint4(float_bits(v.x), float_bits(v.y), float_bits(v.z), float_bits(v.w));
    }
    template <int kTiles, int kRowTiles>
    static __device__ __forceinline__ void multiply(const char* blocks, int stride,
                                                    const uint4 (&x)[kRowTiles],
                                                    float (&sums)[kTiles][kRowTiles][4]) {
        const int column = lane_id() / 4, row = lane_id() % 4 * 2;
#pragma unroll 1
        for (int t = 0; t < 4; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float values[kRowTiles][2];
#pragma unroll
                for (int i = 0; i < 2 * kRowTiles; ++i) {
                    const uint4& v = x[i / 2];
                    const uint32_t mine = e == 0 ? v.x : e == 1 ? v.y : e == 2 ? v.z : v.w;
                    values[i / 2][i % 2] = bits_float(shfl(mine, (row + i % 2) * 4 + t));
                }
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    const auto* w = reinterpret_cast<const Weight*>(blocks + tile * stride) +
                                    (4 * t + e) * kTileColumns + column;
                    const float pair[2] = {Type::value(w[0]), Type::value(w[8])};
#pragma unroll
                    for (int i = 0; i < 4 * kRowTiles; ++i) {
                        float& sum = sums[tile][i / 4][i % 4];
                        sum = fmaf(pair[i % 4 / 2], values[i / 4][i % 2], sum);
                    }
                }
            }
        }
    }
};

// Copies a stage of a tile, `tile` being its beginning in device memory, as the calling warp.
template <class Type>
__device__ __forceinline__ void copy_stage(char* stage, const void* tile, int k, int in_features,
                                           bool valid = true) {
    constexpr int kBytes = kTileColumns * sizeof(typename Type::Weight);
    constexpr int kCopies = Product<Type>::kBlockBytes / (32 * kChunkBytes);
    const char* source = static_cast<const char*>(tile) + static_cast<int64_t>(k) * kBytes;
#pragma unroll
    for (int i = 0; i < kStageBlocks * kCopies; ++i) {
        const int block = i / kCopies, chunk = i % kCopies * 32 + lane_id();
        const int row = k + block * kBlockK + chunk * kChunkBytes / kBytes;
        copy_async16(stage + block * Product<Type>::kBlockBytes + Product<Type>::place(chunk),
                     source + block * Product<Type>::kBlockBytes + chunk * kChunkBytes,
                     valid && row < in_features);
    }
}

// x[k .. k + 3] of a row, zero where it has ended. `aligned`: 16 bytes can be read at once.
__device__ __forceinline__ float4 load_inputs(const float* row, int k, int in_features,
                                              bool aligned) {
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
    if (aligned) {
        if (k < in_features) v = *reinterpret_cast<const float4*>(row + k);
    } else {
        if (k < in_features) v.x = row[k];
        if (k + 1 < in_features) v.y = row[k + 1];
        if (k + 2 < in_features) v.z = row[k + 2];
        if (k + 3 < in_features) v.w = row[k + 3];
    }
    return v;
}
__device__ __forceinline__ bool inputs_aligned(const float* x, int in_features) {
    return (reinterpret_cast<uint64_t>(x) % kChunkBytes | in_features % 4) == 0;
}
__device__ __forceinline__ float largest_of(const float4& v) {
    return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
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

}  // namespace exl
