// simd.h for AVX-512 (F, BW, VL, DQ, and VNNI if the processor has it): one register of sixteen
// lanes. See simd.h.
#pragma once

namespace exl {

struct F32x16 {
    __m512 v;
};
struct I32x16 {
    __m512i v;
};
// 64 codes of one byte: [16 columns][4 rows].
struct U8x64 {
    __m512i v;
};

EXL_INLINE F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
EXL_INLINE void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
EXL_INLINE F32x16 load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
EXL_INLINE void store_half(uint16_t* p, F32x16 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
EXL_INLINE F32x16 load_bfloat16(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
EXL_INLINE F32x16 gather(const float* p, const int32_t* index) {
    return {_mm512_i32gather_ps(_mm512_loadu_si512(index), p, sizeof(float))};
}
EXL_INLINE F32x16 broadcast(float a) { return {_mm512_set1_ps(a)}; }
EXL_INLINE F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
EXL_INLINE F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
EXL_INLINE F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
EXL_INLINE F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
EXL_INLINE F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
EXL_INLINE F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
// a * b + c with one rounding.
EXL_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
EXL_INLINE float sum(F32x16 a) { return _mm512_reduce_add_ps(a.v); }
EXL_INLINE float largest(F32x16 a) { return _mm512_reduce_max_ps(a.v); }
// Rounds to the nearest whole number, ties to even.
EXL_INLINE F32x16 round(F32x16 a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)};
}

EXL_INLINE I32x16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
EXL_INLINE void store(int32_t* p, I32x16 a) { _mm512_storeu_si512(p, a.v); }
EXL_INLINE I32x16 broadcast(int32_t a) { return {_mm512_set1_epi32(a)}; }
EXL_INLINE I32x16 load_bytes(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// Moves the field of 4 bits of every lane to the lane's lowest bits; see load_half_bytes.
EXL_INLINE __m512i spread_half_bytes(const uint8_t* p) {
    const __m128i words = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m512i shifts =
        _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    return _mm512_srlv_epi32(_mm512_broadcast_i32x2(words), shifts);
}
// Loads 16 fields of 4 bits. Lane i has field i / 2 of the 32-bit word i % 2.
EXL_INLINE I32x16 load_half_bytes(const uint8_t* p) {
    return {_mm512_and_si512(spread_half_bytes(p), _mm512_set1_epi32(15))};
}
// table[field] for each field of load_half_bytes.
EXL_INLINE F32x16 look_up_half_bytes(const float* table, const uint8_t* p) {
    return {_mm512_permutexvar_ps(spread_half_bytes(p), _mm512_loadu_ps(table))};
}
// Stores the low byte of every lane. Precondition: lanes are in -128..127.
EXL_INLINE void store_bytes(int8_t* p, I32x16 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
EXL_INLINE int32_t sum(I32x16 a) { return _mm512_reduce_add_epi32(a.v); }
EXL_INLINE int32_t largest(I32x16 a) { return _mm512_reduce_max_epi32(a.v); }
EXL_INLINE I32x16 max(I32x16 a, I32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
EXL_INLINE I32x16 operator+(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
EXL_INLINE I32x16 operator*(I32x16 a, I32x16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
EXL_INLINE I32x16 operator-(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
template <int Bits>
EXL_INLINE I32x16 shift_right_signed(I32x16 a) {
    return {_mm512_srai_epi32(a.v, Bits)};
}
EXL_INLINE I32x16 shift_left(I32x16 a, int bits) {
    return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(bits))};
}
EXL_INLINE F32x16 to_float(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
// Rounds to the nearest whole number, ties to even.
EXL_INLINE I32x16 to_int(F32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
EXL_INLINE F32x16 as_float(I32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
EXL_INLINE I32x16 as_int(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
// The bits of the magnitude, without the sign.
EXL_INLINE I32x16 magnitude_bits(F32x16 a) {
    return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))};
}

EXL_INLINE U8x64 load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
EXL_INLINE void store_codes(uint8_t* p, U8x64 a) { _mm512_storeu_si512(p, a.v); }
EXL_INLINE void stream_codes(uint8_t* p, U8x64 a) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), a.v);
}
// Shift every byte. Bits of the neighbouring bytes are shifted in; the caller must mask them.
template <int Bits>
EXL_INLINE U8x64 shift_bytes_right(U8x64 a) {
    return {_mm512_srli_epi16(a.v, Bits)};
}
template <int Bits>
EXL_INLINE U8x64 shift_bytes_left(U8x64 a) {
    return {_mm512_slli_epi16(a.v, Bits)};
}
template <int Bits>
EXL_INLINE U8x64 mask() {
    return {_mm512_set1_epi8(static_cast<char>(Bits))};
}
EXL_INLINE U8x64 operator&(U8x64 a, U8x64 b) { return {_mm512_and_si512(a.v, b.v)}; }
// (a & b) | c
EXL_INLINE U8x64 and_or(U8x64 a, U8x64 b, U8x64 c) {
    return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0xea)};
}

#if !defined(__AVX512VNNI__)
// Sums of products of two neighbouring rows: [16 columns][2 pairs].
#define EXL_DOTS_IN_PAIRS 1
struct I16x32 {
    __m512i v;
};
EXL_INLINE I16x32 operator+(I16x32 a, I16x32 b) { return {_mm512_add_epi16(a.v, b.v)}; }
// codes[column][row] * x[row] + codes[column][row + 1] * x[row + 1], saturated at 2^15.
EXL_INLINE I16x32 pair_products(U8x64 codes, int32_t x4) {
    return {_mm512_maddubs_epi16(codes.v, _mm512_set1_epi32(x4))};
}
EXL_INLINE I32x16 add_pairs(I32x16 acc, I16x32 pairs) {
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(pairs.v, _mm512_set1_epi16(1)))};
}
#endif

// True if dot<true> costs no more than dot<false>.
#if defined(__AVX512VNNI__)
constexpr bool kWideDotIsFree = true;
#else
constexpr bool kWideDotIsFree = false;
#endif

// acc[column] += sum over 4 rows of codes[column][row] * x[row]. `x4` holds four signed bytes,
// none of them -128, the first row in the lowest byte. Wide: codes may exceed 127.
template <bool Wide>
EXL_INLINE I32x16 dot(I32x16 acc, U8x64 codes, int32_t x4) {
    const __m512i x = _mm512_set1_epi32(x4);
#if defined(__AVX512VNNI__)
    return {_mm512_dpbusd_epi32(acc.v, codes.v, x)};
#else
    // vpmaddubsw saturates at 2^15: 2 * 127 * 127 fits but 2 * 255 * 127 does not, so the top bit
    // of a wide code is multiplied separately (2 * 128 * 127 fits as well).
    const __m512i ones = _mm512_set1_epi16(1);
    __m512i low = codes.v;
    if constexpr (Wide) {
        const __m512i top = _mm512_set1_epi8(static_cast<char>(0x80));
        const __m512i high = _mm512_and_si512(codes.v, top);
        low = _mm512_andnot_si512(top, codes.v);
        const __m512i pairs = _mm512_maddubs_epi16(high, x);
        acc.v = _mm512_add_epi32(acc.v, _mm512_madd_epi16(pairs, ones));
    }
    const __m512i pairs = _mm512_maddubs_epi16(low, x);
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(pairs, ones))};
#endif
}

}  // namespace exl
