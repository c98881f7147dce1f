// Products of decoding: queries and keys as integers, values as float16.
//
// See attention_decode.cu for work and preconditions. Fragments are laid out as described in
// platform.cuh, with g = lane / 4 and t = lane % 4. A lane loads whole words of packed codes; the
// unpacked elements are its part of the fragment. Only the order of elements along the product is
// unusual (element_of).
#pragma once

#include "cuda/decode_rows.cuh"
#include "cuda/key_bias.cuh"

namespace exl {

// Queries as integers: 128 * high + low, with high in -127..127 and low in -64..63.
constexpr float kQueryUnit = 127.0f * 128.0f;
// kSumStart is the bits of the float32 kSumBase = 1.5 * 2^23. If an int32 sum below 2^22 starts
// from it, the bits of the result are the float32 kSumBase + sum.
constexpr int32_t kSumStart = 0x4B400000;
constexpr float kSumBase = 12582912.0f;
constexpr uint32_t kSigned = 0x80808080u;

// The factor that converts an integer product with a key.
__device__ __forceinline__ float key_unit(int bits) {
    return 1.0f / (kQueryUnit * (is_quantized(bits) ? 128.0f : kBlockUnit));
}

// Converts four elements to high and low bytes.
__device__ __forceinline__ uint2 query_bytes(const float (&x)[4]) {
    uint32_t high = 0, low = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int number = round_int(x[i] * kQueryUnit);
        const int upper = (number + 64) >> 7;
        high |= static_cast<uint32_t>(upper & 255) << (8 * i);
        low |= static_cast<uint32_t>((number - 128 * upper) & 255) << (8 * i);
    }
    return make_uint2(high, low);
}

template <int kHeadDim>
__device__ __forceinline__ BiasMemory bias_of(const AttentionCall& call,
                                              const DecodeMemory<kHeadDim>& memory) {
    return {call, reinterpret_cast<char*>(memory.queries), kRows};
}

// Writes the rows of the pass as B fragments, in the order of keys of `k_bits`; other rows as zeros.
template <int kHeadDim, int kTile>
__device__ __forceinline__ void prepare_queries(const AttentionCall& call, const RowGroup& group,
                                                const Pass& pass, int k_bits,
                                                const DecodeMemory<kHeadDim>& memory) {
    const int warps = static_cast<int>(blockDim.x) / 32;
    for (int row = warp_id(); row < kRows; row += warps) {
        float x[kHeadDim / 32] = {};
        float largest = 0.0f;
        const int position = row < group.count ? group.position(row) : -1;
        const bool active = position >= pass.low_row && position < pass.high;
        if (active) {
            load_query(call, group.q_first + group.token(row), group.head(row), x);
            largest = largest_of_warp(x);
        }
        const float inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) {
            memory.rows[row * kHeadDim + lane_id() + 32 * i] = x[i] * inverse;
        }
        float factor = largest * ScoreTransform(call.shape).factor * key_unit(k_bits);
        if (call.bias.num_pairs != 0) {
            const float* q = active ? query_of(call, group.q_first + group.token(row),
                                               group.head(row))
                                    : nullptr;
            factor = prepare_bias_row(call, group.kv_head, q, factor, row, bias_of(call, memory));
        }
        if (lane_id() == 0) {
            memory.data->factors[row] = factor;
            memory.data->positions[row] = active ? position : -1;
        }
    }
    if (call.bias.num_pairs != 0) {
        prepare_waves<kTile>(call.bias, group.sequence, group.kv_head, bias_of(call, memory));
    }
    block_sync();  // rows are read by all threads
    const int head_dim = static_cast<int>(call.layer.head_dim);
    for (int item = threadIdx.x; item < kHeadDim / kGroup * 32; item += blockDim.x) {
        const int lane = item % 32, unit = item / 32 * 2 + lane % 4 / 2;
        const float* row = memory.rows + lane / 4 * kHeadDim;
        float x[2][4] = {};
        for (int i = 0; i < 8 && unit * kUnit < head_dim; ++i) {
            x[i / 4][i % 4] = row[element_of(k_bits, head_dim, unit, lane % 2 * 8 + i)];
        }
        const uint2 first = query_bytes(x[0]), second = query_bytes(x[1]);
        memory.queries[item] = make_uint4(first.x, second.x, first.y, second.y);
    }
    block_sync();  // fragments are read by all threads
}

