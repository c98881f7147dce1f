// Conversion of the packed cache to operands of tensor cores.
//
// Layout: a head is handled in units of 16 elements. Unit u is half of group u / 2 of 32
// elements, or all of a last group of 16. One thread can load and unpack a unit by itself, so
// elements come in the order of the bytes and not of the head: `element_of` maps the order. A
// dot product gives the same result if queries (and outputs) follow the same order.
//
// Levels of 3, 4, 6 and 8 bits are unpacked to bytes in units of 1/128, plus 128. A byte b with
// the high byte 0x64 is the float16 1024 + b. One multiply-add converts that to level / 16 (exact:
// 8 times the level in [-1, 1)), and one product with the group's scale gives the value times
// kLevelUnit. The factor 8 keeps scales from 1e-5 to 8191 away from the limits of float16.
#pragma once

#include "cache_codec.h"
#include "cuda/platform.cuh"

namespace exl {

constexpr int kUnit = 16;
constexpr float kLevelUnit = 8.0f;
constexpr uint32_t kSixteenth = 0x2C002C00u;      // 1/16, twice
constexpr uint32_t kMinusShift = 0xD480D480u;     // -(1024 + 128) / 16, twice
constexpr uint32_t kExponentBytes = 0x64646464u;  // the high byte of the float16 1024 + b
constexpr float kLog2E = 1.4426950408889634f;

// The factor between a stored value and the result of expand_unit.
__device__ __forceinline__ float unit_factor(int bits) { return bits < 16 ? kLevelUnit : 1.0f; }

// The element of a head at position `i` of a unit.
__device__ __forceinline__ int element_of(int bits, int head_dim, int unit, int i) {
    if (bits >= 8) return unit * kUnit + i;
    const int group = unit / 2, half = unit % 2;
    // Codes with tables are unpacked as pairs of the two codes of a byte of 4-bit fields, 6 bits as
    // four low and four high codes.
    const int byte = has_tables(bits) ? i / 2 : i / 8 * 4 + i % 4;
    const int high = has_tables(bits) ? i % 2 : i / 4 % 2;
    if (head_dim - group * kGroup >= kGroup) return group * kGroup + half * 8 + byte + high * 16;
    return group * kGroup + byte + high * 8;
}

// Four levels of a codebook as bytes, plus 128.
EXL_HOST_DEVICE constexpr uint32_t codebook_word(int bits, int table, int word) {
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) {
        const int level = codebook_level(bits, table, 4 * word + i) + 128;
        bytes |= static_cast<uint32_t>(level) << (8 * i);
    }
    return bytes;
}

// The levels of one table in registers, combined with kFlip by exclusive or. Codes without tables
// have no words.
template <int kBits, uint32_t kFlip = 0, bool = has_tables(kBits)>
struct Codebook {
    __device__ __forceinline__ explicit Codebook(uint32_t) {}
};
template <int kBits, uint32_t kFlip>
struct Codebook<kBits, kFlip, true> {
    static constexpr int kWords = (1 << kBits) / 4;
    uint32_t words[kWords];
    __device__ __forceinline__ explicit Codebook(uint32_t scale_bits) {
        const bool second = scale_bits & 1;
        set_word<0>(second);
        set_word<1>(second);
        if constexpr (kWords == 4) {
            set_word<2>(second);
            set_word<3>(second);
        }
    }
    template <int kWord>
    __device__ __forceinline__ void set_word(bool second) {
        constexpr uint32_t kFirst = codebook_word(kBits, 0, kWord) ^ kFlip;
        constexpr uint32_t kSecond = codebook_word(kBits, 1, kWord) ^ kFlip;
        words[kWord] = second ? kSecond : kFirst;
    }
    // Returns the levels of eight codes: those of the low four nibbles and of the high four. A
    // byte permutation looks up three bits of a code in eight levels. For 4 bits it does so in each
    // half of the table; the fourth bit selects the half.
    __device__ __forceinline__ void look_up(uint32_t codes, uint32_t (&levels)[2]) const {
        if constexpr (kBits == 4) {
            const uint32_t index = codes & 0x77777777u;
            const uint32_t choice = (codes >> 1 & 0x44444444u) | 0x32103210u;
            levels[0] = byte_perm(byte_perm(words[0], words[1], index),
                                  byte_perm(words[2], words[3], index), choice);
            levels[1] = byte_perm(byte_perm(words[0], words[1], index >> 16),
                                  byte_perm(words[2], words[3], index >> 16), choice >> 16);
        } else {
            static_assert(kBits == 3);
            levels[0] = byte_perm(words[0], words[1], codes);
            levels[1] = byte_perm(words[0], words[1], codes >> 16);
        }
    }
};

