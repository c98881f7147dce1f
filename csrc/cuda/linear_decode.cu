// Quantised matrix products of few rows: decoding. Bound by memory.
//
// Work: a warp reads one split of one tile's stream, once, and multiplies it with all rows of
// a pass (4, 8 or 16). The warps of a tile are neighbours in a block; their sums are added in
// the order of splits, through shared memory. Passes over the same tile are neighbouring
// blocks, so that all but the first find its codes in the second-level cache.
//
// A launch takes up to kMaxLayers layers of one input (q, k and v; gate and up), whose
// activations are the same quantised rows. Blocks [first_block[i], first_block[i + 1]) are
// those of layer i.
//
// Shared memory: a ring a warp (RingReader), then the same bytes for the warp's sums:
// [row tile][q][lane] float32.
#include "cuda/linear_stream.cuh"

namespace exl {

constexpr int kMaxLayers = 3;

struct DecodeCall {
    StreamLayer layers[kMaxLayers];
    float* outs[kMaxLayers];
    int64_t out_strides[kMaxLayers];
    int32_t first_block[kMaxLayers + 1];
    int32_t passes;
    int32_t add;
    QuantizedRows x;
};

}  // namespace exl

namespace {

using namespace exl;

constexpr int kDecodeThreads = 32 * kMaxSplits;

// Activations in device memory. Rows beyond the last repeat it; their sums are not stored.
template <int kRowTiles>
struct GlobalRows {
    const uint8_t* codes[kRowTiles];
    const Note* notes[kRowTiles];
    int blocks;
    int windows;

    __device__ __forceinline__ GlobalRows(const QuantizedRows& x, int in_features,
                                          int first_row) {
        blocks = stream_blocks(in_features);
        windows = stream_windows(in_features);
        const int t = lane_id() % 4, g = lane_id() / 4;
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
            const int code_row = min(first_row + 4 * n + g / 2, x.rows - 1);
            const int note_row = min(first_row + 4 * n + t, x.rows - 1);
            codes[n] = x.codes + static_cast<int64_t>(code_row) * blocks * kBlockCodeBytes +
                       g % 2 * kStreamBlockRows + 8 * t;
            notes[n] = x.notes + static_cast<int64_t>(note_row) * windows;
        }
    }
    // From the window before to `window`: all pointers follow.
    __device__ __forceinline__ void go_to(int window) {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
            codes[n] += static_cast<int64_t>(window) * kWindowCodeBytes;
            notes[n] += window;
        }
    }
    __device__ __forceinline__ uint2 fragment(int n, int block) const {
        return *reinterpret_cast<const uint2*>(codes[n] + block * kBlockCodeBytes);
    }
    __device__ __forceinline__ const Note* note(int n) const { return notes[n]; }
};

// One split of one tile: rows first_row .. + 4 * kRowTiles.
template <int kRowTiles>
__device__ __forceinline__ void multiply_split(const StreamLayer& w, const QuantizedRows& x,
                                               int tile, int split, int first_row, char* ring,
                                               float (&acc)[kRowTiles][4]) {
    const StreamPlace start = w.starts[split];
    const uint8_t* stream = w.codes + tile * w.tile_bytes;
    RingReader reader(ring, stream + start.offset,
                      static_cast<uint32_t>(w.starts[split + 1].offset - start.offset));
    TileState state;
    state.begin(w, start, stream);
    GlobalRows<kRowTiles> rows(x, w.in_features, first_row);
    const int first = rows.windows * split / w.splits;
    const int end = rows.windows * (split + 1) / w.splits;
    rows.go_to(first);
    for (int window = first; window < end; ++window) {
        const int blocks = min(kWindowBlocks, rows.blocks - window * kWindowBlocks);
        add_window(w, state, reader, rows, blocks, acc);
        rows.go_to(1);
    }
    reader.finish();
}

