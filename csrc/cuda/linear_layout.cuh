// Quantised layers on a card: constants and structs shared by packing, quantising and multiplying.
//
// Layout: StreamLinear in the formats package of Python is the definition; ctypes mirrors of the
// structs below have the same fields in the same order. A layer is cut into tiles of 32 columns,
// and each tile is one stream of bytes that a warp reads from start to end. Per group the stream
// has a header (scales and zero points, see header_bytes) and blocks of 32 stored rows. A *row_block* is 128 stored rows (4 blocks), the rows that share one activation scale. A
// *row_split* is a range of row_blocks that one warp reads.
#pragma once

#include "cuda/platform.cuh"
#include "packed.h"

namespace exl {

constexpr int kStreamColumns = 32;
constexpr int kStreamBlockRows = 32;
// A block of b-bit codes has b times this number of bytes.
constexpr int kStreamBitBytes = kStreamBlockRows * kStreamColumns / 8;
// A group's header has 4-bit levels, or float16 scales and then zero points of zero_bits bits.
constexpr int kLevelBytes = kStreamColumns / 2;
constexpr int kScaleBytes = 2 * kStreamColumns;
constexpr int kBlocksPerRowBlock = 4;
constexpr int kRowBlockRows = kBlocksPerRowBlock * kStreamBlockRows;
constexpr int kMaxRowSplits = 16;

// One group: rows [first_row, first_row + rows).
struct alignas(16) StreamGroup {
    int32_t bits;
    int32_t first_row;
    int32_t rows;
    int32_t offset;  // of the group's header, in bytes from the start of a tile
};

// A position in a stream at which a reader can start.
struct alignas(16) StreamPosition {
    int32_t offset;  // in bytes, from the start of a tile
    int32_t group;  // the group that has begun, or the next group
    int32_t state;  // bits | remaining blocks << 8 of the group that has begun; 0: a header follows
    int32_t header;  // offset of the header of the group that has begun
};

struct alignas(16) StreamLayer {
    const uint8_t* codes;              // [tiles, tile_bytes]
    const StreamGroup* groups;         // [num_groups]
    const StreamPosition* row_blocks;  // [row_blocks + 1]
    const int32_t* perm;               // [in_features]; null: the identity
    const float* bias;                 // [out_features]; null: no bias
    const uint16_t* scale_units;       // float16 [num_groups]; null: headers have float16 scales
    int64_t tile_bytes;
    int32_t in_features;
    int32_t out_features;
    int32_t num_groups;
    int32_t zero_bits;        // bits of a zero point, 4 or 8; 0: headers have levels
    int32_t row_splits;       // split s: row_blocks [R * s / row_splits, R * (s + 1) / row_splits)
    int32_t row_block_bytes;  // the largest number of stream bytes of a row_block
    StreamPosition starts[kMaxRowSplits + 1];  // of the row_splits, then the end
};

// Bytes of a group's header.
__device__ __forceinline__ int header_bytes(int zero_bits) {
    return zero_bits == 0 ? kLevelBytes : kScaleBytes + kStreamColumns / 8 * zero_bits;
}
__device__ __forceinline__ int stream_tiles(int out_features) {
    return ceil_div(out_features, kStreamColumns);
}
__device__ __forceinline__ int stream_blocks(int in_features) {
    return ceil_div(in_features, kStreamBlockRows);
}
__device__ __forceinline__ int stream_row_blocks(int in_features) {
    return ceil_div(in_features, kRowBlockRows);
}

// Quantised activations of `rows` rows, written by linear_quantize.cu.
//
// An activation is (128 * high + low) times a scale for each row and row_block; high and low are
// int8. `codes` is [row][block][high, low][32 stored rows].
constexpr int kBlockCodeBytes = 2 * kStreamBlockRows;
constexpr int kRowBlockCodeBytes = kBlocksPerRowBlock * kBlockCodeBytes;

// Scale and sums of one row of activations in one row_block. Sums are negated because they multiply
// zero points, which are subtracted.
struct alignas(16) ActivationScale {
    float scale;
    int32_t negative_sum;  // of the integers of the row_block
    int32_t negative_block_sums[kBlocksPerRowBlock];
    int32_t unused[2];
};

struct QuantizedRows {
    const uint8_t* codes;                      // [rows, blocks, 2, 32]
    const ActivationScale* activation_scales;  // [rows, row_blocks]
    int32_t rows;
};

// Bit position of the lowest bit of a code within its byte in the registers of matrix m (columns
// 16 * m and on). Codes are shifted only as far as necessary, and the power of two is divided out
// with the scale. Within a matrix all codes have the same shift, and none exceeds its byte.
template <int Bits>
__device__ __forceinline__ constexpr int code_shift(int m) {
    return m == 0 ? (Bits == 3 ? 1 : 0)
                  : (Bits == 8 ? 0 : Bits == 6 ? 2 : Bits == 2 || Bits == 4 ? 4 : 3);
}

// Calls `run(Width<bits>())`, so that the number of bits is a constant; the same in all lanes.
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
