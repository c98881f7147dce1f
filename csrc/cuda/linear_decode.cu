// Quantised matrix products of few rows: decoding. Bound by memory.
//
// Layout: weights as StreamLayer, activations as QuantizedRows (linear_layout.cuh).
//
// Work per warp: one row_split of one tile's stream, which it reads once and multiplies with all
// rows of a pass (1, 4 or 8). Work per block: the warps of a tile are neighbours in a block; their
// sums are added through shared memory in the order of row_splits. Passes over the same tile are
// neighbouring blocks, so that all but the first find its codes in the L2 cache.
//
// A launch takes up to kMaxLayers layers with one input (q, k and v; gate and up), whose
// activations are the same quantised rows. Blocks [first_block[i], first_block[i + 1]) belong to
// layer i.
//
// With a single row, every block quantises the row itself while the first codes are in flight,
// and before that normalises or gates it on request. This saves one or two launches, each of
// which costs more than the tens of KiB that a block reads for it.
//
// Shared memory: a ring per warp (RingReader), whose bytes are reused for the warp's sums, float32
// [row tile][q][lane]. With a single row, after the rings: kNormWarps float32, the row's
// activation scales and its codes.
//
// Preconditions: all layers of a launch have the same in_features and permutation; a block has a
// multiple of row_splits warps; in a launch of several rows they are quantised.
#include "cuda/linear_quantize.cuh"
#include "cuda/linear_stream.cuh"
#include "cuda/row_functions.cuh"

namespace exl {

constexpr int kMaxLayers = 3;

// Source of a single row; x and other are float32 [in_features].
enum RowKind : int32_t {
    kPlainRow = 0,  // x
    kNormRow = 1,   // rms_norm(x) with weights `other`; block 0 also stores it in `normed`
    kGatedRow = 2,  // kGatedRow + a: gated(x, other, a)
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

constexpr int kDecodeThreads = 32 * kMaxRowSplits;

// norm.cu uses this number of warps per row; another number would add squares in another order.
constexpr int kNormWarps = 16;

// Activations in device memory, from a row_block on. Rows beyond the last repeat it; their sums
// are not stored.
template <int kRowTiles>
struct GlobalRows {
    // Loaded one block ahead, if there are enough registers.
    static constexpr bool kFetchAhead = kRowTiles <= 2;

    const uint8_t* codes[kRowTiles];
    const ActivationScale* activation_scales[kRowTiles];
    uint2 ahead[kFetchAhead ? kRowTiles : 1];

    __device__ __forceinline__ GlobalRows(const QuantizedRows& x, int in_features, int first_row,
                                          int row_block) {
        const int64_t blocks = stream_blocks(in_features);
        const int64_t row_blocks = stream_row_blocks(in_features);
        const int t = lane_id() % 4, g = lane_id() / 4;
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
            const int code_row = min(first_row + 4 * n + g / 2, x.rows - 1);
            const int scale_row = min(first_row + 4 * n + t, x.rows - 1);
            codes[n] = x.codes +
                       (code_row * blocks + row_block * kBlocksPerRowBlock) * kBlockCodeBytes +
                       g % 2 * kStreamBlockRows + 8 * t;
            activation_scales[n] = x.activation_scales + scale_row * row_blocks + row_block;
            if constexpr (kFetchAhead) ahead[n] = *reinterpret_cast<const uint2*>(codes[n]);
        }
    }
    // The load after the last block reads bytes of another row or of scales, which are not used.
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
    __device__ __forceinline__ const ActivationScale* activation_scale(int n) const {
        return activation_scales[n];
    }
    __device__ __forceinline__ void next_row_block() {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) ++activation_scales[n];
    }
};

// A single row in shared memory.
struct SharedRow {
    const uint8_t* codes;
    const ActivationScale* activation_scales;

    __device__ __forceinline__ SharedRow(const uint8_t* row, const ActivationScale* scales,
                                         int row_block)
        : codes(row + row_block * kRowBlockCodeBytes + lane_id() / 4 % 2 * kStreamBlockRows +
                lane_id() % 4 * 8),
          activation_scales(scales + row_block) {}
    __device__ __forceinline__ void fragments(int, uint2 (&x)[1]) {
        x[0] = *reinterpret_cast<const uint2*>(codes);
        codes += kBlockCodeBytes;
    }
    __device__ __forceinline__ const ActivationScale* activation_scale(int) const {
        return activation_scales;
    }
    __device__ __forceinline__ void next_row_block() { ++activation_scales; }
};

// The part of a warp in a block. `local` is the block's number within its layer.
struct BlockWork {
    int first_tile;
    int tiles;  // of the layer, from first_tile on, in this block
    int tile;
    int row_split;
    int first_row_block;
    int end_row_block;
    bool busy;  // false: this warp's tile does not exist

