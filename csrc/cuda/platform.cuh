// Functions that device code may use besides plain C++17; every kernel file includes this header.
//
// Purpose: the same names exist twice. This file has the implementation for GPUs (nvcc and NVRTC,
// compute capability 7.5 and newer). If EXL_CUDA_EMULATION is defined, the emulation
// implements the names on the CPU, where kernels are compared with the reference. Kernels call
// nothing else: no CUDA header (NVRTC must work without an installed toolkit), no cooperative
// groups, no CCCL.
//
// Rules for kernel files:
// - Includes are relative to csrc/: "cuda/platform.cuh", "cache_codec.h".
// - Kernels are in namespace exl, because `ballot` and other names also exist in CUDA outside
//   of it.
// - A kernel is `extern "C" __global__ void __launch_bounds__(N) foo_kernel(...)`, followed by
//   EXL_KERNEL(foo_kernel). Blocks are one-dimensional and consist of whole warps.
// - Shared memory is dynamic: EXL_SHARED(char, memory). The launcher chooses its size.
// - Every lane of a warp must reach each shuffle, ballot, mma, load_matrix and warp_sync; every
//   thread of a block must reach each block_sync. The emulation raises an error otherwise.
// - float16 and bfloat16 are bits: one value in a uint16_t, two in a uint32_t (the first in the
//   low half).
// - If two kernels must give the same bits, use fmaf, mul_rn and add_rn: nvcc may contract
//   a * b + c into a fused operation, but it never contracts these.
//
// PTX fragments and instructions are those of the PTX ISA 8.x; comments name its sections.
#pragma once

#include <cstdint>

#if defined(EXL_CUDA_EMULATION)

#include "cuda_emulation/emulation.h"

#else

// Kernels are found by name; only the emulation needs a registration.
#define EXL_KERNEL(kernel) static_assert(true, "")
// One name for all types, because a translation unit may not declare the array with two types.
#define EXL_SHARED(type, name)                                                                 \
    extern __shared__ __align__(16) char exl_shared_memory[];                                  \
    type* const name = reinterpret_cast<type*>(exl_shared_memory)

namespace exl {

constexpr unsigned kFullMask = 0xFFFFFFFFu;

// ---- Threads -------------------------------------------------------------------------------

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x >> 5; }

__device__ __forceinline__ void warp_sync() { __syncwarp(); }
__device__ __forceinline__ void block_sync() { __syncthreads(); }

// T: an arithmetic type of 4 or 8 bytes.
template <typename T>
__device__ __forceinline__ T shfl(T value, int source_lane) {
    return __shfl_sync(kFullMask, value, source_lane);
}
template <typename T>
__device__ __forceinline__ T shfl_xor(T value, int lane_mask) {
    return __shfl_xor_sync(kFullMask, value, lane_mask);
}
// A lane whose source is outside of the warp keeps its own value.
template <typename T>
__device__ __forceinline__ T shfl_down(T value, int delta) {
    return __shfl_down_sync(kFullMask, value, delta);
}
template <typename T>
__device__ __forceinline__ T shfl_up(T value, int delta) {
    return __shfl_up_sync(kFullMask, value, delta);
}
__device__ __forceinline__ uint32_t ballot(bool predicate) {
    return __ballot_sync(kFullMask, predicate);
}

// ---- Memory --------------------------------------------------------------------------------

// Returns the previous value. Only for integers, because a sum of floats must not depend on the
// order in which threads arrive.
__device__ __forceinline__ int32_t atomic_add(int32_t* address, int32_t value) {
    return atomicAdd(address, value);
}
__device__ __forceinline__ uint32_t atomic_add(uint32_t* address, uint32_t value) {
    return atomicAdd(address, value);
}
__device__ __forceinline__ void thread_fence() { __threadfence(); }

