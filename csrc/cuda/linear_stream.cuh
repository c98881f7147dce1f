// The inner part of quantised matrix products, shared by decoding and prefill: one warp, one tile
// of 32 columns, up to 4 * kRowTiles rows of activations.
//
// Layout: the stream of a tile as StreamLayer, activations as QuantizedRows (linear_layout.cuh).
// Codes are the A operand (16 columns x 32 stored rows per matrix, two matrices per block),
// unsigned bytes. Activations are the B operand, signed bytes, whose 8 columns are (row, plane)
// pairs: column 2 * r + p. A lane's accumulators are therefore both planes of one row for two
// columns, and joining the planes needs no other lane. Lane L has columns L / 4 + 8 * q,
// q = 0..3, and rows 4 * n + L % 4 for row tile n.
//
// Arithmetic: the integer sums of a *span* (rows of one group within one row_block) are exact in
// any order. Then, once per span and in the order of spans,
//     acc = fma(float(128 * high + low - zero * x_sum), scale * x_scale, acc).
// |128 * high + low| <= 128 rows * 255 * 16256 < 2^30, and the zero point's term has the same
// bound, so that the difference fits into an int32. Every number of a lane depends only on its row.
#pragma once

#include "cuda/linear_layout.cuh"

namespace exl {

// Reader of the bytes of a stream from the start of a row_split on, through a ring in shared memory
// that asynchronous copies fill ahead.
//
// A chunk is as long as the longest block (8 bits), 32 bytes per lane, so that a block needs at
// most one more chunk. Two slots hold the bytes being read, because a block may lie in two chunks;
// all others are in flight: 2 KiB per warp with a shallow ring, 6 KiB with a deep one. The launch
// chooses the depth at run time because separate kernels would double the compile time.
constexpr int kChunkBytes = 8 * kStreamBitBytes;
// kShallowChunks fit on every card, kDeepChunks on cards with at least 160 KiB of shared memory per
// block.
constexpr int kShallowChunks = 4;
constexpr int kDeepChunks = 8;

class RingReader {
public:
    // Starts reading `length` bytes from `source` on, through a ring of `chunks`. Precondition:
    // source and length are multiples of 16.
    __device__ __forceinline__ RingReader(char* ring, int chunks, const uint8_t* source,
                                          uint32_t length)
        : ring_(ring), source_(source + lane_id() * 16), length_(length),
          mask_(chunks * kChunkBytes - 1) {
#pragma unroll 1
        for (int i = 0; i < chunks - kReadChunks; ++i) copy_next();
    }
    // Makes bytes below `end` readable and releases the bytes before the reader's position, which
    // is at least `end` minus a chunk.
    __device__ __forceinline__ void await(uint32_t end) {
        if (ready_ >= end) return;
        if (mask_ == kDeepChunks * kChunkBytes - 1) {
            copy_async_wait<kDeepChunks - kReadChunks - 1>();
        } else {
            copy_async_wait<kShallowChunks - kReadChunks - 1>();
        }
        warp_sync();  // all copies of a chunk have arrived, all reads of the oldest one are done
        copy_next();
        ready_ += kChunkBytes;
    }
    __device__ __forceinline__ void finish() {
        copy_async_wait<0>();
        warp_sync();
    }
    __device__ __forceinline__ const char* at(uint32_t offset) const {
        return ring_ + (offset & mask_);
    }

private:
    static constexpr int kReadChunks = 2;

    __device__ __forceinline__ void copy_next() {
        char* slot = ring_ + (next_ & mask_) + lane_id() * 16;
        const uint32_t lane_start = next_ + lane_id() * 16;
        copy_async16(slot, source_ + next_, lane_start < length_);
        copy_async16(slot + 512, source_ + next_ + 512, lane_start + 512 < length_);
        copy_async_commit();
        next_ += kChunkBytes;
    }
    char* ring_;
    const uint8_t* source_;
    uint32_t length_;
    uint32_t mask_;
    uint32_t next_ = 0;
    uint32_t ready_ = 0;
};

// Reader of a piece of a stream that is completely in shared memory.
struct PlainReader {
    const char* start;
    __device__ __forceinline__ void await(uint32_t) {}
    __device__ __forceinline__ const char* at(uint32_t offset) const { return start + offset; }
};

// Adds a plane of kWidth bits, whose lowest is bit kLow of the codes, to the registers.
template <int Bits, int kWidth, int kLow>
__device__ __forceinline__ void add_plane(const uint32_t (&words)[kWidth],
                                          uint32_t (&registers)[2][4]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int from = kWidth * (j / kWidth);
        const int to = code_shift<Bits>(j / 4) + kLow;
        const uint32_t word = words[j % kWidth];
        const uint32_t moved = from > to ? word >> (from - to) : word << (to - from);
        const uint32_t mask = (((1u << kWidth) - 1) * 0x01010101u) << to;
        registers[j / 4][j % 4] |= moved & mask;
    }
}

