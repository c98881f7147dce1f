// Rotary position embedding: the table of cosines and sines, and the rotation.
//
// Layout: float32, contiguous. Angles are computed in float64 because at position 10^6 a float32
// product has an error of 0.03 rad. Work per thread: whole rows (tokens).
#include <cmath>

#include "common.h"
#include "replay.h"
#include "simd.h"
#include "threads.h"

namespace exl {
namespace {

// Work that is worth the cost of a claim: a sine and cosine take about 40 ns, an element of a
// rotation well under one.
constexpr int64_t kAnglesPerTask = 256;
constexpr int64_t kElementsPerTask = 16 * 1024;

// (first, second) *= e^(i angle), for 16 pairs.
EXL_INLINE void rotate(F32x16& first, F32x16& second, F32x16 cos, F32x16 sin) {
    const F32x16 a = first * cos - second * sin;
    second = second * cos + first * sin;
    first = a;
}

void subtract(float* x, const float* mean, int64_t size) {
    for (int64_t i = 0; i < size; ++i) x[i] -= mean[i];
}

void rotate_head(float* x, const float* cos, const float* sin, int64_t half) {
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        F32x16 first = load(x + i), second = load(x + half + i);
        rotate(first, second, load(cos + i), load(sin + i));
        store(x + i, first);
        store(x + half + i, second);
    }
    if (i < half) {
        const int64_t left = half - i;
        F32x16 first = load_part(x + i, left), second = load_part(x + half + i, left);
        rotate(first, second, load_part(cos + i, left), load_part(sin + i, left));
        store_part(x + i, first, left);
        store_part(x + half + i, second, left);
    }
}

void rotate_interleaved_head(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float first = x[2 * i], second = x[2 * i + 1];
        x[2 * i] = first * cos[i] - second * sin[i];
        x[2 * i + 1] = second * cos[i] + first * sin[i];
    }
}

}  // namespace
}  // namespace exl

// Computes out[row] = (cos, sin) of positions[row] * inv_freq[i], times `factor`.
//
// positions: int32 [rows]; inv_freq: float32 [half]; out: float32 [rows, 2, half].
EXL_API void exl_rope_table(const int32_t* positions, const float* inv_freq, float factor,
                            int64_t rows, int64_t half, float* out) {
    using namespace exl;
    const int64_t min_grain = ceil_div(kAnglesPerTask, half);
    parallel_for(rows, balanced_grain(rows, min_grain), [&](int64_t first, int64_t end, int) {
        for (int64_t row = first; row < end; ++row) {
            float* cos = out + row * 2 * half;
            float* sin = cos + half;
            for (int64_t i = 0; i < half; ++i) {
                const double angle = static_cast<double>(positions[row]) * inv_freq[i];
                cos[i] = static_cast<float>(std::cos(angle) * factor);
                sin[i] = static_cast<float>(std::sin(angle) * factor);
            }
        }
    });
}
EXL_REPLAYED(rope_table)

// Rotates x in place, after subtracting `mean`, if it is not null. Element i of a head is paired with
// element half + i; if `interleaved` is not 0, element 2 * i with element 2 * i + 1.
//
// x: float32 [rows, heads, head_dim]; table: float32 [rows, 2, half] of exl_rope_table; mean: float32
// [heads, head_dim].
EXL_API void exl_rope(float* x, const float* table, const float* mean, int64_t rows, int64_t heads,
                      int64_t head_dim, int64_t half, int interleaved) {
    using namespace exl;
    const auto rotate = interleaved != 0 ? rotate_interleaved_head : rotate_head;
    const int64_t row_elements = heads * head_dim;
    const int64_t min_grain = ceil_div(kElementsPerTask, row_elements);
    parallel_for(rows, balanced_grain(rows, min_grain), [&](int64_t first, int64_t end, int) {
        for (int64_t row = first; row < end; ++row) {
            const float* cos = table + row * 2 * half;
            if (mean != nullptr) subtract(x + row * row_elements, mean, row_elements);
            for (int64_t head = 0; head < heads; ++head) {
                rotate(x + row * row_elements + head * head_dim, cos, cos + half, half);
            }
        }
    });
}
EXL_REPLAYED(rope)
