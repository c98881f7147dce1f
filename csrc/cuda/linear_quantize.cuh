// Quantisation of one row_block of activations to two planes of int8.
//
// Purpose: one definition for the kernels that quantise. Each row_block (128 stored rows) of a row
// is gathered through the permutation, divided by its largest magnitude / kLargestActivation,
// rounded to nearest even and separated into planes, as in cpu/linear_quantize.cpp. A row_block
// with a NaN or an infinity gets the scale NaN, so that the fault shows in the output instead of
// vanishing in integers.
//
// Layout: output as QuantizedRows (linear_layout.cuh). Work per warp: one row_block; a lane has
// four stored rows.
#pragma once

#include "cuda/linear_layout.cuh"

namespace exl {

constexpr int kLaneRows = 4;

// The largest magnitude as the bits of a float. For non-negative floats the order of the bits is
// the order of the numbers, with infinity and NaN above all.
__device__ __forceinline__ float largest_magnitude(const float (&x)[kLaneRows]) {
    int32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
        bits = max(bits, static_cast<int32_t>(float_bits(x[i]) & 0x7FFFFFFFu));
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) bits = max(bits, shfl_xor(bits, mask));
    return bits_float(static_cast<uint32_t>(bits));
}

// codes, activation_scale: of this row_block, whose blocks from `blocks` on do not exist.
__device__ __forceinline__ void quantize_row_block(const float (&x)[kLaneRows], int blocks,
                                                   uint8_t* codes,
                                                   ActivationScale* activation_scale) {
    const float magnitude = largest_magnitude(x);
    const bool finite = float_bits(magnitude) < 0x7F800000u;
    const bool usable = finite && magnitude >= kSmallestMagnitude;
    const float inverse = usable ? kLargestActivation / magnitude : 0.0f;
    uint32_t high = 0, low = 0;
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
        const int32_t whole = usable ? round_int(mul_rn(x[i], inverse)) : 0;
        const int32_t upper = (whole + (1 << (kPlaneShift - 1))) >> kPlaneShift;
        high |= (static_cast<uint32_t>(upper) & 0xFFu) << (8 * i);
        low |= (static_cast<uint32_t>(whole - upper * (1 << kPlaneShift)) & 0xFFu) << (8 * i);
        sum += whole;
    }
#pragma unroll
    for (int mask = 1; mask < 8; mask <<= 1) sum += shfl_xor(sum, mask);
    int32_t total = sum + shfl_xor(sum, 8);
    total += shfl_xor(total, 16);
    const int block = lane_id() / 8;
    if (block < blocks) {
        auto* words = reinterpret_cast<uint32_t*>(codes + block * kBlockCodeBytes);
        words[lane_id() % 8] = high;
        words[8 + lane_id() % 8] = low;
    }
    if (lane_id() % 8 == 0) activation_scale->negative_block_sums[block] = -sum;
    if (lane_id() == 0) {
        activation_scale->scale = !finite  ? bits_float(0x7FC00000u)
                                  : usable ? magnitude / kLargestActivation
                                           : 0.0f;
        activation_scale->negative_sum = -total;
    }
}

// Gathers and quantises one row_block of a row. value(channel): an element of the row. codes,
// activation_scales: of the row.
template <class Value>
__device__ __forceinline__ void gather_and_quantize(const Value& value, const int32_t* perm,
                                                    int in_features, int row_block, uint8_t* codes,
                                                    ActivationScale* activation_scales) {
    const int first = row_block * kRowBlockRows + lane_id() * kLaneRows;
    float values[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
        const int stored = first + i;
        const bool exists = stored < in_features;
        const int channel = exists && perm != nullptr ? perm[stored] : stored;
        values[i] = exists ? value(channel) : 0.0f;
    }
    const int blocks =
        min(kBlocksPerRowBlock, stream_blocks(in_features) - row_block * kBlocksPerRowBlock);
    quantize_row_block(values, blocks, codes + static_cast<int64_t>(row_block) * kRowBlockCodeBytes,
                       activation_scales + row_block);
}

}  // namespace exl
