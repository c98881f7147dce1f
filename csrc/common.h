// Small helpers that the CPU library and the CUDA kernels share.
#pragma once

#include <cstdint>

// Marks a function that the CPU library and kernels share. A kernel may call only functions that
// are declared for the device. A table must be local to such a function because nvcc places an
// array of namespace scope on the CPU, and a kernel may then read only elements whose index is a
// constant.
#if defined(__CUDACC__)
#define EXL_HOST_DEVICE __host__ __device__
#else
#define EXL_HOST_DEVICE
#endif

namespace exl {

// a / b, rounded up. Precondition: a >= 0, b > 0.
template <class A, class B>
EXL_HOST_DEVICE constexpr auto ceil_div(A a, B b) {
    return (a + b - 1) / b;
}
// The smallest multiple of b that is at least a. Precondition: a >= 0, b > 0.
template <class A, class B>
EXL_HOST_DEVICE constexpr auto round_up(A a, B b) {
    return ceil_div(a, b) * b;
}

// Activations of an MLP; the numbers are part of the ABI. kRelu2 is the square of kRelu. Those
// from kClampedSwiglu on are only of gates, because they change the other factor as well.
enum Activation : int32_t {
    kSilu = 0,
    kGeluTanh = 1,
    kGelu = 2,
    kRelu = 3,
    kRelu2 = 4,
    kQuickGelu = 5,
    kClampedSwiglu = 6,
};
// gelu_tanh(x) = x/2 (1 + tanh u) with u = sqrt(2 / pi) (x + kGeluCubic x^3).
constexpr float kGeluCubic = 0.044715f;
constexpr float kMinusTwoRootTwoOverPi = -1.5957691216f;  // -2 sqrt(2 / pi)
constexpr float kMinusRootHalf = -0.70710678f;            // -sqrt(1 / 2)
// quick_gelu(x) = x / (1 + e^(kMinusQuickGelu x)).
constexpr float kMinusQuickGelu = -1.702f;
// clamped_swiglu(gate, up) = quick_gelu(min(gate, L)) (1 + min(max(up, -L), L)).
constexpr float kSwigluLimit = 7.0f;

}  // namespace exl