// Adds the contribution of the key bias to the scores of a tile. kWaves: tokens whose waves
// BiasMemory holds, at least those of a tile.
template <int kHeadDim, int kTile, int kWaves>
__device__ __forceinline__ void add_bias(const AttentionCall& call,
                                         const DecodeMemory<kHeadDim>& memory, int first_token,
                                         float (&scores)[kTile / 16][4]) {
    const BiasMemory bias = bias_of(call, memory);
    const int lane = lane_id();
    const float2 wave = tile_wave(bias, first_token);
    const float units[2] = {bias.key_factors[lane % 4 * 2], bias.key_factors[lane % 4 * 2 + 1]};
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[i][j] *= units[j % 2];
    }
#pragma unroll 1
    for (int step = 0; step < bias.steps; ++step) {
        const RotatedFactors rows(bias.factors[step * 32 + lane], wave, step);
        const uint4* waves = bias.waves + step * kWaves * 4 + lane;
#pragma unroll
        for (int i = 0; i < kTile / 16; ++i) {
            const uint4 upper = waves[i * 64], lower = waves[i * 64 + 32];
            const uint32_t high[4] = {upper.x, lower.x, upper.y, lower.y};
            const uint32_t low[4] = {upper.z, lower.z, upper.w, lower.w};
            mma_f16_16x8x16(scores[i], high, rows.high);
            mma_f16_16x8x16(scores[i], high, rows.low);
            mma_f16_16x8x16(scores[i], low, rows.high);
        }
    }
}

// A packed tile in shared memory. If heads are whole, all strides are constants.
template <int kHeadDim, int kTile, bool kWhole>
struct Tile {
    uint8_t* memory;
    int runtime_head_dim;
    __device__ __forceinline__ int head_dim() const {
        return kWhole ? kHeadDim : runtime_head_dim;
    }
    template <int kBits>
    __device__ __forceinline__ uint8_t* row(int token) const {
        return memory + token * code_bytes(head_dim(), kBits);
    }
    template <int kBits>
    __device__ __forceinline__ uint16_t* scales(int token) const {
        uint8_t* scales_of_tile = memory + kTile * code_bytes(head_dim(), kBits);
        return reinterpret_cast<uint16_t*>(scales_of_tile) + token * num_groups(head_dim(), kBits);
    }
    __device__ __forceinline__ bool has(int unit) const {
        return kWhole || unit * kUnit < runtime_head_dim;
    }
};

// Integer products of a group of 16 tokens with the high and the low bytes of queries.
struct Products {
    int32_t high[4], low[4];
    __device__ __forceinline__ explicit Products(int32_t start) {
#pragma unroll
        for (int i = 0; i < 4; ++i) high[i] = low[i] = start;
    }
};

// Adds the scores of a group of elements. Lane (g, t) has eight elements of tokens g and g + 8:
// half t % 2 of unit t / 2. d[0], d[1] are token g, rows 2t and 2t + 1; d[2], d[3] token g + 8.
template <int kBits, typename Tile>
__device__ __forceinline__ void score_group(const Tile& tile, int token, int group,
                                            const uint4& query, float (&d)[4]) {
    const unsigned lane = lane_id();
    const int unit = 2 * group + static_cast<int>(lane % 4 / 2), half = lane % 2;
    uint32_t upper[2] = {}, lower[2] = {};
    const uint32_t upper_scale = tile.template scales<kBits>(token)[group];
    const uint32_t lower_scale = tile.template scales<kBits>(token + 8)[group];
    if (tile.has(unit)) {
        unpack_half_unit<kBits, kSigned>(tile.template row<kBits>(token), tile.head_dim(), unit,
                                         half, Codebook<kBits, kSigned>(upper_scale), upper);
        unpack_half_unit<kBits, kSigned>(tile.template row<kBits>(token + 8), tile.head_dim(),
                                         unit, half, Codebook<kBits, kSigned>(lower_scale), lower);
    }
    Products products(kSumStart);
    const uint32_t a[4] = {upper[0], lower[0], upper[1], lower[1]};
    const uint32_t high[2] = {query.x, query.y}, low[2] = {query.z, query.w};
    mma_s8s8_16x8x32(products.high, a, high);
    mma_s8s8_16x8x32(products.low, a, low);
    const float scales[2] = {half_to_float(static_cast<uint16_t>(upper_scale)),
                             half_to_float(static_cast<uint16_t>(lower_scale))};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float high_sum = bits_float(static_cast<uint32_t>(products.high[i])) - kSumBase;
        const float low_sum = bits_float(static_cast<uint32_t>(products.low[i])) - kSumBase;
        d[i] = fmaf(scales[i / 2], fmaf(high_sum, 128.0f, low_sum), d[i]);
    }
}

