// What the attention kernels share: their call, what a row sees, how its result is finished.
#pragma once

#include "cuda/cache_rotate.cuh"
#include "cuda/cache_tile.cuh"

namespace exl {

// Rows of a sequence up to which attention_decode.cu serves it; longer ones are prefill's. So
// which kernel a row comes through depends on its own sequence alone. Drafts may be this long
// (draft_model.py) and still give the bits of single tokens.
constexpr int kDecodeRows = 32;

struct AttentionCall {
    ExlCacheLayer layer;
    ExlBatch batch;
    ExlAttentionShape shape;
    ExlKeyBias bias;      // no pairs where the layer has none
    int64_t bias_begin;   // of BiasMemory in a block's shared memory
    const float* q;  // [rows, num_heads, head_dim]
    float* out;      // the same shape
};

// Scores become exponents of 2: the factor on a dot product, and what follows it.
struct Softening {
    float factor;  // on q . k
    float cap;     // 0, or cap * log2(e) on tanh(factor * q . k)
    __device__ __forceinline__ explicit Softening(const ExlAttentionShape& shape)
        : factor(shape.softcap != 0.0f ? shape.scale / shape.softcap : shape.scale * kLog2E),
          cap(shape.softcap * kLog2E) {}
    __device__ __forceinline__ bool caps() const { return cap != 0.0f; }
    // tanh(x) = 1 - 2 / (1 + e^2x); its error, 1e-7, is far below that of x.
    __device__ __forceinline__ float capped(float x) const {
        return cap * (1.0f - 2.0f / (1.0f + exp2_fast(x * (2.0f * kLog2E))));
    }
    __device__ __forceinline__ float operator()(float x) const { return caps() ? capped(x) : x; }
};

// Row `position` sees tokens up to itself, `window` of them where there is one.
__device__ __forceinline__ bool sees(int position, int token, int window) {
    return token <= position && (window == 0 || position - token < window);
}
// Whether rows from `low` to `high` all see `count` tokens from `first` on: most tiles of a long
// text, whose scores nobody has to look at one by one then.
__device__ __forceinline__ bool all_see(int low, int high, int first, int count, int window) {
    return first + count - 1 <= low && (window == 0 || high - first < window);
}
__device__ __forceinline__ int first_seen(int position, int window) {
    return window == 0 ? 0 : max(0, position + 1 - window);
}

// What the maximum is taken as where nothing was visible: -inf - -inf would be NaN.
__device__ __forceinline__ float finite_base(float largest) {
    return largest == -infinity() ? 0.0f : largest;
}

// Writes one row's weighted sum of values, spread over a warp, times `factor`.
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
// Reads one row's query, rotated where keys are, spread over a warp.
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

// What brings a query into float16's range, over the warp: 1 / its largest magnitude.
template <int kRegisters>
__device__ __forceinline__ float largest_of_warp(const float (&x)[kRegisters]) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) largest = fmaxf(largest, fabsf(x[i]));
    return warp_max(largest);
}

}  // namespace exl
