// Attention of a prompt's rows: each tile of the cache is unpacked once for many rows.
//
// Layout: the cache as ExlCacheLayer, queries and outputs [rows, num_heads, head_dim].
//
// Work per block: one key/value head of one sequence and `16 * warps` query rows that share it
// (tokens x query heads). For each tile of kTile tokens the block unpacks keys to float16 in
// shared memory, multiplies them with the queries (m16n8k16, queries are A), turns scores into
// weights in registers, and does the same with values in the same tile buffer. Packed tiles are
// copied ahead: values while keys are multiplied, the next keys while values are multiplied.
// Work per warp: 16 rows.
//
// Queries are normalised by their largest magnitude so that float16 can hold them.
//
// Elements stay in the order in which units are unpacked (element_of). Queries are stored in the
// keys' order, and results are written back in the order of the head.
//
// The open page is attended last, in tiles of its own. Its elements are unpacked in the order of the
// layer's codes. The first token replaces that of the tile of position 0.
//
// Tiles are at fixed positions of the sequence and tiles that a row does not see do not change
// its sums, so a row's result does not depend on the other rows.
//
// Grid: groups of rows, kv_heads, sequences.
//
// Shared memory: queries float16 [rows][kHeadDim + 8]; tile buffer float16 [kTile][kHeadDim + 8];
// packed codes and scales of a tile; BiasMemory. At the end float32 [warps][8][kHeadDim] over
// all of it.
//
// Preconditions: cache of 3, 4, 6, 8 or 16 bits; head_dim a multiple of 16, at most kHeadDim; with open
// pages the rows of a sequence lie in one page.
#include "cuda/prefill_tile.cuh"

namespace exl {

constexpr int kPrefillThreads = 256;

// The rows of a block, counted over the sequence's rows x the query heads of a key/value head.
struct PrefillRows {
    int sequence, kv_head, heads_per_kv, first;
    int count;  // of the sequence; 0 if it is decoded
    int past, q_first;
    __device__ __forceinline__ PrefillRows(const AttentionCall& call, int rows_of_block) {
        sequence = blockIdx.z;
        kv_head = blockIdx.y;
        heads_per_kv = static_cast<int>(call.shape.num_heads / call.layer.num_kv_heads);
        q_first = call.batch.q_start[sequence];
        past = call.batch.past_len[sequence];
        const int q_len = call.batch.q_start[sequence + 1] - q_first;
        count = q_len > kDecodeRows ? q_len * heads_per_kv : 0;
        first = blockIdx.x * rows_of_block;
    }
    __device__ __forceinline__ bool exists(int row) const { return row < count; }
    __device__ __forceinline__ int token(int row) const { return row / heads_per_kv; }
    __device__ __forceinline__ int position(int row) const { return past + row / heads_per_kv; }
    __device__ __forceinline__ int head(int row) const {
        return kv_head * heads_per_kv + row % heads_per_kv;
    }
};

// Writes a warp's rows to shared memory as float16 in the keys' order. Returns the factors that
// multiply scores after add_bias, for rows g and g + 8 of this lane.
template <int kHeadDim>
__device__ float2 prepare_queries(const AttentionCall& call, const PrefillRows& rows, int first_row,
                                  uint16_t* queries, const BiasMemory& bias) {
    const int head_dim = static_cast<int>(call.layer.head_dim), lane = lane_id();
    const int bits = call.layer.k.bits;
    float2 factors = make_float2(0.0f, 0.0f);
    const float unit = ScoreTransform(call.shape).factor / unit_factor(bits);
    // The element at each position of the keys' order.
    int elements[kHeadDim / 32];
    for (int i = 0; i < kHeadDim / 32; ++i) {
        const int position = lane + 32 * i;
        const bool exists = position / kUnit * kUnit < head_dim;
        elements[i] = exists ? element_of(bits, head_dim, position / kUnit, position % kUnit) : -1;
    }
#pragma unroll 1
    for (int row = 0; row < kWarpRows; ++row) {
        float x[kHeadDim / 32] = {};
        if (rows.exists(first_row + row)) {
            load_query(call, rows.q_first + rows.token(first_row + row),
                       rows.head(first_row + row), x);
        }
        const float largest = largest_of_warp(x);
        const float inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
        uint16_t* out = queries + row * PrefillMemory<kHeadDim>::kStride;
        // Write the row in its own order first; then each lane picks the elements of its positions.
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) out[lane + 32 * i] = float_to_half(x[i] * inverse);
        warp_sync();
        uint16_t picked[kHeadDim / 32];
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) picked[i] = elements[i] < 0 ? 0 : out[elements[i]];
        warp_sync();  // all lanes have picked their elements
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) out[lane + 32 * i] = picked[i];
        float factor = largest * unit;
        if (bias.pairs != 0) {
            const float* q = rows.exists(first_row + row)
                                 ? query_of(call, rows.q_first + rows.token(first_row + row),
                                            rows.head(first_row + row))
                                 : nullptr;
            factor =
                prepare_bias_row(call, rows.kv_head, q, factor, warp_id() * kWarpRows + row, bias);
        }
        if (row == lane / 4) factors.x = factor;
        if (row == lane / 4 + 8) factors.y = factor;
    }
    return factors;
}