// Load read-only data that is read once; the L1 cache is bypassed so that useful lines stay in it.
// 16, 8 and 4 bytes, aligned.
__device__ __forceinline__ uint4 load_nc16(const void* source) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(source));
    return v;
}
__device__ __forceinline__ uint2 load_nc8(const void* source) {
    uint2 v;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
        : "=r"(v.x), "=r"(v.y)
        : "l"(source));
    return v;
}
__device__ __forceinline__ uint32_t load_nc4(const void* source) {
    uint32_t v;
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(source));
    return v;
}

// Load data that another block wrote during this launch; L1 may hold the previous content.
__device__ __forceinline__ uint4 load_cg16(const void* source) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(source)
                 : "memory");
    return v;
}
__device__ __forceinline__ float load_cg(const float* source) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(source) : "memory");
    return v;
}

__device__ __forceinline__ void prefetch_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes (aligned) to shared memory asynchronously. If `valid` is false, writes zeros and
// does not read the source. The bytes are readable after copy_async_wait and a barrier.
__device__ __forceinline__ void copy_async16(void* shared, const void* source, bool valid = true) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(source), "r"(valid ? 16 : 0)
                 : "memory");
#else
    *static_cast<uint4*>(shared) =
        valid ? *static_cast<const uint4*>(source) : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `kPending` of this thread's committed groups are still in flight.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- Tensor cores --------------------------------------------------------------------------
// Layout of fragments (PTX ISA, "Matrix fragments for mma.m16n8k32" and "m16n8k16"), with
// g = lane / 4 and t = lane % 4. All functions add to d.
//   8 bits   a[i]: row g + 8 * (i % 2), k = 4 * t + 16 * (i / 2) + 0..3 (low byte first)
//            b[i]: column g,            k = 4 * t + 16 * i + 0..3
//   16 bits  a[i]: row g + 8 * (i % 2), k = 2 * t + 8 * (i / 2) + 0..1 (low half first)
//            b[i]: column g,            k = 2 * t + 8 * i + 0..1
//   d[i]: row g + 8 * (i / 2), column 2 * t + i % 2

#define EXL_MMA_8BIT(function, atype, btype)                                                   \
    __device__ __forceinline__ void function(int32_t (&d)[4], const uint32_t (&a)[4],          \
                                             const uint32_t (&b)[2]) {                         \
        EXL_MMA_8BIT_BODY(atype, btype)                                                        \
    }
#if __CUDA_ARCH__ >= 800
#define EXL_MMA_8BIT_BODY(atype, btype)                                                        \
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." atype "." btype                      \
                 ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
// Compute capability 7.5 has only m8n8k16, whose fragments are quarters of the above.
#define EXL_MMA_8BIT_BODY(atype, btype)                                                        \
    _Pragma("unroll") for (int i = 0; i < 4; i++) {                                            \
        asm volatile("mma.sync.aligned.m8n8k16.row.col.s32." atype "." btype                   \
                     ".s32 {%0, %1}, {%2}, {%3}, {%0, %1};"                                    \
                     : "+r"(d[2 * (i % 2)]), "+r"(d[2 * (i % 2) + 1])                          \
                     : "r"(a[i]), "r"(b[i / 2]));                                              \
    }
#endif
EXL_MMA_8BIT(mma_u8s8_16x8x32, "u8", "s8")
EXL_MMA_8BIT(mma_s8s8_16x8x32, "s8", "s8")
#undef EXL_MMA_8BIT
#undef EXL_MMA_8BIT_BODY

__device__ __forceinline__ void mma_f16_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (int i = 0; i < 2; i++) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
    }
#endif
}

// Requires kHasBf16Mma: must not be launched on compute capability 7.5.
#if __CUDA_ARCH__ >= 800
constexpr bool kHasBf16Mma = true;
#else
constexpr bool kHasBf16Mma = false;
#endif
__device__ __forceinline__ void mma_bf16_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}

// Reads four 8x8 matrices of 16-bit elements from shared memory (PTX ISA, ldmatrix). Lane i
// passes the address of row i % 8 (16 bytes, aligned) of matrix i / 8 and receives, of each
// matrix, elements 2 * (lane % 4) + 0..1 of row lane / 4; transposed: of column lane / 4.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&d)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&d)[4],
                                                          const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// Transposes an 8x8 matrix of 16-bit elements across the warp (PTX ISA, movmatrix). Lane i passes
