// Quantised matrix products of few rows: decoding. Bound by memory.
//
// Work: a warp reads one split of one tile's stream, once, and multiplies it with all rows of
// a pass (1, 4 or 8). The warps of a tile are neighbours in a block; their sums are added
// in the order of splits, through shared memory. Passes over the same tile are neighbouring
// blocks, so that all but the first find its codes in the second-level cache.
//
// A launch takes up to kMaxLayers layers of one input (q, k and v; gate and up), whose
// activations are the same quantised rows. Blocks [first_block[i], first_block[i + 1]) are
// those of layer i.
//
// A single row is made by every block for itself, while the first codes are on their way:
// quantised, and where asked normalised or gated before. That is a launch or two less, each of
// which costs more than the few ten KiB that a block reads for it.
//
// Shared memory: a ring a warp (RingReader), then the same bytes for the warp's sums:
// [row tile][q][lane] float32. A single row: behind the rings kNormWarps float32, its notes and
// its codes.
#include "cuda/activation.cuh"
#include "cuda/linear_quantize.cuh"
#include "cuda/linear_stream.cuh"
#include "cuda/norm.cuh"

namespace exl {

constexpr int kMaxLayers = 3;

// A single row, float32 [in_features].
enum RowKind : int32_t {
    kPlainRow = 0,  // x
    kNormRow = 1,   // rms_norm(x) with weights `other`; the first block stores it in `normed`
    kGatedRow = 2,  // kGatedRow + a: activation a of x, times `other`
};
struct RowSource {
    const float* x;
    const float* other;
    float* normed;
    float eps;
    int32_t kind;
};

struct DecodeCall {
    StreamLayer layers[kMaxLayers];
    float* outs[kMaxLayers];
    int64_t out_strides[kMaxLayers];
    int32_t first_block[kMaxLayers + 1];
    int32_t passes;
    int32_t add;
    int32_t ring_chunks;  // kShallowChunks or kDeepChunks
    QuantizedRows x;
    RowSource row;
};

}  // namespace exl

namespace {

using namespace exl;

constexpr int kDecodeThreads = 32 * kMaxSplits;

// norm.cu gives a row so many warps; another number would add squares in another order.
constexpr int kNormWarps = 16;

// Activations in device memory, from a window on. Rows beyond the last repeat it; their sums
// are not stored.
template <int kRowTiles>
struct GlobalRows {
    // Fetched one block ahead, where registers allow it.
    static constexpr bool kFetchAhead = kRowTiles <= 2;

    const uint8_t* codes[kRowTiles];
    const Note* notes[kRowTiles];
    uint2 ahead[kFetchAhead ? kRowTiles : 1];

    __device__ __forceinline__ GlobalRows(const QuantizedRows& x, int in_features,
                                          int first_row, int window) {
        const int64_t blocks = stream_blocks(in_features), windows = stream_windows(in_features);
        const int t = lane_id() % 4, g = lane_id() / 4;
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
            const int code_row = min(first_row + 4 * n + g / 2, x.rows - 1);
            const int note_row = min(first_row + 4 * n + t, x.rows - 1);
            codes[n] = x.codes + (code_row * blocks + window * kWindowBlocks) * kBlockCodeBytes +
                       g % 2 * kStreamBlockRows + 8 * t;
            notes[n] = x.notes + note_row * windows + window;
            if constexpr (kFetchAhead) ahead[n] = *reinterpret_cast<const uint2*>(codes[n]);
        }
    }
    // Behind the last block stands another row's, or notes: fetched, and not used.
    __device__ __forceinline__ void fragments(int, uint2 (&x)[kRowTiles]) {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
            if constexpr (kFetchAhead) {
                x[n] = ahead[n];
                codes[n] += kBlockCodeBytes;
                ahead[n] = *reinterpret_cast<const uint2*>(codes[n]);
            } else {
                x[n] = *reinterpret_cast<const uint2*>(codes[n]);
                codes[n] += kBlockCodeBytes;
            }
        }
    }
    __device__ __forceinline__ const Note* note(int n) const { return notes[n]; }
    __device__ __forceinline__ void next_window() {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) ++notes[n];
    }
};

// A single row in shared memory.
struct SharedRow {
    const uint8_t* codes;
    const Note* notes;

    __device__ __forceinline__ SharedRow(const uint8_t* row, const Note* row_notes, int window)
        : codes(row + window * kWindowCodeBytes + lane_id() / 4 % 2 * kStreamBlockRows +
                lane_id() % 4 * 8),
          notes(row_notes + window) {}
    __device__ __forceinline__ void fragments(int, uint2 (&x)[1]) {
        x[0] = *reinterpret_cast<const uint2*>(codes);
        codes += kBlockCodeBytes;
    }
    __device__ __forceinline__ const Note* note(int) const { return notes; }
    __device__ __forceinline__ void next_window() { ++notes; }
};

