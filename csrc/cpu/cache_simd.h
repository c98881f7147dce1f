// Vector operations that only the cache codec needs, beyond simd.h: table lookups, bit fields and
// transposed loads.
//
// Layout: as in simd.h, vectors of 16 lanes in registers. One spelling of every operation for
// AVX-512, AVX2 and portable C++, with the same results bit for bit.
#pragma once

#include "simd.h"

#if !defined(EXL_AVX512) && !defined(EXL_AVX2) && (defined(__SSE2__) || defined(_M_X64))
#include <emmintrin.h>
#endif
#if defined(EXL_AVX512) || defined(EXL_AVX2) || defined(__SSE2__) || defined(_M_X64)
#define EXL_SSE2 1
#endif

namespace exl {

#if defined(EXL_AVX512)

EXL_INLINE I32x16 operator&(I32x16 a, I32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
EXL_INLINE I32x16 operator|(I32x16 a, I32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }
EXL_INLINE I32x16 shift_right(I32x16 a, int bits) {
    return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(bits))};
}
// table[index % Count] for a table of 8 or 16 entries. Precondition for 8 entries: bit 3 of an
// index is 0.
template <int Count>
EXL_INLINE F32x16 look_up(F32x16 table, I32x16 index) {
    return {_mm512_permutexvar_ps(index.v, table.v)};
}
// table[index] for a table of 32 entries. Precondition: 0 <= index < 32.
EXL_INLINE F32x16 lookup32(const float* table, I32x16 index) {
    return {_mm512_permutex2var_ps(_mm512_loadu_ps(table), index.v, _mm512_loadu_ps(table + 16))};
}
EXL_INLINE I32x16 load_int16(const int16_t* p) {
    return {_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// Number of the Levels - 1 rising thresholds that are below x, for 8 or 16 levels. If the
// thresholds are the midpoints of levels, this is the index of the nearest level. 16 thresholds must
// be readable.
template <int Levels>
EXL_INLINE I32x16 count_below(const float* thresholds, F32x16 x) {
    const __m512 all = _mm512_loadu_ps(thresholds);
    __m512i count = _mm512_setzero_si512();
    for (int step = Levels / 2; step > 0; step /= 2) {
        const __m512i next = _mm512_add_epi32(count, _mm512_set1_epi32(step - 1));
        const __mmask16 above =
            _mm512_cmp_ps_mask(x.v, _mm512_permutexvar_ps(next, all), _CMP_GT_OQ);
        count = _mm512_mask_add_epi32(count, above, count, _mm512_set1_epi32(step));
    }
    return {count};
}

#elif defined(EXL_AVX2)

EXL_INLINE I32x16 operator&(I32x16 a, I32x16 b) {
    return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
EXL_INLINE I32x16 operator|(I32x16 a, I32x16 b) {
    return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
}
EXL_INLINE I32x16 shift_right(I32x16 a, int bits) {
    const __m128i count = _mm_cvtsi32_si128(bits);
    return {_mm256_srl_epi32(a.lo, count), _mm256_srl_epi32(a.hi, count)};
}
// Selects `one` where bit `Bit` of the index is set. The shift moves that bit to the sign, which
// the blend reads.
template <int Bit>
EXL_INLINE __m256 choose(__m256 zero, __m256 one, __m256i index) {
    return _mm256_blendv_ps(zero, one, _mm256_castsi256_ps(_mm256_slli_epi32(index, 31 - Bit)));
}
template <int Count>
EXL_INLINE __m256 look_up(F32x16 table, __m256i index) {
    const __m256 low = _mm256_permutevar8x32_ps(table.lo, index);
    if constexpr (Count == 8) return low;
    return choose<3>(low, _mm256_permutevar8x32_ps(table.hi, index), index);
}
template <int Count>
EXL_INLINE F32x16 look_up(F32x16 table, I32x16 index) {
    return {look_up<Count>(table, index.lo), look_up<Count>(table, index.hi)};
}
EXL_INLINE F32x16 lookup32(const float* table, I32x16 index) {
    const F32x16 first = look_up<16>(load(table), index);
    const F32x16 second = look_up<16>(load(table + 16), index);
    return {choose<4>(first.lo, second.lo, index.lo), choose<4>(first.hi, second.hi, index.hi)};
}
EXL_INLINE I32x16 load_int16(const int16_t* p) {
    return {_mm256_cvtepi16_epi32(load128(p)), _mm256_cvtepi16_epi32(load128(p + 8))};
}
template <int Levels>
EXL_INLINE I32x16 count_below(const float* thresholds, F32x16 x) {
    I32x16 count = broadcast(int32_t{0});
    for (int i = 0; i + 1 < Levels; ++i) {
        const __m256 threshold = _mm256_set1_ps(thresholds[i]);
        const __m256i lo = _mm256_castps_si256(_mm256_cmp_ps(x.lo, threshold, _CMP_GT_OQ));
        const __m256i hi = _mm256_castps_si256(_mm256_cmp_ps(x.hi, threshold, _CMP_GT_OQ));
        count = {_mm256_sub_epi32(count.lo, lo), _mm256_sub_epi32(count.hi, hi)};
    }
    return count;
}

#else

EXL_INLINE I32x16 operator&(I32x16 a, I32x16 b) {
    return lanes<I32x16>([&](int i) { return a.v[i] & b.v[i]; });
}
EXL_INLINE I32x16 operator|(I32x16 a, I32x16 b) {
    return lanes<I32x16>([&](int i) { return a.v[i] | b.v[i]; });
}
EXL_INLINE I32x16 shift_right(I32x16 a, int bits) {
    return lanes<I32x16>(
        [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> bits); });
}
template <int Count>
EXL_INLINE F32x16 look_up(F32x16 table, I32x16 index) {
    return lanes<F32x16>([&](int i) { return table.v[index.v[i] & (Count - 1)]; });
}
EXL_INLINE F32x16 lookup32(const float* table, I32x16 index) {
    return lanes<F32x16>([&](int i) { return table[index.v[i]]; });
}
EXL_INLINE I32x16 load_int16(const int16_t* p) {
    return lanes<I32x16>([=](int i) { return static_cast<int32_t>(p[i]); });
}
template <int Levels>
EXL_INLINE I32x16 count_below(const float* thresholds, F32x16 x) {
    I32x16 count = broadcast(int32_t{0});
    for (int t = 0; t + 1 < Levels; ++t) {
        for (int i = 0; i < kLanes; ++i) count.v[i] += x.v[i] > thresholds[t] ? 1 : 0;
    }
    return count;
}

#endif

// Sixteen bytes, of one token each.
struct U8x16 {
#if defined(EXL_SSE2)
    __m128i v;
#else
    uint8_t v[kLanes];
#endif
};

// 0x88 for tokens whose scale selects the second table, 0 for the others.
EXL_INLINE U8x16 second_tables(const uint16_t* scales) {
#if defined(EXL_SSE2)
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 8));
    const __m128i bytes = _mm_packs_epi16(_mm_srai_epi16(_mm_slli_epi16(low, 15), 15),
                                          _mm_srai_epi16(_mm_slli_epi16(high, 15), 15));
    return {_mm_and_si128(bytes, _mm_set1_epi8(static_cast<char>(0x88)))};
#else
    U8x16 tables;
    for (int j = 0; j < kLanes; ++j) tables.v[j] = scales[j] & 1 ? 0x88 : 0;
    return tables;
#endif
}

