// Attention in float32 over any cache: heads whose size is no multiple of 16 or above 256, and
// float32 caches, which exist for verification.
//
// Purpose: correctness for every shape; slow beside the other kernels.
//
// Layout: the cache as ExlCacheLayer, queries and outputs [rows, num_heads, head_dim].
//
// Work per block: one row of one query head, in prefill and decoding alike. Work per warp: every
// kWarps-th tile of 32 tokens. A lane computes the score of one token, and the sums of values of
// every 32nd element. A row's softmax runs over the tiles of a warp in order and warps are merged
// in order, so nothing depends on other rows.
//
// Grid: rows, query heads.
//
// Shared memory, float32: query [head_dim], sums [warps, head_dim], largest and total [warps, 2],
// then the key bias: factors [pairs, 2], frequencies [pairs].
#include "cuda/key_bias.cuh"

namespace exl {

constexpr int kGenericThreads = 128;
constexpr int kWarps = kGenericThreads / 32;

// Reads code `index` of a group of `count` stored codes (bit planes, see cache_codec.h).
__device__ __forceinline__ int code_at(const uint8_t* codes, int count, int bits, int index) {
    if (bits == 8) return codes[index];
    // The widths of the planes; 4 bits have one.
    const int high_width = bits == 3 ? 2 : 4, low_width = bits - high_width;
    const int high_bytes = count * high_width / 8;
    const int high_shift = index / high_bytes * high_width;
    const int high = codes[index % high_bytes] >> high_shift & ((1 << high_width) - 1);
    if (low_width == 0) return high;
    const int low_bytes = count * low_width / 8;
    const int low = codes[high_bytes + index % low_bytes] >> (index / low_bytes * low_width);
    return high << low_width | (low & ((1 << low_width) - 1));
}

template <int kBits>
__device__ __forceinline__ float codebook_value(int table, int code) {
    const Codebook<kBits> levels(table);
    // Select among eight levels by the low three bits of the code.
    uint32_t level = byte_perm(levels.words[0], levels.words[1], code & 7);
    if constexpr (kBits == 4) {
        if (code & 8) level = byte_perm(levels.words[2], levels.words[3], code & 7);
    }
    return static_cast<float>(static_cast<int>(level & 255u) - 128) * kCodebookUnit;
}

// The first element that shares a scale with `element`; cache of 16 bits.
__device__ __forceinline__ int block_start(int head_dim, int element) {
    int first = element / kGroup * kGroup;
    // A remainder that is too short for its own scale belongs to the group before it.
    if (first > 0 && head_dim - first < 16) first -= kGroup;
    return first;
}

// One element of a token as stored. token_index counts tokens of [pages, kv_heads, kPageLen].
__device__ float element_at(const ExlCacheHalf& half, int64_t token_index, int head_dim,
                            int element) {
    const auto* row =
        static_cast<const uint8_t*>(half.codes) + token_index * code_bytes(head_dim, half.bits);
    if (half.bits == 32) return reinterpret_cast<const float*>(row)[element];
    if (half.bits == 16) {
        const auto* codes = reinterpret_cast<const uint16_t*>(row);
        if (head_dim < 16) return half_to_float(codes[element]);
        const uint16_t* block = codes + block_start(head_dim, element);
        uint32_t scale = 0;
        for (int i = 0; i < 16; ++i) scale |= static_cast<uint32_t>(block[i] & 1u) << i;
        const float factor = half_to_float(static_cast<uint16_t>(scale)) * (1.0f / kBlockUnit);
        return static_cast<float>(static_cast<int16_t>(codes[element])) * factor;
    }
    const int group = element / kGroup;
    const int count = padded_codes(min(kGroup, head_dim - group * kGroup));
    const uint32_t bits = half.scales[token_index * num_groups(head_dim, half.bits) + group];
    const int code = code_at(row + group * code_bytes(kGroup, half.bits), count, half.bits,
                             element % kGroup);
    const float scale = half_to_float(static_cast<uint16_t>(bits));
    if (half.bits == 3) return scale * codebook_value<3>(bits & 1, code);
    if (half.bits == 4) return scale * codebook_value<4>(bits & 1, code);
    const float steps = static_cast<float>(1 << (half.bits - 1));
    return scale * ((static_cast<float>(code) - steps) / steps);
}

// The part of a row that one warp attends: tiles of 32 tokens, `kWarps` tiles apart.
struct WarpRow {
    const AttentionCall& call;
    const float* query;
    const float* waves;  // of the key bias: factors [pairs, 2], then frequencies [pairs]
    float* sums;
    int sequence, kv_head, position;
    float largest, total;

    // Where a token's keys or values are stored.
    struct Place {
        ExlCacheHalf half;
        int64_t token_index;
    };
    __device__ Place place_of(const ExlCacheHalf& half, const ExlOpenPages& open,
                              int token) const {
        const int64_t heads = call.layer.num_kv_heads;
        if (open.tokens.codes != nullptr) {
            const int own_page = first_open(call.batch, sequence);
            if (token >= own_page) {
                return {open.tokens,
                        open_token_index(call.batch, open, sequence, heads, kv_head, token)};
            }
            if (token == 0) {
                return {open.first, first_token_index(call.batch, open, sequence, heads, kv_head)};
            }
        }
        return {half, token_index_of(call.batch, sequence, heads, kv_head, token)};
    }

    // The contribution of the key bias to the dot product.
    __device__ float bias_score(int token) const {
        const int pairs = static_cast<int>(call.bias.num_pairs);
        float score = 0.0f;
        for (int i = 0; i < pairs; ++i) {
            const float2 wave = wave_at(token, waves[2 * pairs + i]);
            score = fmaf(waves[2 * i], wave.x, fmaf(waves[2 * i + 1], wave.y, score));
        }
        return score * call.bias.rope_factor;
    }

