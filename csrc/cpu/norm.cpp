// RMSNorm, out = x / sqrt(mean(x^2) + eps) * weight, and LayerNorm, out = (x - mean(x)) /
// sqrt(variance(x) + eps) * weight + bias, for each row.
//
// Layout: float32, contiguous. Work per thread: whole rows. A sum has 64 chains of fixed order, so
// a row's result does not depend on the other rows.
#include <cmath>
#include <cstring>

#include "common.h"
#include "replay.h"
#include "simd.h"
#include "threads.h"

namespace exl {
namespace {

// Elements that are worth the cost of a claim: about 5 us of reading and writing.
constexpr int64_t kElementsPerTask = 16 * 1024;

// Sums a row. add(total, v) is a chain's total with 16 elements v; `padding` is what it leaves
// unchanged.
template <class Add>
float chained_sum(const float* x, int64_t size, float padding, const Add& add) {
    constexpr int kChains = 4;
    F32x16 sums[kChains];
    for (auto& chain : sums) chain = broadcast(0.0f);
    int64_t i = 0;
    for (; i + kChains * kLanes <= size; i += kChains * kLanes) {
        for (int c = 0; c < kChains; ++c) sums[c] = add(sums[c], load(x + i + c * kLanes));
    }
    for (; i + kLanes <= size; i += kLanes) sums[0] = add(sums[0], load(x + i));
    if (i < size) {
        float tail[kLanes];
        store(tail, broadcast(padding));
        std::memcpy(tail, x + i, sizeof(float) * static_cast<size_t>(size - i));
        sums[0] = add(sums[0], load(tail));
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

float sum_of_squares(const float* x, int64_t size) {
    return chained_sum(x, size, 0.0f, [](F32x16 total, F32x16 v) { return fma(v, v, total); });
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

// The mean of a row, in two parts because float32 rounds it: x - shift is exact or nearly so, also
// where the mean is far larger than the deviations.
struct Center {
    F32x16 shift, remainder;
    EXL_INLINE F32x16 deviation(F32x16 x) const { return (x - shift) - remainder; }
};

// LayerNorm of a row. bias: [size], or null. The squares are those of the deviations, because
// mean(x^2) - mean(x)^2 would cancel.
void layer_norm_row(const float* x, const float* weight, const float* bias, float eps,
                    int64_t size, float* out) {
    const float total = chained_sum(x, size, 0.0f, [](F32x16 sums, F32x16 v) { return sums + v; });
    const float shift = static_cast<float>(static_cast<double>(total) / size);
    Center center{broadcast(shift), broadcast(0.0f)};
    const float rest = chained_sum(x, size, shift, [&](F32x16 sums, F32x16 v) {
        return sums + center.deviation(v);
    });
    const float remainder = static_cast<float>(static_cast<double>(rest) / size);
    center.remainder = broadcast(remainder);
    float squares = chained_sum(x, size - size % kLanes, 0.0f, [&](F32x16 sums, F32x16 v) {
        const F32x16 deviation = center.deviation(v);
        return fma(deviation, deviation, sums);
    });
    for (int64_t i = size - size % kLanes; i < size; ++i) {
        const float deviation = (x[i] - shift) - remainder;
        squares += deviation * deviation;
    }
    const double variance = static_cast<double>(squares) / size;
    const F32x16 scale = broadcast(static_cast<float>(1.0 / std::sqrt(variance + eps)));
    for (int64_t i = 0; i < size; i += kLanes) {
        const int64_t count = size - i < kLanes ? size - i : kLanes;
        const auto part = [&](const float* p) {
            return count == kLanes ? load(p + i) : load_part(p + i, count);
        };
        F32x16 result = center.deviation(part(x)) * scale * part(weight);
        if (bias != nullptr) result = result + part(bias);
        if (count == kLanes) {
            store(out + i, result);
        } else {
            store_part(out + i, result, count);
        }
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
EXL_REPLAYED(rms_norm)

// x, out: float32 [rows, size], may be the same buffer; weight: float32 [periods, size], of which
// row r takes row r % periods; bias: float32 [periods, size], or null.
EXL_API void exl_layer_norm(const float* x, const float* weight, const float* bias, float eps,
                            int64_t rows, int64_t size, int64_t periods, float* out) {
    using namespace exl;
    const int64_t min_grain = ceil_div(kElementsPerTask, size);
    parallel_for(rows, balanced_grain(rows, min_grain), [&](int64_t first, int64_t end, int) {
        for (int64_t row = first; row < end; ++row) {
            const int64_t start = row % periods * size;
            layer_norm_row(x + row * size, weight + start, bias == nullptr ? nullptr : bias + start,
                           eps, size, out + row * size);
        }
    });
}
EXL_REPLAYED(layer_norm)