// Who does what in a block, of which `local` counts within a layer.
struct BlockShare {
    int first_tile;
    int tiles;  // of the layer, from first_tile on, in this block
    int tile;
    int split;
    int first_window;
    int end_window;
    bool busy;  // there is such a tile

    __device__ __forceinline__ BlockShare(const StreamLayer& w, int local) {
        const int tiles_a_block = static_cast<int>(blockDim.x / 32) / w.splits;
        const int windows = stream_windows(w.in_features);
        first_tile = local * tiles_a_block;
        tiles = min(tiles_a_block, stream_tiles(w.out_features) - first_tile);
        tile = first_tile + warp_id() / w.splits;
        split = warp_id() % w.splits;
        first_window = windows * split / w.splits;
        end_window = windows * (split + 1) / w.splits;
        busy = warp_id() / w.splits < tiles;
    }
    __device__ __forceinline__ RingReader reader(const StreamLayer& w, char* memory,
                                                 int chunks) const {
        const int from = w.starts[split].offset;
        const int length = busy ? w.starts[split + 1].offset - from : 0;
        return {memory + warp_id() * chunks * kChunkBytes, chunks,
                w.codes + (busy ? tile : first_tile) * w.tile_bytes + from,
                static_cast<uint32_t>(length)};
    }
};

// The warp's split, all windows. Its sums go to where its ring was.
template <int kRowTiles, class Rows>
__device__ __forceinline__ void multiply_split(const StreamLayer& w, const BlockShare& share,
                                               RingReader& reader, Rows& rows, char* ring) {
    TileState state;
    state.begin(w, w.starts[share.split], w.codes + share.tile * w.tile_bytes);
    float acc[kRowTiles][4] = {};
    const int blocks = stream_blocks(w.in_features);
    for (int window = share.first_window; window < share.end_window; ++window) {
        add_window(w, state, reader, rows, min(kWindowBlocks, blocks - window * kWindowBlocks),
                   acc);
        rows.next_window();
    }
    reader.finish();
    auto* sums = reinterpret_cast<float*>(ring);
#pragma unroll
    for (int i = 0; i < kRowTiles * 4; ++i) sums[i * 32 + lane_id()] = acc[i / 4][i % 4];
}

// Adds the splits of the block's tiles in order and stores rows [first_row, end_row).
template <int kRowTiles>
__device__ __forceinline__ void add_splits(const StreamLayer& w, const BlockShare& share,
                                           const char* memory, int ring_bytes, int first_row,
                                           int end_row,
                                           float* out, int64_t out_stride, bool add) {
    constexpr int kItems = kRowTiles * 4 * 32;
    for (int item = threadIdx.x; item < share.tiles * kItems; item += blockDim.x) {
        const int local_tile = item / kItems, place = item % kItems;
        const int lane = place % 32, q = place / 32 % 4, n = place / 128;
        const int row = first_row + 4 * n + lane % 4;
        const int column = (share.first_tile + local_tile) * kStreamColumns + 8 * q + lane / 4;
        if (row >= end_row || column >= w.out_features) continue;
        const char* rings = memory + local_tile * w.splits * ring_bytes;
        float total = reinterpret_cast<const float*>(rings)[place];
        for (int s = 1; s < w.splits; ++s) {
            total = add_rn(total, reinterpret_cast<const float*>(rings + s * ring_bytes)[place]);
        }
        store_output(total, w, column, out + row * out_stride + column, add);
    }
}

// Rows first_row .. + 4 * kRowTiles of x.
template <int kRowTiles>
__device__ __forceinline__ void multiply_rows(const StreamLayer& w, const QuantizedRows& x,
                                              int chunks, int local, int first_row, float* out,
                                              int64_t out_stride, bool add) {
    EXL_SHARED(char, memory);
    const BlockShare share(w, local);
    const int ring_bytes = chunks * kChunkBytes;
    RingReader reader = share.reader(w, memory, chunks);
    if (share.busy) {
        GlobalRows<kRowTiles> rows(x, w.in_features, first_row, share.first_window);
        multiply_split<kRowTiles>(w, share, reader, rows, memory + warp_id() * ring_bytes);
    } else {
        reader.finish();
    }
    block_sync();  // the sums of all splits are written
    add_splits<kRowTiles>(w, share, memory, ring_bytes, first_row, x.rows, out, out_stride, add);
}

// The layer that a block works for, and its number among that layer's blocks.
struct LayerChoice {
    int layer = 0;
    int local;
    int pass;

    __device__ __forceinline__ explicit LayerChoice(const DecodeCall& call) {
        pass = static_cast<int>(blockIdx.x) % call.passes;
        const int block = static_cast<int>(blockIdx.x) / call.passes;
        while (block >= call.first_block[layer + 1]) ++layer;
        local = block - call.first_block[layer];
    }
};

