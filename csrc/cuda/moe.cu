// Mixture of experts: the choice of experts, and the sum of what the chosen ones made.
//
// Choice: a warp a row, since a router has 8 to 128 experts. Its order is the reference's:
// falling logits, the lower expert first among equals.
#include "cuda/platform.cuh"

namespace exl {

constexpr int kRouteThreads = 32;
constexpr int kSumThreads = 256;
constexpr int kNone = 0x7FFFFFFF;

struct Choice {
    float logit;
    int expert;  // kNone: no expert
};

__device__ __forceinline__ bool before(const Choice& a, const Choice& b) {
    if (b.expert == kNone) return a.expert != kNone;
    if (a.expert == kNone) return false;
    return a.logit > b.logit || (a.logit == b.logit && a.expert < b.expert);
}

// The expert behind `last` in the order of choice, the same in every lane. NaN is never chosen.
__device__ __forceinline__ Choice next_expert(const float* logits, int experts, Choice last) {
    Choice best{0.0f, kNone};
    for (int e = lane_id(); e < experts; e += 32) {
        const float logit = logits[e];
        const bool later = logit < last.logit || (logit == last.logit && e > last.expert);
        const Choice candidate{logit, e};
        if (later && before(candidate, best)) best = candidate;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        const Choice other{shfl_xor(best.logit, mask), shfl_xor(best.expert, mask)};
        if (before(other, best)) best = other;
    }
    return best;
}

}  // namespace exl

// Softmax over experts and the top_k of them. logits [rows, experts]; weights and chosen
// [rows, top_k]. A block of one warp a row.
extern "C" __global__ void __launch_bounds__(exl::kRouteThreads)
    moe_route_kernel(const float* logits, int32_t experts, int32_t top_k, int32_t normalize,
                     float* weights, int32_t* chosen) {
    using namespace exl;
    const int64_t row = blockIdx.x;
    logits += row * experts;
    weights += row * top_k;
    chosen += row * top_k;
    const Choice above{bits_float(0x7F800000u), -1};
    const Choice first = next_expert(logits, experts, above);
    const float largest = first.expert == kNone ? 0.0f : first.logit;
    float total = 0.0f;
    for (int e = lane_id(); e < experts; e += 32) total += expf(logits[e] - largest);
    total = warp_sum(total);
    Choice last = above;
    float chosen_total = 0.0f;
    for (int k = 0; k < top_k; ++k) {
        const Choice next = next_expert(logits, experts, last);
        // Only NaN leaves nothing to choose; the weights become NaN as well.
        last.expert = next.expert == kNone ? k : next.expert;
        last.logit = logits[last.expert];
        const float power = expf(last.logit - largest);
        chosen_total += power;
        if (lane_id() == 0) {
            chosen[k] = last.expert;
            weights[k] = power;
        }
    }
    warp_sync();  // what lane 0 wrote is read below
    const float divisor = normalize != 0 ? chosen_total : total;
    for (int k = lane_id(); k < top_k; k += 32) weights[k] = weights[k] / divisor;
}
EXL_KERNEL(moe_route_kernel);

// out[t] += sum over k of weights[t, k] * x[t * top_k + k], in rising order of experts, as
// scatter_add_rows adds one expert after the other: the same bits. x [rows * top_k, size],
// weights and experts [rows, top_k], out [rows, size]. grid.x rows, grid.y pieces of a row.
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
