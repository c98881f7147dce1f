// The contribution of a layer's key bias to scores, if keys are stored without the bias.
//
// Purpose: a pair of bias elements with frequency f adds cos(p f) a + sin(p f) b to the score of
// a token at position p, where a and b (the *factors*) depend on the row's query and the pair.
// ExlKeyBias describes the bias; KeyBias in Python derives the formula. With p = first + o, where
// o is the token's index in its tile, the term is
//
//     cos(o f) a' + sin(o f) b',   a' = cos(first f) a + sin(first f) b
//                                  b' = cos(first f) b - sin(first f) a
//
// so a tile of scores gets one more product, rows x pairs x tokens. Its token side, the *waves*
// (cosine, sine) of `o`, is the same for every tile. Its row side, the factors, is rotated to the
// start of each tile, whose wave is exact; a position therefore has the same bits whatever was
// computed before. Eight pairs are the depth of m16n8k16. A single float16 would be too coarse, so
// both sides are a sum of two, 22 bits, and three products are computed.
//
// Factors are divided by the value that makes all factors of a row at most 1. Before a key bias is
// added, scores are multiplied by `key_factors` to bring them to the same unit.
//
// Precondition: at most kMaxBiasPairs pairs per key/value head.
#pragma once

#include "cuda/angles.cuh"
#include "cuda/attention.cuh"

namespace exl {

constexpr int kStepPairs = 8;  // pairs of one product: m16n8k16 has 16 k, a cosine and a sine each

// The key bias in a block's shared memory; Python computes its size (bias_bytes). Factors and waves
// are in the order in which lane (g = lane / 4, t = lane % 4) reads them: pairs t and t + 4 of a
// step.
struct BiasMemory {
    float* frequencies;  // [kMaxBiasPairs], zeros after the last pair
    float* key_factors;  // [rows]
    float4* factors;     // [rows / 8][steps][32]: a, b of pairs t and t + 4, of row g
    uint4* waves;        // [steps][tokens / 8][32]: high, high, low, low of token g
    int pairs, steps;

    // rows: of the block, a multiple of 8. shared: the block's shared memory.
    __device__ __forceinline__ BiasMemory(const AttentionCall& call, char* shared, int rows)
        : pairs(static_cast<int>(call.bias.num_pairs)),
          steps(ceil_div(pairs, kStepPairs)) {
        frequencies = reinterpret_cast<float*>(shared + call.bias_begin);
        key_factors = frequencies + kMaxBiasPairs;
        factors = reinterpret_cast<float4*>(key_factors + rows);
        waves = reinterpret_cast<uint4*>(factors + rows / 8 * steps * 32);
    }
};

// Two floats, each as the sum of two float16, exact up to 2^-22.
struct HalfParts {
    uint32_t high, low;
    __device__ __forceinline__ explicit HalfParts(float2 x) {
        high = floats_to_half2(x.x, x.y);
        const float2 rounded = half2_to_float2(high);
        low = floats_to_half2(x.x - rounded.x, x.y - rounded.y);
    }
};

// The frequency of a pair of a key/value head; 0 after the last pair.
__device__ __forceinline__ float bias_frequency(const ExlKeyBias& bias, int sequence,
                                                int kv_head, int pair) {
    if (pair >= bias.num_pairs) return 0.0f;
    return bias.inv_freq[sequence * bias.half + bias.pairs[kv_head * bias.num_pairs + pair]];
}

// Computes frequencies and waves, by the whole block. Readable after a barrier.
template <int kTile>
__device__ __forceinline__ void prepare_waves(const ExlKeyBias& bias, int sequence, int kv_head,
                                              const BiasMemory& memory) {
    for (int item = threadIdx.x; item < memory.steps * kTile * 4; item += blockDim.x) {
        const int token = item / 32 % (kTile / 8) * 8 + item % 32 / 4;
        const int pair = item / (kTile * 4) * kStepPairs + item % 4;
        auto* words = reinterpret_cast<uint32_t*>(memory.waves + item);
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            const float frequency = bias_frequency(bias, sequence, kv_head, pair + 4 * i);
            const HalfParts parts(wave_at(token, frequency));
            words[i] = parts.high;
            words[2 + i] = parts.low;
        }
    }
    if (threadIdx.x < kMaxBiasPairs) {
        memory.frequencies[threadIdx.x] =
            bias_frequency(bias, sequence, kv_head, static_cast<int>(threadIdx.x));
    }
}

// The factors of a pair, from a query after RoPE.
__device__ __forceinline__ float2 bias_factors(const ExlKeyBias& bias, int kv_head, int pair,
                                               const float* q) {
    const int64_t index = kv_head * bias.num_pairs + pair;
    const float q1 = q[bias.pairs[index]], q2 = q[bias.half + bias.pairs[index]];
    const float first = bias.first[index], second = bias.second[index];
    return make_float2(fmaf(q1, first, q2 * second), fmaf(q2, first, -(q1 * second)));
}

// Computes the factors of a row, by a warp.
//
// q: the row's query; null if there is no such row. key_factor: the factor that converts the
// caller's product of the row with a key to a score. index: the row's index in the block. Returns
// the factor that multiplies scores after add_bias.
__device__ __forceinline__ float prepare_bias_row(const AttentionCall& call, int kv_head,
                                                  const float* q, float key_factor, int index,
                                                  const BiasMemory& memory) {
    const int pair = lane_id();
    float2 x = make_float2(0.0f, 0.0f);
    if (q != nullptr && pair < memory.pairs) x = bias_factors(call.bias, kv_head, pair, q);
    const float unit = ScoreTransform(call.shape).factor * call.bias.rope_factor;
    // No rotation makes a factor larger than this.
    const float largest = warp_max(fabsf(x.x) + fabsf(x.y)) * unit;
    const float factor = fmaxf(key_factor, largest);
    const float inverse = factor > 0.0f ? 1.0f / factor : 0.0f;
    if (pair == 0) memory.key_factors[index] = key_factor * inverse;
    if (pair < memory.steps * kStepPairs) {
        const int item = (index / 8 * memory.steps + pair / kStepPairs) * 32 + index % 8 * 4;
        reinterpret_cast<float2*>(memory.factors + item + pair % 4)[pair % kStepPairs / 4] =
            make_float2(x.x * unit * inverse, x.y * unit * inverse);
    }
    return factor;
}

// The wave of this lane's pair at the first token of a tile.
__device__ __forceinline__ float2 tile_wave(const BiasMemory& memory, int first_token) {
    return wave_at(first_token, memory.frequencies[lane_id()]);
}

// A lane's factors of a step, rotated to the start of the tile: pairs t and t + 4 of row g.
struct RotatedFactors {
    uint32_t high[2], low[2];
    __device__ __forceinline__ RotatedFactors(const float4& factors, const float2& wave, int step) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int source = step * kStepPairs + lane_id() % 4 + 4 * i;
            const float cosine = shfl(wave.x, source), sine = shfl(wave.y, source);
            const float a = i ? factors.z : factors.x, b = i ? factors.w : factors.y;
            const HalfParts parts(make_float2(fmaf(a, cosine, b * sine),
                                              fmaf(b, cosine, -(a * sine))));
            high[i] = parts.high;
            low[i] = parts.low;
        }
    }
};

}  // namespace exl
