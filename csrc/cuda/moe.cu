// Mixture of experts: the choice of experts, and the weighted sum of their outputs.
//
// Layout: float32 and int32, contiguous. Work of the choice: one warp per row, because a router has
// 8 to 512 experts. Experts are ordered as in the reference: by falling logits, or by score +
// correction if there is a correction, and by number among equal ones. Work of the sum: one element
// per thread. No shared memory.
#include "cuda/platform.cuh"

// How the experts of a row are chosen. A score is the sigmoid of a logit, or the softmax over all
// experts. The weights of the chosen experts are their scores, divided by the sum of these if
// `normalize`, times `factor`.
struct RoutingCall {
    const float* correction;  // [experts], or null
    int32_t experts;
    int32_t top_k;  // <= experts
    int32_t sigmoid;
    int32_t normalize;
    float factor;
};

namespace exl {

constexpr int kRouteThreads = 32;
constexpr int kSumThreads = 256;
constexpr int kNone = 0x7FFFFFFF;

struct Choice {
    float value;
    int expert;  // kNone: no expert
};

__device__ __forceinline__ bool precedes(const Choice& a, const Choice& b) {
    if (b.expert == kNone) return a.expert != kNone;
    if (a.expert == kNone) return false;
    return a.value > b.value || (a.value == b.value && a.expert < b.expert);
}

// The logits of a row and what they are as scores.
struct Scores {
    const float* logits;
    bool sigmoid;
    float largest, total;  // of a softmax

    // The sigmoid, or the exponential of a softmax before its division by `total`.
    __device__ __forceinline__ float undivided(int expert) const {
        return sigmoid ? 1.0f / (1.0f + expf(-logits[expert])) : expf(logits[expert] - largest);
    }
    // The value that decides the choice.
    __device__ __forceinline__ float value(int expert, const float* correction) const {
        if (correction == nullptr) return logits[expert];
        return undivided(expert) / total + correction[expert];
    }
};

// The expert after `last` in the order of choice, the same in every lane. NaN is never chosen.
__device__ __forceinline__ Choice next_expert(const Scores& scores, const float* correction,
                                              int experts, Choice last) {
    Choice best{0.0f, kNone};
    for (int e = lane_id(); e < experts; e += 32) {
        const float value = scores.value(e, correction);
        const bool follows_last = value < last.value || (value == last.value && e > last.expert);
        const Choice candidate{value, e};
        if (follows_last && precedes(candidate, best)) best = candidate;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        const Choice other{shfl_xor(best.value, mask), shfl_xor(best.expert, mask)};
        if (precedes(other, best)) best = other;
    }
    return best;
}

}  // namespace exl

// Chooses the top_k experts of each row and their weights.
//
// logits: float32 [rows, experts]; weights: float32 and chosen: int32 [rows, top_k]. grid.x: rows,
// one warp each.
extern "C" __global__ void __launch_bounds__(exl::kRouteThreads)
    moe_route_kernel(const float* logits, RoutingCall call, float* weights, int32_t* chosen) {
    using namespace exl;
    const int64_t row = blockIdx.x;
    Scores scores{logits + row * call.experts, call.sigmoid != 0, 0.0f, 1.0f};
    weights += row * call.top_k;
    chosen += row * call.top_k;
    const Choice above{infinity(), -1};
    if (!scores.sigmoid) {
        const Choice first = next_expert(scores, nullptr, call.experts, above);
        if (first.expert != kNone) scores.largest = first.value;
        float total = 0.0f;
        for (int e = lane_id(); e < call.experts; e += 32) total += scores.undivided(e);
        scores.total = warp_sum(total);
    }
    Choice last = above;
    float chosen_total = 0.0f;
    for (int k = 0; k < call.top_k; ++k) {
        const Choice next = next_expert(scores, call.correction, call.experts, last);
        // Only NaN leaves no expert to choose; the weights then become NaN as well.
        last.expert = next.expert == kNone ? k : next.expert;
        last.value = scores.value(last.expert, call.correction);
        const float score = scores.undivided(last.expert);
        chosen_total += score;
        if (lane_id() == 0) {
            chosen[k] = last.expert;
            weights[k] = score;
        }
    }
    warp_sync();  // what lane 0 wrote is read below
    const float divisor = call.normalize != 0 ? chosen_total : scores.total;
    for (int k = lane_id(); k < call.top_k; k += 32) {
        weights[k] = mul_rn(weights[k] / divisor, call.factor);
    }
}
EXL_KERNEL(moe_route_kernel);

// out[t] += sum over k of weights[t, k] * x[t * top_k + k], in rising order of experts. This is the
// order in which scatter_add_rows adds one expert after the other, so the bits are the same.
//
// x: float32 [rows * top_k, size]; weights: float32 and experts: int32 [rows, top_k]; out: float32
// [rows, size]. grid.x: rows, grid.y: pieces of kSumThreads elements.
extern "C" __global__ void __launch_bounds__(exl::kSumThreads)
    moe_sum_kernel(const float* x, const float* weights, const int32_t* experts, int32_t top_k,
                   int32_t size, float* out) {
    using namespace exl;
    const int i = static_cast<int>(blockIdx.y) * kSumThreads + threadIdx.x;
    if (i >= size) return;
    const int64_t row = blockIdx.x;
    weights += row * top_k;
    experts += row * top_k;
    float sum = out[row * size + i];
    int last = -1;
    for (int done = 0; done < top_k; ++done) {
        int next = 0;
        int lowest = kNone;
        for (int k = 0; k < top_k; ++k) {
            if (experts[k] > last && experts[k] < lowest) {
                lowest = experts[k];
                next = k;
            }
        }
        if (lowest == kNone) break;
        last = lowest;
        sum = fmaf(weights[next], x[(row * top_k + next) * size + i], sum);
    }
    out[row * size + i] = sum;
}
EXL_KERNEL(moe_sum_kernel);