    __device__ void attend(int first_tile, const ScoreTransform& transform, int sliding_window) {
        const int head_dim = static_cast<int>(call.layer.head_dim), lane = lane_id();
        for (int i = lane; i < head_dim; i += 32) sums[i] = 0.0f;
        for (int tile = first_tile; tile * 32 <= position; tile += kWarps) {
            const int token = tile * 32 + lane;
            float score = -infinity();
            if (is_visible(position, token, sliding_window)) {
                const Place key = place_of(call.layer.k, call.layer.k_open, token);
                float dot = 0.0f;
                for (int i = 0; i < head_dim; ++i) {
                    dot = fmaf(query[i], element_at(key.half, key.token_index, head_dim, i), dot);
                }
                score = transform((dot + bias_score(token)) * transform.factor);
            }
            const float top = fmaxf(largest, warp_max(score));
            const float base = finite_base(top), keep = exp2_fast(largest - base);
            const float weight = exp2_fast(score - base);
            largest = top;
            total = fmaf(total, keep, weight);
            add_values(tile * 32, weight, keep);
        }
        total = warp_sum(total);
    }

    __device__ void add_values(int first_token, float weight, float keep) {
        const int head_dim = static_cast<int>(call.layer.head_dim), lane = lane_id();
        const int count = min(32, position + 1 - first_token);
        for (int i = lane; i < head_dim + 31 - (head_dim + 31) % 32; i += 32) {
            float sum = i < head_dim ? sums[i] * keep : 0.0f;
            for (int j = 0; j < count; ++j) {
                const float token_weight = shfl(weight, j);
                // The weight is 0 if the token is outside of the sliding window.
                if (i < head_dim && token_weight != 0.0f) {
                    const Place value =
                        place_of(call.layer.v, call.layer.v_open, first_token + j);
                    sum = fmaf(token_weight,
                               element_at(value.half, value.token_index, head_dim, i), sum);
                }
            }
            if (i < head_dim) sums[i] = sum;
        }
    }
};

// Loads the query into shared memory; rotated if the cache stores rotated keys.
__device__ void prepare_query(const AttentionCall& call, int row, int head, float* query) {
    const int head_dim = static_cast<int>(call.layer.head_dim);
    const float* q = query_of(call, row, head);
    const bool rotated = is_quantized(call.layer.k.bits);
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
        query[i] = rotated ? q[i] * rotation_factor(head_dim, i) : q[i];
    }
    block_sync();  // the query is complete
    if (rotated) hadamard_of_block(query, head_dim);
}

// Writes the key bias factors of a row and the frequencies of its pairs to shared memory.
__device__ void prepare_bias(const AttentionCall& call, int sequence, int row, int head,
                             int kv_head, float* waves) {
    const int pairs = static_cast<int>(call.bias.num_pairs);
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        const float2 x = bias_factors(call.bias, kv_head, i, query_of(call, row, head));
        waves[2 * i] = x.x;
        waves[2 * i + 1] = x.y;
        waves[2 * pairs + i] = bias_frequency(call.bias, sequence, kv_head, i);
    }
    block_sync();  // factors are read by all threads
}

extern "C" __global__ void __launch_bounds__(kGenericThreads)
    attention_generic_kernel(const __grid_constant__ AttentionCall call) {
    EXL_SHARED(float, memory);
    const int head_dim = static_cast<int>(call.layer.head_dim);
    const int head = blockIdx.y, row = blockIdx.x;
    float* query = memory;
    float* sums = memory + head_dim;
    float* largest_and_total = sums + kWarps * head_dim;
    prepare_query(call, row, head, query);
    const int sequence = sequence_of(call.batch, row);
    const int position = call.batch.past_len[sequence] + row - call.batch.q_start[sequence];
    const int sliding_window = static_cast<int>(call.shape.sliding_window);
    const int heads_per_kv = static_cast<int>(call.shape.num_heads / call.layer.num_kv_heads);
    float* waves = largest_and_total + 2 * kWarps;
    prepare_bias(call, sequence, row, head, head / heads_per_kv, waves);
    WarpRow warp{call, query, waves, sums + warp_id() * head_dim, sequence, head / heads_per_kv,
                 position, -infinity(), 0.0f};
    const int first = first_visible(position, sliding_window) / 32;
    warp.attend(first + (warp_id() - first % kWarps + kWarps) % kWarps, ScoreTransform(call.shape),
                sliding_window);
    if (lane_id() == 0) {
        largest_and_total[2 * warp_id()] = warp.largest;
        largest_and_total[2 * warp_id() + 1] = warp.total;
    }
    block_sync();  // every warp's sums are complete
    float largest = -infinity(), total = 0.0f;
    for (int i = 0; i < kWarps; ++i) largest = fmaxf(largest, largest_and_total[2 * i]);
    for (int i = 0; i < kWarps; ++i) {
        total = fmaf(exp2_fast(largest_and_total[2 * i] - largest), largest_and_total[2 * i + 1],
                     total);
    }
    total = with_sink(call, head, largest, total);
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
        float sum = 0.0f;
        for (int j = 0; j < kWarps; ++j) {
            sum = fmaf(exp2_fast(largest_and_total[2 * j] - largest), sums[j * head_dim + i], sum);
        }
        query[i] = sum / total;
    }
    block_sync();  // the row is complete
    const bool rotated = is_quantized(call.layer.v.bits);
    if (rotated) hadamard_of_block(query, head_dim);
    float* out = call.out + (static_cast<int64_t>(row) * call.shape.num_heads + head) * head_dim;
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
        out[i] = rotated ? query[i] * rotation_factor(head_dim, i) : query[i];
    }
}
EXL_KERNEL(attention_generic_kernel);

}  // namespace exl
