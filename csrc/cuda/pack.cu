// Repacking at load: tensors of EXL2 and GPTQ files into streams (linear_layout.cuh).
//
// Layout of the files: a column is a bit stream along the rows, least significant bit first, and
// columns are adjacent in 32-bit words; 32 rows of b bits are b words. The streams defined in the
// formats package of Python are matched bit for bit. A launch takes a range of a layer's columns;
// the file's tensors on the device hold just these columns.
//
// Work per warp: one block of 32 rows x 32 columns. grid.x: blocks of the layer, grid.y: groups of
// kPackWarps tiles. A lane unpacks its column, then the warp transposes columns to fragments
// through shared memory: kColumnStride words per column, for each warp.
#include "cuda/linear_layout.cuh"

namespace {

using namespace exl;

constexpr int kPackWarps = 4;
constexpr int kPackThreads = 32 * kPackWarps;
constexpr int kQuads = kStreamBlockRows / 4;
// Distance in words between the 8 words of neighbouring columns: odd, so that columns are in
// different banks.
constexpr int kColumnStride = kQuads + 1;

struct PackSource {
    const uint32_t* words;   // [word_rows, columns]
    const uint16_t* scales;  // float16 [num_groups, columns], or null: the source has levels
    const uint8_t* fields;   // levels or zero points [num_groups, columns]
    int zero_bits;           // 0: fields are levels
    int64_t word_rows;
    int columns;
};

// The group of a block, and the block's index in it.
struct PackTarget {
    StreamGroup group;
    int index;  // of the group
    int block;  // within the group
};

// Finds the group of a block: lanes test 32 groups at a time, and exactly one lane finds it.
__device__ __forceinline__ PackTarget find_block(const StreamGroup* groups, int num_groups,
                                                 int block) {
    const int row = block * kStreamBlockRows;
    for (int first = 0;; first += 32) {
        const int candidate = first + lane_id();
        bool contains = false;
        if (candidate < num_groups) {
            const StreamGroup group = groups[candidate];
            contains = row >= group.first_row && row < group.first_row + group.rows;
        }
        const uint32_t found = exl::ballot(contains);
        if (found == 0) continue;
        const int index = first + count_ones((found & (0u - found)) - 1);
        const StreamGroup group = groups[index];
        return {group, index, (row - group.first_row) / kStreamBlockRows};
    }
}

__device__ __forceinline__ uint32_t word_at(const PackSource& s, int64_t row, int column) {
    return row < s.word_rows && column < s.columns ? s.words[row * s.columns + column] : 0;
}

// Reads the code of Bits bits at bit `bit` of a column's stream.
template <int Bits>
__device__ __forceinline__ uint32_t code_at(const PackSource& s, int64_t bit, int column) {
    const uint32_t low = word_at(s, bit / 32, column);
    const int shift = static_cast<int>(bit % 32);
    const uint32_t high = shift + Bits > 32 ? word_at(s, bit / 32 + 1, column) : 0;
    return funnel_shift_right(low, high, shift) & ((1u << Bits) - 1);
}

// Writes the planes of a block from registers j = 0..7 of this lane.
template <int Bits>
__device__ __forceinline__ void write_planes(const uint32_t (&registers)[8], uint8_t* block) {
    constexpr int kHigh = high_width(Bits);
    constexpr int kWidths[2] = {kHigh, Bits - kHigh};
    int shift = Bits;
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
        const int width = kWidths[plane];
        if (width == 0) break;
        shift -= width;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i >= width) break;
            uint32_t word = 0;
#pragma unroll
            for (int j = i; j < 8; j += width) {
                const uint32_t field = registers[j] >> shift & ((1u << width) - 1) * 0x01010101u;
                word |= field << (width * (j / width));
            }
            // In the plane of 8 bits, words 4..7 of all lanes follow words 0..3 of all lanes.
            const int index =
                width == 8 ? i / 4 * 128 + lane_id() * 4 + i % 4 : lane_id() * width + i;
            reinterpret_cast<uint32_t*>(block)[index] = word;
        }
        block += width * kStreamBitBytes;
    }
}

template <int Bits, class ReadCode>
__device__ __forceinline__ void pack_block(uint32_t* shared, int rows, uint8_t* block,
                                           const ReadCode& read_code) {
    const int column = lane_id();
    for (int quad = 0; quad < kQuads; ++quad) {
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = 4 * quad + i;
            const uint32_t code = row < rows ? read_code(row) : 1u << (Bits - 1);
            word |= code << (8 * i);
        }
        shared[column * kColumnStride + quad] = word;
    }
    warp_sync();  // columns are written before fragments are read
    uint32_t registers[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int source = 16 * (j / 4) + 8 * (j % 2) + lane_id() / 4;
        registers[j] = shared[source * kColumnStride + 2 * (lane_id() % 4) + j / 2 % 2];
    }
    write_planes<Bits>(registers, block);
}

