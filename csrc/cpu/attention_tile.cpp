// Expansion of tiles of the packed cache to float32.
//
// Layout: input as ExlCacheHalf (cache_codec.h), output as in attention.h.
//
// Work: the calling thread expands one tile, 16 tokens at a time for keys. Bytes of codes are
// transposed before they become floats: 16 tokens x 16 bytes take 64 shuffles, and the 256 or
// 512 floats of these bytes would take ten times as many. Codes of 3 bits are put together
// as bytes, two codes in each.
//
// Precondition: the tokens of a call lie within one page.
#include "attention.h"

#include <cstring>
#include <utility>

namespace exl {
namespace {

// The levels of both tables, one table after the other. A whole vector can be loaded from the
// beginning of each.
template <int Bits>
struct Codebooks {
    static constexpr int kLevels = 1 << Bits;
    alignas(64) float levels[kLevels + kLanes];
    constexpr Codebooks() : levels() {
        for (int i = 0; i < kTables * kLevels; ++i) {
            levels[i] = codebook_level(Bits, i / kLevels, i % kLevels) * kCodebookUnit;
        }
    }
};
template <int Bits>
constexpr Codebooks<Bits> kBooks;

constexpr int smaller(int a, int b) { return a < b ? a : b; }

// value = level * scale with level = (code - 2^(bits-1)) / 2^(bits-1), as one fused operation.
template <int Bits>
struct Uniform {
    F32x16 factor, offset;
    explicit Uniform(F32x16 scale)
        : factor(scale * broadcast(2.0f / (1 << Bits))),
          offset(factor * broadcast(-0.5f * (1 << Bits))) {}
    F32x16 value(I32x16 code) const { return fma(to_float(code), factor, offset); }
};

// ---- keys ----

// Reads the scales of one group for 16 tokens, which are `groups` apart.
EXL_INLINE void gather_scales(const uint16_t* scales, int64_t groups, uint16_t* out) {
    for (int j = 0; j < kLanes; ++j) out[j] = scales[j * groups];
}

// Expands elements Element... and those 16 later of a whole group of 3 bits. planes: its bytes as
// transpose_bytes leaves them.
template <int... Element>
EXL_INLINE void three_bit_pairs(const uint8_t* planes, U8x16 tables, F32x16 scale, float* out,
                                std::integer_sequence<int, Element...>) {
    const F32x16 levels = load(kBooks<3>.levels);
    const auto expand = [&](int element, I32x16 pair) EXL_INLINED {
        float* element_out = out + element * kTileTokens;
        store(element_out, look_up<16>(levels, pair) * scale);
        store(element_out + 16 * kTileTokens, look_up<16>(levels, shift_right(pair, 4)) * scale);
    };
    (expand(Element, pair_of_three_bits<Element>(planes, tables)), ...);
}

// Expands one group of 16 tokens of 3 bits.
EXL_INLINE void three_bit_keys(const uint8_t* codes, int64_t row_bytes, const uint16_t* halves,
                               int elements, float* out) {
    const F32x16 scale = load_half(halves);
    alignas(64) uint8_t planes[256];
    if (elements == kGroup) {
        transpose_bytes(codes, row_bytes, 12, planes);
        three_bit_pairs(planes, second_tables(halves), scale, out,
                        std::make_integer_sequence<int, kGroup / 2>());
        return;
    }
    const int stored = padded_codes(elements), high_columns = stored / 4, low_columns = stored / 8;
    transpose_bytes(codes, row_bytes, high_columns + low_columns, planes);
    const uint8_t* low_planes = planes + kLanes * high_columns;
    for (int e = 0; e < elements; ++e) {
        int32_t index[kLanes];
        for (int j = 0; j < kLanes; ++j) {
            const unsigned high = planes[e % high_columns * kLanes + j];
            const unsigned low = low_planes[e % low_columns * kLanes + j];
            index[j] = static_cast<int32_t>((high >> (e / high_columns * 2) & 3u) << 1 |
                                            (low >> (e / low_columns) & 1u) |
                                            (halves[j] & 1u) << 3);
        }
        store(out + e * kTileTokens, look_up<16>(load(kBooks<3>.levels), load(index)) * scale);
    }
}

// Expands one group of 16 tokens; out[e * kTileTokens] receives element e.
template <int Bits>
EXL_INLINE void key_group(const uint8_t* codes, int64_t row_bytes, const uint16_t* halves,
                          int elements, float* out) {
    if constexpr (Bits == 3) {
        three_bit_keys(codes, row_bytes, halves, elements, out);
        return;
    }
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
    const int columns = stored / 2;  // bytes of the plane of 4 bits
    transpose_bytes(codes, row_bytes, columns, bytes);
    const I32x16 nibble = broadcast(int32_t{15});
    if constexpr (Bits == 4) {
        int32_t tables[kLanes];
        for (int j = 0; j < kLanes; ++j) tables[j] = (halves[j] & 1) << 4;
        const I32x16 table = load(tables);
        for (int e = 0; e < columns; ++e) {
            const I32x16 pair = load_bytes(bytes + kLanes * e);
            const F32x16 low = lookup32(kBooks<4>.levels, (pair & nibble) | table) * scale;
            const F32x16 high = lookup32(kBooks<4>.levels, shift_right(pair, 4) | table) * scale;
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
void quantized_keys(const ExlCacheHalf& keys, int64_t token_index, int tokens,
                    int head_dim, float* out) {
    const int64_t row_bytes = code_bytes(head_dim, Bits), groups = num_groups(head_dim, Bits);
    for (int t = 0; t < tokens; t += kLanes) {
        const uint8_t* codes =
            static_cast<const uint8_t*>(keys.codes) + (token_index + t) * row_bytes;
        const uint16_t* scales = keys.scales + (token_index + t) * groups;
        for (int g = 0; g < groups; ++g) {
            uint16_t halves[kLanes];
            gather_scales(scales + g, groups, halves);
            const int elements = smaller(kGroup, head_dim - g * kGroup);
            float* group_out = out + g * kGroup * kTileTokens + t;
            // Two calls, so that the common case is compiled for a constant.
            if (elements == kGroup) {
                key_group<Bits>(codes, row_bytes, halves, kGroup, group_out);
            } else {
                key_group<Bits>(codes, row_bytes, halves, elements, group_out);
            }
            codes += code_bytes(kGroup, Bits);
        }
    }
}

// Expands elements [first, first + count) of 16 tokens, which share a scale; cache of 16 bits.
EXL_INLINE void key_block(const int16_t* rows, int head_dim, int first, int count, float* out) {
    constexpr int kStep = 8;  // elements of one transposition
    uint16_t halves[kLanes];
    for (int j = 0; j < kLanes; ++j) halves[j] = lowest_bits(rows + j * head_dim + first);
    const F32x16 factor = load_half(halves) * broadcast(1.0f / kBlockUnit);
    int e = first;
    for (; e + kStep <= first + count; e += kStep) {
        alignas(64) int16_t columns[kStep * kLanes];
        transpose_int16(rows + e, head_dim, columns);
        for (int i = 0; i < kStep; ++i) {
            const F32x16 codes = to_float(load_int16(columns + i * kLanes));
            store(out + (e + i) * kTileTokens, codes * factor);
        }
    }
    for (; e < first + count; ++e) {
        int16_t column[kLanes];
        for (int j = 0; j < kLanes; ++j) column[j] = rows[j * head_dim + e];
        store(out + e * kTileTokens, to_float(load_int16(column)) * factor);
    }
}

void half_keys(const ExlCacheHalf& keys, int64_t token_index, int tokens,
               int head_dim, float* out) {
    const int16_t* codes = static_cast<const int16_t*>(keys.codes) + token_index * head_dim;
    if (head_dim < kLanes) {
        for (int i = 0; i < tokens * head_dim; ++i) {
            const uint16_t half = static_cast<uint16_t>(codes[i]);
            out[i % head_dim * kTileTokens + i / head_dim] = float_of_half(half);
        }
        return;
    }
    for (int t = 0; t < tokens; t += kLanes) {
        for (int first = 0, count; first < head_dim; first += count) {
            count = block_elements(head_dim, first);
            key_block(codes + t * head_dim, head_dim, first, count, out + t);
        }
    }
}

void float_keys(const ExlCacheHalf& keys, int64_t token_index, int tokens,
                int head_dim, float* out) {
    const float* rows = static_cast<const float*>(keys.codes) + token_index * head_dim;
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

// Unpacks the codes of a short group to one byte each, in order.
template <int Bits>
void unpack_codes(const uint8_t* data, int stored, uint8_t* out) {
    if (Bits == 8) {
        std::memcpy(out, data, static_cast<size_t>(stored));
        return;
    }
    // The widths of the planes; 4 bits have one.
    constexpr int kHigh = Bits == 3 ? 2 : 4, kLow = Bits - kHigh;
    const int high_bytes = stored * kHigh / 8, low_bytes = stored * kLow / 8;
    for (int e = 0; e < stored; ++e) {
        const unsigned high = data[e % high_bytes] >> (kHigh * (e / high_bytes));
        unsigned code = high & ((1u << kHigh) - 1);
        if constexpr (kLow != 0) {
            const unsigned low = data[high_bytes + e % low_bytes] >> (kLow * (e / low_bytes));
            code = code << kLow | (low & ((1u << kLow) - 1));
        }
        out[e] = static_cast<uint8_t>(code);
    }
}

// Unpacks the 32 codes of a whole group of 6 bits to one byte each, in order.
EXL_INLINE void unpack_six_bits(const uint8_t* data, uint8_t* out) {
    const uint64_t low = load_word(data + 16);
    for (int i = 0; i < 4; ++i) {
        const uint64_t high = load_word(data + 8 * (i % 2)) >> (4 * (i / 2)) & repeat(15);
        const uint64_t codes = high << 2 | (low >> (2 * i) & repeat(3));
        std::memcpy(out + 8 * i, &codes, 8);
    }
}

// Converts 16 codes to values.
template <int Bits, bool = has_tables(Bits)>
struct Values : Uniform<Bits> {
    Values(uint16_t, float exact) : Uniform<Bits>(broadcast(exact)) {}
};
template <int Bits>
struct Values<Bits, true> {
    F32x16 levels;  // times the scale
    Values(uint16_t half, float exact)
        : levels(load(kBooks<Bits>.levels + ((half & 1) << Bits)) * broadcast(exact)) {}
    F32x16 value(I32x16 code) const { return look_up<1 << Bits>(levels, code); }
};

template <int Bits>
EXL_INLINE void value_group(const uint8_t* codes, const Values<Bits>& values, float* out) {
    if constexpr (Bits == 4) {
        const I32x16 pair = load_bytes(codes);
        store(out, values.value(pair & broadcast(int32_t{15})));
        store(out + kLanes, values.value(shift_right(pair, 4)));
    } else if constexpr (Bits == 3) {
        const I32x16 pair = load_three_bits(codes);
        store(out, values.value(pair));
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
        store_part(lanes, values.value(load_bytes(unpacked + i)), count);
        store(out + i, load(lanes));
    }
}

template <int Bits>
void quantized_values(const ExlCacheHalf& values, int64_t token_index, int tokens,
                      int head_dim, float* out) {
    const int64_t row_bytes = code_bytes(head_dim, Bits), groups = num_groups(head_dim, Bits);
    const uint8_t* rows = static_cast<const uint8_t*>(values.codes) + token_index * row_bytes;
    const uint16_t* scales = values.scales + token_index * groups;
    for (int t = 0; t < tokens; ++t) {
        const uint8_t* codes = rows + t * row_bytes;
        float* row = out + t * value_stride(head_dim);
        for (int g = 0; g < groups; ++g) {
            const uint16_t half = scales[t * groups + g];
            const Values<Bits> group(half, float_of_half(half));
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

// Expands the elements that share a scale, cache of 16 bits. Pads `out` to a whole vector.
EXL_INLINE void value_block(const int16_t* codes, int count, float* out) {
    const F32x16 factor = broadcast(float_of_half(lowest_bits(codes)) * (1.0f / kBlockUnit));
    int e = 0;
    for (; e + kLanes <= count; e += kLanes) {
        store(out + e, to_float(load_int16(codes + e)) * factor);
    }
    if (e == count) return;
    int16_t tail[kLanes] = {};
    std::memcpy(tail, codes + e, static_cast<size_t>(count - e) * sizeof(int16_t));
    store(out + e, to_float(load_int16(tail)) * factor);
}

void half_values(const ExlCacheHalf& values, int64_t token_index, int tokens,
                 int head_dim, float* out) {
    const int16_t* rows = static_cast<const int16_t*>(values.codes) + token_index * head_dim;
    for (int t = 0; t < tokens; ++t) {
        const int16_t* row = rows + t * head_dim;
        float* row_out = out + t * value_stride(head_dim);
        if (head_dim < kLanes) {
            uint16_t halves[kLanes] = {};
            std::memcpy(halves, row, static_cast<size_t>(head_dim) * sizeof(uint16_t));
            store(row_out, load_half(halves));
            continue;
        }
        for (int first = 0, count; first < head_dim; first += count) {
            count = block_elements(head_dim, first);
            value_block(row + first, count, row_out + first);
        }
    }
}

void float_values(const ExlCacheHalf& values, int64_t token_index, int tokens,
                  int head_dim, float* out) {
    const float* rows = static_cast<const float*>(values.codes) + token_index * head_dim;
    for (int t = 0; t < tokens; ++t) {
        float* row_out = out + t * value_stride(head_dim);
        for (int e = 0; e < value_stride(head_dim); ++e) {
            row_out[e] = e < head_dim ? rows[t * head_dim + e] : 0.0f;
        }
    }
}

}  // namespace

void expand_keys(const ExlCacheHalf& keys, int64_t token_index, int tokens,
                 int head_dim, float* out) {
    switch (keys.bits) {
        case 3: return quantized_keys<3>(keys, token_index, tokens, head_dim, out);
        case 4: return quantized_keys<4>(keys, token_index, tokens, head_dim, out);
        case 6: return quantized_keys<6>(keys, token_index, tokens, head_dim, out);
        case 8: return quantized_keys<8>(keys, token_index, tokens, head_dim, out);
        case 16: return half_keys(keys, token_index, tokens, head_dim, out);
        default: return float_keys(keys, token_index, tokens, head_dim, out);
    }
}

void expand_values(const ExlCacheHalf& values, int64_t token_index, int tokens,
                   int head_dim, float* out) {
    switch (values.bits) {
        case 3: return quantized_values<3>(values, token_index, tokens, head_dim, out);
        case 4: return quantized_values<4>(values, token_index, tokens, head_dim, out);
        case 6: return quantized_values<6>(values, token_index, tokens, head_dim, out);
        case 8: return quantized_values<8>(values, token_index, tokens, head_dim, out);
        case 16: return half_values(values, token_index, tokens, head_dim, out);
        default: return float_values(values, token_index, tokens, head_dim, out);
    }
}

}  // namespace exl
