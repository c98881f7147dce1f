// csrc/cuda/platform.cuh on the CPU: the same names, executed by runner.cpp.
//
// Each thread of a block is a fiber in one OS thread. A collective (shuffle, mma, barrier)
// parks the fiber until all lanes of its warp, or all threads of its block, have reached the same
// one. The launcher chooses the order in which lanes, warps and blocks run, so that a missing
// barrier shows as a different result. A fault of a kernel ends the launch with a message (fail).
// Shared memory holds NaN patterns until it is written, and the target of an asynchronous copy
// holds them until the copy is waited for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// ---- Built into CUDA's compilers --------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 { unsigned x, y, z; };
struct alignas(8) int2 { int32_t x, y; };
struct alignas(16) int4 { int32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Of the running fiber; runner.cpp sets them.
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline void __trap() { __builtin_trap(); }

// ---- Between kernels and runner ----------------------------------------------------------------

namespace exl_emulation {

constexpr int kLanes = 32;

// Source location of a collective; all threads that take part must be at the same location.
struct Site {
    const char* operation;
    const char* file;
    int line;
};

// Ends the launch with this message; does not return.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// Parks until the whole warp has arrived; then `finish` gets each lane's `operand`, once.
using Finish = void (*)(void* const (&operands)[kLanes]);
void wait_warp(const Site& site, Finish finish, void* operand);
void wait_block(const Site& site);

char* shared_memory();
// True if all of these bytes are shared memory of the running block.
bool is_shared(const void* address, int bytes);

void copy_async(void* shared, const void* source, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

// Type of an argument in Python (`p`ointer, `i`nteger, `f`loat or `s`truct), and its size.
struct Argument {
    char kind;
    int bytes;
};
using Invoke = void (*)(void** arguments);
void add_kernel(const char* name, Invoke invoke, const Argument* arguments, int count);

template <typename T>
constexpr Argument describe() {
    return {std::is_pointer_v<T>          ? 'p'
            : std::is_integral_v<T>       ? 'i'
            : std::is_floating_point_v<T> ? 'f'
                                          : 's',
            static_cast<int>(sizeof(T))};
}

template <auto kernel>
struct Registration;
template <typename... T, void (*kernel)(T...)>
struct Registration<kernel> {
    explicit Registration(const char* name) {
        static constexpr Argument arguments[] = {describe<T>()..., {}};
        add_kernel(name, invoke, arguments, sizeof...(T));
    }
    static void invoke(void** arguments) {
        call(arguments, std::make_integer_sequence<int, sizeof...(T)>());
    }
    template <int... i>
    static void call(void** arguments, std::integer_sequence<int, i...>) {
        kernel(*static_cast<std::remove_cv_t<T>*>(arguments[i])...);
    }
};

inline void check_aligned(const void* address, int bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
        fail("%s of an address that is no multiple of %d", what, bytes);
}

template <typename T>
T load(const void* source, const char* what) {
    check_aligned(source, sizeof(T), what);
    T value;
    std::memcpy(&value, source, sizeof(T));
    return value;
}

template <typename T>
struct Shuffle {
    T value, result;
    int source;
};

template <typename T>
T shuffle(const Site& site, T value, int source) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    Shuffle<T> mine{value, value, source};
    wait_warp(site, [](void* const (&operands)[kLanes]) {
        for (void* operand : operands) {
            auto* to = static_cast<Shuffle<T>*>(operand);
            to->result = static_cast<Shuffle<T>*>(operands[to->source])->value;
        }
    }, &mine);
    return mine.result;
}

// A lane's part of an mma or of load_matrix.
struct Fragments {
    void* d;
    const uint32_t* a;
    const uint32_t* b;
};
void finish_mma_u8s8(void* const (&lanes)[kLanes]);
void finish_mma_s8s8(void* const (&lanes)[kLanes]);
void finish_mma_f16(void* const (&lanes)[kLanes]);
void finish_mma_bf16(void* const (&lanes)[kLanes]);
void finish_load_matrix(void* const (&lanes)[kLanes]);
void finish_load_matrix_transposed(void* const (&lanes)[kLanes]);

float half_value(uint16_t bits);
uint16_t half_nearest(double value);

}  // namespace exl_emulation

#define EXL_KERNEL(kernel)                                                                     \
    static const exl_emulation::Registration<kernel> register_##kernel(#kernel)
#define EXL_SHARED(type, name) type* const name =                                              \
    reinterpret_cast<type*>(exl_emulation::shared_memory())

#include "cuda_emulation/platform_names.h"