// Writes a warp's rows to `out`, eight at a time through the warp's own part of shared memory.
template <int kHeadDim>
__device__ void store_rows(const AttentionCall& call, const PrefillRows& rows, int first_row,
                           PrefillSums<kHeadDim>& sums, float* memory) {
    const int head_dim = static_cast<int>(call.layer.head_dim), bits = call.layer.v.bits;
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        float total = sums.totals[part];
        total += shfl_xor(total, 1);
        total += shfl_xor(total, 2);
        const int own = first_row + 8 * part + g;
        if (rows.exists(own)) total = with_sink(call, rows.head(own), sums.largest[part], total);
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) {
            if (i * 8 / kUnit * kUnit >= head_dim) continue;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int position = i * 8 + 2 * t + j;
                const int element = element_of(bits, head_dim, position / kUnit, position % kUnit);
                memory[g * kHeadDim + element] = sums.o[i][2 * part + j];
            }
        }
        warp_sync();  // rows are read by all lanes
        for (int row = 0; row < 8; ++row) {
            const int index = first_row + 8 * part + row;
            const float row_total = shfl(total, 4 * row);
            if (!rows.exists(index)) continue;
            float x[kHeadDim / 32];
#pragma unroll
            for (int i = 0; i < kHeadDim / 32; ++i) {
                const int element = lane_id() + 32 * i;
                x[i] = element < head_dim ? memory[row * kHeadDim + element] : 0.0f;
            }
            store_row(call, rows.q_first + rows.token(index), rows.head(index), x,
                      1.0f / (row_total * unit_factor(bits)));
        }
        warp_sync();  // rows were read before the next part overwrites them
    }
}

// Tokens of a tile of an open page. Its tokens have up to 2.5 times the bytes of the codes beside
// it, so that such a tile hardly takes more shared memory than one of codes.
EXL_HOST_DEVICE constexpr int open_tile(int tile) { return tile / 2; }

// Copies packed tiles of kTile tokens, or of open_tile(kTile) tokens from `own_page` on, where the
// open page begins. Without open pages own_page is `end`, the end of the tokens that the block sees.
template <int kTile>
struct PrefillCopies {
    const AttentionCall& call;
    const PrefillRows& rows;
    uint8_t* packed;
    int own_page, end;

    // half, open: keys or values of the layer.
    __device__ __forceinline__ void copy(const ExlCacheHalf& half, const ExlOpenPages& open,
                                         int token) const {
        const int head_dim = static_cast<int>(call.layer.head_dim);
        const int64_t heads = call.layer.num_kv_heads;
        if (token < min(own_page, end)) {
            const int64_t token_index =
                token_index_of(call.batch, rows.sequence, heads, rows.kv_head, token);
            copy_tile(half, TileBytes(half.bits, head_dim), token_index, kTile, packed, threadIdx.x,
                      blockDim.x);
        } else if (token < end) {
            const ExlCacheHalf tokens = open_tokens(half, open);
            const int64_t token_index =
                open_token_index(call.batch, open, rows.sequence, heads, rows.kv_head, token);
            copy_tile(tokens, TileBytes(tokens.bits, head_dim), token_index, open_tile(kTile),
                      packed, threadIdx.x, blockDim.x);
        }
        copy_async_commit();
    }
};

// Expands a tile of keys or values from token `first` on.
template <int kHeadDim, int kTile, bool kOpen, typename Copies>
__device__ __forceinline__ void expand_half(const Copies& copies, const ExlCacheHalf& half,
                                            const ExlOpenPages& open, int first,
                                            const PrefillMemory<kHeadDim>& memory) {
    const AttentionCall& call = copies.call;
    const int head_dim = static_cast<int>(call.layer.head_dim);
    const TileBytes bytes(kOpen ? open_tokens(half, open).bits : half.bits, head_dim);
    expand_tile<kHeadDim, kTile, kOpen>(memory, bytes, half.bits, head_dim, copies.end - first);
    if (!kOpen && first == 0 && open.first.codes != nullptr) {
        const int64_t token_index = first_token_index(call.batch, open, copies.rows.sequence,
                                                      call.layer.num_kv_heads, copies.rows.kv_head);
        expand_first_token<kHeadDim>(memory, open.first, token_index, half.bits, head_dim);
    }
}

// A warp's rows, and what their scores need.
struct PrefillWarp {
    const uint16_t* queries;
    int low_row, high_row;  // positions; low_row > high_row beyond the last row
    int positions[2];
    float2 factors;
};

