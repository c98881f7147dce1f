// simd.h in plain C++: arrays of 16 that the compiler vectorises for its target. See simd.h.
#pragma once

namespace exl {

struct F32x16 {
    float v[kLanes];
};
struct I32x16 {
    int32_t v[kLanes];
};
// 64 codes of one byte: [16 columns][4 rows].
struct U8x64 {
    uint8_t v[4 * kLanes];
};

template <class Result, class Function>
EXL_INLINE Result lanes(const Function& function) {
    Result r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = function(i);
    return r;
}

// Converts float32 to float16 without hardware, to nearest, ties to even.
EXL_INLINE uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (bits >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and above
    if (bits < 0x38800000u) {  // below 2^-14: the addition rounds at 2^-24, a subnormal's step
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;  // 0.5 has its last bit at 2^-24
        std::memcpy(&bits, &magnitude, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + ((bits >> 13) & 1u);  // half of the dropped 13 bits, ties to even
    return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

EXL_INLINE F32x16 load(const float* p) {
    F32x16 r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
}
EXL_INLINE void store(float* p, F32x16 a) { std::memcpy(p, a.v, sizeof(a.v)); }
EXL_INLINE F32x16 load_half(const uint16_t* p) {
    return lanes<F32x16>([=](int i) { return half_to_float(p[i]); });
}
EXL_INLINE void store_half(uint16_t* p, F32x16 a) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(a.v[i]);
}
EXL_INLINE F32x16 load_bfloat16(const uint16_t* p) {
    return lanes<F32x16>([=](int i) { return bfloat16_to_float(p[i]); });
}
EXL_INLINE F32x16 broadcast(float a) {
    return lanes<F32x16>([=](int) { return a; });
}
EXL_INLINE F32x16 operator+(F32x16 a, F32x16 b) {
    return lanes<F32x16>([&](int i) { return a.v[i] + b.v[i]; });
}
EXL_INLINE F32x16 operator-(F32x16 a, F32x16 b) {
    return lanes<F32x16>([&](int i) { return a.v[i] - b.v[i]; });
}
EXL_INLINE F32x16 operator*(F32x16 a, F32x16 b) {
    return lanes<F32x16>([&](int i) { return a.v[i] * b.v[i]; });
}
EXL_INLINE F32x16 operator/(F32x16 a, F32x16 b) {
    return lanes<F32x16>([&](int i) { return a.v[i] / b.v[i]; });
}
EXL_INLINE F32x16 max(F32x16 a, F32x16 b) {
    return lanes<F32x16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
EXL_INLINE F32x16 min(F32x16 a, F32x16 b) {
    return lanes<F32x16>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// a * b + c, with one rounding if the target has a fused multiply-add. A call of the library's
// fmaf would cost more than the product.
EXL_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return lanes<F32x16>([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
#else
    return lanes<F32x16>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
#endif
}
EXL_INLINE float sum(F32x16 a) {
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
    }
    return a.v[0];
}
EXL_INLINE float largest(F32x16 a) {
    for (int i = 1; i < kLanes; ++i) a.v[0] = a.v[i] > a.v[0] ? a.v[i] : a.v[0];
    return a.v[0];
}
// Rounds to the nearest whole number, ties to even.
EXL_INLINE F32x16 round(F32x16 a) {
    return lanes<F32x16>([&](int i) { return std::nearbyint(a.v[i]); });
}

EXL_INLINE I32x16 load(const int32_t* p) {
    I32x16 r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
}
EXL_INLINE void store(int32_t* p, I32x16 a) { std::memcpy(p, a.v, sizeof(a.v)); }
EXL_INLINE I32x16 broadcast(int32_t a) {
    return lanes<I32x16>([=](int) { return a; });
}
EXL_INLINE I32x16 load_bytes(const uint8_t* p) {
    return lanes<I32x16>([=](int i) { return static_cast<int32_t>(p[i]); });
}
// Loads 16 fields of 4 bits. Lane i has field i / 2 of the 32-bit word i % 2.
EXL_INLINE I32x16 load_half_bytes(const uint8_t* p) {
    return lanes<I32x16>(
        [=](int i) { return p[i % 2 * 4 + i / 4] >> (i / 2 % 2 * 4) & 15; });
}
// table[field] for each field of load_half_bytes.
EXL_INLINE F32x16 look_up_half_bytes(const float* table, const uint8_t* p) {
    const I32x16 fields = load_half_bytes(p);
    return lanes<F32x16>([&](int i) { return table[fields.v[i]]; });
}
// Stores the low byte of every lane. Precondition: lanes are in -128..127.
EXL_INLINE void store_bytes(int8_t* p, I32x16 a) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
EXL_INLINE int32_t sum(I32x16 a) {
    int32_t total = 0;
    for (const int32_t lane : a.v) total += lane;
    return total;
}
EXL_INLINE I32x16 max(I32x16 a, I32x16 b) {
    return lanes<I32x16>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
EXL_INLINE int32_t largest(I32x16 a) {
    for (int i = 1; i < kLanes; ++i) a.v[0] = a.v[i] > a.v[0] ? a.v[i] : a.v[0];
    return a.v[0];
}
EXL_INLINE I32x16 operator+(I32x16 a, I32x16 b) {
    return lanes<I32x16>([&](int i) { return a.v[i] + b.v[i]; });
}
EXL_INLINE I32x16 operator*(I32x16 a, I32x16 b) {
    return lanes<I32x16>([&](int i) { return a.v[i] * b.v[i]; });
}
EXL_INLINE I32x16 operator-(I32x16 a, I32x16 b) {
    return lanes<I32x16>([&](int i) { return a.v[i] - b.v[i]; });
}
template <int Bits>
EXL_INLINE I32x16 shift_right_signed(I32x16 a) {
    return lanes<I32x16>([&](int i) { return a.v[i] >> Bits; });
}
EXL_INLINE I32x16 shift_left(I32x16 a, int bits) {
    return lanes<I32x16>(
        [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << bits); });
}
EXL_INLINE F32x16 to_float(I32x16 a) {
    return lanes<F32x16>([&](int i) { return static_cast<float>(a.v[i]); });
}
// Rounds to the nearest whole number, ties to even.
EXL_INLINE I32x16 to_int(F32x16 a) {
    return lanes<I32x16>([&](int i) { return static_cast<int32_t>(std::lrint(a.v[i])); });
}
EXL_INLINE F32x16 as_float(I32x16 a) {
    F32x16 r;
    std::memcpy(r.v, a.v, sizeof(r.v));
    return r;
}
EXL_INLINE I32x16 as_int(F32x16 a) {
    I32x16 r;
    std::memcpy(r.v, a.v, sizeof(r.v));
    return r;
}
// The bits of the magnitude, without the sign.
EXL_INLINE I32x16 magnitude_bits(F32x16 a) {
    const I32x16 bits = as_int(a);
    return lanes<I32x16>([&](int i) { return bits.v[i] & 0x7fffffff; });
}

EXL_INLINE U8x64 load_codes(const uint8_t* p) {
    U8x64 r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
}
EXL_INLINE void store_codes(uint8_t* p, U8x64 a) { std::memcpy(p, a.v, sizeof(a.v)); }
EXL_INLINE void stream_codes(uint8_t* p, U8x64 a) { store_codes(p, a); }
// Shift every byte. The caller must mask the result because vector targets shift in bits of the
// neighbouring bytes.
template <int Bits>
EXL_INLINE U8x64 shift_bytes_right(U8x64 a) {
    for (auto& byte : a.v) byte = static_cast<uint8_t>(byte >> Bits);
    return a;
}
template <int Bits>
EXL_INLINE U8x64 shift_bytes_left(U8x64 a) {
    for (auto& byte : a.v) byte = static_cast<uint8_t>(byte << Bits);
    return a;
}
template <int Bits>
EXL_INLINE U8x64 mask() {
    U8x64 bits;
    for (auto& byte : bits.v) byte = static_cast<uint8_t>(Bits);
    return bits;
}
EXL_INLINE U8x64 operator&(U8x64 a, U8x64 b) {
    for (int i = 0; i < 4 * kLanes; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] & b.v[i]);
    return a;
}
// (a & b) | c
EXL_INLINE U8x64 and_or(U8x64 a, U8x64 b, U8x64 c) {
    for (int i = 0; i < 4 * kLanes; ++i) {
        c.v[i] = static_cast<uint8_t>(c.v[i] | (a.v[i] & b.v[i]));
    }
    return c;
}

// True if dot<true> costs no more than dot<false>.
constexpr bool kWideDotIsFree = true;

// acc[column] += sum over 4 rows of codes[column][row] * x[row]. `x4` holds four signed bytes,
// the first row in the lowest byte.
template <bool Wide>
EXL_INLINE I32x16 dot(I32x16 acc, U8x64 codes, int32_t x4) {
    int16_t x[4];
    for (int i = 0; i < 4; ++i) {
        x[i] = static_cast<int8_t>(static_cast<uint32_t>(x4) >> (8 * i));
    }
    for (int column = 0; column < kLanes; ++column) {
        int32_t total = 0;
        for (int i = 0; i < 4; ++i) total += codes.v[4 * column + i] * x[i];
        acc.v[column] += total;
    }
    return acc;
}

}  // namespace exl
