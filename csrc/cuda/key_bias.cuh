// What a layer's key bias adds to scores, where keys are stored without it.
//
// The formula is in exl_loader/key_bias.py: a pair of bias elements with frequency f adds
// cos(p f) a + sin(p f) b to the score of a row with position p, with a and b of the row's
// query and the pair. With p = first + o, o a token's place in its tile, that is
//
//     cos(o f) a' + sin(o f) b',   a' = cos(first f) a + sin(first f) b
//                                  b' = cos(first f) b - sin(first f) a
//
// so a tile of scores gets one more product, rows x pairs x tokens. Its tokens' side, the waves
// (cosine, sine) of `o`, is the same for every tile; its rows' side, the factors (a, b), is
// turned to each tile's beginning, whose wave is exact: a position has the same bits whatever
// came before it. Eight pairs are the depth of m16n8k16. float16 would be far too coarse, so
// both sides are a sum of two, 22 bits, and three products are taken.
//
// Factors are divided by what makes all of a row at most 1, and scores are brought to the same
// unit before they are added to, by `key_factors`.
#pragma once

#include "cuda/angles.cuh"
#include "cuda/attention.cuh"

namespace exl {

constexpr int kMaxBiasPairs = 32;  // cache.MAX_BIAS_PAIRS: a lane each
constexpr int kStepPairs = 8;      // of a product

// What a block keeps of it in shared memory, attention_plan.bias_bytes. Factors and waves lie as
// a lane (g = lane / 4, t = lane % 4) reads them: those of pairs t and t + 4 of a step.
struct BiasMemory {
    float* frequencies;  // [kMaxBiasPairs], zeros behind the last
    float* key_factors;  // [rows]
    float4* factors;     // [rows / 8][steps][32]: a, b, a, b of row g
    uint4* waves;        // [steps][tokens / 8][32]: high, high, low, low parts of token g
    int pairs, steps;

    // rows: of the block, a multiple of 8. shared: the block's.
    __device__ __forceinline__ BiasMemory(const AttentionCall& call, char* shared, int rows)
        : pairs(static_cast<int>(call.bias.num_pairs)),
          steps((pairs + kStepPairs - 1) / kStepPairs) {
        frequencies = reinterpret_cast<float*>(shared + call.bias_begin);
        key_factors = frequencies + kMaxBiasPairs;
        factors = reinterpret_cast<float4*>(key_factors + rows);
        waves = reinterpret_cast<uint4*>(factors + rows / 8 * steps * 32);
    }
};

// Two floats as float16 pairs whose sum they are, up to 2^-22.
struct HalfParts {
    uint32_t high, low;
    __device__ __forceinline__ explicit HalfParts(float2 x) {
        high = floats_to_half2(x.x, x.y);
        const float2 rounded = half2_to_float2(high);
        low = floats_to_half2(x.x - rounded.x, x.y - rounded.y);
    }
};

// The frequency of a key/value head's pair; 0 behind the last.
__device__ __forceinline__ float bias_frequency(const ExlKeyBias& bias, int sequence,
                                                int kv_head, int pair) {
    if (pair >= bias.num_pairs) return 0.0f;
    return bias.inv_freq[sequence * bias.half + bias.pairs[kv_head * bias.num_pairs + pair]];
}

// Frequencies and waves, by the whole block. Readable after a barrier.
template <int kTile>
__device__ __forceinline__ void stage_waves(const ExlKeyBias& bias, int sequence, int kv_head,
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

// A pair's factors of a query as it is behind RoPE.
__device__ __forceinline__ float2 bias_factors(const ExlKeyBias& bias, int kv_head, int pair,
                                               const float* q) {
    const int64_t place = kv_head * bias.num_pairs + pair;
    const float q1 = q[bias.pairs[place]], q2 = q[bias.half + bias.pairs[place]];
    const float first = bias.first[place], second = bias.second[place];
    return make_float2(fmaf(q1, first, q2 * second), fmaf(q2, first, -(q1 * second)));
}

// A row's factors, by a warp.
//
// q: its query; null where there is no such row. key_factor: what its product with a key, as
// the caller computes it, has to be multiplied with. index: its number in the block. Returns
// what scores have to be multiplied with behind add_bias.
__device__ __forceinline__ float stage_bias_row(const AttentionCall& call, int kv_head,
                                                const float* q, float key_factor, int index,
                                                const BiasMemory& memory) {
    const int pair = lane_id();
    float2 x = make_float2(0.0f, 0.0f);
    if (q != nullptr && pair < memory.pairs) x = bias_factors(call.bias, kv_head, pair, q);
    const float unit = Softening(call.shape).factor * call.bias.rope_factor;
    // No turn makes a factor larger than this.
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

// This lane's pair where a tile begins.
__device__ __forceinline__ float2 tile_wave(const BiasMemory& memory, int first_token) {
    return wave_at(first_token, memory.frequencies[lane_id()]);
}

// A lane's factors of a step, turned to where the tile begins: pairs t and t + 4 of row g.
struct TurnedFactors {
    uint32_t high[2], low[2];
    __device__ __forceinline__ TurnedFactors(const float4& factors, const float2& wave, int step) {
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