// Attends the tile of kTile tokens from `first` on, whose packed keys are on their way. kWaves:
// tokens whose waves BiasMemory holds.
template <int kHeadDim, int kTile, int kWaves, bool kOpen, typename Copies>
__device__ __forceinline__ void attend_tile(const AttentionCall& call, const Copies& copies,
                                            const PrefillMemory<kHeadDim>& memory, char* shared,
                                            const PrefillWarp& warp,
                                            const ScoreTransform& transform, int first,
                                            PrefillSums<kHeadDim>& sums) {
    const int sliding_window = static_cast<int>(call.shape.sliding_window);
    float scores[kTile / 8][4];
    copy_async_wait<0>();
    block_sync();  // packed keys have arrived; the last values are no longer read
    expand_half<kHeadDim, kTile, kOpen>(copies, call.layer.k, call.layer.k_open, first, memory);
    block_sync();  // keys are unpacked; packed keys are no longer read
    copies.copy(call.layer.v, call.layer.v_open, first);
    multiply_keys<kHeadDim, kTile>(warp.queries, memory.tile, scores);
    if (call.bias.num_pairs != 0) {
        const int block_rows = static_cast<int>(blockDim.x) / 32 * kWarpRows;
        add_bias<kTile, kWaves>(BiasMemory(call, shared, block_rows), first, scores);
    }
    const bool all = all_visible(warp.low_row, warp.high_row, first, kTile, sliding_window);
    softmax_tile<kHeadDim, kTile>(scores, first, all, transform, sliding_window, warp.positions,
                                  warp.factors, sums);
    copy_async_wait<0>();
    block_sync();  // packed values have arrived; keys are no longer read
    expand_half<kHeadDim, kTile, kOpen>(copies, call.layer.v, call.layer.v_open, first, memory);
    block_sync();  // values are unpacked; packed values are no longer read
    copies.copy(call.layer.k, call.layer.k_open, first + kTile);
    multiply_values<kHeadDim, kTile>(scores, memory.tile, sums.o);
}

template <int kHeadDim, int kTile>
__device__ __forceinline__ void attention_prefill(const AttentionCall& call, char* shared) {
    constexpr int kOpenTile = open_tile(kTile);
    const int block_rows = static_cast<int>(blockDim.x) / 32 * kWarpRows;
    const PrefillRows rows(call, block_rows);
    if (rows.first >= rows.count) return;
    const PrefillMemory<kHeadDim> memory(shared, block_rows, kTile);
    const int sliding_window = static_cast<int>(call.shape.sliding_window);
    const int end = rows.position(min(rows.first + block_rows, rows.count) - 1) + 1;
    const int own_page = has_open_pages(call.layer) ? first_open(call.batch, rows.sequence) : end;
    const int low = first_visible(rows.position(rows.first), sliding_window);
    const PrefillCopies<kTile> copies{call, rows, memory.packed, own_page, end};
    int first = low < own_page ? low / kTile * kTile : low / kOpenTile * kOpenTile;
    copies.copy(call.layer.k, call.layer.k_open, first);

    const int warp_row = rows.first + warp_id() * kWarpRows;
    uint16_t* queries =
        memory.queries + warp_id() * kWarpRows * PrefillMemory<kHeadDim>::kStride;
    const BiasMemory bias(call, shared, block_rows);
    PrefillWarp warp;
    warp.queries = queries;
    warp.factors = prepare_queries<kHeadDim>(call, rows, warp_row, queries, bias);
    if (bias.pairs != 0) prepare_waves<kTile>(call.bias, rows.sequence, rows.kv_head, bias);
    for (int i = 0; i < 2; ++i) {
        const int row = warp_row + lane_id() / 4 + 8 * i;
        warp.positions[i] = rows.exists(row) ? rows.position(row) : -1;
    }
    // The results of a warp beyond the last row are not stored.
    warp.low_row = rows.position(warp_row);
    warp.high_row = rows.position(min(warp_row + kWarpRows, rows.count) - 1);
    const ScoreTransform transform(call.shape);
    PrefillSums<kHeadDim> sums;
    for (; first < min(own_page, end); first += kTile) {
        attend_tile<kHeadDim, kTile, kTile, false>(call, copies, memory, shared, warp, transform,
                                                   first, sums);
    }
    if (own_page < end) {
        for (; first < end; first += kOpenTile) {
            attend_tile<kHeadDim, kOpenTile, kTile, true>(call, copies, memory, shared, warp,
                                                          transform, first, sums);
        }
    }
    block_sync();  // the last values are no longer read; rows overwrite them
    store_rows<kHeadDim>(call, rows, warp_row, sums,
                         reinterpret_cast<float*>(shared) + warp_id() * 8 * kHeadDim);
}

#define EXL_PREFILL_KERNEL(head_dim, tile)                                                     \
    extern "C" __global__ void __launch_bounds__(kPrefillThreads, 1)                           \
        attention_prefill_##head_dim##_kernel(const __grid_constant__ AttentionCall call) {    \
        EXL_SHARED(char, shared);                                                              \
        attention_prefill<head_dim, tile>(call, shared);                                       \
    }                                                                                          \
    EXL_KERNEL(attention_prefill_##head_dim##_kernel)

EXL_PREFILL_KERNEL(64, 64);
EXL_PREFILL_KERNEL(128, 64);
EXL_PREFILL_KERNEL(256, 32);

}  // namespace exl
