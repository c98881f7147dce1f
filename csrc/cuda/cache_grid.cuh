// Grids of the cache's codes: the nearest code of a value, and a code's level.
//
// Layout: thresholds of both tables [table][code], then levels likewise, up to kCodebookFloats
// float32 in shared memory. Each round of the binary search over a table's thresholds is one
// conflict-free read, because the thresholds of both tables, 32 or 16, are in different banks.
#pragma once

#include "cache_codec.h"
#include "cuda/platform.cuh"

namespace exl {

constexpr int kCodebookFloats = 64;

EXL_HOST_DEVICE constexpr float level_of(int bits, int table, int code) {
    return codebook_level(bits, table, code) * kCodebookUnit;
}
// A value above threshold i has code i + 1 or more. The last threshold is not used.
EXL_HOST_DEVICE constexpr float threshold_of(int bits, int table, int code) {
    return code + 1 < 1 << bits
               ? 0.5f * (level_of(bits, table, code) + level_of(bits, table, code + 1))
               : 0.0f;
}

// Writes thresholds [table][code], then levels [table][code]. Each value is a constant in the
// code, so that no table is read from global memory.
template <int kBits>
__device__ __forceinline__ void fill_codebooks(float* codebooks) {
    constexpr int kLevels = 1 << kBits, kCount = kTables * kLevels;
    const int thread = threadIdx.x;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if (thread == i) codebooks[i] = threshold_of(kBits, i / kLevels, i % kLevels);
        if (thread == kCount + i) {
            codebooks[kCount + i] = level_of(kBits, i / kLevels, i % kLevels);
        }
    }
}

// A grid of codes; `value` is x / scale. Ties go to the lower code, as in the reference.
template <int kBits, bool = has_tables(kBits)>
struct Grid;

template <int kBits>
struct Grid<kBits, false> {
    static constexpr float kHalf = 1 << (kBits - 1);
    __device__ __forceinline__ Grid(const float*, int) {}
    // Its ceiling is the nearest level in steps; NaN has code 0, as with tables.
    static __device__ __forceinline__ float bounded(float value) {
        return fminf(kHalf - 1.0f, fmaxf(-kHalf, value * kHalf - 0.5f));
    }
    __device__ __forceinline__ float nearest(float value) const {
        return ceil_small(bounded(value)) + kHalf;
    }
    __device__ __forceinline__ float level(float code) const {
        return (code - kHalf) * (1.0f / kHalf);
    }
};
template <int kBits>
struct Grid<kBits, true> {
    static constexpr int kLevels = 1 << kBits;
    const float* thresholds;
    __device__ __forceinline__ Grid(const float* codebooks, int table)
        : thresholds(codebooks + table * kLevels) {}
    __device__ __forceinline__ float nearest(float value) const {
        int code = 0;
#pragma unroll
        for (int step = kLevels / 2; step > 0; step /= 2) {
            code = value > thresholds[code + step - 1] ? code + step : code;
        }
        return static_cast<float>(code);
    }
    __device__ __forceinline__ float level(float code) const {
        return thresholds[kTables * kLevels + static_cast<int>(code)];
    }
};

__device__ __forceinline__ float inverse_of(float exact) {
    return exact == 0.0f ? 0.0f : 1.0f / exact;
}

}  // namespace exl
