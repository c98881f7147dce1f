// Quantised matrix products of many rows: prefill. Bound by tensor cores.
//
// Layout: weights as StreamLayer, activations as QuantizedRows (linear_layout.cuh).
//
// Work per block: 4 tiles (128 columns) and 8 * kRowTiles rows. Work per warp: one tile and one
// half of the rows, through all row_blocks of the layer. The block copies activations and streams
// of a row_block into shared memory, one row_block ahead of the one it multiplies; a warp expands
// codes from shared memory to fragments. Integers, roundings and row_splits are those of decoding:
// at the end of each row_split the running sums are added to the totals and start from zero. A row
// therefore has the same bits in prefill and in decoding.
//
// Registers: for 64 rows a lane has 64 integer sums, 32 running sums and 32 totals.
//
// Shared memory, two tile buffers: activations [row][row_block codes], swizzled; activation scales
// [row]; 4 pieces of stream of row_block_bytes each.
//
// Precondition: the activations were quantised by linear_quantize.cu with the layer's permutation.
#include "cuda/linear_stream.cuh"

namespace {

using namespace exl;

constexpr int kBlockTiles = 4;
constexpr int kRowHalves = 2;
constexpr int kPrefillThreads = 32 * kBlockTiles * kRowHalves;
constexpr int kPieceBytes = 16;
constexpr int kRowPieces = kRowBlockCodeBytes / kPieceBytes;
constexpr int kScalePieces = static_cast<int>(sizeof(ActivationScale)) / kPieceBytes;

// The codes of a row in a row_block are 64 words, so rows would be in the same banks. Odd rows have
// neighbouring blocks exchanged, so that the two rows of a fragment do not collide.
__device__ __forceinline__ int swizzled_block(int row, int block) { return block ^ (row & 1); }

template <int kRowTiles>
struct TileBuffer {
    static constexpr int kRows = 4 * kRowHalves * kRowTiles;
    static constexpr int kScalesOffset = kRows * kRowBlockCodeBytes;
    static constexpr int kStreamsOffset =
        kScalesOffset + kRows * static_cast<int>(sizeof(ActivationScale));

    char* start;

    // Starts to copy `row_block`. Rows and tiles beyond the last repeat it and are not stored.
    __device__ __forceinline__ void copy(const StreamLayer& w, const QuantizedRows& x,
                                         int row_block, int first_row, int first_tile) const {
        const int blocks = stream_blocks(w.in_features);
        const int row_blocks = stream_row_blocks(w.in_features);
        const int valid_pieces =
            (blocks - row_block * kBlocksPerRowBlock) * kBlockCodeBytes / kPieceBytes;
        for (int i = threadIdx.x; i < kRows * kRowPieces; i += kPrefillThreads) {
            const int row = i / kRowPieces, piece = i % kRowPieces;
            const int64_t source = min(first_row + row, x.rows - 1);
            const int block = piece / kBlockPieces, piece_in_block = piece % kBlockPieces;
            char* target = start + row * kRowBlockCodeBytes +
                           swizzled_block(row, block) * kBlockCodeBytes +
                           piece_in_block * kPieceBytes;
            copy_async16(target,
                         x.codes + source * blocks * kBlockCodeBytes +
                             static_cast<int64_t>(row_block) * kRowBlockCodeBytes +
                             piece * kPieceBytes,
                         piece < valid_pieces);
        }
        for (int i = threadIdx.x; i < kRows * kScalePieces; i += kPrefillThreads) {
            const int row = i / kScalePieces, piece = i % kScalePieces;
            const int64_t source = min(first_row + row, x.rows - 1);
            copy_async16(start + kScalesOffset + i * kPieceBytes,
                         reinterpret_cast<const char*>(x.activation_scales + source * row_blocks +
                                                       row_block) +
                             piece * kPieceBytes);
        }
        const int begin = w.row_blocks[row_block].offset;
        const int pieces = (w.row_blocks[row_block + 1].offset - begin) / kPieceBytes;
        const int last_tile = stream_tiles(w.out_features) - 1;
#pragma unroll
        for (int tile = 0; tile < kBlockTiles; ++tile) {
            const uint8_t* source =
                w.codes + min(first_tile + tile, last_tile) * w.tile_bytes + begin;
            char* target = start + kStreamsOffset + tile * w.row_block_bytes;
            for (int i = threadIdx.x; i < pieces; i += kPrefillThreads) {
                copy_async16(target + i * kPieceBytes, source + i * kPieceBytes);
            }
        }
    }

    static constexpr int kBlockPieces = kBlockCodeBytes / kPieceBytes;
};

// Activations in a tile buffer; `half` selects 4 * kRowTiles of its rows.
template <int kRowTiles>
struct SharedRows {
    const char* start;
    int half;