    __device__ __forceinline__ BlockWork(const StreamLayer& w, int local) {
        const int block_tiles = static_cast<int>(blockDim.x / 32) / w.row_splits;
        const int row_blocks = stream_row_blocks(w.in_features);
        first_tile = local * block_tiles;
        tiles = min(block_tiles, stream_tiles(w.out_features) - first_tile);
        tile = first_tile + warp_id() / w.row_splits;
        row_split = warp_id() % w.row_splits;
        first_row_block = row_blocks * row_split / w.row_splits;
        end_row_block = row_blocks * (row_split + 1) / w.row_splits;
        busy = warp_id() / w.row_splits < tiles;
    }
    __device__ __forceinline__ RingReader reader(const StreamLayer& w, char* memory,
                                                 int chunks) const {
        const int from = w.starts[row_split].offset;
        const int length = busy ? w.starts[row_split + 1].offset - from : 0;
        return {memory + warp_id() * chunks * kChunkBytes, chunks,
                w.codes + (busy ? tile : first_tile) * w.tile_bytes + from,
                static_cast<uint32_t>(length)};
    }
};

// Multiplies the warp's row_split and writes the sums to the bytes of its ring.
template <int kRowTiles, class Rows>
__device__ __forceinline__ void multiply_row_split(const StreamLayer& w, const BlockWork& work,
                                                   RingReader& reader, Rows& rows, char* ring) {
    TileState state;
    state.begin(w, w.starts[work.row_split], w.codes + work.tile * w.tile_bytes);
    float acc[kRowTiles][4] = {};
    const int blocks = stream_blocks(w.in_features);
    for (int row_block = work.first_row_block; row_block < work.end_row_block; ++row_block) {
        add_row_block(w, state, reader, rows,
                      min(kBlocksPerRowBlock, blocks - row_block * kBlocksPerRowBlock), acc);
        rows.next_row_block();
    }
    reader.finish();
    auto* sums = reinterpret_cast<float*>(ring);
#pragma unroll
    for (int i = 0; i < kRowTiles * 4; ++i) sums[i * 32 + lane_id()] = acc[i / 4][i % 4];
}

// Adds the row_splits of the block's tiles in order and stores rows [first_row, end_row).
template <int kRowTiles>
__device__ __forceinline__ void add_row_splits(const StreamLayer& w, const BlockWork& work,
                                               const char* memory, int ring_bytes, int first_row,
                                               int end_row, float* out, int64_t out_stride,
                                               bool add) {
    constexpr int kItems = kRowTiles * 4 * 32;
    for (int item = threadIdx.x; item < work.tiles * kItems; item += blockDim.x) {
        const int local_tile = item / kItems, item_in_tile = item % kItems;
        const int lane = item_in_tile % 32, q = item_in_tile / 32 % 4, n = item_in_tile / 128;
        const int row = first_row + 4 * n + lane % 4;
        const int column = (work.first_tile + local_tile) * kStreamColumns + 8 * q + lane / 4;
        if (row >= end_row || column >= w.out_features) continue;
        const char* rings = memory + local_tile * w.row_splits * ring_bytes;
        float total = reinterpret_cast<const float*>(rings)[item_in_tile];
        for (int s = 1; s < w.row_splits; ++s) {
            total =
                add_rn(total, reinterpret_cast<const float*>(rings + s * ring_bytes)[item_in_tile]);
        }
        store_output(total, w, column, out + row * out_stride + column, add);
    }
}

// Multiplies rows [first_row, first_row + 4 * kRowTiles) of x.
template <int kRowTiles>
__device__ __forceinline__ void multiply_rows(const StreamLayer& w, const QuantizedRows& x,
                                              int chunks, int local, int first_row, float* out,
                                              int64_t out_stride, bool add) {
    EXL_SHARED(char, memory);
    const BlockWork work(w, local);
    const int ring_bytes = chunks * kChunkBytes;
    RingReader reader = work.reader(w, memory, chunks);
    if (work.busy) {
        GlobalRows<kRowTiles> rows(x, w.in_features, first_row, work.first_row_block);
        multiply_row_split<kRowTiles>(w, work, reader, rows, memory + warp_id() * ring_bytes);
    } else {
        reader.finish();
    }
    block_sync();  // the sums of all row_splits are written
    add_row_splits<kRowTiles>(w, work, memory, ring_bytes, first_row, x.rows, out, out_stride, add);
}

// The layer of a block, the block's number within that layer, and its pass.
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

