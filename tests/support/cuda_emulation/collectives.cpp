// Collectives of a warp: products of matrix fragments, and loading them.
//
// The layout of fragments is that of csrc/cuda/platform.cuh. Sums of 16-bit products are exact and
// rounded once; a GPU has another order and rounding.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")  // halves the time of a product; kernels compile quicker with less
#endif

#include <array>

#include "emulation.h"

namespace exl_emulation {
namespace {

constexpr int kRows = 16;
constexpr int kColumns = 8;

// Gathers a [16, depth] and b [8, depth] from the lanes, `per_word` elements a word, and adds
// their product to the lanes' d.
template <int per_word, typename A, typename B, typename Sum, typename D, typename ReadA,
          typename ReadB>
void multiply(void* const (&lanes)[kLanes], ReadA read_a, ReadB read_b) {
    constexpr int depth = 8 * per_word;
    constexpr int bits = 32 / per_word;
    A a[kRows][depth];
    B b[depth][kColumns];  // so that the inner loop below is a vector
    for (int lane = 0; lane < kLanes; lane++) {
        const auto& part = *static_cast<const Fragments*>(lanes[lane]);
        const int g = lane / 4, k = lane % 4 * per_word;
        for (int e = 0; e < per_word; e++) {
            for (int i = 0; i < 4; i++)
                a[g + 8 * (i % 2)][k + 4 * per_word * (i / 2) + e] =
                    read_a(part.a[i] >> (bits * e));
            for (int i = 0; i < 2; i++)
                b[k + 4 * per_word * i + e][g] = read_b(part.b[i] >> (bits * e));
        }
    }
    Sum sums[kRows][kColumns];
    for (int row = 0; row < kRows; row++) {
        Sum line[kColumns] = {};
        for (int k = 0; k < depth; k++)
            for (int column = 0; column < kColumns; column++)
                line[column] += static_cast<Sum>(a[row][k] * b[k][column]);
        std::memcpy(sums[row], line, sizeof line);
    }
    for (int lane = 0; lane < kLanes; lane++) {
        auto* d = static_cast<D*>(static_cast<const Fragments*>(lanes[lane])->d);
        for (int i = 0; i < 4; i++)
            d[i] = static_cast<D>(static_cast<Sum>(d[i]) +
                                  sums[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2]);
    }
}

// Maps every float16 to its float32.
const std::array<float, 65536>& half_values() {
    static const std::array<float, 65536> values = [] {
        std::array<float, 65536> made;
        for (int bits = 0; bits < 65536; bits++) {
            const int exponent = bits >> 10 & 31, fraction = bits & 1023;
            float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(1024.0f + fraction, exponent - 25);
            made[bits] = bits & 0x8000 ? -value : value;
        }
        return made;
    }();
    return values;
}

float bf16_value(uint16_t bits) { return exl::bits_float(static_cast<uint32_t>(bits) << 16); }

template <bool transposed>
void load_matrix(void* const (&lanes)[kLanes]) {
    for (int lane = 0; lane < kLanes; lane++) {
        auto* d = static_cast<uint32_t*>(static_cast<const Fragments*>(lanes[lane])->d);
        for (int matrix = 0; matrix < 4; matrix++) {
            d[matrix] = 0;
            for (int e = 0; e < 2; e++) {
                const int along = lane % 4 * 2 + e;
                const int row = transposed ? along : lane / 4;
                const int column = transposed ? lane / 4 : along;
                const auto& owner = *static_cast<const Fragments*>(lanes[8 * matrix + row]);
                uint16_t element;
                std::memcpy(&element, reinterpret_cast<const char*>(owner.a) + 2 * column, 2);
                d[matrix] |= static_cast<uint32_t>(element) << (16 * e);
            }
        }
    }
}

}  // namespace

float half_value(uint16_t bits) { return half_values()[bits]; }

// Rounds a double to the nearest float16, ties to even; a float in between would round twice. Ten
// of the double's 52 bits are kept, fewer if the float16 is subnormal.
uint16_t half_nearest(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, 8);
    const auto sign = static_cast<uint16_t>(bits >> 48 & 0x8000);
    bits &= ~(uint64_t{1} << 63);
    const int exponent = static_cast<int>(bits >> 52) - 1023;
    if (exponent >= 16) return sign | (value != value ? 0x7E00 : 0x7C00);
    if (exponent < -25) return sign;
    const bool normal = exponent >= -14;
    const int dropped = normal ? 42 : 28 - exponent;
    const uint64_t mantissa = normal ? bits - (uint64_t{1023 - 15} << 52)
                                     : (bits & ((uint64_t{1} << 52) - 1)) | uint64_t{1} << 52;
    uint64_t kept = mantissa >> dropped;
    const uint64_t rest = mantissa << (64 - dropped), half = uint64_t{1} << 63;
    if (rest > half || (rest == half && (kept & 1))) kept++;
    return static_cast<uint16_t>(sign + kept);
}

// Integer sums wrap as on the GPU.
void finish_mma_u8s8(void* const (&lanes)[kLanes]) {
    multiply<4, int32_t, int32_t, uint32_t, int32_t>(
        lanes, [](uint32_t w) { return static_cast<int32_t>(w & 255); },
        [](uint32_t w) { return static_cast<int32_t>(static_cast<int8_t>(w)); });
}
void finish_mma_s8s8(void* const (&lanes)[kLanes]) {
    const auto read = [](uint32_t w) { return static_cast<int32_t>(static_cast<int8_t>(w)); };
    multiply<4, int32_t, int32_t, uint32_t, int32_t>(lanes, read, read);
}
void finish_mma_f16(void* const (&lanes)[kLanes]) {
    const float* values = half_values().data();
    const auto read = [values](uint32_t w) { return values[w & 0xFFFF]; };
    multiply<2, float, float, double, float>(lanes, read, read);
}
void finish_mma_bf16(void* const (&lanes)[kLanes]) {
    const auto read = [](uint32_t w) { return bf16_value(static_cast<uint16_t>(w)); };
    multiply<2, double, double, double, float>(lanes, read, read);
}
void finish_load_matrix(void* const (&lanes)[kLanes]) { load_matrix<false>(lanes); }
void finish_load_matrix_transposed(void* const (&lanes)[kLanes]) { load_matrix<true>(lanes); }

}  // namespace exl_emulation
