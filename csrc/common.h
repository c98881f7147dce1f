// Small helpers that the CPU library and the CUDA kernels share.
#pragma once

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

}  // namespace exl