// elements 2 * (i % 4) + 0..1 of row i / 4 and receives those of column i / 4.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t a) {
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// ---- Integers ------------------------------------------------------------------------------

// c + the dot product of four bytes: unsigned times signed, and signed times signed.
__device__ __forceinline__ int32_t dp4a_us(uint32_t a, uint32_t b, int32_t c) {
    int32_t d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ int32_t dp4a_ss(uint32_t a, uint32_t b, int32_t c) {
    return __dp4a(static_cast<int>(a), static_cast<int>(b), c);
}
// Byte i of the result is byte (selector >> 4 * i) & 7 of b:a. If bit 3 of a nibble of the
// selector is set, the byte is filled with the sign bit of that byte.
__device__ __forceinline__ uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}
// The low 32 bits of high:low >> (shift % 32).
__device__ __forceinline__ uint32_t funnel_shift_right(uint32_t low, uint32_t high,
                                                       uint32_t shift) {
    return __funnelshift_r(low, high, shift);
}
__device__ __forceinline__ int count_ones(uint32_t value) { return __popc(value); }
__device__ __forceinline__ int leading_zeros(uint32_t value) { return __clz(value); }

// ---- Floats --------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
// Rounds to the nearest integer, ties to even.
__device__ __forceinline__ int32_t round_int(float value) { return __float2int_rn(value); }

// fmaf, bounded to 0 and 1; NaN becomes 0.
__device__ __forceinline__ float fma_saturated(float a, float b, float c) {
    float result;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(result) : "f"(a), "f"(b), "f"(c));
    return result;
}
// ceilf of magnitudes below 2^22, by two additions: conversions have a quarter of their rate. The
// sum with 1.5 * 2^23 is rounded up to an integer.
__device__ __forceinline__ float ceil_small(float value) {
    return __fadd_ru(value, 12582912.0f) - 12582912.0f;
}

// Approximations within 2 units in the last place. exp2_fast flushes results below 2^-126 to zero.
__device__ __forceinline__ float exp2_fast(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}
__device__ __forceinline__ float rcp_fast(float value) {
    float result;
    asm("rcp.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}
__device__ __forceinline__ float rsqrt_fast(float value) {
    float result;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
// Rounds to nearest, ties to even; values beyond the range become infinity.
__device__ __forceinline__ uint16_t float_to_half(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
__device__ __forceinline__ float2 half2_to_float2(uint32_t bits) {
    return make_float2(half_to_float(static_cast<uint16_t>(bits)),
                       half_to_float(static_cast<uint16_t>(bits >> 16)));
}
__device__ __forceinline__ uint32_t floats_to_half2(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#else
    return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
#endif
}
__device__ __forceinline__ float bf16_to_float(uint16_t bits) {
    return bits_float(static_cast<uint32_t>(bits) << 16);
}
__device__ __forceinline__ float2 bf162_to_float2(uint32_t bits) {
    return make_float2(bits_float(bits << 16), bits_float(bits & 0xFFFF0000u));
}
// Rounds to nearest, ties to even. In integers, because compute capability 7.5 has no instruction.
__device__ __forceinline__ uint16_t float_to_bf16(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
__device__ __forceinline__ uint32_t floats_to_bf162(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#else
    return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
#endif
}

// Operations on two float16 at once; h2_fma rounds once.
__device__ __forceinline__ uint32_t h2_fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ uint32_t h2_add(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ uint32_t h2_sub(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ uint32_t h2_mul(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

}  // namespace exl

#endif  // EXL_CUDA_EMULATION

namespace exl {

__device__ __forceinline__ float infinity() { return bits_float(0x7F800000u); }

// Reductions over the warp. Every lane gets the same bits, because the tree is the same for all
// lanes.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) value += shfl_xor(value, mask);
    return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) value = fmaxf(value, shfl_xor(value, mask));
    return value;
}

}  // namespace exl