// Reads this lane's words of the plane that begins at `offset`.
template <int kWidth, class Reader>
__device__ __forceinline__ void read_plane(const Reader& reader, uint32_t offset,
                                           uint32_t (&words)[kWidth]) {
    if constexpr (kWidth == 1) {
        words[0] = *reinterpret_cast<const uint32_t*>(reader.at(offset + lane_id() * 4));
    } else if constexpr (kWidth == 2) {
        const uint2 v = *reinterpret_cast<const uint2*>(reader.at(offset + lane_id() * 8));
        words[0] = v.x, words[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
            const uint4 v =
                *reinterpret_cast<const uint4*>(reader.at(offset + i * 128 + lane_id() * 16));
            words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
        }
    }
}

// Reads the A fragments of the block at `offset`; matrix 0 has the tile's first 16 columns.
template <int Bits, class Reader>
__device__ __forceinline__ void read_block(const Reader& reader, uint32_t offset,
                                           uint32_t (&registers)[2][4]) {
    constexpr int kHigh = high_width(Bits);
    constexpr int kLow = Bits - kHigh;
#pragma unroll
    for (int j = 0; j < 8; ++j) registers[j / 4][j % 4] = 0;
    uint32_t high[kHigh];
    read_plane(reader, offset, high);
    add_plane<Bits, kHigh, kLow>(high, registers);
    if constexpr (kLow > 0) {
        uint32_t low[kLow];
        read_plane(reader, offset + kHigh * kStreamBitBytes, low);
        add_plane<Bits, kLow, 0>(low, registers);
    }
}

// The state of a warp in the stream of its tile. It is the same in all lanes except for scales and
// zeros, which belong to the lane's four columns.
struct TileState {
    uint32_t offset;  // of the next byte to read, from the start of the reader
    int group;        // the next group
    int bits;
    int left;  // remaining blocks of the group that has begun
    StreamGroup next;
    uint32_t next_unit;  // float16, the scale unit of the next group
    float scales[4];
    uint32_t zeros;  // of four columns, one byte each

    __device__ __forceinline__ void look_ahead(const StreamLayer& w) {
        const int index = min(group, w.num_groups - 1);
        next = w.groups[index];
        if (w.scale_units != nullptr) next_unit = w.scale_units[index];
    }
    __device__ __forceinline__ void set_scales(const uint2& halves) {
        const float2 low = half2_to_float2(halves.x), high = half2_to_float2(halves.y);
        scales[0] = low.x, scales[1] = low.y, scales[2] = high.x, scales[3] = high.y;
    }
    // levels: of four columns, 4 bits each; unit: float16.
    __device__ __forceinline__ void set_levels(uint32_t levels, uint32_t unit) {
        const uint32_t units = unit * 0x00010001u;
        set_scales(make_uint2(level_scales(levels | levels << 12, units),
                              level_scales(levels >> 8 | levels << 4, units)));
        zeros = 0x01010101u << (bits - 1);
    }
    // half((level + 1)^2 * unit) of the levels at bits 0 and 16.
    static __device__ __forceinline__ uint32_t level_scales(uint32_t levels, uint32_t units) {
        // The float16 0x6400 is 1024, and the last bit of its fraction is 1.
        const uint32_t shifted = (levels & 0x000F000Fu) | 0x64006400u;
        const uint32_t roots = h2_sub(shifted, 0x63FE63FEu);  // 1023
        return h2_mul(h2_mul(roots, roots), units);
    }
    // Reads the header of a group; load8, load4 and load2 read bytes at an offset in the header.
    template <class Load8, class Load4, class Load2>
    __device__ __forceinline__ void read_header(const StreamLayer& w, uint32_t unit,
                                                const Load8& load8, const Load4& load4,
                                                const Load2& load2) {
        const int column = lane_id() / 4;
        if (w.zero_bits == 0) {
            set_levels(load2(column * 2), unit);
            return;
        }
        set_scales(load8(column * 8));
        if (w.zero_bits == 8) {
            zeros = load4(kScaleBytes + column * 4);
        } else {
            const uint32_t points = load2(kScaleBytes + column * 2);
            const uint32_t pairs = (points | points << 8) & 0x00FF00FFu;
            zeros = (pairs | pairs << 4) & 0x0F0F0F0Fu;
        }
    }
    // Starts at a row_split; `tile` is the tile's stream.
    __device__ __forceinline__ void begin(const StreamLayer& w, const StreamPosition& start,
                                          const uint8_t* tile) {
        offset = 0;
        bits = start.state & 0xFF;
        left = start.state >> 8;
        group = start.group + (left > 0 ? 1 : 0);
        // If a row_split begins with a group, open_group sets these values before the first block.
        // They are set here because the compiler cannot know that and would warn.
        zeros = next_unit = 0;
#pragma unroll
        for (int q = 0; q < 4; ++q) scales[q] = 0.0f;
        look_ahead(w);
        if (left == 0) return;
        // The group began before this row_split, so its header is not in the bytes of the reader.
        const uint8_t* header = tile + start.header;
        const uint32_t unit = w.scale_units != nullptr ? w.scale_units[start.group] : 0;
        read_header(
            w, unit, [&](int at) { return load_nc8(header + at); },
            [&](int at) { return load_nc4(header + at); },
            [&](int at) { return uint32_t{*reinterpret_cast<const uint16_t*>(header + at)}; });
    }
    template <class Reader>
    __device__ __forceinline__ void open_group(const StreamLayer& w, Reader& reader) {
        const int size = header_bytes(w.zero_bits);
        const uint32_t unit = next_unit;
        bits = next.bits;
        left = stream_blocks(next.rows);
        ++group;
        look_ahead(w);
        reader.await(offset + size);
        read_header(
            w, unit,
            [&](int at) { return *reinterpret_cast<const uint2*>(reader.at(offset + at)); },
            [&](int at) { return *reinterpret_cast<const uint32_t*>(reader.at(offset + at)); },
            [&](int at) {
                return uint32_t{*reinterpret_cast<const uint16_t*>(reader.at(offset + at))};
            });
        offset += size;
    }
};