// The scale of a row's norm, as in rms_norm_kernel. `partials` has kNormWarps floats.
__device__ __forceinline__ float row_norm_scale(const float* x, int size, float eps,
                                                float* partials) {
    const int warps = static_cast<int>(blockDim.x / 32);
    for (int warp = warp_id(); warp < kNormWarps; warp += warps) {
        const int thread = warp * 32 + lane_id();
        const float sum = warp_sum(part_of_squares(x, size, thread, 32 * kNormWarps));
        if (lane_id() == 0) partials[warp] = sum;
    }
    block_sync();  // all partial sums are read by all threads
    float total = 0.0f;
    for (int warp = 0; warp < kNormWarps; ++warp) total += partials[warp];
    return norm_scale(total, size, eps);
}

// Quantises the row of the call into shared memory; the block's warps take turns.
__device__ __forceinline__ void quantize_source_row(const RowSource& source, const StreamLayer& w,
                                                    float* partials, uint8_t* codes,
                                                    ActivationScale* activation_scales) {
    const int warps = static_cast<int>(blockDim.x / 32), size = w.in_features;
    const int row_blocks = stream_row_blocks(size);
    const auto quantize = [&](const auto& value) {
        for (int row_block = warp_id(); row_block < row_blocks; row_block += warps) {
            gather_and_quantize(value, w.perm, size, row_block, codes, activation_scales);
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
            return gated(source.x[channel], source.other[channel], source.kind - kGatedRow);
        });
    }
}

__device__ __forceinline__ void decode_row(const DecodeCall& call) {
    EXL_SHARED(char, memory);
    const LayerChoice choice(call);
    const StreamLayer& w = call.layers[choice.layer];
    const BlockWork work(w, choice.local);
    const int ring_bytes = call.ring_chunks * kChunkBytes;
    RingReader reader = work.reader(w, memory, call.ring_chunks);
    auto* partials = reinterpret_cast<float*>(memory + blockDim.x / 32 * ring_bytes);
    auto* activation_scales = reinterpret_cast<ActivationScale*>(partials + kNormWarps);
    auto* codes = reinterpret_cast<uint8_t*>(activation_scales + stream_row_blocks(w.in_features));
    quantize_source_row(call.row, w, partials, codes, activation_scales);
    block_sync();  // the row is quantised
    if (work.busy) {
        SharedRow row(codes, activation_scales, work.first_row_block);
        multiply_row_split<1>(w, work, reader, row, memory + warp_id() * ring_bytes);
    } else {
        reader.finish();
    }
    block_sync();  // the sums of all row_splits are written
    add_row_splits<1>(w, work, memory, ring_bytes, 0, 1, call.outs[choice.layer], 0, call.add != 0);
}

}  // namespace

// out = x @ W + bias, or out += x @ W + bias if call.add; up to 3 layers. outs[i]: float32
// [rows, out_strides[i]]. grid.x: blocks of all layers times passes. Passes have at most 8 rows,
// because 16 would need more registers than a block of 512 threads has.
#define EXL_DECODE(name, ...)                                                                  \
    extern "C" __global__ void __launch_bounds__(kDecodeThreads, 1)                               \
        linear_decode_##name##_kernel(const __grid_constant__ DecodeCall call) {               \
        __VA_ARGS__(call);                                                                     \
    }                                                                                          \
    EXL_KERNEL(linear_decode_##name##_kernel)

EXL_DECODE(1, decode_row);
EXL_DECODE(4, decode_rows<1>);
EXL_DECODE(8, decode_rows<2>);

// One row for each (row, choice) pair of a mixture: pair p is multiplied with layers[experts[p]].
//
// layers: [experts] StreamLayer; experts: int32 [pairs]; codes: uint8 [pairs][block][64] and
// activation_scales: [pairs][row_block] of quantize_pairs_kernel; out: float32
// [pairs, out_stride]. grid.x: blocks of a layer, grid.y: pairs.
extern "C" __global__ void __launch_bounds__(kDecodeThreads, 1)
    linear_decode_pairs_kernel(const StreamLayer* layers, const int32_t* experts,
                               const uint8_t* codes, const ActivationScale* activation_scales,
                               float* out, int64_t out_stride) {
    const int64_t pair = blockIdx.y;
    const StreamLayer& w = layers[experts[pair]];
    const QuantizedRows x = {codes + pair * stream_blocks(w.in_features) * kBlockCodeBytes,
                             activation_scales + pair * stream_row_blocks(w.in_features), 1};
    multiply_rows<1>(w, x, kShallowChunks, static_cast<int>(blockIdx.x), 0,
                     out + pair * out_stride, out_stride, false);
}
EXL_KERNEL(linear_decode_pairs_kernel);
