// Rounding of weights to codes by a conversion: the search for scales, and the error feedback
// within a group of rows.
//
// Layout: rows float32 [n][columns]: consecutive rows of a matrix, input channels first.
//
// Arithmetic: columns do not depend on each other, so a strip of 16 of them is computed in
// registers and in the first-level cache. Its order is that of the rows, whatever the number of
// threads.
//
// Work per thread: whole strips.
#include <algorithm>
#include <cstring>

#include "api.h"
#include "common.h"
#include "simd.h"
#include "threads.h"
#include "unpack.h"

namespace exl {
namespace {

// Levels of a scale.
constexpr int kScaleLevels = 16;
// Levels that are tried together: 24 of 32 registers have their scales, reciprocals and sums.
constexpr int kTogether = 5;
// Rows whose errors reach the rows of the group after them in one pass.
constexpr int kBlock = 32;
// Steps of the inner loop, of about a nanosecond, that are worth the cost of a claim.
constexpr int64_t kStepsPerTask = 4096;

EXL_INLINE F32x16 load_columns(const float* p, int64_t count) {
    return count == kLanes ? load(p) : load_part(p, count);
}
EXL_INLINE void store_columns(float* p, F32x16 a, int64_t count) {
    if (count == kLanes) {
        store(p, a);
    } else {
        store_part(p, a, count);
    }
}

EXL_INLINE F32x16 clamped(F32x16 code, float half) {
    return max(min(code, broadcast(half - 1.0f)), broadcast(-half));
}

// Finds for 16 columns the level of the smallest weighted error among `tried` ones.
// rows: the strip's first column; scales: [16]; highest, levels, errors: of its columns.
void search_strip(const float* rows, int64_t n, int64_t columns, int64_t count,
                  const float* scales, const int32_t* highest, int tried, float half,
                  const float* weights, int32_t* levels, float* errors) {
    float best[kLanes];
    for (int first = 0; first < tried; first += kTogether) {
        float lanes[kTogether][kLanes];
        F32x16 step[kTogether], inverse[kTogether], sums[kTogether];
        for (int t = 0; t < kTogether; ++t) {
            // Beyond the last level it is repeated.
            const int below = tried - 1 - std::min(first + t, tried - 1);
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                const int32_t level = highest[std::min(lane, count - 1)] - below;
                lanes[t][lane] = scales[level - 1];
            }
            step[t] = load(lanes[t]);
            inverse[t] = broadcast(1.0f) / step[t];
            sums[t] = broadcast(0.0f);
        }
        for (int64_t r = 0; r < n; ++r) {
            const F32x16 value = load_columns(rows + r * columns, count);
            const F32x16 weight = broadcast(weights[r]);
            unrolled<kTogether>([&](auto t) EXL_INLINED {
                const F32x16 code = clamped(round(value * inverse[t]), half);
                const F32x16 error = code * step[t] - value;
                sums[t] = fma(error * error, weight, sums[t]);
            });
        }
        for (int t = 0; t < std::min(kTogether, tried - first); ++t) {
            store(lanes[t], sums[t]);
            for (int64_t lane = 0; lane < count; ++lane) {
                if (first + t > 0 && !(lanes[t][lane] < best[lane])) continue;
                best[lane] = lanes[t][lane];
                levels[lane] = highest[lane] - (tried - 1 - (first + t));
            }
        }
    }
    std::memcpy(errors, best, sizeof(float) * static_cast<size_t>(count));
}

// Rounds 16 columns of a group, row after row, and passes errors on within the group.
// rows, scales, codes, errors: the strip's first column.
void round_strip(float* rows, int64_t n, int64_t columns, int64_t count, const float* feedback,
                 const float* scales, float half, int8_t* codes, float* errors) {
    const F32x16 scale = load_columns(scales, count);
    F32x16 block[kBlock];
    F32x16 passed[kBlock];
    for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t size = std::min<int64_t>(n - first, kBlock);
        for (int64_t i = 0; i < size; ++i) {
            block[i] = load_columns(rows + (first + i) * columns, count);
        }
        for (int64_t i = 0; i < size; ++i) {
            const int64_t row = first + i;
            const float* factors = feedback + row * n;
            const F32x16 code = clamped(round(block[i] / scale), half);
            int8_t stored[kLanes];
            store_bytes(stored, to_int(code));
            std::memcpy(codes + row * columns, stored, static_cast<size_t>(count));
            const F32x16 error = (block[i] - code * scale) / broadcast(factors[row]);
            passed[i] = error;
            store_columns(errors + row * columns, error, count);
            const F32x16 negative = broadcast(0.0f) - error;
            for (int64_t j = i + 1; j < size; ++j) {
                block[j] = fma(broadcast(factors[first + j]), negative, block[j]);
            }
        }
        for (int64_t j = first + size; j < n; ++j) {
            F32x16 change = broadcast(0.0f);
            for (int64_t i = 0; i < size; ++i) {
                change = fma(broadcast(feedback[(first + i) * n + j]), passed[i], change);
            }
            float* target = rows + j * columns;
            store_columns(target, load_columns(target, count) - change, count);
        }
    }
}

// Calls f(first column, columns of the strip) for all strips; a strip takes `steps` steps.
template <class Function>
void for_each_strip(int64_t columns, int64_t steps, const Function& f) {
    const int64_t strips = ceil_div(columns, int64_t{kLanes});
    parallel_for(strips, balanced_grain(strips, ceil_div(kStepsPerTask, steps)),
                 [&](int64_t first, int64_t end, int) {
                     for (int64_t strip = first; strip < end; ++strip) {
                         const int64_t column = strip * kLanes;
                         f(column, std::min<int64_t>(kLanes, columns - column));
                     }
                 });
}

}  // namespace
}  // namespace exl

// For `candidates` tables of scales, finds for every column the level with the smallest weighted
// error among `tried` ones up to its highest; of equal ones the lowest.
//
// rows: float32 [n][columns]; scales: float32 [candidates][16]; highest: int32
// [candidates][columns], from `tried` to 16; weights: float32 [n]; levels: int32 and errors:
// float32 [candidates][columns].
EXL_API void exl_choose_levels(const float* rows, int64_t n, int64_t columns, const float* scales,
                               const int32_t* highest, int64_t candidates, int tried, int bits,
                               const float* weights, int32_t* levels, float* errors) {
    using namespace exl;
    const float half = static_cast<float>(1 << (bits - 1));
    for_each_strip(columns, n * tried * candidates, [&](int64_t column, int64_t count) {
        for (int64_t c = 0; c < candidates; ++c) {
            const int64_t at = c * columns + column;
            search_strip(rows + column, n, columns, count, scales + c * kScaleLevels, highest + at,
                         tried, half, weights, levels + at, errors + at);
        }
    });
}

// Rounds the rows of a group consecutively; each row's error, divided by its element of the
// diagonal, changes the rows after it.
//
// rows: float32 [n][columns], overwritten; feedback: float32 [n][n], upper triangular; scales:
// float32 [columns]; codes: int8 and errors: float32 [n][columns].
EXL_API void exl_round_rows(float* rows, int64_t n, int64_t columns, const float* feedback,
                            const float* scales, int bits, int8_t* codes, float* errors) {
    using namespace exl;
    const float half = static_cast<float>(1 << (bits - 1));
    for_each_strip(columns, n * n / 2 + n, [&](int64_t column, int64_t count) {
        round_strip(rows + column, n, columns, count, feedback, scales + column, half,
                    codes + column, errors + column);
    });
}
