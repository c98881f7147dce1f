// Repacking at load: codes of EXL2 and GPTQ files into the layout of ExlPackedLinear (packed.h).
//
// Layout of the files: a column is a bit stream along the rows, least significant bit first, and
// columns are adjacent in 32-bit words; 32 rows of b bits are b words. 16 columns of a word row
// are therefore one vector, and packing consists of shifts and masks of such vectors. The bit
// planes defined in the formats package of Python are matched bit for bit.
//
// Work per thread: blocks of 32 stored rows over all tiles, so that reading follows the file.
// Padding: columns beyond the file are 0, rows that pad a group are 2^(bits - 1), the value of
// the default zero point.
#include <algorithm>
#include <cstring>

#include "api.h"
#include "packed.h"
#include "threads.h"
#include "unpack.h"

namespace exl {
namespace {

using Words = uint32_t[kTileColumns];

struct Source {
    const uint32_t* words;  // [word_rows, columns]
    int64_t word_rows;
    int64_t columns;
};

// Reads 16 columns of a word row from `column` on; columns beyond the file are 0.
EXL_INLINE void read_words(const Source& s, int64_t row, int64_t column, Words& out) {
    const uint32_t* source = s.words + row * s.columns + column;
    if (row < s.word_rows && column + kTileColumns <= s.columns) {
        std::memcpy(out, source, sizeof(out));
        return;
    }
    const int64_t left = row < s.word_rows ? s.columns - column : 0;
    for (int64_t i = 0; i < kTileColumns; ++i) out[i] = i < left ? source[i] : 0;
}

// Writes the codes of 32 rows, one per word, into the bit planes of a block.
template <int Bits>
void write_block(const Words (&codes)[kBlockRows], uint8_t* block) {
    Words registers[kBlockRegisters];
    for (int j = 0; j < kBlockRegisters; ++j) {
        for (int i = 0; i < kTileColumns; ++i) {
            registers[j][i] = codes[4 * j][i] | codes[4 * j + 1][i] << 8 |
                              codes[4 * j + 2][i] << 16 | codes[4 * j + 3][i] << 24;
        }
    }
    constexpr int kHigh = high_width(Bits);
    constexpr int kWidths[] = {kHigh, Bits - kHigh};
    int shift = Bits;
    for (const int width : kWidths) {
        if (width == 0) break;
        shift -= width;
        const uint32_t mask = 0x01010101u * ((1u << width) - 1);
        const int fields = 8 / width;
        for (int v = 0; v < width; ++v) {
            Words vector = {};
            for (int f = 0; f < fields; ++f) {
                for (int i = 0; i < kTileColumns; ++i) {
                    vector[i] |= (registers[v * fields + f][i] >> shift & mask) << (f * width);
                }
            }
            std::memcpy(block, vector, sizeof(vector));
            block += sizeof(vector);
        }
    }
}

void fill_rows(Words (&codes)[kBlockRows], int first, int bits) {
    for (int row = first; row < kBlockRows; ++row) {
        std::fill_n(codes[row], kTileColumns, 1u << (bits - 1));
    }
}

// Packs a block whose rows are consecutive in the file, from word row `word` on.
template <int Bits>
void pack_sequential(const Source& s, int64_t word, int rows, int64_t column, uint8_t* block) {
    Words words[Bits + 1] = {};
    const int count = ceil_div(rows * Bits, 32);
    for (int i = 0; i < count; ++i) read_words(s, word + i, column, words[i]);
    Words codes[kBlockRows];
    unrolled<kBlockRows>([&](auto row) EXL_INLINED {
        constexpr int kWord = row * Bits / 32, kShift = row * Bits % 32;
        for (int i = 0; i < kTileColumns; ++i) {
            uint32_t code = words[kWord][i] >> kShift;
            if constexpr (kShift + Bits > 32) code |= words[kWord + 1][i] << (32 - kShift);
            codes[row][i] = code & ((1u << Bits) - 1);
        }
    });
    fill_rows(codes, rows, Bits);
    write_block<Bits>(codes, block);
}

// Packs a block whose rows are the given input channels.
template <int Bits>
void pack_gathered(const Source& s, const int32_t* channels, int rows, int64_t column,
                   uint8_t* block) {
    Words codes[kBlockRows];
    for (int row = 0; row < rows; ++row) {
        const int64_t bit = int64_t{channels[row]} * Bits;
        const int shift = static_cast<int>(bit % 32);
        Words low, high = {};
        read_words(s, bit / 32, column, low);
        if (shift + Bits > 32) read_words(s, bit / 32 + 1, column, high);
        for (int i = 0; i < kTileColumns; ++i) {
            // 64 bits wide, because shift = 0 would otherwise need a shift by 32.
            const uint64_t both = low[i] | static_cast<uint64_t>(high[i]) << 32;
            codes[row][i] = static_cast<uint32_t>(both >> shift) & ((1u << Bits) - 1);
        }
    }
    fill_rows(codes, rows, Bits);
    write_block<Bits>(codes, block);
}

// Calls pack(group, first row within the group, rows, column, block address) for every block of
// every tile.
template <class Pack>
void for_each_block(const Group* groups, int64_t num_groups, uint8_t* codes, int64_t tiles,
                int64_t tile_bytes, const Pack& pack) {
    int64_t blocks = 0, used_bytes = 0;
    for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t count = ceil_div(groups[g].rows, kBlockRows);
        blocks += count;
        used_bytes += count * groups[g].bits * kBlockBitBytes;
    }
    parallel_for(blocks, balanced_grain(blocks, 1), [&](int64_t first, int64_t end, int) {
        int64_t g = 0, base = 0;
        for (int64_t block = first; block < end; ++block) {
            int64_t count = ceil_div(groups[g].rows, kBlockRows);
            while (block - base >= count) {
                base += count;
                ++g;
                count = ceil_div(groups[g].rows, kBlockRows);
            }
            const Group& group = groups[g];
            const int row = static_cast<int>(block - base) * kBlockRows;
            const int rows = std::min(group.rows - row, kBlockRows);
            const int64_t offset = group.offset + (block - base) * group.bits * kBlockBitBytes;
            for (int64_t t = 0; t < tiles; ++t) {
                pack(group, row, rows, t * kTileColumns, codes + t * tile_bytes + offset);
            }
        }
    });
    for (int64_t t = 0; t < tiles && used_bytes < tile_bytes; ++t) {
        std::memset(codes + t * tile_bytes + used_bytes, 0, tile_bytes - used_bytes);
    }
}

}  // namespace
}  // namespace exl

