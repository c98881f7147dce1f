// The rotation of quantised keys and values on the CPU.
//
// Purpose: spread outliers over a head before quantisation. Elements get fixed signs
// (rotation_negates), then each block of the largest power of two that divides head_dim gets an
// orthonormal Hadamard transform. The reference codec in Python is the definition.
//
// Layout: one head, float32 [head_dim], contiguous. Work: the calling thread transforms one head.
#pragma once

#include <cmath>

#include "cache_codec.h"
#include "cache_simd.h"

namespace exl {

#if defined(EXL_AVX512)
// One step of the transform: `partner` is x with its lanes exchanged; the lanes set in Minus
// subtract.
template <int Minus>
EXL_INLINE __m512 butterfly(__m512 x, __m512 partner) {
    return _mm512_mask_sub_ps(_mm512_add_ps(partner, x), static_cast<__mmask16>(Minus), partner,
                              x);
}
EXL_INLINE F32x16 hadamard16(F32x16 a) {
    __m512 x = a.v;
    x = butterfly<0xaaaa>(x, _mm512_permute_ps(x, 0xb1));
    x = butterfly<0xcccc>(x, _mm512_permute_ps(x, 0x4e));
    x = butterfly<0xf0f0>(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    x = butterfly<0xff00>(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    return {x};
}
#else
// A Hadamard transform over 16 lanes, without the factor 1 / 4.
EXL_INLINE F32x16 hadamard16(F32x16 a) {
    float x[kLanes];
    store(x, a);
    for (int step = 1; step < kLanes; step *= 2) {
        float y[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            const float own = x[i & ~step], partner = x[i | step];
            y[i] = i & step ? own - partner : own + partner;
        }
        std::memcpy(x, y, sizeof(x));
    }
    return load(x);
}
#endif

// Transforms x[0, size), size a power of two, without the factor 1 / sqrt(size).
inline void hadamard(float* x, int size) {
    int step = 1;
    if (size >= kLanes) {
        for (int i = 0; i < size; i += kLanes) store(x + i, hadamard16(load(x + i)));
        step = kLanes;
    }
    for (; step < size; step *= 2) {
        for (int base = 0; base < size; base += 2 * step) {
            if (step < kLanes) {
                for (int i = base; i < base + step; ++i) {
                    const float a = x[i], b = x[i + step];
                    x[i] = a + b;
                    x[i + step] = a - b;
                }
                continue;
            }
            for (int i = base; i < base + step; i += kLanes) {
                const F32x16 a = load(x + i), b = load(x + i + step);
                store(x + i, a + b);
                store(x + i + step, a - b);
            }
        }
    }
}

inline void hadamard_blocks(float* x, int head_dim) {
    const int block = rotation_block(head_dim);
    for (int i = 0; i < head_dim; i += block) hadamard(x + i, block);
}

// out = rotation(in * factor), head_dim elements each; in and out must not overlap.
inline void rotate(const float* in, int head_dim, float factor, float* out) {
    const float plus = factor / std::sqrt(static_cast<float>(rotation_block(head_dim)));
    for (int i = 0; i < head_dim; ++i) out[i] = in[i] * (rotation_negates(i) ? -plus : plus);
    hadamard_blocks(out, head_dim);
}

// out = inverse rotation(x * factor), head_dim elements each; x is overwritten.
inline void rotate_back(float* x, int head_dim, float factor, float* out) {
    hadamard_blocks(x, head_dim);
    const float plus = factor / std::sqrt(static_cast<float>(rotation_block(head_dim)));
    for (int i = 0; i < head_dim; ++i) out[i] = x[i] * (rotation_negates(i) ? -plus : plus);
}

}  // namespace exl