template <int kRowTiles>
__device__ __forceinline__ void decode_rows(const DecodeCall& call) {
    const LayerChoice choice(call);
    multiply_rows<kRowTiles>(call.layers[choice.layer], call.x, call.ring_chunks, choice.local,
                             choice.pass * 4 * kRowTiles, call.outs[choice.layer],
                             call.out_strides[choice.layer], call.add != 0);
}

// The scale of a row's norm, as rms_norm_kernel finds it; `partials` has kNormWarps floats.
__device__ __forceinline__ float row_norm_scale(const float* x, int size, float eps,
                                                float* partials) {
    const int warps = static_cast<int>(blockDim.x / 32);
    for (int warp = warp_id(); warp < kNormWarps; warp += warps) {
        const int thread = warp * 32 + lane_id();
        const float sum = warp_sum(part_of_squares(x, size, thread, 32 * kNormWarps));
        if (lane_id() == 0) partials[warp] = sum;
    }
    block_sync();  // all parts are read by all
    float total = 0.0f;
    for (int warp = 0; warp < kNormWarps; ++warp) total += partials[warp];
    return norm_scale(total, size, eps);
}

// Quantises the call's row into shared memory, the block's warps taking turns.
__device__ __forceinline__ void make_row(const RowSource& source, const StreamLayer& w,
                                         float* partials, uint8_t* codes, Note* notes) {
    const int warps = static_cast<int>(blockDim.x / 32), size = w.in_features;
    const int windows = stream_windows(size);
    const auto quantize = [&](const auto& value) {
        for (int window = warp_id(); window < windows; window += warps) {
            quantize_row_window(value, w.perm, size, window, codes, notes);
        }
    };
    if (source.kind == kPlainRow) {
        quantize([&](int channel) { return source.x[channel]; });
    } else if (source.kind == kNormRow) {
        const float scale = row_norm_scale(source.x, size, source.eps, partials);
        const bool store = blockIdx.x == 0;
        quantize([&](int channel) {
            const float value = normalized(source.x[channel], scale, source.other[channel]);
            if (store) source.normed[channel] = value;
            return value;
        });
    } else {
        quantize([&](int channel) {
            return mul_rn(activated(source.x[channel], source.kind - kGatedRow),
                          source.other[channel]);
        });
    }
}

__device__ __forceinline__ void decode_row(const DecodeCall& call) {
    EXL_SHARED(char, memory);
    const LayerChoice choice(call);
    const StreamLayer& w = call.layers[choice.layer];
    const BlockShare share(w, choice.local);
    const int ring_bytes = call.ring_chunks * kChunkBytes;
    RingReader reader = share.reader(w, memory, call.ring_chunks);
    auto* partials = reinterpret_cast<float*>(memory + blockDim.x / 32 * ring_bytes);
    auto* notes = reinterpret_cast<Note*>(partials + kNormWarps);
    auto* codes = reinterpret_cast<uint8_t*>(notes + stream_windows(w.in_features));
    make_row(call.row, w, partials, codes, notes);
    block_sync();  // the row is quantised
    if (share.busy) {
        SharedRow row(codes, notes, share.first_window);
        multiply_split<1>(w, share, reader, row, memory + warp_id() * ring_bytes);
    } else {
        reader.finish();
    }
    block_sync();  // the sums of all splits are written
    add_splits<1>(w, share, memory, ring_bytes, 0, 1, call.outs[choice.layer], 0, call.add != 0);
}

}  // namespace

// out = x @ W + bias, or out += ... where call.add. Rows in passes of 4 or 8: 16 would need more
// registers than a block of 512 threads has.
#define EXL_DECODE(name, ...)                                                                  \
    extern "C" __global__ void __launch_bounds__(kDecodeThreads, 1)                               \
        linear_decode_##name##_kernel(const __grid_constant__ DecodeCall call) {               \
        __VA_ARGS__(call);                                                                     \
    }                                                                                          \
    EXL_KERNEL(linear_decode_##name##_kernel)

EXL_DECODE(1, decode_row);
EXL_DECODE(4, decode_rows<1>);
EXL_DECODE(8, decode_rows<2>);

// One row for each (row, choice) pair of a mixture: x holds a row a pair, pair p is multiplied
// with layers[experts[p]] into out [pairs, out_stride]. grid.x blocks of a layer, grid.y pairs.
extern "C" __global__ void __launch_bounds__(kDecodeThreads, 1)
    linear_decode_pairs_kernel(const StreamLayer* layers, const int32_t* experts,
                               const uint8_t* codes, const Note* notes, float* out,
                               int64_t out_stride) {
    const int64_t pair = blockIdx.y;
    const StreamLayer& w = layers[experts[pair]];
    const QuantizedRows x = {
        codes + pair * stream_blocks(w.in_features) * kBlockCodeBytes,
        notes + pair * stream_windows(w.in_features), 1};
    multiply_rows<1>(w, x, kShallowChunks, static_cast<int>(blockIdx.x), 0,
                     out + pair * out_stride, out_stride, false);
}
EXL_KERNEL(linear_decode_pairs_kernel);
