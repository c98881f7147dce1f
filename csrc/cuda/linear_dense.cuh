// Matrix products of unquantised layers (routers, heads, unquantised models): the arithmetic, which
// decoding and prefill share.
//
// Layout: weights [tile][k][16] in float16, bfloat16 or float32 (ExlDenseLinear in packed.h). A
// *block* is 16 k of a tile, consecutive bytes; a *slice* is 32 k, the unit of copies; a *part* is
// 256 k.
//
// Tensor cores (float16 and bfloat16): weights are the A operand (16 columns x 16 k), activations
// the B operand, whose 8 columns are rows. An activation is the sum of two numbers of the weights'
// type, high and low, which are multiplied separately and added to the same float32. The lost
// remainder is at most 2^-22 (float16) or 2^-18 (bfloat16) of the activation. A row is scaled by a
// power of two for each part, so that its largest magnitude is representable; activations that
// float16 cannot represent then are below 2^-39 of the largest.
//
// Tensor cores truncate their sums instead of rounding them, so a sum within them is only as long
// as a part: 32 additions. Parts are scaled back and added in order in float32. For float32, and
// for bfloat16 on cards without such tensor cores (compute capability 7.5), a part is summed by
// fma in the order of k, and the rest is the same.
//
// A row has the same bits whatever rows are computed with it, in decoding and in prefill, because
// a product of fragments depends only on its own row and all additions are in the order of k.
#pragma once

#include "cuda/platform.cuh"
#include "packed.h"

namespace exl {

constexpr int kBlockK = 16;
constexpr int kSliceBlocks = 2;
constexpr int kSliceK = kSliceBlocks * kBlockK;
// 8 slices are 16 products of 16 k with two numbers per activation: 32 additions.
constexpr int kPartSlices = 8;
constexpr int kPartK = kPartSlices * kSliceK;
constexpr int kPartBlocks = kPartK / kBlockK;
// Rows of activations of one product of fragments: the columns of the B operand.
constexpr int kFragmentRows = 8;
// Bytes of one asynchronous copy.
constexpr int kChunkBytes = 16;

__device__ __forceinline__ int dense_parts(int in_features) {
    return ceil_div(in_features, kPartK);
}
__device__ __forceinline__ int dense_slices(int in_features) {
    return ceil_div(in_features, kSliceK);
}

// A power of two and its inverse.
struct RowScale {
    float scale, inverse;
};

// Returns a scale that brings `largest` between 2^kExponent and twice that, as far as both factors
// are normal numbers.
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
    // Half of the largest power of two in float16, so that rounding up cannot reach infinity.
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

// The position of blocks in shared memory, the conversion of activations, and their product.
//
// Four activations of a row, k = 4 * t .. 4 * t + 3 of a block, become the 16 bytes of lane
// 4 * row + t: the fragments of the mma with their k in an unusual order, in which the weights are
// read as well.
template <class Type, bool kTensorCores = Type::kTensorCores>
struct Product {
    static constexpr int kBlockBytes = kBlockK * kTileColumns * 2;

    // Byte offset of the i-th 16 bytes of a block, which are k = i / 2, columns 8 * (i % 2) .. + 7.
    // A block is four matrices of 8 k x 8 columns, one per register of the fragment; matrix m has
    // columns m % 2 and k % 4 / 2 = m / 2. The rows of a matrix are rotated by 2 * m, so that
    // neither 8 lanes that copy nor 8 lanes that read a matrix collide in a bank.
    static __device__ __forceinline__ int chunk_offset(int i) {
        const int k = i / 2, matrix = i % 2 + k / 2 % 2 * 2, row = k / 4 * 2 + k % 2;
        return (matrix * 8 + (row ^ (2 * matrix))) * kChunkBytes;
    }
    static __device__ __forceinline__ RowScale row_scale(float largest) {
        return scale_to<Type::kExponent>(largest);
    }
    // An infinity has no low part, because inf - inf would be NaN.
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
    // Adds the product of one block of each of kTiles tiles, `stride` bytes apart, with 8 rows of
    // each of kRowTiles: d[i] of a lane is column lane / 4 + 8 * (i / 2) and row
    // 2 * (lane % 4) + i % 2.
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

// Product without tensor cores: blocks as in device memory, activations unchanged.
template <class Type>
struct Product<Type, false> {
    using Weight = typename Type::Weight;
    static constexpr int kBlockBytes = kBlockK * kTileColumns * sizeof(Weight);

    static __device__ __forceinline__ int chunk_offset(int i) { return i * kChunkBytes; }
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
                    const uint32_t element = e == 0 ? v.x : e == 1 ? v.y : e == 2 ? v.z : v.w;
                    values[i / 2][i % 2] = bits_float(shfl(element, (row + i % 2) * 4 + t));
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

// Copies a slice of a tile, by the calling warp. `tile` is the start of the tile in device memory.
template <class Type>
__device__ __forceinline__ void copy_slice(char* slice, const void* tile, int k, int in_features,
                                           bool valid = true) {
    constexpr int kBytes = kTileColumns * sizeof(typename Type::Weight);
    constexpr int kCopies = Product<Type>::kBlockBytes / (32 * kChunkBytes);
    const char* source = static_cast<const char*>(tile) + static_cast<int64_t>(k) * kBytes;
#pragma unroll
    for (int i = 0; i < kSliceBlocks * kCopies; ++i) {
        const int block = i / kCopies, chunk = i % kCopies * 32 + lane_id();
        const int row = k + block * kBlockK + chunk * kChunkBytes / kBytes;
        copy_async16(
            slice + block * Product<Type>::kBlockBytes + Product<Type>::chunk_offset(chunk),
            source + block * Product<Type>::kBlockBytes + chunk * kChunkBytes,
            valid && row < in_features);
    }
}

// x[k .. k + 3] of a row, zero beyond its end. aligned: 16 bytes can be read at once.
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
    const float* bias;  // [out_features]; null: no bias
    float* out;         // [rows, stride]
    int64_t stride;
    int out_features;
    int rows;
    bool add;

    __device__ __forceinline__ void store(float value, int row, int column) const {
        if (row >= rows || column >= out_features) return;
        if (bias != nullptr) value = add_rn(value, bias[column]);
        float* chunk_offset = out + row * stride + column;
        *chunk_offset = add ? add_rn(*chunk_offset, value) : value;
    }
};

}  // namespace exl
