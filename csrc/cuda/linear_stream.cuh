// The inner part of quantised matrix products, shared by decoding and prefill: a warp, one
// tile of 32 columns, up to 4 * kRowTiles rows of activations.
//
// Codes are the A operand (16 columns x 32 stored rows a matrix, two matrices a block),
// unsigned bytes; activations the B operand, signed bytes, whose 8 columns are (row, plane)
// pairs: column 2 * r + p. So a lane's accumulators are both planes of one row for two
// columns, and joining the planes needs no other lane: lane L has columns L / 4 + 8 * q,
// q = 0..3, and rows 4 * n + L % 4 for row tile n.
//
// Integer sums of a *span* (rows of one group within one window) are exact, whatever the order.
// Then, once per span and in the order of spans,
//     acc = fma(float(128 * high + low - zero * x_sum), scale * x_scale, acc).
// |128 * high + low| <= 128 rows * 255 * 16256 < 2^30, and as much for the zero points, so
// int32 holds the difference. Every number a lane computes depends on its row alone.
#pragma once

#include "cuda/linear_layout.cuh"

namespace exl {

// Where codes are read: bytes of a stream from the start of a split on, in a ring of shared
// memory that asynchronous copies fill ahead of the reader.
//
// A chunk is as long as the longest block, so that one more is all that a block can need. It
// is 32 bytes a lane. Two slots hold what is being read (a block may lie in two chunks), all
// others are under way: 2 KiB a warp of a shallow ring, 6 KiB of a deep one. Which one it is the
// launch says: kernels of their own would take a compiler as long again.
constexpr int kChunkBytes = 8 * kStreamBitBytes;
// What every card has room for, and cards with 160 KiB of shared memory a block and more.
constexpr int kShallowChunks = 4;
constexpr int kDeepChunks = 8;

class RingReader {
public:
    // A ring of `chunks`, and `length` bytes from `source` on, both multiples of 16. Starts
    // reading.
    __device__ __forceinline__ RingReader(char* ring, int chunks, const uint8_t* source,
                                          uint32_t length)
        : ring_(ring), source_(source + lane_id() * 16), length_(length),
          mask_(chunks * kChunkBytes - 1) {
#pragma unroll 1
        for (int i = 0; i < chunks - kReadChunks; ++i) copy_next();
    }
    // Makes bytes below `end` readable, and gives up what lies before the reader's position,
    // which is at least `end` less a chunk.
    __device__ __forceinline__ void await(uint32_t end) {
        if (ready_ >= end) return;
        if (mask_ == kDeepChunks * kChunkBytes - 1) {
            copy_async_wait<kDeepChunks - kReadChunks - 1>();
        } else {
            copy_async_wait<kShallowChunks - kReadChunks - 1>();
        }
        warp_sync();  // all lanes' copies of a chunk are in, all reads of the oldest done
        copy_next();
        ready_ += kChunkBytes;
    }
    __device__ __forceinline__ void finish() {
        copy_async_wait<0>();
        warp_sync();
    }
    __device__ __forceinline__ const char* at(uint32_t place) const {
        return ring_ + (place & mask_);
    }

private:
    static constexpr int kReadChunks = 2;

