// Attention of a prompt's rows: tiles of the cache, unpacked once for many rows.
//
// A block takes one key/value head of one sequence and `16 * warps` query rows that share it
// (tokens x query heads). Tile by tile of kTile tokens, keys are unpacked to float16 in shared
// memory and multiplied (m16n8k16; a warp has 16 rows, queries are A), scores are softened and
// become weights in registers, and values go the same way through the same memory. Packed
// tiles are copied ahead: values while keys are multiplied, the next keys while values are.
// Queries are normalised, so that float16 holds them whatever their size.
//
// Elements stay in the order in which units are unpacked; queries are stored in the keys'
// order, and the result's order is undone when it is written.
//
// Tiles stand at fixed places of the sequence and those that a row does not see change nothing
// about it, so a row's result does not depend on the other rows.
//
// Grid: groups of rows, kv_heads, sequences. Shared memory: queries float16 [rows][kHeadDim +
// 8], a tile float16 [kTile][kHeadDim + 8], packed codes and scales of a tile, BiasMemory; at the
// end float32 [warps][8][kHeadDim] over all that.
#include "cuda/prefill_tile.cuh"

namespace exl {

constexpr int kPrefillThreads = 256;

// The rows of a block, counted over the sequence's rows x the heads that share a kv head.
struct PrefillRows {
    int sequence, kv_head, sharing, first, count;  // count: of the sequence, 0: not a prompt
    int past, q_first;
    __device__ __forceinline__ PrefillRows(const AttentionCall& call, int rows_of_block) {
        sequence = blockIdx.z;
        kv_head = blockIdx.y;
        sharing = static_cast<int>(call.shape.num_heads / call.layer.num_kv_heads);
        q_first = call.batch.q_start[sequence];
        past = call.batch.past_len[sequence];
        const int q_len = call.batch.q_start[sequence + 1] - q_first;
        count = q_len > kDecodeRows ? q_len * sharing : 0;
        first = blockIdx.x * rows_of_block;
    }
    __device__ __forceinline__ bool exists(int row) const { return row < count; }
    __device__ __forceinline__ int token(int row) const { return row / sharing; }
    __device__ __forceinline__ int position(int row) const { return past + row / sharing; }
    __device__ __forceinline__ int head(int row) const {
        return kv_head * sharing + row % sharing;
    }
};

// A warp's own rows as float16, in the keys' order; returns the factors on scores, behind
// add_bias, of the two rows g and g + 8 that a lane will have.
template <int kHeadDim>
__device__ float2 stage_rows(const AttentionCall& call, const PrefillRows& rows, int first_row,
                             uint16_t* queries, const BiasMemory& bias) {
    const int head_dim = static_cast<int>(call.layer.head_dim), lane = lane_id();
    const int bits = call.layer.k.bits;
    float2 factors = make_float2(0.0f, 0.0f);
    const float unit = Softening(call.shape).factor / unit_factor(bits);
    // Where an element stands in the keys' order.
    int places[kHeadDim / 32];
    for (int i = 0; i < kHeadDim / 32; ++i) {
        const int place = lane + 32 * i;
        const bool known = place / kUnit * kUnit < head_dim;
        places[i] = known ? element_of(bits, head_dim, place / kUnit, place % kUnit) : -1;
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
        // The row in its own order first; then each lane picks what belongs to its places.
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) out[lane + 32 * i] = float_to_half(x[i] * inverse);
        warp_sync();
        uint16_t picked[kHeadDim / 32];
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) picked[i] = places[i] < 0 ? 0 : out[places[i]];
        warp_sync();  // all have picked
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) out[lane + 32 * i] = picked[i];
        float factor = largest * unit;
        if (bias.pairs != 0) {
            const float* q = rows.exists(first_row + row)
                                 ? query_of(call, rows.q_first + rows.token(first_row + row),
                                            rows.head(first_row + row))
                                 : nullptr;
            factor = stage_bias_row(call, rows.kv_head, q, factor,
                                    warp_id() * kWarpRows + row, bias);
        }
        if (row == lane / 4) factors.x = factor;
        if (row == lane / 4 + 8) factors.y = factor;
    }
    return factors;
}