// score_group for 16 bits: a code is 256 * (signed) high byte + (unsigned) low byte. The first two
// lanes of a token have the codes that hold the scale.
template <typename Tile>
__device__ __forceinline__ void score_block(const Tile& tile, int token, int group,
                                            const uint4& query, float (&d)[4]) {
    const unsigned lane = lane_id();
    const bool exists = tile.has(2 * group + static_cast<int>(lane % 4 / 2));
    uint32_t high_bytes[4] = {}, low_bytes[4] = {};
    float scales[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint4 c = make_uint4(0, 0, 0, 0);
        if (exists) {
            c = *reinterpret_cast<const uint4*>(tile.template row<16>(token + 8 * i) +
                                                group * (kGroup * 2) + lane % 4 * 16);
        }
        high_bytes[i] = byte_perm(c.x, c.y, 0x7531);
        high_bytes[i + 2] = byte_perm(c.z, c.w, 0x7531);
        low_bytes[i] = byte_perm(c.x, c.y, 0x6420);
        low_bytes[i + 2] = byte_perm(c.z, c.w, 0x6420);
        const uint32_t pairs = (c.x & 0x10001u) | (c.y & 0x10001u) << 2 |
                               (c.z & 0x10001u) << 4 | (c.w & 0x10001u) << 6;
        const uint32_t bits = (pairs | pairs >> 15) & 255u;
        const uint32_t scale = shfl(bits, lane & ~3u) | shfl(bits, (lane & ~3u) | 1u) << 8;
        scales[i] = half_to_float(static_cast<uint16_t>(scale));
    }
    Products upper(0), lower(0);
    const uint32_t high[2] = {query.x, query.y}, low[2] = {query.z, query.w};
    mma_s8s8_16x8x32(upper.high, high_bytes, high);
    mma_s8s8_16x8x32(upper.low, high_bytes, low);
    mma_u8s8_16x8x32(lower.high, low_bytes, high);
    mma_u8s8_16x8x32(lower.low, low_bytes, low);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float high_sum = static_cast<float>(upper.high[i] * 256 + lower.high[i]);
        const float low_sum = static_cast<float>(upper.low[i] * 256 + lower.low[i]);
        d[i] = fmaf(scales[i / 2], fmaf(high_sum, 128.0f, low_sum), d[i]);
    }
}

// Adds the scores of 16 tokens from first_token on.
template <int kHeadDim, int kBits, typename Tile>
__device__ __forceinline__ void score_tokens(const Tile& tile, int first_token,
                                             const uint4* queries, float (&d)[4]) {
    const int token = first_token + lane_id() / 4;
    // One group at a time: more would need more registers than a thread has with two blocks per
    // multiprocessor, and other warps hide the latency.
#pragma unroll 1
    for (int group = 0; group < kHeadDim / kGroup; ++group) {
        if (!tile.has(2 * group)) break;
        const uint4 query = queries[group * 32 + lane_id()];
        if constexpr (kBits == 16) {
            score_block(tile, token, group, query, d);
        } else {
            score_group<kBits>(tile, token, group, query, d);
        }
    }
}

// Scales for one unit of four tokens, two per word, and the tokens' codebooks.
template <int kBits>
struct UnitScales {
    uint32_t first, second;
    Codebook<kBits> codebooks[4];
    template <typename Tile>
    __device__ __forceinline__ UnitScales(const Tile& tile, const int (&tokens)[4], int unit)
        : UnitScales(tile.template scales<kBits>(tokens[0])[unit / 2],
                     tile.template scales<kBits>(tokens[1])[unit / 2],
                     tile.template scales<kBits>(tokens[2])[unit / 2],
                     tile.template scales<kBits>(tokens[3])[unit / 2]) {}
    __device__ __forceinline__ UnitScales(uint32_t a, uint32_t b, uint32_t c, uint32_t d)
        : first(a | b << 16), second(c | d << 16),
          codebooks{Codebook<kBits>(a), Codebook<kBits>(b), Codebook<kBits>(c),
                    Codebook<kBits>(d)} {}
};

