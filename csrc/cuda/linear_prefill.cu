// Quantised matrix products of many rows: prefill. Bound by tensor cores.
//
// Work: a block takes 4 tiles (128 columns) and 8 * kRowTiles rows: 4 tiles x 2 halves of the
// rows, a warp each, through all of the layer's windows. Per window the block copies what it
// needs of activations and streams into shared memory, one window ahead of what it multiplies;
// a warp expands codes from there straight into fragments. Integers and roundings are those
// of decoding, and so are the splits: at the end of each one the running sums are added to the
// totals and start from zero. So a row has the same bits here and there.
//
// Registers: of 64 rows 64 integer sums, 32 running sums, 32 totals a lane.
//
// Shared memory, twice: activations [row][window codes], swizzled; notes [row]; 4 pieces of
// stream of window_bytes each.
#include "cuda/linear_stream.cuh"

namespace {

using namespace exl;

constexpr int kBlockTiles = 4;
constexpr int kRowHalves = 2;
constexpr int kPrefillThreads = 32 * kBlockTiles * kRowHalves;
constexpr int kPieceBytes = 16;
constexpr int kRowPieces = kWindowCodeBytes / kPieceBytes;
constexpr int kNotePieces = static_cast<int>(sizeof(Note)) / kPieceBytes;

// A row's codes of a window are 64 words, so rows are in the same banks; odd rows have
// neighbouring blocks exchanged, and a fragment's two rows do not collide.
__device__ __forceinline__ int swizzled_block(int row, int block) { return block ^ (row & 1); }

template <int kRowTiles>
struct Stage {
    static constexpr int kRows = 4 * kRowHalves * kRowTiles;
    static constexpr int kNotesOffset = kRows * kWindowCodeBytes;
    static constexpr int kStreamsOffset = kNotesOffset + kRows * static_cast<int>(sizeof(Note));

    char* start;

    // Begins to copy `window`. Rows and tiles beyond the last repeat it, and are not stored.
    __device__ __forceinline__ void copy(const StreamLayer& w, const QuantizedRows& x,
                                         int window, int first_row, int first_tile) const {
        const int blocks = stream_blocks(w.in_features), windows = stream_windows(w.in_features);
        const int there = (blocks - window * kWindowBlocks) * kBlockCodeBytes / kPieceBytes;
        for (int i = threadIdx.x; i < kRows * kRowPieces; i += kPrefillThreads) {
            const int row = i / kRowPieces, piece = i % kRowPieces;
            const int64_t source = min(first_row + row, x.rows - 1);
            const int block = piece / kBlockPieces, rest = piece % kBlockPieces;
            char* target = start + row * kWindowCodeBytes +
                           swizzled_block(row, block) * kBlockCodeBytes + rest * kPieceBytes;
            copy_async16(target,
                         x.codes + source * blocks * kBlockCodeBytes +
                             static_cast<int64_t>(window) * kWindowCodeBytes + piece * kPieceBytes,
                         piece < there);
        }
        for (int i = threadIdx.x; i < kRows * kNotePieces; i += kPrefillThreads) {
            const int row = i / kNotePieces, piece = i % kNotePieces;
            const int64_t source = min(first_row + row, x.rows - 1);
            copy_async16(start + kNotesOffset + i * kPieceBytes,
                         reinterpret_cast<const char*>(x.notes + source * windows + window) +
                             piece * kPieceBytes);
        }
        const int begin = w.windows[window].offset;
        const int pieces = (w.windows[window + 1].offset - begin) / kPieceBytes;
        const int last_tile = stream_tiles(w.out_features) - 1;
#pragma unroll
        for (int tile = 0; tile < kBlockTiles; ++tile) {
            const uint8_t* source =
                w.codes + min(first_tile + tile, last_tile) * w.tile_bytes + begin;
            char* target = start + kStreamsOffset + tile * w.window_bytes;
            for (int i = threadIdx.x; i < pieces; i += kPrefillThreads) {
                copy_async16(target + i * kPieceBytes, source + i * kPieceBytes);
            }
        }
    }

    static constexpr int kBlockPieces = kBlockCodeBytes / kPieceBytes;
};

// Activations of a stage; `half` is which 4 * kRowTiles of its rows.
template <int kRowTiles>
struct SharedRows {
    const char* start;
    int half;

    __device__ __forceinline__ void fragments(int block, uint2 (&x)[kRowTiles]) const {
        const int t = lane_id() % 4, g = lane_id() / 4;
        const int row = 4 * half * kRowTiles + g / 2;
        const char* place = start + row * kWindowCodeBytes +
                            swizzled_block(row, block) * kBlockCodeBytes +
                            g % 2 * kStreamBlockRows + 8 * t;
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
            x[n] = *reinterpret_cast<const uint2*>(place + 4 * n * kWindowCodeBytes);
        }
    }
    __device__ __forceinline__ const Note* note(int n) const {
        const char* notes = start + Stage<kRowTiles>::kNotesOffset;
        return reinterpret_cast<const Note*>(notes) + 4 * (half * kRowTiles + n) + lane_id() % 4;
    }
};

template <int kRowTiles>
__device__ __forceinline__ void prefill(const StreamLayer& w, const QuantizedRows& x, float* out,
                                        int64_t out_stride, bool add) {
    EXL_SHARED(char, memory);
    const int tile_in_block = warp_id() % kBlockTiles, half = warp_id() / kBlockTiles;
    const int first_row = static_cast<int>(blockIdx.x) * Stage<kRowTiles>::kRows;
    const int first_tile = static_cast<int>(blockIdx.y) * kBlockTiles;
    const int stage_bytes = Stage<kRowTiles>::kStreamsOffset + kBlockTiles * w.window_bytes;
    const int windows = stream_windows(w.in_features), blocks = stream_blocks(w.in_features);

    TileState state;
    state.begin(w, w.starts[0], w.codes);
    float acc[kRowTiles][4] = {}, totals[kRowTiles][4] = {};
    int split = 0, split_end = windows / w.splits;
    Stage<kRowTiles>{memory}.copy(w, x, 0, first_row, first_tile);
    copy_async_commit();
    for (int window = 0; window < windows; ++window) {
        if (window + 1 < windows) {
            const Stage<kRowTiles> next = {memory + (window + 1) % 2 * stage_bytes};
            next.copy(w, x, window + 1, first_row, first_tile);
        }
        copy_async_commit();
        copy_async_wait<1>();
        block_sync();  // everybody's copies of this window are in
        const char* start = memory + window % 2 * stage_bytes;
        PlainReader reader = {start + Stage<kRowTiles>::kStreamsOffset +
                              tile_in_block * w.window_bytes};
        state.place = 0;
        SharedRows<kRowTiles> rows = {start, half};
        add_window(w, state, reader, rows, min(kWindowBlocks, blocks - window * kWindowBlocks),
                   acc);
        if (window + 1 == split_end) {
#pragma unroll
            for (int i = 0; i < kRowTiles * 4; ++i) {
                float& total = totals[i / 4][i % 4];
                total = split == 0 ? acc[i / 4][i % 4] : add_rn(total, acc[i / 4][i % 4]);
                acc[i / 4][i % 4] = 0.0f;
            }
            ++split;
            split_end = windows * (split + 1) / w.splits;
        }
        block_sync();  // nobody reads this window any more, and the next copy goes there
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

// out = x @ W + bias, or out += ... where `add`. grid.x blocks of rows, grid.y of 4 tiles.
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
