// Declarations shared by the attention kernels: arguments, visibility of tokens, scaling of
// scores, and the first and last step of a row.
//
// Layout: queries and outputs float32 [rows, num_heads, head_dim]; the cache as ExlCacheLayer. A
// row in registers is spread over a warp: lane i holds elements i, i + 32, i + 64, ...
#pragma once

#include "cuda/cache_rotate.cuh"
#include "cuda/cache_tile.cuh"

namespace exl {

// True if the layer has open pages. Rows then read the page of their own call, and position 0, in
// more bits than the codes of the other pages have.
__device__ __forceinline__ bool has_open_pages(const ExlCacheLayer& layer) {
    return layer.k_open.tokens.codes != nullptr || layer.v_open.tokens.codes != nullptr;
}
// The first position of a sequence that is in its open page. All rows of a call lie in this page.
__device__ __forceinline__ int first_open(const ExlBatch& batch, int sequence) {
    return batch.past_len[sequence] / kPageLen * kPageLen;
}
// Where keys or values of the open page are stored: a half without open pages has them in its
// pages.
__device__ __forceinline__ ExlCacheHalf open_tokens(const ExlCacheHalf& half,
                                                    const ExlOpenPages& open) {
    return open.tokens.codes != nullptr ? open.tokens : half;
}
__device__ __forceinline__ ExlCacheHalf first_tokens(const ExlCacheHalf& half,
                                                     const ExlOpenPages& open) {
    return open.first.codes != nullptr ? open.first : half;
}
// Index of a position of the open page in open_tokens, or of position 0 in first_tokens.
__device__ __forceinline__ int64_t open_token_index(const ExlBatch& batch,
                                                    const ExlOpenPages& open, int sequence,
                                                    int64_t num_kv_heads, int kv_head,
                                                    int position) {
    if (open.tokens.codes == nullptr) {
        return token_index_of(batch, sequence, num_kv_heads, kv_head, position);
    }
    return (batch.open_pages[sequence] * num_kv_heads + kv_head) * kPageLen + position % kPageLen;
}
__device__ __forceinline__ int64_t first_token_index(const ExlBatch& batch,
                                                     const ExlOpenPages& open, int sequence,
                                                     int64_t num_kv_heads, int kv_head) {
    if (open.first.codes == nullptr) {
        return token_index_of(batch, sequence, num_kv_heads, kv_head, 0);
    }
    return batch.open_pages[sequence] * num_kv_heads + kv_head;
}

// Sequences with up to this number of rows are served by attention_decode.cu, longer ones by
// prefill. The kernel of a row therefore depends only on its own sequence. Drafts may have this
// number of rows and still give the same bits as single tokens.
constexpr int kDecodeRows = 32;

struct AttentionCall {
    ExlCacheLayer layer;
    ExlBatch batch;
    ExlAttentionShape shape;
    ExlKeyBias bias;     // num_pairs is 0 if the layer has none
    int64_t bias_begin;  // offset of BiasMemory in a block's shared memory
    const float* q;      // [rows, num_heads, head_dim]
    float* out;          // [rows, num_heads, head_dim]
    const float* sinks;  // [num_heads], or null; see with_sink
};

// Converts a dot product q . k to an exponent of 2, with the scale and the soft cap.
struct ScoreTransform {
    float factor;  // of q . k
    float cap;     // 0, or cap * log2(e), which multiplies tanh(factor * q . k)
    __device__ __forceinline__ explicit ScoreTransform(const ExlAttentionShape& shape)
        : factor(shape.softcap != 0.0f ? shape.scale / shape.softcap : shape.scale * kLog2E),
          cap(shape.softcap * kLog2E) {}
    __device__ __forceinline__ bool caps() const { return cap != 0.0f; }
    // tanh(x) = 1 - 2 / (1 + e^2x). Its error, 1e-7, is far below that of x.
    __device__ __forceinline__ float capped(float x) const {
        return cap * (1.0f - 2.0f / (1.0f + exp2_fast(x * (2.0f * kLog2E))));
    }
    __device__ __forceinline__ float operator()(float x) const { return caps() ? capped(x) : x; }
};

// True if the row at `position` sees `token`: tokens up to its own position, at most
// `sliding_window` of them (0: all).
__device__ __forceinline__ bool is_visible(int position, int token, int sliding_window) {
    return token <= position && (sliding_window == 0 || position - token < sliding_window);
}
// True if all rows from position `low` to `high` see `count` tokens from `first` on. This holds
// for most tiles of a long text, whose scores then need no mask.
__device__ __forceinline__ bool all_visible(int low, int high, int first, int count,
                                            int sliding_window) {
    return first + count - 1 <= low && (sliding_window == 0 || high - first < sliding_window);
}
__device__ __forceinline__ int first_visible(int position, int sliding_window) {
    return sliding_window == 0 ? 0 : max(0, position + 1 - sliding_window);
}

// The maximum to subtract. 0 if nothing was visible, because -inf - -inf would be NaN.
__device__ __forceinline__ float finite_base(float largest) {
    return largest == -infinity() ? 0.0f : largest;
}

// The sum of a row's weights with that of its head's sink, a logit that joins the softmax without a
// value. `largest`: the exponent of 2 that was subtracted from the row's scores.
__device__ __forceinline__ float with_sink(const AttentionCall& call, int head, float largest,
                                           float total) {
    if (call.sinks == nullptr) return total;
    return total + exp2_fast(fmaf(call.sinks[head], kLog2E, -largest));
}

// Writes the weighted sum of values of one row, spread over a warp, times `factor`.
template <int kRegisters>
__device__ __forceinline__ void store_row(const AttentionCall& call, int64_t row, int head,
                                          float (&x)[kRegisters], float factor) {
    const int head_dim = static_cast<int>(call.layer.head_dim);
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) x[i] *= factor;
    if (is_quantized(call.layer.v.bits)) rotate_back_of_warp(x, head_dim);
    float* out = call.out + (row * call.shape.num_heads + head) * head_dim;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
        const int element = lane_id() + 32 * i;
        if (element < head_dim) out[element] = x[i];
    }
}

__device__ __forceinline__ const float* query_of(const AttentionCall& call, int64_t row,
                                                 int head) {
    return call.q + (row * call.shape.num_heads + head) * call.layer.head_dim;
}
// Reads the query of one row, spread over a warp; rotated if the cache stores rotated keys.
template <int kRegisters>
__device__ __forceinline__ void load_query(const AttentionCall& call, int64_t row, int head,
                                           float (&x)[kRegisters]) {
    const int head_dim = static_cast<int>(call.layer.head_dim);
    const float* q = query_of(call, row, head);
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
        const int element = lane_id() + 32 * i;
        x[i] = element < head_dim ? q[element] : 0.0f;
    }
    if (is_quantized(call.layer.k.bits)) rotate_of_warp(x, head_dim);
}

// Returns the largest magnitude of a query; division by it brings the query into the range of
// float16.
template <int kRegisters>
__device__ __forceinline__ float largest_of_warp(const float (&x)[kRegisters]) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) largest = fmaxf(largest, fabsf(x[i]));
    return warp_max(largest);
}

}  // namespace exl
