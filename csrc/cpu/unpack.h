// Unpacking of bit planes into registers with one byte for each code.
//
// Layout: a block of b-bit codes (packed.h) is b vectors of 64 bytes, in a high and a low plane
// of high_width(b) and b - high_width(b) bits. A plane of w bits is w vectors; its register j is
// field j % (8 / w) of vector j / (8 / w).
#pragma once

#include <type_traits>

#include "packed.h"
#include "simd.h"

namespace exl {

// Shifts bytes right by Shift, or left if Shift is negative. Bits of neighbouring bytes are
// shifted in.
template <int Shift>
EXL_INLINE U8x64 shifted(U8x64 a) {
    if constexpr (Shift > 0) return shift_bytes_right<Shift>(a);
    if constexpr (Shift < 0) return shift_bytes_left<-Shift>(a);
    return a;
}

// Register Index of a plane of Width bits that begins at `plane`, shifted left by Up bits.
template <int Width, int Up, int Index>
EXL_INLINE U8x64 plane_register(const uint8_t* plane) {
    constexpr int kFields = 8 / Width;
    constexpr int kShift = Index % kFields * Width - Up;
    constexpr int kMask = ((1 << Width) - 1) << Up;
    const U8x64 vector = load_codes(plane + Index / kFields * kRegisterBytes);
    if constexpr (Width == 8) {
        return vector;
    } else {
        return shifted<kShift>(vector) & mask<kMask>();
    }
}

// plane_register combined with `other` by a bitwise or.
template <int Width, int Up, int Index>
EXL_INLINE U8x64 plane_register_or(const uint8_t* plane, U8x64 other) {
    constexpr int kFields = 8 / Width;
    constexpr int kShift = Index % kFields * Width - Up;
    constexpr int kMask = ((1 << Width) - 1) << Up;
    const U8x64 vector = load_codes(plane + Index / kFields * kRegisterBytes);
    return and_or(shifted<kShift>(vector), mask<kMask>(), other);
}

// Register Index (of 8) of a block of Bits-bit codes, shifted left by Up bits.
template <int Bits, int Index, int Up = 0>
EXL_INLINE U8x64 block_register(const uint8_t* block) {
    constexpr int kHigh = high_width(Bits);
    constexpr int kLow = Bits - kHigh;
    if constexpr (kLow == 0) {
        return plane_register<kHigh, Up, Index>(block);
    } else {
        const U8x64 low = plane_register<kLow, Up, Index>(block + kHigh * kRegisterBytes);
        return plane_register_or<kHigh, kLow + Up, Index>(block, low);
    }
}

// Left shift of a code of register Index if the field of its high plane is used without a shift,
// or the smallest shift that the low plane allows. This saves a shift for almost every register.
constexpr int unshifted_up(int bits, int index) {
    const int high = high_width(bits);
    const int up = index % (8 / high) * high - (bits - high);
    return up > 0 ? up : 0;
}

// Calls f(integral_constant<Bits>) for the number of bits of a group.
template <class Function>
EXL_INLINE void with_bits(int bits, const Function& f) {
    switch (bits) {
        case 2: f(std::integral_constant<int, 2>()); break;
        case 3: f(std::integral_constant<int, 3>()); break;
        case 4: f(std::integral_constant<int, 4>()); break;
        case 5: f(std::integral_constant<int, 5>()); break;
        case 6: f(std::integral_constant<int, 6>()); break;
        case 8: f(std::integral_constant<int, 8>()); break;
    }
}

// Calls f(integral_constant<I>) for I = 0 .. Count - 1, unrolled.
template <int Count, class Function>
EXL_INLINE void unrolled(const Function& f) {
    if constexpr (Count > 0) {
        unrolled<Count - 1>(f);
        f(std::integral_constant<int, Count - 1>());
    }
}

}  // namespace exl
