// Exponentials on sixteen lanes, beyond simd.h.
//
// Every function computes each lane in the same way and has no branches, so an element's result
// does not depend on its lane.
#pragma once

#include "simd.h"

namespace exl {

// x = n ln 2 + r with |r| <= ln 2 / 2. Holds 2^n and expm1(r), from which exp, expm1 and tanh
// follow without cancellation.
struct Exponential {
    F32x16 power;
    F32x16 expm1;
};

EXL_INLINE Exponential split_exponential(F32x16 x) {
    // The limits are ln(2^-126) and ln(2^127), so that 2^n is a normal number. NaN passes through
    // min and max because both return their second operand if an operand is NaN.
    x = max(broadcast(-87.33654f), min(broadcast(88.02969f), x));
    const F32x16 n = round(x * broadcast(1.44269504f));
    // ln 2 = 0x1.62ep-1 + remainder. The first has 12 bits, so n times it is exact.
    F32x16 r = fma(n, broadcast(-0x1.62ep-1f), x);
    r = fma(n, broadcast(-0x1.0bfbe8p-15f), r);
    // Taylor series. The first omitted term, r^7 / 8! relative to r, is below 2^-25.
    F32x16 p = broadcast(1.0f / 5040);
    p = fma(p, r, broadcast(1.0f / 720));
    p = fma(p, r, broadcast(1.0f / 120));
    p = fma(p, r, broadcast(1.0f / 24));
    p = fma(p, r, broadcast(1.0f / 6));
    p = fma(p, r, broadcast(0.5f));
    p = fma(p * r, r, r);
    constexpr int kExponentBias = 127, kMantissaBits = 23;
    const I32x16 exponent = to_int(n) + broadcast(int32_t{kExponentBias});
    return {as_float(shift_left(exponent, kMantissaBits)), p};
}

// e^x within 2 units in the last place; e^-87.3 (1.2e-38) for smaller x, 2^127 for x above 88.03.
EXL_INLINE F32x16 exp(F32x16 x) {
    const Exponential e = split_exponential(x);
    return fma(e.power, e.expm1, e.power);
}

// tanh(x) within 4 units in the last place, also near zero.
EXL_INLINE F32x16 tanh(F32x16 x) {
    // Beyond 15, tanh is 1 after rounding to float32, and expm1 would overflow for larger x.
    const F32x16 bounded = max(broadcast(-15.0f), min(broadcast(15.0f), x));
    const Exponential e = split_exponential(bounded + bounded);
    const F32x16 expm1 = fma(e.power, e.expm1, e.power - broadcast(1.0f));
    return expm1 / (expm1 + broadcast(2.0f));
}

}  // namespace exl
