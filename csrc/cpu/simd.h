// Sixteen lanes of 32 bits on any processor.
//
// Purpose: one spelling of the vector operations that the kernels need, so that a kernel is
// written once. A tile has 16 columns, so the unit is 16 lanes of 32 bits: one AVX-512
// register, two AVX2 registers, or an array that the compiler vectorises. The target macros
// select the variant because the library is compiled for the machine that runs it.
//
// Layout: F32x16 and I32x16 hold 16 lanes; U8x64 holds 64 codes of one byte,
// [16 columns][4 rows].
//
// Integer results are the same bits on every target. Floating-point results differ only on a
// target without a fused multiply-add.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__)
#define EXL_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && (defined(_MSC_VER) || (defined(__FMA__) && defined(__F16C__)))
// MSVC defines neither __FMA__ nor __F16C__; its /arch:AVX2 implies both.
#define EXL_AVX2 1
#include <immintrin.h>
#endif
// Tiles need the system's permission at run time (linear_amx.cpp), which only Linux is asked for.
#if defined(EXL_AVX512) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__linux__)
#define EXL_AMX 1
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own intrinsics start from a deliberately undefined register and then warn about it.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
// Partial redundancy elimination cuts the integer sums of a loop into two sets, half of which
// then live in memory; prefill runs at half its speed (GCC 12).
#pragma GCC optimize("no-tree-pre")
#endif

#if defined(_MSC_VER)
#define EXL_INLINE __forceinline
#define EXL_INLINED
#else
#define EXL_INLINE inline __attribute__((always_inline))
// Follows a lambda's parameters. If the lambda is inlined early, its captures can live in
// registers; if it is inlined late, GCC leaves arrays of sums in memory.
#define EXL_INLINED __attribute__((always_inline))
#endif

// A condition that is nearly always true.
#if defined(__GNUC__)
#define EXL_LIKELY(condition) __builtin_expect(!!(condition), 1)
#else
#define EXL_LIKELY(condition) (condition)
#endif

namespace exl {

// Lanes of a vector; also the number of columns of a tile.
constexpr int kLanes = 16;

// Converts float16 to float32 without hardware. A multiplication moves the exponent, which is
// right for subnormal numbers too; infinities and NaN (exponent 31) are corrected after it.
EXL_INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    uint32_t bits = static_cast<uint32_t>(half & 0x7fffu) << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;  // the difference of the exponents' biases, 127 - 15
    std::memcpy(&bits, &value, 4);
    if ((half & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
    bits |= sign;
    std::memcpy(&value, &bits, 4);
    return value;
}

EXL_INLINE float bfloat16_to_float(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

}  // namespace exl

#if defined(EXL_AVX512)
#include "simd_avx512.h"
#elif defined(EXL_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace exl {

// True if dot products are made of pair_products and add_pairs.
#if defined(EXL_DOTS_IN_PAIRS)
constexpr bool kDotsInPairs = true;
#else
constexpr bool kDotsInPairs = false;
#endif

// Request a cache line for the second-level cache, or for the first, ahead of its use. Any address
// is allowed, also an invalid one.
EXL_INLINE void prefetch_far(const uint8_t* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
#elif defined(EXL_AVX512) || defined(EXL_AVX2)
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
#else
    (void)p;
#endif
}
EXL_INLINE void prefetch_near(const uint8_t* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p);
#elif defined(EXL_AVX512) || defined(EXL_AVX2)
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
#else
    (void)p;
#endif
}

// dot() with a word of memory that is used once.
template <bool Wide>
EXL_INLINE I32x16 dot_loaded(I32x16 acc, U8x64 codes, const int32_t* x4) {
#if defined(EXL_AVX512) && defined(__AVX512VNNI__) && defined(__GNUC__) && !defined(__clang__)
    // GCC 12 broadcasts the word by an instruction of its own: up to a third of all instructions.
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(codes.v), "m"(*x4));
    return acc;
#else
    return dot<Wide>(acc, codes, *x4);
#endif
}

// Orders `stream_codes`, which stores a whole line (p is a multiple of 64) past the caches, before
// all later stores. A function that streams calls it at its end.
EXL_INLINE void finish_streaming() {
#if defined(EXL_AVX512) || defined(EXL_AVX2)
    _mm_sfence();
#endif
}

// Loads or stores the first `count` (below 16) elements; the other lanes are zero. Memory outside
// these elements is not accessed.
EXL_INLINE F32x16 load_part(const float* p, int64_t count) {
    float lanes[kLanes] = {};
    std::memcpy(lanes, p, sizeof(float) * static_cast<size_t>(count));
    return load(lanes);
}
EXL_INLINE void store_part(float* p, F32x16 a, int64_t count) {
    float lanes[kLanes];
    store(lanes, a);
    std::memcpy(p, lanes, sizeof(float) * static_cast<size_t>(count));
}

}  // namespace exl