// Packs a layer of an EXL2 file, whose groups are consecutive.
//
// q_weight: uint32 [word_rows, columns] as in the file; groups [num_groups]; codes: uint8
// [tiles, tile_bytes], written.
EXL_API void exl_pack_exl2(const uint32_t* q_weight, int64_t word_rows, int64_t columns,
                           const exl::Group* groups, int64_t num_groups, uint8_t* codes,
                           int64_t tiles, int64_t tile_bytes) {
    using namespace exl;
    const Source source = {q_weight, word_rows, columns};
    for_each_block(groups, num_groups, codes, tiles, tile_bytes,
               [&](const Group& group, int row, int rows, int64_t column, uint8_t* block) {
                   // A word row of the file is 64 bytes of a tile, in the same order.
                   const int64_t word =
                       group.offset / kBlockBitBytes + row / kBlockRows * group.bits;
                   with_bits(group.bits, [&](auto bits) EXL_INLINED {
                       pack_sequential<bits>(source, word, rows, column, block);
                   });
               });
}

// Packs a layer of a GPTQ file.
//
// qweight: uint32 [word_rows, columns] as in the file; perm: int32 [in_features], stored row r is
// input channel perm[r], or r if perm is null; groups [num_groups]; codes: uint8
// [tiles, tile_bytes], written.
EXL_API void exl_pack_gptq(const uint32_t* qweight, int64_t word_rows, int64_t columns,
                           const int32_t* perm, const exl::Group* groups, int64_t num_groups,
                           uint8_t* codes, int64_t tiles, int64_t tile_bytes) {
    using namespace exl;
    const Source source = {qweight, word_rows, columns};
    for_each_block(groups, num_groups, codes, tiles, tile_bytes,
               [&](const Group& group, int row, int rows, int64_t column, uint8_t* block) {
                   int32_t channels[kBlockRows];
                   for (int i = 0; i < rows; ++i) {
                       const int stored = group.first_row + row + i;
                       channels[i] = perm ? perm[stored] : stored;
                   }
                   with_bits(group.bits, [&](auto bits) EXL_INLINED {
                       pack_gathered<bits>(source, channels, rows, column, block);
                   });
               });
}