    __device__ __forceinline__ void copy_next() {
        char* slot = ring_ + (next_ & mask_) + lane_id() * 16;
        const uint32_t mine = next_ + lane_id() * 16;
        copy_async16(slot, source_ + next_, mine < length_);
        copy_async16(slot + 512, source_ + next_ + 512, mine + 512 < length_);
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

// The same for a piece of a stream that lies in shared memory as a whole.
struct PlainReader {
    const char* start;
    __device__ __forceinline__ void await(uint32_t) {}
    __device__ __forceinline__ const char* at(uint32_t place) const { return start + place; }
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

// This lane's words of a plane that begins at `place`.
template <int kWidth, class Reader>
__device__ __forceinline__ void read_plane(const Reader& reader, uint32_t place,
                                           uint32_t (&words)[kWidth]) {
    if constexpr (kWidth == 1) {
        words[0] = *reinterpret_cast<const uint32_t*>(reader.at(place + lane_id() * 4));
    } else if constexpr (kWidth == 2) {
        const uint2 v = *reinterpret_cast<const uint2*>(reader.at(place + lane_id() * 8));
        words[0] = v.x, words[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
            const uint4 v = *reinterpret_cast<const uint4*>(
                reader.at(place + i * 128 + lane_id() * 16));
            words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
        }
    }
}

// A fragments of the block at `place`: matrix 0 has the tile's first 16 columns.
template <int Bits, class Reader>
__device__ __forceinline__ void read_block(const Reader& reader, uint32_t place,
                                           uint32_t (&registers)[2][4]) {
    constexpr int kHigh = Bits == 2 || Bits == 3 ? 2 : Bits == 8 ? 8 : 4;
    constexpr int kLow = Bits - kHigh;
#pragma unroll
    for (int j = 0; j < 8; ++j) registers[j / 4][j % 4] = 0;
    uint32_t high[kHigh];
    read_plane(reader, place, high);
    add_plane<Bits, kHigh, kLow>(high, registers);
    if constexpr (kLow > 0) {
        uint32_t low[kLow];
        read_plane(reader, place + kHigh * kStreamBitBytes, low);
        add_plane<Bits, kLow, 0>(low, registers);
    }
}

// What a warp knows of the tile it reads. All lanes agree but on scales and zeros, which are
// those of the lane's four columns.
struct TileState {
    uint32_t place;  // of the next byte to read, from where the reader begins
    int group;       // the next one
    int bits;
    int left;        // blocks of the group under way
    StreamGroup next;
    float scales[4];
    uint32_t zeros;  // four bytes

    __device__ __forceinline__ void look_ahead(const StreamLayer& w) {
        next = w.groups[min(group, w.num_groups - 1)];
    }
    __device__ __forceinline__ void set_header(const StreamLayer& w, const uint2& halves,
                                               uint32_t points) {
        const float2 low = half2_to_float2(halves.x), high = half2_to_float2(halves.y);
        scales[0] = low.x, scales[1] = low.y, scales[2] = high.x, scales[3] = high.y;
        zeros = w.zeros ? points : 0x01010101u << (bits - 1);
    }
    // At the start of a split; `tile` is the tile's stream.
    __device__ __forceinline__ void begin(const StreamLayer& w, const StreamPlace& start,
                                          const uint8_t* tile) {
        const int column = lane_id() / 4;
        place = 0;
        bits = start.state & 0xFF;
        left = start.state >> 8;
        group = start.group + (left > 0 ? 1 : 0);
        look_ahead(w);
        // A split that begins with a group opens it before its first block. A compiler does not
        // know that, and without these values would read registers that nothing has set.
        zeros = 0;
#pragma unroll
        for (int q = 0; q < 4; ++q) scales[q] = 0.0f;
        if (left == 0) return;
        // A group that began before this split: its header is not in what the warp reads.
        const uint8_t* header = tile + start.header;
        const uint32_t points = w.zeros ? load_nc4(header + kScaleBytes + column * 4) : 0;
        set_header(w, load_nc8(header + column * 8), points);
    }
    template <class Reader>
    __device__ __forceinline__ void open_group(const StreamLayer& w, Reader& reader) {
        const int column = lane_id() / 4;
        const int size = kScaleBytes + (w.zeros ? kZeroBytes : 0);
        bits = next.bits;
        left = stream_blocks(next.rows);
        ++group;
        look_ahead(w);
        reader.await(place + size);
        const uint2 halves = *reinterpret_cast<const uint2*>(reader.at(place + column * 8));
        const uint32_t points =
            w.zeros ? *reinterpret_cast<const uint32_t*>(reader.at(place + kScaleBytes + column * 4))
                    : 0;
        set_header(w, halves, points);
        place += size;
    }
};

// Blocks [first, first + count) of a window, all of one group, added to `acc`.
//
// Rows gives activations: fragments(block, x) this lane's B fragments of a block, for each row
// tile, blocks in order; note(n) the Note of this lane's row in row tile n.
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
        const Note* note = rows.note(n);
        const int2 whole = *reinterpret_cast<const int2*>(note);
        x_scales[n] = bits_float(static_cast<uint32_t>(whole.x));
        minus[n] = whole.y;
        if (count == kWindowBlocks) continue;
        minus[n] = note->negative_block_sums[first];
#pragma unroll 1
        for (int i = 1; i < count; ++i) minus[n] += note->negative_block_sums[first + i];
    }
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        uint2 x[kRowTiles];
        rows.fragments(first + i, x);
        const uint32_t end = state.place + Bits * kStreamBitBytes;
        reader.await(end);
        uint32_t codes[2][4];
        read_block<Bits>(reader, state.place, codes);
        state.place = end;
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

// All of one window, which has `blocks` blocks.
template <int kRowTiles, class Reader, class Rows>
__device__ __forceinline__ void add_window(const StreamLayer& w, TileState& state,
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

// Adds bias and what stands in `out`.
__device__ __forceinline__ void store_output(float value, const StreamLayer& w, int column,
                                             float* out, bool add) {
    if (w.bias != nullptr) value = add_rn(value, w.bias[column]);
    *out = add ? add_rn(*out, value) : value;
}

}  // namespace exl