// Two codes of 3 bits of each of 16 tokens, with tables in front: element Element < 16 of the group
// in bits 0 to 3 and element Element + 16 in bits 4 to 7. planes: the bytes of a whole group, as
// transpose_bytes leaves them.
template <int Element>
EXL_INLINE I32x16 pair_of_three_bits(const uint8_t* planes, U8x16 tables) {
    const uint8_t* high = planes + kLanes * (Element % 8);
    const uint8_t* low = planes + kLanes * (8 + Element % 4);
    constexpr int kLowShift = Element / 4;
#if defined(EXL_SSE2)
    // Bits that a shift brings from the next byte are masked.
    const __m128i two_bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
    const __m128i one_bit = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
    const __m128i moved =
        Element < 8 ? _mm_slli_epi16(two_bits, 1) : _mm_srli_epi16(two_bits, 1);
    const __m128i lowest =
        _mm_and_si128(_mm_srli_epi16(one_bit, kLowShift), _mm_set1_epi8(0x11));
    const __m128i pairs = _mm_or_si128(_mm_and_si128(moved, _mm_set1_epi8(0x66)),
                                       _mm_or_si128(lowest, tables.v));
#if defined(EXL_AVX512)
    return {_mm512_cvtepu8_epi32(pairs)};
#elif defined(EXL_AVX2)
    return {_mm256_cvtepu8_epi32(pairs), _mm256_cvtepu8_epi32(_mm_srli_si128(pairs, 8))};
#else
    uint8_t bytes[kLanes];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), pairs);
    return load_bytes(bytes);
#endif
#else
    return lanes<I32x16>([&](int j) {
        const int two_bits = Element < 8 ? high[j] << 1 : high[j] >> 1;
        return (two_bits & 0x66) | (low[j] >> kLowShift & 0x11) | tables.v[j];
    });
#endif
}

