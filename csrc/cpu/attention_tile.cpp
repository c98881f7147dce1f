// Expanding tiles of the packed cache, see attention_tile.h.
//
// Bytes of codes are transposed before they become floats: 16 tokens x 16 bytes take 64
// shuffles, where the 256 or 512 floats that they hold would take ten times as many.
#include "attention_tile.h"

#include <cstring>

namespace exl {
namespace {

struct Codebooks {
    alignas(64) float levels[kTables * kLevels];
    constexpr Codebooks() : levels() {
        for (int i = 0; i < kTables * kLevels; ++i) {
            levels[i] = kCodebooks[i / kLevels][i % kLevels] * kCodebookUnit;
        }
    }
};
constexpr Codebooks kBooks;

constexpr int smaller(int a, int b) { return a < b ? a : b; }

// level = (code - 2^(bits-1)) / 2^(bits-1), times the scale: one fused operation.
template <int Bits>
struct Uniform {
    F32x16 factor, offset;
    explicit Uniform(F32x16 scale)
        : factor(scale * broadcast(2.0f / (1 << Bits))),
          offset(factor * broadcast(-0.5f * (1 << Bits))) {}
    F32x16 value(I32x16 code) const { return fma(to_float(code), factor, offset); }
};

// ---- keys ----

// Scales of one group for 16 tokens, `groups` apart.
EXL_INLINE void gather_scales(const uint16_t* scales, int64_t groups, uint16_t* out) {
    for (int j = 0; j < kLanes; ++j) out[j] = scales[j * groups];
}

// One group of 16 tokens; out[e * kTileTokens] is element e.
template <int Bits>
EXL_INLINE void key_group(const uint8_t* codes, int64_t row_bytes, const uint16_t* halves,
                          int elements, float* out) {
    const F32x16 scale = load_half(halves);
    const int stored = padded_codes(elements);
    if constexpr (Bits == 8) {
        const Uniform<8> uniform(scale);
        for (int first = 0; first < elements; first += kLanes) {
            alignas(64) uint8_t bytes[256];
            transpose_bytes(codes + first, row_bytes, smaller(kLanes, stored - first), bytes);
            for (int e = first; e < smaller(first + kLanes, elements); ++e) {
                const I32x16 code = load_bytes(bytes + kLanes * (e - first));
                store(out + e * kTileTokens, uniform.value(code));
            }
        }
        return;
    }
    alignas(64) uint8_t bytes[256];
    const int columns = stored / 2;  // of the plane of 4 bits
    transpose_bytes(codes, row_bytes, columns, bytes);
    const I32x16 nibble = broadcast(int32_t{15});
    if constexpr (Bits == 4) {
        int32_t tables[kLanes];
        for (int j = 0; j < kLanes; ++j) tables[j] = (halves[j] & 1) * kLevels;
        const I32x16 table = load(tables);
        for (int e = 0; e < columns; ++e) {
            const I32x16 pair = load_bytes(bytes + kLanes * e);
            const F32x16 low = lookup32(kBooks.levels, (pair & nibble) | table) * scale;
            const F32x16 high = lookup32(kBooks.levels, shift_right(pair, 4) | table) * scale;
            store(out + e * kTileTokens, low);
            if (e + columns < elements) store(out + (e + columns) * kTileTokens, high);
        }
    } else {
        alignas(64) uint8_t low_bytes[256];
        const int low_columns = stored / 4;
        transpose_bytes(codes + columns, row_bytes, low_columns, low_bytes);
        const Uniform<6> uniform(scale);
        const I32x16 two_bits = broadcast(int32_t{3});
        for (int e = 0; e < elements; ++e) {
            const I32x16 high = load_bytes(bytes + kLanes * (e % columns));
            const I32x16 low = load_bytes(low_bytes + kLanes * (e % low_columns));
            const I32x16 code = shift_left(shift_right(high, 4 * (e / columns)) & nibble, 2) |
                                (shift_right(low, 2 * (e / low_columns)) & two_bits);
            store(out + e * kTileTokens, uniform.value(code));
        }
    }
}

template <int Bits>
void quantized_keys(const ExlCacheHalf& keys, int64_t place, int tokens, int head_dim,
                    float* out) {
    const int64_t row_bytes = code_bytes(head_dim, Bits), groups = num_groups(head_dim, Bits);
    for (int t = 0; t < tokens; t += kLanes) {
        const uint8_t* codes = static_cast<const uint8_t*>(keys.codes) + (place + t) * row_bytes;
        const uint16_t* scales = keys.scales + (place + t) * groups;
        for (int g = 0; g < groups; ++g) {
            uint16_t halves[kLanes];
            gather_scales(scales + g, groups, halves);
            const int elements = smaller(kGroup, head_dim - g * kGroup);
            float* group_out = out + g * kGroup * kTileTokens + t;
            // Two calls, so that the common one is compiled for its constant.
            if (elements == kGroup) {
                key_group<Bits>(codes, row_bytes, halves, kGroup, group_out);
            } else {
                key_group<Bits>(codes, row_bytes, halves, elements, group_out);
            }
            codes += code_bytes(kGroup, Bits);
        }
    }
}

void half_keys(const ExlCacheHalf& keys, int64_t place, int tokens, int head_dim, float* out) {
    constexpr int kStep = 8;  // elements of one transposition
    for (int t = 0; t < tokens; t += kLanes) {
        const uint16_t* rows = static_cast<const uint16_t*>(keys.codes) + (place + t) * head_dim;
        int e = 0;
        for (; e + kStep <= head_dim; e += kStep) {
            alignas(64) uint16_t columns[kStep * kLanes];
            transpose_halves(rows + e, head_dim, columns);
            for (int i = 0; i < kStep; ++i) {
                store(out + (e + i) * kTileTokens + t, load_half(columns + i * kLanes));
            }
        }
        for (; e < head_dim; ++e) {
            uint16_t column[kLanes];
            gather_scales(rows + e, head_dim, column);
            store(out + e * kTileTokens + t, load_half(column));
        }
    }
}

void float_keys(const ExlCacheHalf& keys, int64_t place, int tokens, int head_dim, float* out) {
    const float* rows = static_cast<const float*>(keys.codes) + place * head_dim;
    for (int t = 0; t < tokens; ++t) {
        for (int e = 0; e < head_dim; ++e) out[e * kTileTokens + t] = rows[t * head_dim + e];
    }
}

// ---- values ----

constexpr uint64_t repeat(uint8_t byte) { return byte * 0x0101010101010101u; }

EXL_INLINE uint64_t load_word(const uint8_t* p) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    return word;
}

// The codes of a short group, one a byte, in order.
template <int Bits>
void unpack_codes(const uint8_t* data, int stored, uint8_t* out) {
    if (Bits == 8) {
        std::memcpy(out, data, static_cast<size_t>(stored));
        return;
    }
    const int high_bytes = stored / 2, low_bytes = stored / 4;
    for (int e = 0; e < stored; ++e) {
        unsigned code = (data[e % high_bytes] >> (4 * (e / high_bytes))) & 15u;
        if (Bits == 6) {
            const unsigned low = data[high_bytes + e % low_bytes] >> (2 * (e / low_bytes));
            code = code << 2 | (low & 3u);
        }
        out[e] = static_cast<uint8_t>(code);
    }
}

// The 32 codes of a whole group, one a byte, in order; 6 bits.
EXL_INLINE void unpack_six_bits(const uint8_t* data, uint8_t* out) {
    const uint64_t low = load_word(data + 16);
    for (int i = 0; i < 4; ++i) {
        const uint64_t high = load_word(data + 8 * (i % 2)) >> (4 * (i / 2)) & repeat(15);
        const uint64_t codes = high << 2 | (low >> (2 * i) & repeat(3));
        std::memcpy(out + 8 * i, &codes, 8);
    }
}

// A vector of values from 16 codes of one byte each.
template <int Bits>
struct Values;

template <>
struct Values<4> {
    const float* levels;
    F32x16 scale;
    Values(uint16_t half, float exact)
        : levels(kBooks.levels + (half & 1) * kLevels), scale(broadcast(exact)) {}
    F32x16 value(I32x16 code) const { return lookup16(levels, code) * scale; }
};
template <>
struct Values<6> : Uniform<6> {
    Values(uint16_t, float exact) : Uniform(broadcast(exact)) {}
};
template <>
struct Values<8> : Uniform<8> {
    Values(uint16_t, float exact) : Uniform(broadcast(exact)) {}
};

template <int Bits>
EXL_INLINE void value_group(const uint8_t* codes, const Values<Bits>& values, float* out) {
    if constexpr (Bits == 4) {
        const I32x16 pair = load_bytes(codes);
        store(out, values.value(pair & broadcast(int32_t{15})));
        store(out + kLanes, values.value(shift_right(pair, 4)));
    } else {
        uint8_t unpacked[kGroup];
        if (Bits == 6) unpack_six_bits(codes, unpacked);
        const uint8_t* bytes = Bits == 6 ? unpacked : codes;
        store(out, values.value(load_bytes(bytes)));
        store(out + kLanes, values.value(load_bytes(bytes + kLanes)));
    }
}

template <int Bits>
void short_value_group(const uint8_t* codes, const Values<Bits>& values, int elements,
                       float* out) {
    uint8_t unpacked[kGroup] = {};
    unpack_codes<Bits>(codes, padded_codes(elements), unpacked);
    for (int i = 0; i < elements; i += kLanes) {
        const int count = smaller(kLanes, elements - i);
        float lanes[kLanes] = {};
        store_lanes(lanes, values.value(load_bytes(unpacked + i)), count);
        store(out + i, load(lanes));
    }
}

template <int Bits>
void quantized_values(const ExlCacheHalf& values, int64_t place, int tokens, int head_dim,
                      float* out) {
    const int64_t row_bytes = code_bytes(head_dim, Bits), groups = num_groups(head_dim, Bits);
    const uint8_t* rows = static_cast<const uint8_t*>(values.codes) + place * row_bytes;
    const uint16_t* scales = values.scales + place * groups;
    for (int t = 0; t < tokens; ++t) {
        const uint8_t* codes = rows + t * row_bytes;
        float* row = out + t * value_stride(head_dim);
        for (int g = 0; g < groups; ++g) {
            const uint16_t half = scales[t * groups + g];
            const Values<Bits> group(half, half_to_float(half));
            const int elements = smaller(kGroup, head_dim - g * kGroup);
            if (elements == kGroup) {
                value_group<Bits>(codes, group, row + g * kGroup);
            } else {
                short_value_group<Bits>(codes, group, elements, row + g * kGroup);
            }
            codes += code_bytes(kGroup, Bits);
        }
    }
}

void half_values(const ExlCacheHalf& values, int64_t place, int tokens, int head_dim,
                 float* out) {
    const uint16_t* rows = static_cast<const uint16_t*>(values.codes) + place * head_dim;
    for (int t = 0; t < tokens; ++t) {
        const uint16_t* row = rows + t * head_dim;
        float* row_out = out + t * value_stride(head_dim);
        int e = 0;
        for (; e + kLanes <= head_dim; e += kLanes) store(row_out + e, load_half(row + e));
        if (e == head_dim) continue;
        uint16_t rest[kLanes] = {};
        std::memcpy(rest, row + e, static_cast<size_t>(head_dim - e) * sizeof(uint16_t));
        store(row_out + e, load_half(rest));
    }
}

void float_values(const ExlCacheHalf& values, int64_t place, int tokens, int head_dim,
                  float* out) {
    const float* rows = static_cast<const float*>(values.codes) + place * head_dim;
    for (int t = 0; t < tokens; ++t) {
        float* row_out = out + t * value_stride(head_dim);
        for (int e = 0; e < value_stride(head_dim); ++e) {
            row_out[e] = e < head_dim ? rows[t * head_dim + e] : 0.0f;
        }
    }
}

}  // namespace

void expand_keys(const ExlCacheHalf& keys, int64_t place, int tokens, int head_dim, float* out) {
    switch (keys.bits) {
        case 4: return quantized_keys<4>(keys, place, tokens, head_dim, out);
        case 6: return quantized_keys<6>(keys, place, tokens, head_dim, out);
        case 8: return quantized_keys<8>(keys, place, tokens, head_dim, out);
        case 16: return half_keys(keys, place, tokens, head_dim, out);
        default: return float_keys(keys, place, tokens, head_dim, out);
    }
}

void expand_values(const ExlCacheHalf& values, int64_t place, int tokens, int head_dim,
                   float* out) {
    switch (values.bits) {
        case 4: return quantized_values<4>(values, place, tokens, head_dim, out);
        case 6: return quantized_values<6>(values, place, tokens, head_dim, out);
        case 8: return quantized_values<8>(values, place, tokens, head_dim, out);
        case 16: return half_values(values, place, tokens, head_dim, out);
        default: return float_values(values, place, tokens, head_dim, out);
    }
}

}  // namespace exl
