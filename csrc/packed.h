// Packed and dense linear layers: constants and structs that Python and C++ share.
//
// Purpose: one definition of the layout in which the CPU keeps a layer's weights. The packed
// layout is that of PackedLinear in the formats package; ctypes mirrors of the structs below
// have the same fields in the same order.
//
// Layout: a layer is cut into tiles of 16 columns. A tile holds its groups consecutively; a
// group holds blocks of 32 stored rows, the last one padded. A block of b-bit codes is b vectors
// of 64 bytes, in one or two bit planes (cpu/unpack.h). Stored row r is input channel perm[r].
// A scale is a float16, or, if the layer has no zero points, a level of 4 bits:
// half((level + 1)^2 * scale_units[group]). Of 16 columns in fields of 4 bits, column c is field
// c / 2 of the 32-bit word c % 2.
#pragma once

#include <cstdint>

#include "common.h"

namespace exl {

constexpr int kTileColumns = 16;
constexpr int kBlockRows = 32;
// A register is 4 rows of 16 columns with one byte for each code: a block has 8 of them.
constexpr int kRegisterRows = 4;
constexpr int kRegisterBytes = kTileColumns * kRegisterRows;
constexpr int kBlockRegisters = kBlockRows / kRegisterRows;
// A block of b-bit codes has b times this number of bytes.
constexpr int kBlockBitBytes = kBlockRows * kTileColumns / 8;
// Bytes of a tile's columns in fields of 4 bits.
constexpr int kHalfBytes = kTileColumns / 2;
// Values of a level.
constexpr int kLevels = 16;

// Bits of a code's high plane; the low plane has the others.
EXL_HOST_DEVICE constexpr int high_width(int bits) {
    return bits == 8 ? 8 : bits >= 4 ? 4 : 2;
}

// Quantised activations: 128 * high + low, two planes of int8. The largest value has 127 in its
// high plane; low planes are in -64..63.
constexpr int kPlaneShift = 7;
constexpr int kLargestActivation = 127 << kPlaneShift;
// Rows whose largest magnitude is below this are treated as zero, because kLargestActivation /
// magnitude must stay finite (3.4e38). A contribution that small cannot matter beside others.
constexpr float kSmallestMagnitude = 1e-30f;

// A row of the group table: rows [first_row, first_row + rows) have codes of `bits` bits.
struct Group {
    int32_t bits;
    int32_t first_row;
    int32_t rows;
    int32_t offset;  // in bytes, from the start of a tile
};

}  // namespace exl

extern "C" {

struct ExlPackedLinear {
    int64_t in_features;
    int64_t out_features;
    int64_t tiles;
    int64_t tile_bytes;
    int64_t num_groups;
    const uint8_t* codes;         // [tiles, tile_bytes]
    const void* scales;           // [tiles, num_groups, 16]: float16 if there are zeros, else levels
    const uint16_t* scale_units;  // float16 [num_groups], of levels
    const uint8_t* zeros;         // [tiles, num_groups, 16]; null: each is 2^(bits - 1)
    int64_t zero_bits;            // bits of a zero point: 4 or 8
    const exl::Group* groups;     // [num_groups]
    const int32_t* perm;          // [in_features]; null: the identity
    const float* bias;            // [out_features]; null: no bias
};

enum ExlDtype : int32_t { kExlFloat32 = 0, kExlFloat16 = 1, kExlBfloat16 = 2 };

struct ExlDenseLinear {
    int64_t in_features;
    int64_t out_features;
    int64_t tiles;
    const void* weight;  // dtype [tiles, in_features, 16]
    const float* bias;   // [out_features]; null: no bias
    int64_t dtype;       // ExlDtype
};
}