// o[i] += weights x values of half a unit of 16 tokens; i counts pairs of elements.
template <int kBits, typename Tile>
__device__ __forceinline__ void weigh_half_unit(const Tile& tile, const int (&tokens)[4],
                                                const UnitScales<kBits>& scales, int unit,
                                                int half, const uint32_t (&weights)[2],
                                                float (*o)[4]) {
    uint32_t levels[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        unpack_half_unit<kBits>(tile.template row<kBits>(tokens[i]), tile.head_dim(), unit, half,
                                scales.codebooks[i], levels[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // Elements 2i and 2i + 1, with the bytes of two tokens adjacent.
        const uint32_t selector = i % 2 ? 0x7362 : 0x5140;
        const uint32_t x = byte_perm(levels[0][i / 2], levels[1][i / 2], selector);
        const uint32_t y = byte_perm(levels[2][i / 2], levels[3][i / 2], selector);
        const uint32_t a[4] = {
            h2_mul(low_levels(x), scales.first), h2_mul(high_levels(x), scales.first),
            h2_mul(low_levels(y), scales.second), h2_mul(high_levels(y), scales.second)};
        mma_f16_16x8x16(o[i], a, weights);
    }
}

// weigh_half_unit for 16 bits.
template <typename Tile>
__device__ __forceinline__ void weigh_half_block(const Tile& tile, const int (&tokens)[4],
                                                 int unit, int half,
                                                 const uint32_t (&weights)[2], float (*o)[4]) {
    float factors[4];
    uint32_t codes[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint8_t* row = tile.template row<16>(tokens[i]);
        factors[i] = block_factor(row, unit);
        const uint4 c = *reinterpret_cast<const uint4*>(row + unit * (kUnit * 2) + half * kUnit);
        codes[i][0] = c.x;
        codes[i][1] = c.y;
        codes[i][2] = c.z;
        codes[i][3] = c.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 x[4];
#pragma unroll
        for (int token = 0; token < 4; ++token) {
            x[token] = block_values(codes[token][i], factors[token]);
        }
        const uint32_t a[4] = {floats_to_half2(x[0].x, x[1].x), floats_to_half2(x[0].y, x[1].y),
                               floats_to_half2(x[2].x, x[3].x), floats_to_half2(x[2].y, x[3].y)};
        mma_f16_16x8x16(o[i], a, weights);
    }
}

// Adds the values of 16 tokens times their weights (B fragments). Lane (g, t) has tokens 2t,
// 2t + 1, 2t + 8, 2t + 9 and half units from g * kHalves on. Units that a head lacks are replaced
// by the first unit; their sums are not used.
template <int kHeadDim, int kBits, typename Tile>
__device__ __forceinline__ void weigh_tokens(const Tile& tile, int first_token,
                                             const uint32_t (&weights)[2],
                                             float (&o)[kHeadDim / 16][4]) {
    constexpr int kHalves = kHeadDim / 64;
    const unsigned g = lane_id() / 4;
    const int token = first_token + lane_id() % 4 * 2;
    const int tokens[4] = {token, token + 1, token + 8, token + 9};
    // A lane has two halves of a unit, or only one.
    constexpr int kInUnit = kHalves > 1 ? 2 : 1;
#pragma unroll
    for (int h = 0; h < kHalves; h += kInUnit) {
        const int unit = static_cast<int>((g * kHalves + h) / 2);
        const int existing_unit = tile.has(unit) ? unit : 0;
        const int first_half = kHalves > 1 ? 0 : static_cast<int>(g % 2);
        if constexpr (kBits == 16) {
#pragma unroll
            for (int i = 0; i < kInUnit; ++i) {
                weigh_half_block(tile, tokens, existing_unit, first_half + i, weights,
                                 o + 4 * (h + i));
            }
        } else {
            const UnitScales<kBits> scales(tile, tokens, existing_unit);
#pragma unroll
            for (int i = 0; i < kInUnit; ++i) {
                weigh_half_unit<kBits>(tile, tokens, scales, existing_unit, first_half + i, weights,
                                       o + 4 * (h + i));
            }
        }
    }
}

// Sets values that no row sees to zero. Their weights are 0, but the values may be NaN.
template <int kBits, typename Tile>
__device__ __forceinline__ void clear_tokens(const Tile& tile, int first, int end) {
    const int head_dim = tile.head_dim();
    for (int token = first; token < end; ++token) {
        if constexpr (kBits == 16) {
            auto* codes = reinterpret_cast<uint16_t*>(tile.template row<16>(token));
            for (int i = lane_id(); i < head_dim; i += 32) codes[i] = 0;
        } else {
            uint16_t* scales = tile.template scales<kBits>(token);
            for (int i = lane_id(); i < num_groups(head_dim, kBits); i += 32) scales[i] = 0;
        }
    }
    warp_sync();  // zeros are read by all lanes
}

}  // namespace exl
