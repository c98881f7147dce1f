// Repacking at load: codes of EXL2 and GPTQ files into the layout of ExlPackedLinear (packed.h).
//
// Layout of the files: a column is a bit stream along the rows, least significant bit first, and
// columns are adjacent in 32-bit words; 32 rows of b bits are b words. 16 columns of a word row
// are therefore one vector, and packing consists of shifts and masks of such vectors. The bit
// planes defined in the formats package of Python are matched bit for bit.
//
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
            // Codes are read much later, so a store past the caches saves reading the line first.
            stream_codes(block, load_codes(reinterpret_cast<const uint8_t*>(vector)));
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

// Packs the blocks of a group whose words are in the file's word rows [first, end), for one tile.
template <int Bits>
void pack_group(const Source& s, int64_t first, const Group& group, int64_t column,
                uint8_t* tile) {
    // A word row of the file is 64 bytes of a tile, in the same order.
    const int64_t base = group.offset / kBlockBitBytes;
    const int64_t before = std::max<int64_t>(0, first - base);
    const int64_t up_to = std::max<int64_t>(0, first + s.word_rows - base);
    const int64_t begin = ceil_div(before, Bits);
    const int64_t end = std::min<int64_t>(ceil_div(group.rows, kBlockRows), ceil_div(up_to, Bits));
    for (int64_t block = begin; block < end; ++block) {
        const int64_t word = base + block * Bits;
        const int rows = static_cast<int>(std::min<int64_t>(group.rows - block * kBlockRows,
                                                            kBlockRows));
        pack_sequential<Bits>(s, word - first, rows, column, tile + word * kBlockBitBytes);
    }
}

// Bytes of a tile up to the end of its last block.
int64_t used_bytes(const Group* groups, int64_t num_groups) {
    const Group& last = groups[num_groups - 1];
    const int64_t blocks = ceil_div(last.rows, kBlockRows);
    return last.offset + blocks * last.bits * kBlockBitBytes;
}

// Clears what no block uses at the end of every tile.
void clear_tails(uint8_t* codes, int64_t tiles, int64_t tile_bytes, int64_t used) {
    for (int64_t t = 0; t < tiles && used < tile_bytes; ++t) {
        std::memset(codes + t * tile_bytes + used, 0, tile_bytes - used);
    }
}

}  // namespace
}  // namespace exl

// Packs a part of a layer whose stored rows are in the order of the file: EXL2, and GPTQ without
// act-order. It runs on the calling thread, because a load packs several layers at once.
//
// A tile's blocks of the part are packed one after the other, so that writing is sequential within
// a tile. Reading is not, so a part should fit into the second level cache.
//
// words: uint32 [word_rows, columns], word rows [first, first + word_rows) of the file, which
// begin and end between blocks; groups [num_groups]; codes: uint8 [tiles, tile_bytes], aligned to
// 64 bytes, of which the part's blocks are written, and by the part that begins at 0 also what no
// block uses.
EXL_API void exl_pack_words(const uint32_t* words, int64_t word_rows, int64_t columns,
                            int64_t first, const exl::Group* groups, int64_t num_groups,
                            uint8_t* codes, int64_t tiles, int64_t tile_bytes) {
    using namespace exl;
    const Source source = {words, word_rows, columns};
    for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t g = 0; g < num_groups; ++g) {
            with_bits(groups[g].bits, [&](auto bits) EXL_INLINED {
                pack_group<bits>(source, first, groups[g], t * kTileColumns,
                                 codes + t * tile_bytes);
            });
        }
    }
    if (first == 0) clear_tails(codes, tiles, tile_bytes, used_bytes(groups, num_groups));
    finish_streaming();
}

// Packs a layer of a GPTQ file whose stored rows are in any order. It runs on all threads.
//
// qweight: uint32 [word_rows, columns] as in the file; perm: int32 [in_features], stored row r is
// input channel perm[r], or r if perm is null; groups [num_groups], all of the same bits; codes:
// uint8 [tiles, tile_bytes], aligned to 64 bytes, written.
EXL_API void exl_pack_gptq(const uint32_t* qweight, int64_t word_rows, int64_t columns,
                           const int32_t* perm, const exl::Group* groups, int64_t num_groups,
                           uint8_t* codes, int64_t tiles, int64_t tile_bytes) {
    using namespace exl;
    const Source source = {qweight, word_rows, columns};
    const int bits = groups[0].bits;
    const int64_t used = used_bytes(groups, num_groups);
    const int64_t blocks = used / (bits * kBlockBitBytes);
    parallel_for(blocks, balanced_grain(blocks, 1), [&](int64_t first, int64_t end, int) {
        int64_t g = 0;
        for (int64_t block = first; block < end; ++block) {
            const int64_t offset = block * bits * kBlockBitBytes;
            while (g + 1 < num_groups && groups[g + 1].offset <= offset) ++g;
            const Group& group = groups[g];
            const int row =
                static_cast<int>((offset - group.offset) / (bits * kBlockBitBytes)) * kBlockRows;
            const int rows = std::min(group.rows - row, kBlockRows);
            int32_t channels[kBlockRows];
            for (int i = 0; i < rows; ++i) {
                const int stored = group.first_row + row + i;
                channels[i] = perm ? perm[stored] : stored;
            }
            for (int64_t t = 0; t < tiles; ++t) {
                with_bits(bits, [&](auto width) EXL_INLINED {
                    pack_gathered<width>(source, channels, rows, t * kTileColumns,
                                         codes + t * tile_bytes + offset);
                });
            }
        }
        finish_streaming();
    });
    clear_tails(codes, tiles, tile_bytes, used);
}
