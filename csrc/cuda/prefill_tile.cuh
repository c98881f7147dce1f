// Prefill attention of one tile of the cache: expansion of keys and values to float16 in shared
// memory, scores, weights, and the running sums of rows. See attention_prefill.cu for layout,
// work and preconditions; the fragment layout of scores is described at multiply_keys.
#pragma once

#include "cuda/key_bias.cuh"

namespace exl {

constexpr int kWarpRows = 16;
// Number of float16 appended to each row: 16 bytes, so that the 8 rows of a load_matrix are in
// different banks.
constexpr int kPadding = 8;

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

// Writes a unit of a token to the tile buffer.
template <int kHeadDim>
__device__ __forceinline__ void store_unit(const PrefillMemory<kHeadDim>& memory, int token,
                                           int unit, const uint32_t (&pairs)[8]) {
    auto* out = reinterpret_cast<uint4*>(
        memory.tile + token * PrefillMemory<kHeadDim>::kStride + unit * kUnit);
    out[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    out[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}

// Expands a packed tile to float16, by the whole block. Tokens from `end` on become zeros. kOpen:
// the tile is of an open page beside codes of kBits.
template <int kHeadDim, int kTile, int kBits, bool kOpen>
__device__ __forceinline__ void expand_tile(const PrefillMemory<kHeadDim>& memory,
                                            const TileBytes& bytes, int head_dim, int end) {
    constexpr int kUnits = kHeadDim / kUnit;
    const auto* scales = reinterpret_cast<const uint16_t*>(memory.packed + kTile * bytes.codes);
    for (int item = threadIdx.x; item < kTile * kUnits; item += blockDim.x) {
        const int token = item / kUnits, unit = item % kUnits;
        uint32_t pairs[8] = {};
        if (token < end && unit * kUnit < head_dim) {
            const uint8_t* row = memory.packed + token * bytes.codes;
            if constexpr (kOpen) {
                expand_open_unit<kBits>(row, scales + token * bytes.groups, head_dim, unit, pairs);
            } else {
                expand_unit<kBits>(row, scales + token * bytes.groups, head_dim, unit, pairs);
            }
        }
        store_unit(memory, token, unit, pairs);
    }
}
// bits: of the codes, beside which an open page may be.
template <int kHeadDim, int kTile, bool kOpen>
__device__ void expand_tile(const PrefillMemory<kHeadDim>& memory, const TileBytes& bytes,
                            int bits, int head_dim, int end) {
    switch (bits) {
        case 3: return expand_tile<kHeadDim, kTile, 3, kOpen>(memory, bytes, head_dim, end);
        case 4: return expand_tile<kHeadDim, kTile, 4, kOpen>(memory, bytes, head_dim, end);
        case 6: return expand_tile<kHeadDim, kTile, 6, kOpen>(memory, bytes, head_dim, end);
        case 8: return expand_tile<kHeadDim, kTile, 8, kOpen>(memory, bytes, head_dim, end);
        // Codes of 16 bits have no open page.
        default: return expand_tile<kHeadDim, kTile, 16, false>(memory, bytes, head_dim, end);
    }
}

// Replaces the first token of the tile buffer by a sequence's first token, which is stored with open
// pages beside codes of `bits`. A thread writes where it also wrote in expand_tile.
template <int kHeadDim>
__device__ void expand_first_token(const PrefillMemory<kHeadDim>& memory, const ExlCacheHalf& first,
                                   int64_t token_index, int bits, int head_dim) {
    const int unit = threadIdx.x;
    if (unit * kUnit >= head_dim) return;
    const uint8_t* row =
        static_cast<const uint8_t*>(first.codes) + token_index * code_bytes(head_dim, first.bits);
    const uint16_t* scales = first.scales + token_index * num_groups(head_dim, first.bits);
    uint32_t pairs[8];
    switch (bits) {
        case 3: expand_open_unit<3>(row, scales, head_dim, unit, pairs); break;
        case 4: expand_open_unit<4>(row, scales, head_dim, unit, pairs); break;
        case 6: expand_open_unit<6>(row, scales, head_dim, unit, pairs); break;
        default: expand_open_unit<8>(row, scales, head_dim, unit, pairs);
    }
    store_unit(memory, 0, unit, pairs);
}

// Multiplies a warp's 16 rows with a tile of keys. Lane (g, t) gets the scores of rows g (0, 1)
// and g + 8 (2, 3), tokens 8 * i + 2t and + 1.
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

// Adds the contribution of the key bias to the scores of a tile. kWaves: tokens whose waves
// BiasMemory holds, at least those of a tile.
template <int kTile, int kWaves>
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
        const RotatedFactors upper(factors[0], wave, step);
        const RotatedFactors lower(factors[bias.steps * 32], wave, step);
        const uint32_t high[4] = {upper.high[0], lower.high[0], upper.high[1], lower.high[1]};
        const uint32_t low[4] = {upper.low[0], lower.low[0], upper.low[1], lower.low[1]};
        const uint4* waves = bias.waves + step * kWaves * 4 + lane;
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

// Running sums of a warp's rows. `totals` covers only the tokens of this lane.
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
        if (ballot(!same) == 0) return;  // all factors would be 1
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

// Turns scores into weights in place. all: every row of the warp sees all of the tile.
template <int kHeadDim, int kTile>
__device__ __forceinline__ void softmax_tile(float (&scores)[kTile / 8][4], int first_token,
                                             bool all, const ScoreTransform& transform,
                                             int sliding_window, const int (&positions)[2],
                                             const float2& factors, PrefillSums<kHeadDim>& sums) {
    float largest[2] = {sums.largest[0], sums.largest[1]};
#pragma unroll
    for (int i = 0; i < kTile / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[i][j] *= j / 2 ? factors.y : factors.x;
    }
    if (transform.caps()) {
#pragma unroll
        for (int i = 0; i < kTile / 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) scores[i][j] = transform.capped(scores[i][j]);
        }
    }
    if (!all) {
#pragma unroll
        for (int i = 0; i < kTile / 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int token = first_token + 8 * i + lane_id() % 4 * 2 + j % 2;
                if (!is_visible(positions[j / 2], token, sliding_window))
                    scores[i][j] = -infinity();
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

}  // namespace exl