// Writes the header of a group; each lane handles its own column. Called by the whole warp.
__device__ __forceinline__ void write_header(const PackSource& s, int group, int column,
                                             uint8_t* header) {
    const int element = 4 * (lane_id() % 8) + lane_id() / 8;
    const bool exists = column < s.columns;
    const int64_t index = static_cast<int64_t>(group) * s.columns + column;
    if (s.zero_bits > 0) {
        reinterpret_cast<uint16_t*>(header)[element] = exists ? s.scales[index] : 0;
        header += kScaleBytes;
    }
    const uint32_t field = exists ? s.fields[index] : 0;
    if (s.zero_bits == 8) {
        header[element] = static_cast<uint8_t>(field);
        return;
    }
    // Columns c, c + 8, c + 16 and c + 24 have neighbouring fields of 4 bits.
    uint32_t fields = field << (4 * (lane_id() / 8));
    fields |= shfl_xor(fields, 8);
    fields |= shfl_xor(fields, 16);
    if (lane_id() < 8) {
        reinterpret_cast<uint16_t*>(header)[lane_id()] = static_cast<uint16_t>(fields);
    }
}

// Packs the block of this warp. read_code(width, target, word offset of the group, row of the
// group, column) returns a code.
template <class ReadCode>
__device__ __forceinline__ void pack_streams(const PackSource& s, const StreamGroup* groups,
                                             int num_groups, uint8_t* codes, int64_t tile_bytes,
                                             const ReadCode& read_code) {
    EXL_SHARED(char, memory);
    auto* shared = reinterpret_cast<uint32_t*>(memory) + warp_id() * 32 * kColumnStride;
    const int tile = static_cast<int>(blockIdx.y) * kPackWarps + warp_id();
    if (tile >= stream_tiles(s.columns)) return;
    const PackTarget target = find_block(groups, num_groups, static_cast<int>(blockIdx.x));
    const int column = tile * kStreamColumns + lane_id();
    const int header = header_bytes(s.zero_bits);
    uint8_t* start = codes + tile * tile_bytes + target.group.offset;
    if (target.block == 0) write_header(s, target.index, column, start);
    start += header + target.block * target.group.bits * kStreamBitBytes;
    // Without headers, 32 columns of a word of the file are 128 bytes of a stream.
    const int64_t words = (target.group.offset - target.index * header) / kStreamBitBytes;
    const int rows = min(kStreamBlockRows, target.group.rows - target.block * kStreamBlockRows);
    with_width(target.group.bits, [&](auto width) {
        constexpr int kBits = decltype(width)::value;
        pack_block<kBits>(shared, rows, start, [&](int row) {
            return read_code(width, target, words, target.block * kStreamBlockRows + row, column);
        });
    });
}

}  // namespace

// Packs columns of a layer of an EXL2 file, whose groups are consecutive.
//
// q_weight: uint32 [word_rows, columns] and levels: uint8 [num_groups, columns] of these columns;
// groups: [num_groups]; codes: uint8 [tiles, tile_bytes], from the first tile of these columns on.
extern "C" __global__ void __launch_bounds__(kPackThreads)
    pack_exl2_kernel(const uint32_t* q_weight, int64_t word_rows, int32_t columns,
                     const uint8_t* levels, const StreamGroup* groups, int32_t num_groups,
                     uint8_t* codes, int64_t tile_bytes) {
    const PackSource source = {q_weight, nullptr, levels, 0, word_rows, columns};
    pack_streams(source, groups, num_groups, codes, tile_bytes,
                 [&](auto width, const PackTarget&, int64_t words, int row, int column) {
                     constexpr int kBits = decltype(width)::value;
                     return code_at<kBits>(source, words * 32 + int64_t{row} * kBits, column);
                 });
}
EXL_KERNEL(pack_exl2_kernel);

// Packs columns of a layer of a GPTQ file.
//
// qweight: uint32 [word_rows, columns]; scales: float16 and zeros: uint8 (with the file's offset
// added) [num_groups, columns]; zero_bits: of a zero point in a stream; perm: int32 [in_features],
// stored row r is input channel perm[r], or r if perm is null; groups: [num_groups]; codes: uint8
// [tiles, tile_bytes].
extern "C" __global__ void __launch_bounds__(kPackThreads)
    pack_gptq_kernel(const uint32_t* qweight, int64_t word_rows, int32_t columns,
                     const uint16_t* scales, const uint8_t* zeros, int32_t zero_bits,
                     const int32_t* perm, const StreamGroup* groups, int32_t num_groups,
                     uint8_t* codes, int64_t tile_bytes) {
    const PackSource source = {qweight, scales, zeros, zero_bits, word_rows, columns};
    pack_streams(source, groups, num_groups, codes, tile_bytes,
                 [&](auto width, const PackTarget& target, int64_t, int row, int column) {
                     constexpr int kBits = decltype(width)::value;
                     const int stored = target.group.first_row + row;
                     const int64_t channel = perm != nullptr ? perm[stored] : stored;
                     return code_at<kBits>(source, channel * kBits, column);
                 });
}
EXL_KERNEL(pack_gptq_kernel);
