// Linear layers as they lie in memory: constants and structs that Python and C++ share.
//
// The packed layout is described in exl_loader/formats/packed.py, word for word what is
// meant here; kernels/native.py mirrors the structs.
#pragma once

#include <cstdint>

namespace exl {

constexpr int kTileColumns = 16;
constexpr int kBlockRows = 32;
// A register is 4 rows of 16 columns, one byte a code: 8 of them a block.
constexpr int kRegisterRows = 4;
constexpr int kRegisterBytes = kTileColumns * kRegisterRows;
constexpr int kBlockRegisters = kBlockRows / kRegisterRows;
// Bytes of a block of b-bit codes are b times this.
constexpr int kBlockBitBytes = kBlockRows * kTileColumns / 8;

// A row of the group table.
struct Group {
    int32_t bits;
    int32_t first_row;
    int32_t rows;
    int32_t offset;  // bytes from the start of a tile
};

}  // namespace exl

extern "C" {

struct ExlPackedLinear {
    int64_t in_features;
    int64_t out_features;
    int64_t tiles;
    int64_t tile_bytes;
    int64_t num_groups;
    const uint8_t* codes;      // [tiles, tile_bytes]
    const uint16_t* scales;    // float16 [tiles, num_groups, 16]
    const uint8_t* zeros;      // [tiles, num_groups, 16], or null: 2^(bits - 1)
    const exl::Group* groups;  // [num_groups]
    const int32_t* perm;       // [in_features], or null: identity
    const float* bias;         // [out_features], or null
};

enum ExlDtype : int32_t { kExlFloat32 = 0, kExlFloat16 = 1, kExlBfloat16 = 2 };

struct ExlDenseLinear {
    int64_t in_features;
    int64_t out_features;
    int64_t tiles;
    const void* weight;  // [tiles, in_features, 16]
    const float* bias;   // [out_features], or null
    int64_t dtype;       // ExlDtype
};
}
