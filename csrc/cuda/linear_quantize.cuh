// Activations to two planes of int8.
//
// Each window (128 stored rows) of a row: gathered through the permutation, divided by its
// largest magnitude / kLargestActivation, rounded to nearest even and split into planes, as
// csrc/cpu/linear_quantize.cpp does it. A window with a NaN or an infinity gets the scale NaN,
// so the fault shows in the output instead of vanishing in integers.
//
// A warp a window, a lane four stored rows.
#pragma once

#include "cuda/linear_layout.cuh"

namespace exl {

// High planes up to 127, low planes in -64..63.
constexpr float kLargestActivation = 127 << kPlaneShift;
// Below this a window counts as zero: kLargestActivation / magnitude has to stay finite, and
// nothing that small can matter beside other windows.
constexpr float kSmallestMagnitude = 1e-30f;
constexpr int kLaneRows = 4;

// The largest magnitude, as the bits of a float: for these, the order of integers is the
// order of numbers, with infinity and NaN above all.
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

// codes and note are those of this window; blocks of it from `blocks` on do not exist.
__device__ __forceinline__ void quantize_window(const float (&x)[kLaneRows], int blocks,
                                                uint8_t* codes, Note* note) {
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
    if (lane_id() % 8 == 0) note->negative_block_sums[block] = -sum;
    if (lane_id() == 0) {
        note->scale = !finite ? bits_float(0x7FC00000u)
                      : usable ? magnitude / kLargestActivation : 0.0f;
        note->negative_sum = -total;
    }
}

// Window `window` of a row, into `codes` and `notes` of that row. value(channel) is an element of
// it.
template <class Value>
__device__ __forceinline__ void quantize_row_window(const Value& value, const int32_t* perm,
                                                    int in_features, int window,
                                                    uint8_t* codes, Note* notes) {
    const int first = window * kWindowRows + lane_id() * kLaneRows;
    float values[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
        const int stored = first + i;
        const bool there = stored < in_features;
        const int channel = there && perm != nullptr ? perm[stored] : stored;
        values[i] = there ? value(channel) : 0.0f;
    }
    const int blocks = min(kWindowBlocks, stream_blocks(in_features) - window * kWindowBlocks);
    quantize_window(values, blocks, codes + static_cast<int64_t>(window) * kWindowCodeBytes,
                    notes + window);
}

}  // namespace exl
