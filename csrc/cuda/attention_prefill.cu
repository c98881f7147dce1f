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
#include "cuda/key_bias.cuh"

namespace exl {

constexpr int kPrefillThreads = 256;
constexpr int kWarpRows = 16;
constexpr int kPadding = 8;  // halves of a row, so that load_matrix meets no bank twice

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

template <int kHeadDim>
struct PrefillMemory {
    static constexpr int kStride = kHeadDim + kPadding;
    uint16_t* queries;
    uint16_t* tile;
    uint8_t* packed;
    __device__ __forceinline__ PrefillMemory(char* memory, int rows, int tile_tokens)
        : queries(reinterpret_cast<uint16_t*>(memory)),
          tile(queries + rows * kStride),
          packed(reinterpret_cast<uint8_t*>(tile + tile_tokens * kStride)) {}
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

// A packed tile to float16 by the whole block; tokens from `end` on become zeros.
template <int kHeadDim, int kTile, int kBits>
__device__ __forceinline__ void expand_tile(const PrefillMemory<kHeadDim>& memory,
                                            const TileBytes& bytes, int head_dim, int end) {
    constexpr int kUnits = kHeadDim / kUnit;
    const auto* scales = reinterpret_cast<const uint16_t*>(memory.packed + kTile * bytes.codes);
    for (int item = threadIdx.x; item < kTile * kUnits; item += blockDim.x) {
        const int token = item / kUnits, unit = item % kUnits;
        uint32_t pairs[8] = {};
        if (token < end && unit * kUnit < head_dim) {
            expand_unit<kBits>(memory.packed + token * bytes.codes, scales + token * bytes.groups,
                               head_dim, unit, pairs);
        }
        auto* out = reinterpret_cast<uint4*>(
            memory.tile + token * PrefillMemory<kHeadDim>::kStride + unit * kUnit);
        out[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        out[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
    }
}
template <int kHeadDim, int kTile>
__device__ void expand_tile(const PrefillMemory<kHeadDim>& memory, const TileBytes& bytes,
                            int bits, int head_dim, int end) {
    switch (bits) {
        case 4: return expand_tile<kHeadDim, kTile, 4>(memory, bytes, head_dim, end);
        case 6: return expand_tile<kHeadDim, kTile, 6>(memory, bytes, head_dim, end);
        case 8: return expand_tile<kHeadDim, kTile, 8>(memory, bytes, head_dim, end);
        default: return expand_tile<kHeadDim, kTile, 16>(memory, bytes, head_dim, end);
    }
}

// Scores of a warp's 16 rows with a tile of keys: lane (g, t) has rows g (0, 1) and g + 8
// (2, 3), tokens 8 * i + 2t and + 1.
template <int kHeadDim, int kTile>
__device__ __forceinline__ void multiply_keys(const uint16_t* queries, const uint16_t* keys,
                                              float (&scores)[kTile / 8][4]) {
    constexpr int kStride = PrefillMemory<kHeadDim>::kStride;
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i) {
        scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = 0.0f;
    }
    const uint16_t* query = queries + lane % 16 * kStride + lane / 16 * 8;
    const uint16_t* key = keys + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll 4
    for (int step = 0; step < kHeadDim / 16; ++step) {
        uint32_t a[4];
        load_matrix_x4(a, query + step * 16);
#pragma unroll
        for (int i = 0; i < kTile / 16; ++i) {
            uint32_t b[4];
            load_matrix_x4(b, key + i * 16 * kStride + step * 16);
            const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
            mma_f16_16x8x16(scores[2 * i], a, first);
            mma_f16_16x8x16(scores[2 * i + 1], a, second);
        }
    }
}

// Adds to a tile's scores what the key bias does.
template <int kTile>
__device__ __forceinline__ void add_bias(const BiasMemory& bias, int first_token,
                                         float (&scores)[kTile / 8][4]) {
    const int lane = lane_id(), group = warp_id() * (kWarpRows / 8);
    const float2 wave = tile_wave(bias, first_token);
    const float* key_factors = bias.key_factors + group * 8 + lane / 4;
    const float units[2] = {key_factors[0], key_factors[8]};
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[i][j] *= units[j / 2];
    }
#pragma unroll 1
    for (int step = 0; step < bias.steps; ++step) {
        const float4* factors = bias.factors + (group * bias.steps + step) * 32 + lane;
        const TurnedFactors upper(factors[0], wave, step);
        const TurnedFactors lower(factors[bias.steps * 32], wave, step);
        const uint32_t high[4] = {upper.high[0], lower.high[0], upper.high[1], lower.high[1]};
        const uint32_t low[4] = {upper.low[0], lower.low[0], upper.low[1], lower.low[1]};
        const uint4* waves = bias.waves + step * kTile * 4 + lane;
#pragma unroll
        for (int i = 0; i < kTile / 8; ++i) {
            const uint4 tokens = waves[i * 32];
            const uint32_t high_wave[2] = {tokens.x, tokens.y}, low_wave[2] = {tokens.z, tokens.w};
            mma_f16_16x8x16(scores[i], high, high_wave);
            mma_f16_16x8x16(scores[i], high, low_wave);
            mma_f16_16x8x16(scores[i], low, high_wave);
        }
    }
}

// What a warp's rows have gathered; totals of a lane's own tokens alone.
template <int kHeadDim>
struct PrefillSums {
    float o[kHeadDim / 8][4];
    float largest[2], totals[2];
    __device__ __forceinline__ PrefillSums() {
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
        largest[0] = largest[1] = -infinity();
        totals[0] = totals[1] = 0.0f;
    }
    __device__ __forceinline__ void raise(const float (&to)[2]) {
        const bool same = to[0] == largest[0] && to[1] == largest[1];
        if (ballot(!same) == 0) return;  // factors would be 1
        float factors[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            factors[n] = exp2_fast(largest[n] - finite_base(to[n]));
            largest[n] = to[n];
            totals[n] *= factors[n];
        }
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) o[i][j] *= factors[j / 2];
        }
    }
};

