// Attention in float32 over any cache: heads whose length is no multiple of 16 or above 256,
// and float32 caches, which are there for verification. Simple, and slow beside the others.
//
// A block attends one row of one query head, prompts and decoding alike; its warps take tiles
// of 32 tokens in turn. For scores a lane is a token, for sums of values it is an element; a
// row's softmax runs over its warp's tiles in order, and warps are added in order, so nothing
// depends on other rows.
//
// Grid: rows, query heads. Shared memory, float32: query [head_dim], sums [warps, head_dim],
// largest and total [warps, 2], then what the key bias adds: factors [pairs, 2], frequencies.
#include "cuda/key_bias.cuh"

namespace exl {

constexpr int kGenericThreads = 128;
constexpr int kWarps = kGenericThreads / 32;

// A code of a group of `count` stored codes: bit planes from the highest on, see pack_codes.
__device__ __forceinline__ int code_at(const uint8_t* codes, int count, int bits, int index) {
    if (bits == 8) return codes[index];
    const int high_bytes = count / 2;
    const int high = codes[index % high_bytes] >> (index / high_bytes * 4) & 15;
    if (bits == 4) return high;
    const int low_bytes = count / 4;
    const int low = codes[high_bytes + index % low_bytes] >> (index / low_bytes * 2) & 3;
    return high << 2 | low;
}

__device__ __forceinline__ float codebook_value(int table, int code) {
    const Codebook<> levels(table);
    // Of eight levels, by the low three bits of the code.
    const uint32_t low = byte_perm(levels.words[0], levels.words[1], code & 7);
    const uint32_t high = byte_perm(levels.words[2], levels.words[3], code & 7);
    const uint32_t level = (code & 8 ? high : low) & 255u;
    return static_cast<float>(static_cast<int>(level) - 128) * kCodebookUnit;
}

// Where the elements that share a scale with `element` begin; 16 bits.
__device__ __forceinline__ int block_start(int head_dim, int element) {
    int first = element / kGroup * kGroup;
    // What is too short for a scale of its own belongs to the block before it.
    if (first > 0 && head_dim - first < 16) first -= kGroup;
    return first;
}

// One element of the token at `place`, as stored.
__device__ float element_at(const ExlCacheHalf& half, int64_t place, int head_dim, int element) {
    const auto* row = static_cast<const uint8_t*>(half.codes) +
                      place * code_bytes(head_dim, half.bits);
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
    const uint32_t bits = half.scales[place * num_groups(head_dim, half.bits) + group];
    const int code = code_at(row + group * code_bytes(kGroup, half.bits), count, half.bits,
                             element % kGroup);
    const float scale = half_to_float(static_cast<uint16_t>(bits));
    if (half.bits == 4) return scale * codebook_value(bits & 1, code);
    const float steps = static_cast<float>(1 << (half.bits - 1));
    return scale * ((static_cast<float>(code) - steps) / steps);
}

// One warp's share of a row: tiles of 32 tokens, `kWarps` apart.
struct WarpRow {
    const AttentionCall& call;
    const float* query;
    const float* waves;  // of the key bias: factors, then frequencies
    float* sums;
    int sequence, kv_head, position;
    float largest, total;

    __device__ __forceinline__ int64_t place(int token) const {
        return place_of(call.batch, sequence, call.layer.num_kv_heads, kv_head, token);
    }

    // What the key bias adds to the dot product.
    __device__ float bias_score(int token) const {
        const int pairs = static_cast<int>(call.bias.num_pairs);
        float score = 0.0f;
        for (int i = 0; i < pairs; ++i) {
            const float2 wave = wave_at(token, waves[2 * pairs + i]);
            score = fmaf(waves[2 * i], wave.x, fmaf(waves[2 * i + 1], wave.y, score));
        }
        return score * call.bias.rope_factor;
    }