__device__ __forceinline__ uint32_t load_word(const uint8_t* row, int offset) {
    return *reinterpret_cast<const uint32_t*>(row + offset);
}

// The codes of 3 bits of half a unit, each in 4 bits, in the order of codes of 4 bits.
__device__ __forceinline__ uint32_t three_bit_codes(const uint8_t* row, int head_dim, int unit,
                                                    int half) {
    const int group = unit / 2;
    const uint8_t* codes = row + group * (kGroup * 3 / 8);
    uint32_t high, low;
    int field;
    if (head_dim % kGroup == 0) {
        // Byte b of the plane of 2 bits has the high bits of elements b, b + 8, b + 16 and b + 24;
        // byte b of the plane of 1 bit has the low bits of elements b, b + 4, b + 8, ...
        high = load_word(codes, half * 4);
        low = load_word(codes, 8) >> half;
        field = unit % 2;
    } else {
        // Tokens of such heads are at even addresses only.
        const auto* pairs = reinterpret_cast<const uint16_t*>(codes);
        if (head_dim - group * kGroup >= kGroup) {
            high = pairs[2 * half] | static_cast<uint32_t>(pairs[2 * half + 1]) << 16;
            low = (pairs[4] | static_cast<uint32_t>(pairs[5]) << 16) >> half;
            field = unit % 2;
        } else {
            // Four bytes with the high bits of elements b, b + 4, b + 8, b + 12; two bytes with the
            // low bits of elements b, b + 2, b + 4, ..., which are brought to the same places.
            high = pairs[0] | static_cast<uint32_t>(pairs[1]) << 16;
            low = pairs[2] | static_cast<uint32_t>(pairs[2] >> 1) << 16;
            field = half;
        }
    }
    return (high >> (2 * field) << 1 & 0x66666666u) | (low >> (2 * field) & 0x11111111u);
}

// Unpacks half a unit, eight elements, to bytes in units of 1/128: plus 128, or signed if kFlip
// is 0x80808080. row: a token's codes.
template <int kBits, uint32_t kFlip = 0>
__device__ __forceinline__ void unpack_half_unit(const uint8_t* row, int head_dim, int unit,
                                                 int half,
                                                 const Codebook<kBits, kFlip>& codebook,
                                                 uint32_t (&levels)[2]) {
    if constexpr (kBits == 8) {
        levels[0] = load_word(row, unit * kUnit + half * 8) ^ kFlip;
        levels[1] = load_word(row, unit * kUnit + half * 8 + 4) ^ kFlip;
    } else if constexpr (kBits == 4) {
        codebook.look_up(load_word(row, unit * (kUnit / 2) + half * 4), levels);
    } else if constexpr (kBits == 3) {
        codebook.look_up(three_bit_codes(row, head_dim, unit, half), levels);
    } else {
        // The plane of 4 bits of a group is followed by its plane of 2 bits, whose byte b has the
        // low bits of elements b, b + 8, b + 16, b + 24 (b, b + 4, ... in a short group).
        const int group = unit / 2;
        const bool whole = head_dim - group * kGroup >= kGroup;
        const int first = group * (kGroup * 6 / 8);
        const uint32_t high = load_word(row, first + unit % 2 * 8 + half * 4);
        const uint32_t low = load_word(row, whole ? first + 16 + half * 4 : first + 8);
        const int field = whole ? unit % 2 : half;
        levels[0] = ((high << 4 & 0xF0F0F0F0u) | (low >> (2 * field) << 2 & 0x0C0C0C0Cu)) ^ kFlip;
        levels[1] = ((high & 0xF0F0F0F0u) | (low >> (2 * field + 2) & 0x0C0C0C0Cu)) ^ kFlip;
    }
}

// Converts two levels of a word of four to float16, times 8: low = bytes 0, 1; high = bytes 2, 3.
__device__ __forceinline__ uint32_t low_levels(uint32_t bytes) {
    return h2_fma(byte_perm(bytes, kExponentBytes, 0x4140), kSixteenth, kMinusShift);
}
__device__ __forceinline__ uint32_t high_levels(uint32_t bytes) {
    return h2_fma(byte_perm(bytes, kExponentBytes, 0x4342), kSixteenth, kMinusShift);
}

