// simd.h for AVX2 with FMA and F16C: two registers of eight lanes. See simd.h.
#pragma once

namespace exl {

struct F32x16 {
    __m256 lo, hi;
};
struct I32x16 {
    __m256i lo, hi;
};
// 64 codes of one byte: [16 columns][4 rows].
struct U8x64 {
    __m256i lo, hi;
};

EXL_INLINE __m256i load256(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
EXL_INLINE void store256(void* p, __m256i a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
EXL_INLINE __m128i load128(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
}

EXL_INLINE F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
EXL_INLINE void store(float* p, F32x16 a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
EXL_INLINE F32x16 load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))};
}
EXL_INLINE void store_half(uint16_t* p, F32x16 a) {
    const __m128i lo = _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT);
    store256(p, _mm256_set_m128i(_mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT), lo));
}
EXL_INLINE F32x16 load_bfloat16(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p + 8)), 16))};
}
EXL_INLINE F32x16 broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
EXL_INLINE F32x16 operator+(F32x16 a, F32x16 b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
EXL_INLINE F32x16 operator-(F32x16 a, F32x16 b) {
    return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
EXL_INLINE F32x16 operator*(F32x16 a, F32x16 b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
EXL_INLINE F32x16 operator/(F32x16 a, F32x16 b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
EXL_INLINE F32x16 max(F32x16 a, F32x16 b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
EXL_INLINE F32x16 min(F32x16 a, F32x16 b) {
    return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
// a * b + c with one rounding.
EXL_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
EXL_INLINE float sum(F32x16 a) {
    const __m256 eight = _mm256_add_ps(a.lo, a.hi);
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}
EXL_INLINE float largest(F32x16 a) {
    const __m256 eight = _mm256_max_ps(a.lo, a.hi);
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}
// Rounds to the nearest whole number, ties to even.
EXL_INLINE F32x16 round(F32x16 a) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}

EXL_INLINE I32x16 load(const int32_t* p) { return {load256(p), load256(p + 8)}; }
EXL_INLINE void store(int32_t* p, I32x16 a) {
    store256(p, a.lo);
    store256(p + 8, a.hi);
}
EXL_INLINE I32x16 broadcast(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
EXL_INLINE I32x16 load_bytes(const uint8_t* p) {
    const __m128i bytes = load128(p);
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
// Loads 16 fields of 4 bits. Lane i has field i / 2 of the 32-bit word i % 2.
EXL_INLINE I32x16 load_half_bytes(const uint8_t* p) {
    const __m256i words =
        _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i lo = _mm256_srlv_epi32(words, _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12));
    const __m256i hi = _mm256_srlv_epi32(words, _mm256_setr_epi32(16, 16, 20, 20, 24, 24, 28, 28));
    const __m256i mask = _mm256_set1_epi32(15);
    return {_mm256_and_si256(lo, mask), _mm256_and_si256(hi, mask)};
}
EXL_INLINE __m256 look_up(const float* table, __m256i index) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    // The sign of a lane, here bit 3 of its index, selects the second eight.
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
// table[field] for each field of load_half_bytes.
EXL_INLINE F32x16 look_up_half_bytes(const float* table, const uint8_t* p) {
    const I32x16 fields = load_half_bytes(p);
    return {look_up(table, fields.lo), look_up(table, fields.hi)};
}
// Stores the low byte of every lane. Precondition: lanes are in -128..127.
EXL_INLINE void store_bytes(int8_t* p, I32x16 a) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
EXL_INLINE int32_t sum(I32x16 a) {
    const __m256i eight = _mm256_add_epi32(a.lo, a.hi);
    __m128i v = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32(v, 0xb1)));
}
EXL_INLINE int32_t largest(I32x16 a) {
    const __m256i eight = _mm256_max_epi32(a.lo, a.hi);
    __m128i v = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    v = _mm_max_epi32(v, _mm_shuffle_epi32(v, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(v, _mm_shuffle_epi32(v, 0xb1)));
}
EXL_INLINE I32x16 max(I32x16 a, I32x16 b) {
    return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
EXL_INLINE I32x16 operator+(I32x16 a, I32x16 b) {
    return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
EXL_INLINE I32x16 operator*(I32x16 a, I32x16 b) {
    return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
EXL_INLINE I32x16 operator-(I32x16 a, I32x16 b) {
    return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
template <int Bits>
EXL_INLINE I32x16 shift_right_signed(I32x16 a) {
    return {_mm256_srai_epi32(a.lo, Bits), _mm256_srai_epi32(a.hi, Bits)};
}
EXL_INLINE I32x16 shift_left(I32x16 a, int bits) {
    const __m128i count = _mm_cvtsi32_si128(bits);
    return {_mm256_sll_epi32(a.lo, count), _mm256_sll_epi32(a.hi, count)};
}
EXL_INLINE F32x16 to_float(I32x16 a) {
    return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}
// Rounds to the nearest whole number, ties to even.
EXL_INLINE I32x16 to_int(F32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
EXL_INLINE F32x16 as_float(I32x16 a) {
    return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}
EXL_INLINE I32x16 as_int(F32x16 a) {
    return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)};
}
// The bits of the magnitude, without the sign.
EXL_INLINE I32x16 magnitude_bits(F32x16 a) {
    const I32x16 bits = as_int(a);
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    return {_mm256_and_si256(bits.lo, mask), _mm256_and_si256(bits.hi, mask)};
}

EXL_INLINE U8x64 load_codes(const uint8_t* p) { return {load256(p), load256(p + 32)}; }
EXL_INLINE void store_codes(uint8_t* p, U8x64 a) {
    store256(p, a.lo);
    store256(p + 32, a.hi);
}
EXL_INLINE void stream_codes(uint8_t* p, U8x64 a) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), a.lo);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p + 32), a.hi);
}
// Shift every byte. Bits of the neighbouring bytes are shifted in; the caller must mask them.
template <int Bits>
EXL_INLINE U8x64 shift_bytes_right(U8x64 a) {
    return {_mm256_srli_epi16(a.lo, Bits), _mm256_srli_epi16(a.hi, Bits)};
}
template <int Bits>
EXL_INLINE U8x64 shift_bytes_left(U8x64 a) {
    return {_mm256_slli_epi16(a.lo, Bits), _mm256_slli_epi16(a.hi, Bits)};
}
template <int Bits>
EXL_INLINE U8x64 mask() {
    const __m256i bits = _mm256_set1_epi8(static_cast<char>(Bits));
    return {bits, bits};
}
EXL_INLINE U8x64 operator&(U8x64 a, U8x64 b) {
    return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
// (a & b) | c
EXL_INLINE U8x64 and_or(U8x64 a, U8x64 b, U8x64 c) {
    const U8x64 both = a & b;
    return {_mm256_or_si256(both.lo, c.lo), _mm256_or_si256(both.hi, c.hi)};
}

#if !defined(__AVXVNNI__)
// Sums of products of two neighbouring rows: [16 columns][2 pairs].
#define EXL_DOTS_IN_PAIRS 1
struct I16x32 {
    __m256i lo, hi;
};
EXL_INLINE I16x32 operator+(I16x32 a, I16x32 b) {
    return {_mm256_add_epi16(a.lo, b.lo), _mm256_add_epi16(a.hi, b.hi)};
}
// codes[column][row] * x[row] + codes[column][row + 1] * x[row + 1], saturated at 2^15.
EXL_INLINE I16x32 pair_products(U8x64 codes, int32_t x4) {
    const __m256i x = _mm256_set1_epi32(x4);
    return {_mm256_maddubs_epi16(codes.lo, x), _mm256_maddubs_epi16(codes.hi, x)};
}
EXL_INLINE I32x16 add_pairs(I32x16 acc, I16x32 pairs) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(pairs.lo, ones)),
            _mm256_add_epi32(acc.hi, _mm256_madd_epi16(pairs.hi, ones))};
}
#endif

// True if dot<true> costs no more than dot<false>.
#if defined(__AVXVNNI__)
constexpr bool kWideDotIsFree = true;
#else
constexpr bool kWideDotIsFree = false;
#endif

template <bool Wide>
EXL_INLINE __m256i dot256(__m256i acc, __m256i codes, __m256i x) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(acc, codes, x);
#else
    // vpmaddubsw saturates at 2^15: 2 * 127 * 127 fits but 2 * 255 * 127 does not, so the top bit
    // of a wide code is multiplied separately (2 * 128 * 127 fits as well).
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i low = codes;
    if constexpr (Wide) {
        const __m256i top = _mm256_set1_epi8(static_cast<char>(0x80));
        const __m256i high = _mm256_and_si256(codes, top);
        low = _mm256_andnot_si256(top, codes);
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), ones));
    }
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones));
#endif
}
// acc[column] += sum over 4 rows of codes[column][row] * x[row]. `x4` holds four signed bytes,
// none of them -128, the first row in the lowest byte. Wide: codes may exceed 127.
template <bool Wide>
EXL_INLINE I32x16 dot(I32x16 acc, U8x64 codes, int32_t x4) {
    const __m256i x = _mm256_set1_epi32(x4);
    return {dot256<Wide>(acc.lo, codes.lo, x), dot256<Wide>(acc.hi, codes.hi, x)};
}

}  // namespace exl