// Scores into weights in place. all: every row of the warp sees all of the tile.
template <int kHeadDim, int kTile>
__device__ __forceinline__ void soften_tile(float (&scores)[kTile / 8][4], int first_token,
                                            bool all, const Softening& soften, int window,
                                            const int (&positions)[2], const float2& factors,
                                            PrefillSums<kHeadDim>& sums) {
    float largest[2] = {sums.largest[0], sums.largest[1]};
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[i][j] *= j / 2 ? factors.y : factors.x;
    }
    if (soften.caps()) {
#pragma unroll
        for (int i = 0; i < kTile / 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) scores[i][j] = soften.capped(scores[i][j]);
        }
    }
    if (!all) {
#pragma unroll
        for (int i = 0; i < kTile / 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int token = first_token + 8 * i + lane_id() % 4 * 2 + j % 2;
                if (!sees(positions[j / 2], token, window)) scores[i][j] = -infinity();
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) largest[j / 2] = fmaxf(largest[j / 2], scores[i][j]);
    }
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
        largest[0] = fmaxf(largest[0], shfl_xor(largest[0], mask));
        largest[1] = fmaxf(largest[1], shfl_xor(largest[1], mask));
    }
    sums.raise(largest);
    const float base[2] = {finite_base(largest[0]), finite_base(largest[1])};
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            scores[i][j] = exp2_fast(scores[i][j] - base[j / 2]);
            sums.totals[j / 2] += scores[i][j];
        }
    }
}

// o += weights x values of a tile.
template <int kHeadDim, int kTile>
__device__ __forceinline__ void multiply_values(const float (&weights)[kTile / 8][4],
                                                const uint16_t* values,
                                                float (&o)[kHeadDim / 8][4]) {
    constexpr int kStride = PrefillMemory<kHeadDim>::kStride;
    const uint16_t* value = values + lane_id() % 16 * kStride + lane_id() / 16 * 8;
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
        const uint32_t a[4] = {
            floats_to_half2(weights[2 * step][0], weights[2 * step][1]),
            floats_to_half2(weights[2 * step][2], weights[2 * step][3]),
            floats_to_half2(weights[2 * step + 1][0], weights[2 * step + 1][1]),
            floats_to_half2(weights[2 * step + 1][2], weights[2 * step + 1][3])};
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) {
            uint32_t b[4];
            load_matrix_x4_transposed(b, value + step * 16 * kStride + i * 16);
            const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
            mma_f16_16x8x16(o[2 * i], a, first);
            mma_f16_16x8x16(o[2 * i + 1], a, second);
        }
    }
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