// ---- 16 bits: codes whose lowest bits hold the scale, see cache_codec.h ----

// The scale of the group of a unit, divided by kBlockUnit.
__device__ __forceinline__ float block_factor(const uint8_t* row, int unit) {
    const auto* words = reinterpret_cast<const uint4*>(row + unit / 2 * (kGroup * 2));
    const uint4 a = words[0], b = words[1];
    // Code 2i is the low half of word i, code 2i + 1 the high half.
    const uint32_t bits = (a.x & 0x10001u) | (a.y & 0x10001u) << 2 | (a.z & 0x10001u) << 4 |
                          (a.w & 0x10001u) << 6 | (b.x & 0x10001u) << 8 |
                          (b.y & 0x10001u) << 10 | (b.z & 0x10001u) << 12 |
                          (b.w & 0x10001u) << 14;
    return half_to_float(static_cast<uint16_t>(bits | bits >> 15)) * (1.0f / kBlockUnit);
}

// Converts two codes to float32. The bits of code + 2^15 with the high half 0x4B00 are the
// float 2^23 + 2^15 + code.
__device__ __forceinline__ float2 block_values(uint32_t codes, float factor) {
    const uint32_t shifted = codes ^ 0x80008000u;
    const float base = -8421376.0f * factor;  // exact: factor has 11 bits, 2^23 + 2^15 has 9
    return make_float2(
        fmaf(bits_float(byte_perm(shifted, 0x4B000000u, 0x7410)), factor, base),
        fmaf(bits_float(byte_perm(shifted, 0x4B000000u, 0x7432)), factor, base));
}

// ---- Whole units ----

// Converts sixteen codes of 16 bits to pairs of float16.
__device__ __forceinline__ void expand_codes(const uint4& a, const uint4& b, float factor,
                                             uint32_t (&pairs)[8]) {
    const uint32_t codes[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float2 values = block_values(codes[i], factor);
        pairs[i] = floats_to_half2(values.x, values.y);
    }
}

// Converts the levels of half a unit to pairs of float16.
__device__ __forceinline__ void expand_levels(const uint32_t (&levels)[2], uint32_t scale, int half,
                                              uint32_t (&pairs)[8]) {
    const uint32_t twice = scale | scale << 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        pairs[4 * half + 2 * i] = h2_mul(low_levels(levels[i]), twice);
        pairs[4 * half + 2 * i + 1] = h2_mul(high_levels(levels[i]), twice);
    }
}

// Expands a unit to eight pairs of float16, times unit_factor. row, scales: of a token.
template <int kBits>
__device__ __forceinline__ void expand_unit(const uint8_t* row, const uint16_t* scales,
                                            int head_dim, int unit, uint32_t (&pairs)[8]) {
    if constexpr (kBits == 16) {
        const float factor = block_factor(row, unit);
        const auto* words = reinterpret_cast<const uint4*>(row + unit * (kUnit * 2));
        expand_codes(words[0], words[1], factor, pairs);
    } else {
        const uint32_t scale = scales[unit / 2];
        const Codebook<kBits> codebook(scale);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t levels[2];
            unpack_half_unit<kBits>(row, head_dim, unit, half, codebook, levels);
            expand_levels(levels, scale, half, pairs);
        }
    }
}

// expand_unit for open pages beside codes of kBits: the elements of a unit are those of these
// codes, in their order (element_of), and unit_factor is that of these codes.
template <int kBits>
__device__ __forceinline__ void expand_open_unit(const uint8_t* row, const uint16_t* scales,
                                                 int head_dim, int unit, uint32_t (&pairs)[8]) {
    // A unit of 3, 4 or 6 bits has eight elements from `first` on, and eight more `apart` elements
    // later.
    const int group = unit / 2 * kGroup;
    const bool whole = head_dim - group >= kGroup;
    const int first = whole ? group + unit % 2 * 8 : group, apart = whole ? 16 : 8;
    if constexpr (has_tables(kBits)) {
        // 8 bits, as pairs of an element and that `apart` elements later.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t low = load_word(row, first + half * 4);
            const uint32_t high = load_word(row, first + apart + half * 4);
            const uint32_t levels[2] = {byte_perm(low, high, 0x5140), byte_perm(low, high, 0x7362)};
            expand_levels(levels, scales[unit / 2], half, pairs);
        }
    } else if constexpr (kBits == 6) {
        // 16 bits, in turns of four elements.
        const float factor = block_factor(row, unit) * kLevelUnit;
        const uint4 low = *reinterpret_cast<const uint4*>(row + 2 * first);
        const uint4 high = *reinterpret_cast<const uint4*>(row + 2 * (first + apart));
        expand_codes(make_uint4(low.x, low.y, high.x, high.y),
                     make_uint4(low.z, low.w, high.z, high.w), factor, pairs);
    } else {
        static_assert(kBits == 8);
        const float factor = block_factor(row, unit) * kLevelUnit;
        const auto* words = reinterpret_cast<const uint4*>(row + unit * (kUnit * 2));
        expand_codes(words[0], words[1], factor, pairs);
    }
}

