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
// Tiles are at fixed positions of the sequence and tiles that a row does not see do not change
// its sums, so a row's result does not depend on the other rows.
//
// Grid: groups of rows, kv_heads, sequences.
//
// Shared memory: queries float16 [rows][kHeadDim + 8]; tile buffer float16 [kTile][kHeadDim + 8];
// packed codes and scales of a tile; BiasMemory. At the end float32 [warps][8][kHeadDim] over
// all of it.
//
// Preconditions: cache of 4, 6, 8 or 16 bits; head_dim a multiple of 16, at most kHeadDim.
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

template <int kHeadDim, int kTile>
__device__ __forceinline__ void attention_prefill(const AttentionCall& call, char* shared) {
    const int block_rows = static_cast<int>(blockDim.x) / 32 * kWarpRows;
    const PrefillRows rows(call, block_rows);
    if (rows.first >= rows.count) return;
    const PrefillMemory<kHeadDim> memory(shared, block_rows, kTile);
    const int head_dim = static_cast<int>(call.layer.head_dim);
    const int sliding_window = static_cast<int>(call.shape.sliding_window);
    const TileBytes k_bytes(call.layer.k.bits, head_dim), v_bytes(call.layer.v.bits, head_dim);
    const int last = rows.position(min(rows.first + block_rows, rows.count) - 1);
    const int first_tile = first_visible(rows.position(rows.first), sliding_window) / kTile;
    const auto copy = [&](const ExlCacheHalf& half, const TileBytes& bytes, int tile) {
        if (tile * kTile <= last) {
            const int64_t token_index = token_index_of(
                call.batch, rows.sequence, call.layer.num_kv_heads, rows.kv_head, tile * kTile);
            copy_tile(half, bytes, token_index, kTile, memory.packed, threadIdx.x, blockDim.x);
        }
        copy_async_commit();
    };
    copy(call.layer.k, k_bytes, first_tile);

    const int warp_row = rows.first + warp_id() * kWarpRows;
    uint16_t* queries =
        memory.queries + warp_id() * kWarpRows * PrefillMemory<kHeadDim>::kStride;
    const BiasMemory bias(call, shared, block_rows);
    const float2 factors = prepare_queries<kHeadDim>(call, rows, warp_row, queries, bias);
    if (bias.pairs != 0) prepare_waves<kTile>(call.bias, rows.sequence, rows.kv_head, bias);
    int positions[2];
    for (int i = 0; i < 2; ++i) {
        const int row = warp_row + lane_id() / 4 + 8 * i;
        positions[i] = rows.exists(row) ? rows.position(row) : -1;
    }
    // A warp beyond the last row has low_row > high_row; its results are not stored.
    const int low_row = rows.position(warp_row);
    const int high_row = rows.position(min(warp_row + kWarpRows, rows.count) - 1);
    const ScoreTransform transform(call.shape);
    PrefillSums<kHeadDim> sums;
    for (int tile = first_tile; tile * kTile <= last; ++tile) {
        const int end = last + 1 - tile * kTile;
        float scores[kTile / 8][4];
        copy_async_wait<0>();
        block_sync();  // packed keys have arrived; the last values are no longer read
        expand_tile<kHeadDim, kTile>(memory, k_bytes, call.layer.k.bits, head_dim, end);
        block_sync();  // keys are unpacked; packed keys are no longer read
        copy(call.layer.v, v_bytes, tile);
        multiply_keys<kHeadDim, kTile>(queries, memory.tile, scores);
        if (call.bias.num_pairs != 0) {
            add_bias<kTile>(BiasMemory(call, shared, block_rows), tile * kTile, scores);
        }
        const bool all = all_visible(low_row, high_row, tile * kTile, kTile, sliding_window);
        softmax_tile<kHeadDim, kTile>(scores, tile * kTile, all, transform, sliding_window,
                                      positions, factors, sums);
        copy_async_wait<0>();
        block_sync();  // packed values have arrived; keys are no longer read
        expand_tile<kHeadDim, kTile>(memory, v_bytes, call.layer.v.bits, head_dim, end);
        block_sync();  // values are unpacked; packed values are no longer read
        copy(call.layer.k, k_bytes, tile + 1);
        multiply_values<kHeadDim, kTile>(scores, memory.tile, sums.o);
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