    __device__ __forceinline__ void fragments(int block, uint2 (&x)[kRowTiles]) const {
        const int t = lane_id() % 4, g = lane_id() / 4;
        const int row = 4 * half * kRowTiles + g / 2;
        const char* source = start + row * kRowBlockCodeBytes +
                             swizzled_block(row, block) * kBlockCodeBytes +
                             g % 2 * kStreamBlockRows + 8 * t;
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
            x[n] = *reinterpret_cast<const uint2*>(source + 4 * n * kRowBlockCodeBytes);
        }
    }
    __device__ __forceinline__ const ActivationScale* activation_scale(int n) const {
        const char* activation_scales = start + TileBuffer<kRowTiles>::kScalesOffset;
        return reinterpret_cast<const ActivationScale*>(activation_scales) +
               4 * (half * kRowTiles + n) + lane_id() % 4;
    }
};

template <int kRowTiles>
__device__ __forceinline__ void prefill(const StreamLayer& w, const QuantizedRows& x, float* out,
                                        int64_t out_stride, bool add) {
    EXL_SHARED(char, memory);
    const int tile_in_block = warp_id() % kBlockTiles, half = warp_id() / kBlockTiles;
    const int first_row = static_cast<int>(blockIdx.x) * TileBuffer<kRowTiles>::kRows;
    const int first_tile = static_cast<int>(blockIdx.y) * kBlockTiles;
    const int buffer_bytes =
        TileBuffer<kRowTiles>::kStreamsOffset + kBlockTiles * w.row_block_bytes;
    const int row_blocks = stream_row_blocks(w.in_features), blocks = stream_blocks(w.in_features);

    TileState state;
    state.begin(w, w.starts[0], w.codes);
    float acc[kRowTiles][4] = {}, totals[kRowTiles][4] = {};
    int row_split = 0, row_split_end = row_blocks / w.row_splits;
    TileBuffer<kRowTiles>{memory}.copy(w, x, 0, first_row, first_tile);
    copy_async_commit();
    for (int row_block = 0; row_block < row_blocks; ++row_block) {
        if (row_block + 1 < row_blocks) {
            const TileBuffer<kRowTiles> next = {memory + (row_block + 1) % 2 * buffer_bytes};
            next.copy(w, x, row_block + 1, first_row, first_tile);
        }
        copy_async_commit();
        copy_async_wait<1>();
        block_sync();  // all threads' copies of this row_block have arrived
        const char* start = memory + row_block % 2 * buffer_bytes;
        PlainReader reader = {start + TileBuffer<kRowTiles>::kStreamsOffset +
                              tile_in_block * w.row_block_bytes};
        state.offset = 0;
        SharedRows<kRowTiles> rows = {start, half};
        add_row_block(w, state, reader, rows,
                      min(kBlocksPerRowBlock, blocks - row_block * kBlocksPerRowBlock), acc);
        if (row_block + 1 == row_split_end) {
#pragma unroll
            for (int i = 0; i < kRowTiles * 4; ++i) {
                float& total = totals[i / 4][i % 4];
                total = row_split == 0 ? acc[i / 4][i % 4] : add_rn(total, acc[i / 4][i % 4]);
                acc[i / 4][i % 4] = 0.0f;
            }
            ++row_split;
            row_split_end = row_blocks * (row_split + 1) / w.row_splits;
        }
        block_sync();  // no thread reads this row_block any more; the next copy overwrites it
    }
    copy_async_wait<0>();
#pragma unroll
    for (int i = 0; i < kRowTiles * 4; ++i) {
        const int row = first_row + 4 * (half * kRowTiles + i / 4) + lane_id() % 4;
        const int column =
            (first_tile + tile_in_block) * kStreamColumns + 8 * (i % 4) + lane_id() / 4;
        if (row >= x.rows || column >= w.out_features) continue;
        store_output(totals[i / 4][i % 4], w, column, out + row * out_stride + column, add);
    }
}

}  // namespace

// out = x @ W + bias, or out += x @ W + bias if `add`; out: float32 [x.rows, out_stride]. grid.x:
// blocks of 32 or 64 rows, grid.y: of 4 tiles.
#define EXL_PREFILL(row_tiles, rows)                                                           \
    extern "C" __global__ void __launch_bounds__(kPrefillThreads, 1)                           \
        linear_prefill_##rows##_kernel(const __grid_constant__ StreamLayer w,                  \
                                       const __grid_constant__ QuantizedRows x, float* out,    \
                                       int64_t out_stride, int32_t add) {                      \
        prefill<row_tiles>(w, x, out, out_stride, add != 0);                                   \
    }                                                                                          \
    EXL_KERNEL(linear_prefill_##rows##_kernel)

EXL_PREFILL(4, 32);
EXL_PREFILL(8, 64);