// ---- Copies to shared memory ----

// Sizes of one token of one head in a packed tile.
struct TileBytes {
    int codes;   // bytes of a token's codes
    int groups;  // number of a token's scales
    __device__ __forceinline__ TileBytes(int bits, int head_dim)
        : codes(code_bytes(head_dim, bits)), groups(num_groups(head_dim, bits)) {}
};

// Starts copying `tokens` tokens, a multiple of 16: codes, followed by scales. token_index counts
// tokens of [pages, kv_heads, kPageLen]. `threads` threads take part.
__device__ __forceinline__ void copy_tile(const ExlCacheHalf& half, const TileBytes& bytes,
                                          int64_t token_index, int tokens, uint8_t* shared,
                                          int thread, int threads) {
    const auto* codes = static_cast<const uint8_t*>(half.codes) + token_index * bytes.codes;
    const int code_chunks = tokens * bytes.codes / 16;
    for (int i = thread; i < code_chunks; i += threads) {
        copy_async16(shared + 16 * i, codes + 16 * i);
    }
    const auto* scales = reinterpret_cast<const uint8_t*>(half.scales + token_index * bytes.groups);
    uint8_t* shared_scales = shared + tokens * bytes.codes;
    const int scale_chunks = tokens * bytes.groups / 8;
    for (int i = thread; i < scale_chunks; i += threads) {
        copy_async16(shared_scales + 16 * i, scales + 16 * i);
    }
}

// Starts copying one token to the place of the first of `tokens` tokens, by one warp.
__device__ __forceinline__ void copy_token(const ExlCacheHalf& half, const TileBytes& bytes,
                                           int64_t token_index, int tokens, uint8_t* shared) {
    const auto* codes = static_cast<const uint8_t*>(half.codes) + token_index * bytes.codes;
    for (int i = lane_id(); i < bytes.codes / 16; i += 32) {
        copy_async16(shared + 16 * i, codes + 16 * i);
    }
    // Scales of one token are too few bytes for asynchronous copies.
    auto* scales = reinterpret_cast<uint16_t*>(shared + tokens * bytes.codes);
    for (int i = lane_id(); i < bytes.groups; i += 32) {
        scales[i] = half.scales[token_index * bytes.groups + i];
    }
}

// copy_tile by one warp for heads of kHeadDim elements and kBits. All offsets are constants, so
// there are no more instructions than copies.
template <int kTokens, int kHeadDim, int kBits>
__device__ __forceinline__ void copy_whole_tile(const ExlCacheHalf& half, int64_t token_index,
                                                uint8_t* shared) {
    constexpr int kPass = 32 * 16;
    constexpr int kCodes = kTokens * code_bytes(kHeadDim, kBits);
    constexpr int kScales = kTokens * num_groups(kHeadDim, kBits) * 2;
    static_assert(kScales <= kPass && kScales % 16 == 0 && kCodes % 16 == 0);
    const int lane = lane_id();
    const auto* codes = static_cast<const uint8_t*>(half.codes) +
                        token_index * code_bytes(kHeadDim, kBits) + lane * 16;
    uint8_t* target = shared + lane * 16;
#pragma unroll
    for (int i = 0; i + kPass <= kCodes; i += kPass) copy_async16(target + i, codes + i);
    if (lane * 16 < kCodes % kPass) {
        constexpr int kDone = kCodes / kPass * kPass;
        copy_async16(target + kDone, codes + kDone);
    }
    if (lane * 16 < kScales) {
        const auto* scales = reinterpret_cast<const uint8_t*>(
            half.scales + token_index * num_groups(kHeadDim, kBits));
        copy_async16(target + kCodes, scales + lane * 16);
    }
}

}  // namespace exl
