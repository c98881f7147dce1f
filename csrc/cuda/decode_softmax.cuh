// Softmax of decoding: scores to weights, and the running sums of warps to rows.
//
// See attention_decode.cu for layout, work and preconditions. g = lane / 4, t = lane % 4.
#pragma once

#include "cuda/decode_rows.cuh"

namespace exl {

// Running sums of a warp's rows. Lane (g, t) has rows 2t and 2t + 1; `totals` covers only the
// tokens of this lane.
template <int kHeadDim>
struct DecodeSums {
    float o[kHeadDim / 16][4];
    float largest[2], totals[2];

    __device__ __forceinline__ DecodeSums() {
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
        largest[0] = largest[1] = -infinity();
        totals[0] = totals[1] = 0.0f;
    }
    __device__ __forceinline__ void scale(const float (&factors)[2]) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) o[i][j] *= factors[j % 2];
        }
        totals[0] *= factors[0];
        totals[1] *= factors[1];
    }
    // Rescales both rows to new maxima, which are not below the old ones.
    __device__ __forceinline__ void raise(const float (&to)[2]) {
        const bool same = to[0] == largest[0] && to[1] == largest[1];
        if (ballot(!same) == 0) return;  // all factors would be 1
        float factors[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            factors[n] = exp2_fast(largest[n] - finite_base(to[n]));
            largest[n] = to[n];
        }
        scale(factors);
    }
};

// Turns the scores of a tile into weights, as B fragments of its groups of 16 tokens. Rows see none
// but the tile's tokens [begin, end). all: every row of the pass sees all of the tile.
template <int kHeadDim, int kTile>
__device__ __forceinline__ void softmax_tile(float (&scores)[kTile / 16][4], int first_token,
                                             int begin, int end, bool all,
                                             const ScoreTransform& transform,
                                             int sliding_window, const RowData& data,
                                             DecodeSums<kHeadDim>& sums,
                                             uint32_t (&weights)[kTile / 16][2]) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    float largest[2] = {sums.largest[0], sums.largest[1]};
    const float factors[2] = {data.factors[2 * t], data.factors[2 * t + 1]};
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[i][j] *= factors[j % 2];
    }
    if (transform.caps()) {
#pragma unroll
        for (int i = 0; i < kTile / 16; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) scores[i][j] = transform.capped(scores[i][j]);
        }
    }
    if (!all) {
#pragma unroll
        for (int i = 0; i < kTile / 16; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = 2 * t + j % 2, token = first_token + i * 16 + j / 2 * 8 + g;
                const bool exists = token >= first_token + begin && token < first_token + end;
                const bool visible = is_visible(data.positions[row], token, sliding_window);
                if (!exists || !visible) scores[i][j] = -infinity();
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) largest[j % 2] = fmaxf(largest[j % 2], scores[i][j]);
    }
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
        largest[0] = fmaxf(largest[0], shfl_xor(largest[0], mask));
        largest[1] = fmaxf(largest[1], shfl_xor(largest[1], mask));
    }
    sums.raise(largest);
    const float base[2] = {finite_base(largest[0]), finite_base(largest[1])};
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            scores[i][j] = exp2_fast(scores[i][j] - base[j % 2]);
            sums.totals[j % 2] += scores[i][j];
        }
        weights[i][0] = transpose_matrix(floats_to_half2(scores[i][0], scores[i][1]));
        weights[i][1] = transpose_matrix(floats_to_half2(scores[i][2], scores[i][3]));
    }
}

// Merges the sums of all warps in a tree of fixed order; warp 0 has the result.
template <int kHeadDim>
__device__ __forceinline__ void merge_warps(DecodeSums<kHeadDim>& sums, float* memory) {
    constexpr int kFloats = kHeadDim / 16 * 4 + 4;
    const int warps = static_cast<int>(blockDim.x) / 32, warp = warp_id();
    for (int step = 1; step < warps; step *= 2) {
        float* slot = memory + warp / (2 * step) * kFloats * 32 + lane_id();
        block_sync();  // rings, or the sums of the last round, are no longer read
        if (warp % (2 * step) == step) {
#pragma unroll
            for (int i = 0; i < kHeadDim / 4; ++i) slot[i * 32] = sums.o[i / 4][i % 4];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                slot[(kFloats - 4 + n) * 32] = sums.largest[n];
                slot[(kFloats - 2 + n) * 32] = sums.totals[n];
            }
        }
        block_sync();  // the sums in the slots are complete
        if (warp % (2 * step) == 0) {
            float largest[2], other_factors[2];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const float other = slot[(kFloats - 4 + n) * 32];
                largest[n] = fmaxf(sums.largest[n], other);
                other_factors[n] = exp2_fast(other - finite_base(largest[n]));
            }
            sums.raise(largest);
#pragma unroll
            for (int i = 0; i < kHeadDim / 4; ++i) {
                sums.o[i / 4][i % 4] =
                    fmaf(slot[i * 32], other_factors[i % 2], sums.o[i / 4][i % 4]);
            }
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                sums.totals[n] =
                    fmaf(slot[(kFloats - 2 + n) * 32], other_factors[n], sums.totals[n]);
            }
        }
    }
}

// Writes warp 0's fragments to shared memory as rows, times the unit_factor of the layer's values.
// v_bits: of the values that were added.
template <int kHeadDim>
__device__ __forceinline__ void spread_rows(const AttentionCall& call, int v_bits,
                                            DecodeSums<kHeadDim>& sums,
                                            const DecodeMemory<kHeadDim>& memory) {
    constexpr int kHalves = kHeadDim / 64;
    const int g = lane_id() / 4, t = lane_id() % 4;
    const int head_dim = static_cast<int>(call.layer.head_dim);
    // Powers of two.
    const float factor = unit_factor(call.layer.v.bits) / unit_factor(v_bits);
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
        sums.totals[0] += shfl_xor(sums.totals[0], mask);
        sums.totals[1] += shfl_xor(sums.totals[1], mask);
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
        const int half = g * kHalves + i / 4;
        if (half / 2 * kUnit >= head_dim) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int position_in_unit = half % 2 * 8 + i % 4 * 2 + j / 2;
            const int element = element_of(v_bits, head_dim, half / 2, position_in_unit);
            memory.rows[(2 * t + j % 2) * kHeadDim + element] = sums.o[i][j] * factor;
        }
    }
    if (g == 0) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            memory.data->largest[2 * t + n] = sums.largest[n];
            memory.data->totals[2 * t + n] = sums.totals[n];
        }
    }
}

}  // namespace exl