// The block's tiles from `local` * tiles a block on.
template <int kRowTiles>
__device__ __forceinline__ void multiply_tiles(const StreamLayer& w, const QuantizedRows& x,
                                               int local, int first_row, float* out,
                                               int64_t out_stride, bool add) {
    EXL_SHARED(char, memory);
    const int warps = blockDim.x / 32;
    const int tiles_a_block = warps / w.splits;
    const int first_tile = local * tiles_a_block;
    const int tile = first_tile + warp_id() / w.splits;
    char* ring = memory + warp_id() * kRingBytes;
    const int tiles = stream_tiles(w.out_features);
    if (tile < tiles) {
        float acc[kRowTiles][4] = {};
        multiply_split(w, x, tile, warp_id() % w.splits, first_row, ring, acc);
#pragma unroll
        for (int i = 0; i < kRowTiles * 4; ++i) {
            reinterpret_cast<float*>(ring)[i * 32 + lane_id()] = acc[i / 4][i % 4];
        }
    }
    block_sync();  // the sums of all splits are written
    constexpr int kItems = kRowTiles * 4 * 32;
    const int count = min(tiles_a_block, tiles - first_tile) * kItems;
    for (int item = threadIdx.x; item < count; item += blockDim.x) {
        const int local_tile = item / kItems, place = item % kItems;
        const int lane = place % 32, q = place / 32 % 4, n = place / 128;
        const int row = first_row + 4 * n + lane % 4;
        const int column = (first_tile + local_tile) * kStreamColumns + 8 * q + lane / 4;
        if (row >= x.rows || column >= w.out_features) continue;
        const char* rings = memory + local_tile * w.splits * kRingBytes;
        float total = reinterpret_cast<const float*>(rings)[place];
        for (int s = 1; s < w.splits; ++s) {
            total = add_rn(total, reinterpret_cast<const float*>(rings + s * kRingBytes)[place]);
        }
        store_output(total, w, column, out + row * out_stride + column, add);
    }
}

template <int kRowTiles>
__device__ __forceinline__ void decode(const DecodeCall& call) {
    const int pass = static_cast<int>(blockIdx.x) % call.passes;
    const int block = static_cast<int>(blockIdx.x) / call.passes;
    int layer = 0;
    while (block >= call.first_block[layer + 1]) ++layer;
    multiply_tiles<kRowTiles>(call.layers[layer], call.x, block - call.first_block[layer],
                              pass * 4 * kRowTiles, call.outs[layer], call.out_strides[layer],
                              call.add != 0);
}

}  // namespace

// out = x @ W + bias, or out += ... where call.add. Rows in passes of 4, 8 or 16.
#define EXL_DECODE(row_tiles, rows)                                                            \
    extern "C" __global__ void __launch_bounds__(kDecodeThreads)                               \
        linear_decode_##rows##_kernel(const __grid_constant__ DecodeCall call) {               \
        decode<row_tiles>(call);                                                               \
    }                                                                                          \
    EXL_KERNEL(linear_decode_##rows##_kernel)

EXL_DECODE(1, 4);
EXL_DECODE(2, 8);
EXL_DECODE(4, 16);

// One row for each (row, choice) pair of a mixture: x holds a row a pair, pair p is multiplied
// with layers[experts[p]] into out [pairs, out_stride]. grid.x blocks of a layer, grid.y pairs.
extern "C" __global__ void __launch_bounds__(kDecodeThreads)
    linear_decode_pairs_kernel(const StreamLayer* layers, const int32_t* experts,
                               const uint8_t* codes, const Note* notes, float* out,
                               int64_t out_stride) {
    const int64_t pair = blockIdx.y;
    const StreamLayer& w = layers[experts[pair]];
    const QuantizedRows x = {
        codes + pair * stream_blocks(w.in_features) * kBlockCodeBytes,
        notes + pair * stream_windows(w.in_features), 1};
    multiply_tiles<1>(w, x, static_cast<int>(blockIdx.x), 0, out + pair * out_stride, out_stride,
                      false);
}
EXL_KERNEL(linear_decode_pairs_kernel);
