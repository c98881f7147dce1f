// RMSNorm: out = x / sqrt(mean(x^2) + eps) * weight, for each row.
//
// Layout: float32, contiguous. Work per thread: whole rows. The sum of squares has 64 chains of
// fixed order, so a row's result does not depend on the other rows.
#include <cmath>

#include "api.h"
#include "common.h"
#include "simd.h"
#include "threads.h"

namespace exl {
namespace {

// Elements that are worth the cost of a claim: about 5 us of reading and writing.
constexpr int64_t kElementsPerTask = 16 * 1024;

float sum_of_squares(const float* x, int64_t size) {
    constexpr int kChains = 4;
    F32x16 sums[kChains];
    for (auto& chain : sums) chain = broadcast(0.0f);
    int64_t i = 0;
    for (; i + kChains * kLanes <= size; i += kChains * kLanes) {
        for (int c = 0; c < kChains; ++c) {
            const F32x16 v = load(x + i + c * kLanes);
            sums[c] = fma(v, v, sums[c]);
        }
    }
    for (; i < size; i += kLanes) {
        const F32x16 v = size - i >= kLanes ? load(x + i) : load_part(x + i, size - i);
        sums[0] = fma(v, v, sums[0]);
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void normalize(const float* x, const float* weight, float scale, int64_t size, float* out) {
    const F32x16 scales = broadcast(scale);
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        store(out + i, load(x + i) * scales * load(weight + i));
    }
    if (i < size) {
        const int64_t left = size - i;
        store_part(out + i, load_part(x + i, left) * scales * load_part(weight + i, left), left);
    }
}

}  // namespace
}  // namespace exl

// x, out: float32 [rows, size], may be the same buffer; weight: float32 [size].
EXL_API void exl_rms_norm(const float* x, const float* weight, float eps, int64_t rows,
                          int64_t size, float* out) {
    using namespace exl;
    const int64_t min_grain = ceil_div(kElementsPerTask, size);
    parallel_for(rows, balanced_grain(rows, min_grain), [&](int64_t first, int64_t end, int) {
        for (int64_t row = first; row < end; ++row) {
            const float* source = x + row * size;
            const double mean = static_cast<double>(sum_of_squares(source, size)) / size;
            const float scale = static_cast<float>(1.0 / std::sqrt(mean + eps));
            normalize(source, weight, scale, size, out + row * size);
        }
    });
}