    __device__ void attend(int first_tile, const Softening& soften, int window) {
        const int head_dim = static_cast<int>(call.layer.head_dim), lane = lane_id();
        for (int i = lane; i < head_dim; i += 32) sums[i] = 0.0f;
        for (int tile = first_tile; tile * 32 <= position; tile += kWarps) {
            const int token = tile * 32 + lane;
            float score = -infinity();
            if (sees(position, token, window)) {
                const int64_t where = place(token);
                float dot = 0.0f;
                for (int i = 0; i < head_dim; ++i) {
                    dot = fmaf(query[i], element_at(call.layer.k, where, head_dim, i), dot);
                }
                score = soften((dot + bias_score(token)) * soften.factor);
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
                const float share = shfl(weight, j);
                // A weight of 0 is a token outside the window.
                if (i < head_dim && share != 0.0f) {
                    const int64_t where = place(first_token + j);
                    sum = fmaf(share, element_at(call.layer.v, where, head_dim, i), sum);
                }
            }
            if (i < head_dim) sums[i] = sum;
        }
    }
};

// The query, rotated where keys are.
__device__ void stage_query(const AttentionCall& call, int row, int head, float* query) {
    const int head_dim = static_cast<int>(call.layer.head_dim);
    const float* q = query_of(call, row, head);
    const bool rotated = is_quantized(call.layer.k.bits);
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
        query[i] = rotated ? q[i] * rotation_factor(head_dim, i) : q[i];
    }
    block_sync();  // the query is in
    if (rotated) hadamard_of_block(query, head_dim);
}

// The factors of a row, and its pairs' frequencies.
__device__ void stage_bias(const AttentionCall& call, int sequence, int row, int head, int kv_head,
                           float* waves) {
    const int pairs = static_cast<int>(call.bias.num_pairs);
    for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
        const float2 x = bias_factors(call.bias, kv_head, i, query_of(call, row, head));
        waves[2 * i] = x.x;
        waves[2 * i + 1] = x.y;
        waves[2 * pairs + i] = bias_frequency(call.bias, sequence, kv_head, i);
    }
    block_sync();  // factors are read by all
}

extern "C" __global__ void __launch_bounds__(kGenericThreads)
    attention_generic_kernel(const __grid_constant__ AttentionCall call) {
    EXL_SHARED(float, memory);
    const int head_dim = static_cast<int>(call.layer.head_dim);
    const int head = blockIdx.y, row = blockIdx.x;
    float* query = memory;
    float* sums = memory + head_dim;
    float* ends = sums + kWarps * head_dim;
    stage_query(call, row, head, query);
    const int sequence = sequence_of(call.batch, row);
    const int position = call.batch.past_len[sequence] + row - call.batch.q_start[sequence];
    const int window = static_cast<int>(call.shape.window);
    const int sharing = static_cast<int>(call.shape.num_heads / call.layer.num_kv_heads);
    float* waves = ends + 2 * kWarps;
    stage_bias(call, sequence, row, head, head / sharing, waves);
    WarpRow warp{call, query, waves, sums + warp_id() * head_dim, sequence, head / sharing,
                 position, -infinity(), 0.0f};
    const int first = first_seen(position, window) / 32;
    warp.attend(first + (warp_id() - first % kWarps + kWarps) % kWarps, Softening(call.shape),
                window);
    if (lane_id() == 0) {
        ends[2 * warp_id()] = warp.largest;
        ends[2 * warp_id() + 1] = warp.total;
    }
    block_sync();  // every warp's sums are in
    float largest = -infinity(), total = 0.0f;
    for (int i = 0; i < kWarps; ++i) largest = fmaxf(largest, ends[2 * i]);
    for (int i = 0; i < kWarps; ++i) {
        total = fmaf(exp2_fast(ends[2 * i] - largest), ends[2 * i + 1], total);
    }
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
        float sum = 0.0f;
        for (int j = 0; j < kWarps; ++j) {
            sum = fmaf(exp2_fast(ends[2 * j] - largest), sums[j * head_dim + i], sum);
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