// Adds blocks [first, first + count) of a row_block, all of one group, to `acc`.
//
// Rows provides activations: fragments(block, x) loads this lane's B fragments of a block for each
// row tile, called for blocks in order; activation_scale(n) is that of this lane's row in row
// tile n.
template <int Bits, int kRowTiles, class Reader, class Rows>
__device__ __forceinline__ void add_span(TileState& state, Reader& reader, Rows& rows,
                                         int first, int count, float (&acc)[kRowTiles][4]) {
    int32_t sums[2][kRowTiles][4];
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles * 4; ++i) {
        sums[i / 4 / kRowTiles][i / 4 % kRowTiles][i % 4] = 0;
    }
    float x_scales[kRowTiles];
    int32_t minus[kRowTiles];
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
        const ActivationScale* activation_scale = rows.activation_scale(n);
        const int2 whole = *reinterpret_cast<const int2*>(activation_scale);
        x_scales[n] = bits_float(static_cast<uint32_t>(whole.x));
        minus[n] = whole.y;
        if (count == kBlocksPerRowBlock) continue;
        minus[n] = activation_scale->negative_block_sums[first];
#pragma unroll 1
        for (int i = 1; i < count; ++i) {
            minus[n] += activation_scale->negative_block_sums[first + i];
        }
    }
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        uint2 x[kRowTiles];
        rows.fragments(first + i, x);
        const uint32_t end = state.offset + Bits * kStreamBitBytes;
        reader.await(end);
        uint32_t codes[2][4];
        read_block<Bits>(reader, state.offset, codes);
        state.offset = end;
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
            const uint32_t b[2] = {x[n].x, x[n].y};
            mma_u8s8_16x8x32(sums[0][n], codes[0], b);
            mma_u8s8_16x8x32(sums[1][n], codes[1], b);
        }
    }
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const int m = q / 2, shift = code_shift<Bits>(m);
            const int32_t zero = static_cast<int32_t>(state.zeros >> (8 * q) & 0xFFu);
            const int32_t high = sums[m][n][q % 2 * 2], low = sums[m][n][q % 2 * 2 + 1];
            const int32_t sum =
                high * (1 << kPlaneShift) + low + zero * (minus[n] * (1 << shift));
            const float scale = state.scales[q] * x_scales[n] * (1.0f / (1 << shift));
            acc[n][q] = fmaf(static_cast<float>(sum), scale, acc[n][q]);
        }
    }
}

// Adds one row_block, which has `blocks` blocks.
template <int kRowTiles, class Reader, class Rows>
__device__ __forceinline__ void add_row_block(const StreamLayer& w, TileState& state,
                                              Reader& reader, Rows& rows, int blocks,
                                              float (&acc)[kRowTiles][4]) {
    for (int block = 0; block < blocks;) {
        if (state.left == 0) state.open_group(w, reader);
        const int count = min(state.left, blocks - block);
        with_width(state.bits, [&](auto width) {
            add_span<decltype(width)::value>(state, reader, rows, block, count, acc);
        });
        state.left -= count;
        block += count;
    }
}

// Stores `value` plus the bias and, if `add`, the present content of `out`.
__device__ __forceinline__ void store_output(float value, const StreamLayer& w, int column,
                                             float* out, bool add) {
    if (w.bias != nullptr) value = add_rn(value, w.bias[column]);
    *out = add ? add_rn(*out, value) : value;
}

}  // namespace exl