// A warp's rows to `out`, eight at a time through shared memory of its own.
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
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) {
            if (i * 8 / kUnit * kUnit >= head_dim) continue;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int place = i * 8 + 2 * t + j;
                const int element = element_of(bits, head_dim, place / kUnit, place % kUnit);
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
        warp_sync();  // before the next part overwrites them
    }
}

template <int kHeadDim, int kTile>
__device__ __forceinline__ void attention_prefill(const AttentionCall& call, char* shared) {
    const int block_rows = static_cast<int>(blockDim.x) / 32 * kWarpRows;
    const PrefillRows rows(call, block_rows);
    if (rows.first >= rows.count) return;
    const PrefillMemory<kHeadDim> memory(shared, block_rows, kTile);
    const int head_dim = static_cast<int>(call.layer.head_dim);
    const int window = static_cast<int>(call.shape.window);
    const TileBytes k_bytes(call.layer.k.bits, head_dim), v_bytes(call.layer.v.bits, head_dim);
    const int last = rows.position(min(rows.first + block_rows, rows.count) - 1);
    const int first_tile = first_seen(rows.position(rows.first), window) / kTile;
    const auto copy = [&](const ExlCacheHalf& half, const TileBytes& bytes, int tile) {
        if (tile * kTile <= last) {
            const int64_t place = place_of(call.batch, rows.sequence, call.layer.num_kv_heads,
                                           rows.kv_head, tile * kTile);
            copy_tile(half, bytes, place, kTile, memory.packed, threadIdx.x, blockDim.x);
        }
        copy_async_commit();
    };
    copy(call.layer.k, k_bytes, first_tile);

    const int warp_row = rows.first + warp_id() * kWarpRows;
    uint16_t* queries =
        memory.queries + warp_id() * kWarpRows * PrefillMemory<kHeadDim>::kStride;
    const BiasMemory bias(call, shared, block_rows);
    const float2 factors = stage_rows<kHeadDim>(call, rows, warp_row, queries, bias);
    if (bias.pairs != 0) stage_waves<kTile>(call.bias, rows.sequence, rows.kv_head, bias);
    int positions[2];
    for (int i = 0; i < 2; ++i) {
        const int row = warp_row + lane_id() / 4 + 8 * i;
        positions[i] = rows.exists(row) ? rows.position(row) : -1;
    }
    // A warp beyond the last row has low_row > high_row, and nothing that anyone reads.
    const int low_row = rows.position(warp_row);
    const int high_row = rows.position(min(warp_row + kWarpRows, rows.count) - 1);
    const Softening soften(call.shape);
    PrefillSums<kHeadDim> sums;
    for (int tile = first_tile; tile * kTile <= last; ++tile) {
        const int end = last + 1 - tile * kTile;
        float scores[kTile / 8][4];
        copy_async_wait<0>();
        block_sync();  // packed keys are there; the last values are no longer read
        expand_tile<kHeadDim, kTile>(memory, k_bytes, call.layer.k.bits, head_dim, end);
        block_sync();  // keys are unpacked; packed ones are no longer read
        copy(call.layer.v, v_bytes, tile);
        multiply_keys<kHeadDim, kTile>(queries, memory.tile, scores);
        if (call.bias.num_pairs != 0) {
            add_bias<kTile>(BiasMemory(call, shared, block_rows), tile * kTile, scores);
        }
        const bool all = all_see(low_row, high_row, tile * kTile, kTile, window);
        soften_tile<kHeadDim, kTile>(scores, tile * kTile, all, soften, window, positions,
                                     factors, sums);
        copy_async_wait<0>();
        block_sync();  // packed values are there; keys are no longer read
        expand_tile<kHeadDim, kTile>(memory, v_bytes, call.layer.v.bits, head_dim, end);
        block_sync();  // values are unpacked; packed ones are no longer read
        copy(call.layer.k, k_bytes, tile + 1);
        multiply_values<kHeadDim, kTile>(scores, memory.tile, sums.o);
    }
    block_sync();  // the last values are no longer read: rows go there
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
