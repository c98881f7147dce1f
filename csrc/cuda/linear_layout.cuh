// Quantised layers as they lie in device memory: constants and structs shared by packing,
// quantising and multiplying. The layout is exl_loader/formats/packed_cuda.py, word for word
// what is meant here; kernels/cuda/ops_linear.py mirrors the structs.
#pragma once

#include "cuda/platform.cuh"

namespace exl {

constexpr int kStreamColumns = 32;
constexpr int kStreamBlockRows = 32;
// Bytes of a block of b-bit codes are b times this.
constexpr int kStreamBitBytes = kStreamBlockRows * kStreamColumns / 8;
constexpr int kScaleBytes = 2 * kStreamColumns;
constexpr int kZeroBytes = kStreamColumns;
constexpr int kWindowBlocks = 4;
constexpr int kWindowRows = kWindowBlocks * kStreamBlockRows;
constexpr int kMaxSplits = 16;

// A row of `groups`.
struct alignas(16) StreamGroup {
    int32_t bits;
    int32_t first_row;
    int32_t rows;
    int32_t offset;  // of its header, bytes from the start of a tile
};

// A row of `windows`: how to begin reading there.
struct alignas(16) StreamPlace {
    int32_t offset;  // bytes from the start of a tile
    int32_t group;   // under way, or the next one
    int32_t state;   // bits | blocks left << 8 of the group under way; 0: a header comes first
    int32_t header;  // of the group under way
};

struct alignas(16) StreamLayer {
    const uint8_t* codes;       // [tiles, tile_bytes]
    const StreamGroup* groups;  // [num_groups]
    const StreamPlace* windows; // [windows + 1]
    const int32_t* perm;        // [in_features], or null: identity
    const float* bias;          // [out_features], or null
    int64_t tile_bytes;
    int32_t in_features;
    int32_t out_features;
    int32_t num_groups;
    int32_t zeros;   // 1: headers hold zero points
    int32_t splits;  // split s: windows [W * s / splits, W * (s + 1) / splits)
    int32_t window_bytes;  // most that a window takes of a stream
    StreamPlace starts[kMaxSplits + 1];  // of the splits, then the end
};

__device__ __forceinline__ int stream_tiles(int out_features) {
    return (out_features + kStreamColumns - 1) / kStreamColumns;
}
__device__ __forceinline__ int stream_blocks(int in_features) {
    return (in_features + kStreamBlockRows - 1) / kStreamBlockRows;
}
__device__ __forceinline__ int stream_windows(int in_features) {
    return (in_features + kWindowRows - 1) / kWindowRows;
}

// Quantised activations of `rows` rows, as linear_quantize.cu writes them.
//
// An activation is 128 * high + low times a scale for each row and window, high and low int8.
// `codes` is [row][block][high, low][32 stored rows]; `notes` is [row][window] of Note.
constexpr int kPlaneShift = 7;
constexpr int kBlockCodeBytes = 2 * kStreamBlockRows;
constexpr int kWindowCodeBytes = kWindowBlocks * kBlockCodeBytes;

// Sums are negated: they stand for zero points, which are taken off.
struct alignas(16) Note {
    float scale;
    int32_t negative_sum;  // of the window's integers
    int32_t negative_block_sums[kWindowBlocks];
    int32_t unused[2];
};

struct QuantizedRows {
    const uint8_t* codes;
    const Note* notes;
    int32_t rows;
};

// Which bit of a byte the lowest bit of a code has in the registers of matrix m (columns
// 16 * m ..): codes are moved only as far as they have to be, and the power of two goes into
// the scale. Within a matrix all codes stand alike, and none beyond its byte.
template <int Bits>
__device__ __forceinline__ constexpr int code_shift(int m) {
    return m == 0 ? (Bits == 3 ? 1 : 0)
                  : (Bits == 8 ? 0 : Bits == 6 ? 2 : Bits == 2 || Bits == 4 ? 4 : 3);
}

// Calls `run(std::integral_constant-like<Bits>)` for the width of a group, the same in all
// lanes.
template <int Value>
struct Width {
    static constexpr int value = Value;
};
template <class Run>
__device__ __forceinline__ void with_width(int bits, const Run& run) {
    switch (bits) {
        case 2: return run(Width<2>());
        case 3: return run(Width<3>());
        case 4: return run(Width<4>());
        case 5: return run(Width<5>());
        case 6: return run(Width<6>());
        default: return run(Width<8>());
    }
}

}  // namespace exl