// Loads a whole group of 3 bits: lane i has element i in bits 0 to 2 and element i + 16 in bits 4
// to 6; other bits are 0.
EXL_INLINE I32x16 load_three_bits(const uint8_t* p) {
    uint64_t high;
    int32_t low;
    std::memcpy(&high, p, 8);
    std::memcpy(&low, p + 8, 4);
#if defined(EXL_AVX512) || defined(EXL_AVX2)
    // Byte i: bits 0 and 1, and 4 and 5, from the plane of 2 bits; bits 0 and 4 from that of 1 bit.
    const __m128i two_bits = _mm_srlv_epi64(_mm_set1_epi64x(static_cast<int64_t>(high)),
                                            _mm_set_epi64x(2, 0));
    const __m128i one_bit = _mm_srlv_epi32(_mm_set1_epi32(low), _mm_setr_epi32(0, 1, 2, 3));
    const __m128i moved = _mm_and_si128(_mm_add_epi8(two_bits, two_bits), _mm_set1_epi8(0x66));
    const __m128i pairs = _mm_or_si128(moved, _mm_and_si128(one_bit, _mm_set1_epi8(0x11)));
#if defined(EXL_AVX512)
    return {_mm512_cvtepu8_epi32(pairs)};
#else
    return {_mm256_cvtepu8_epi32(pairs), _mm256_cvtepu8_epi32(_mm_srli_si128(pairs, 8))};
#endif
#else
    uint8_t pairs[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        const unsigned two_bits = static_cast<unsigned>(high >> (i % 8 * 8 + i / 8 * 2)) & 0x33u;
        const unsigned one_bit = static_cast<uint32_t>(low) >> (i % 4 * 8 + i / 4) & 0x11u;
        pairs[i] = static_cast<uint8_t>(two_bits << 1 | one_bit);
    }
    return load_bytes(pairs);
#endif
}

EXL_INLINE float float_of_half(uint16_t half) {
#if defined(EXL_AVX512) || defined(EXL_AVX2)
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
#else
    return half_to_float(half);
#endif
}

// The lowest bits of 16 numbers: bit i of the result is the lowest bit of p[i].
EXL_INLINE uint16_t lowest_bits(const int16_t* p) {
#if defined(EXL_SSE2)
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8));
        // The shift makes the lowest bit the sign, which saturation to a byte keeps.
    return static_cast<uint16_t>(_mm_movemask_epi8(
        _mm_packs_epi16(_mm_slli_epi16(low, 15), _mm_slli_epi16(high, 15))));
#else
    unsigned bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= (static_cast<unsigned>(p[i]) & 1u) << i;
    return static_cast<uint16_t>(bits);
#endif
}

// out[16 * i + j] = byte i of row j, for 16 rows that are `stride` bytes apart and
// i < count <= 16. Reads only the first `count` bytes of a row. out has 256 bytes, of which those
// of other i become unspecified.
EXL_INLINE void transpose_bytes(const uint8_t* rows, int64_t stride, int count, uint8_t* out) {
#if defined(EXL_SSE2)
    __m128i r[16], t[16];
    if (count == 16) {
        for (int j = 0; j < 16; ++j) {
            r[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + j * stride));
        }
    } else if (count == 8) {
        for (int j = 0; j < 16; ++j) {
            r[j] = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows + j * stride));
        }
    } else if (count == 12) {
        for (int j = 0; j < 16; ++j) {
            int32_t last;
            std::memcpy(&last, rows + j * stride + 8, 4);
            r[j] = _mm_unpacklo_epi64(
                _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows + j * stride)),
                _mm_cvtsi32_si128(last));
        }
    } else {
        for (int j = 0; j < 16; ++j) {
            uint8_t row[16] = {};
            std::memcpy(row, rows + j * stride, static_cast<size_t>(count));
            r[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
        }
    }
    // Interleaving rows j and j + 8 rotates the bits of the index (row, byte) by one position;
    // four rounds exchange row and byte.
    for (int round = 0; round < 4; ++round) {
        for (int j = 0; j < 8; ++j) {
            t[2 * j] = _mm_unpacklo_epi8(r[j], r[j + 8]);
            t[2 * j + 1] = _mm_unpackhi_epi8(r[j], r[j + 8]);
        }
        for (int j = 0; j < 16; ++j) r[j] = t[j];
    }
    for (int j = 0; j < 16; ++j) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * j), r[j]);
    }
#else
    for (int j = 0; j < 16; ++j) {
        for (int i = 0; i < count; ++i) out[16 * i + j] = rows[j * stride + i];
    }
#endif
}

// out[16 * i + j] = element i of row j, for 16 rows of 8 elements of 16 bits, `stride` elements
// apart.
EXL_INLINE void transpose_int16(const int16_t* rows, int64_t stride, int16_t* out) {
#if defined(EXL_SSE2)
    for (int half = 0; half < 2; ++half) {
        __m128i r[8], t[8];
        for (int j = 0; j < 8; ++j) {
            const int16_t* row = rows + (8 * half + j) * stride;
            r[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
        }
        for (int round = 0; round < 3; ++round) {
            for (int j = 0; j < 4; ++j) {
                t[2 * j] = _mm_unpacklo_epi16(r[j], r[j + 4]);
                t[2 * j + 1] = _mm_unpackhi_epi16(r[j], r[j + 4]);
            }
            for (int j = 0; j < 8; ++j) r[j] = t[j];
        }
        for (int j = 0; j < 8; ++j) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * j + 8 * half), r[j]);
        }
    }
#else
    for (int j = 0; j < 16; ++j) {
        for (int i = 0; i < 8; ++i) out[16 * i + j] = rows[j * stride + i];
    }
#endif
}

}  // namespace exl
