// Kernels for tests/backends/cuda/test_cuda_emulation.py: each wrapper of platform.cuh once, and
// every fault of a kernel that the emulation must find. They compile for the GPU as well.
#include "cuda/platform.cuh"

namespace exl {
// ---- Threads ---------------------------------------------------------------------------------

namespace {
// Reverses a block's values through shared memory. Without the barrier the result depends on the
// order of threads.
template <bool kBarrier>
__device__ void reverse(const float* in, float* out) {
    EXL_SHARED(char, memory);
    auto* values = reinterpret_cast<float*>(memory);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x;
    values[threadIdx.x] = in[first + threadIdx.x];
    if (kBarrier) block_sync();
    out[first + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}
}  // namespace

extern "C" __global__ void __launch_bounds__(256) reverse_kernel(const float* in, float* out) {
    reverse<true>(in, out);
}
EXL_KERNEL(reverse_kernel);

extern "C" __global__ void __launch_bounds__(256) racing_kernel(const float* in, float* out) {
    reverse<false>(in, out);
}
EXL_KERNEL(racing_kernel);

extern "C" __global__ void __launch_bounds__(1024)
    mean_kernel(const float* in, float* out, int32_t rounds) {
    float value = in[threadIdx.x];
    for (int i = 0; i < rounds; i++) value = warp_sum(value) * (1.0f / 32.0f);
    out[threadIdx.x] = value;
}
EXL_KERNEL(mean_kernel);

// out [7, 64]: six exchanges between lanes, and the thread's index.
extern "C" __global__ void __launch_bounds__(64) lanes_kernel(const int32_t* in, int32_t* out) {
    const int i = threadIdx.x;
    const int32_t value = in[i];
    out[i] = shfl(value, 31 - lane_id());
    out[64 + i] = shfl_xor(value, 5);
    out[128 + i] = shfl_down(value, 3);
    out[192 + i] = shfl_up(value, 3);
    out[256 + i] = static_cast<int32_t>(ballot(value % 2 != 0));
    out[320 + i] = static_cast<int32_t>(warp_max(static_cast<float>(value)));
    warp_sync();
    out[384 + i] = warp_id() * 100 + lane_id();
}
EXL_KERNEL(lanes_kernel);

// The number of a block in a grid of three dimensions.
extern "C" __global__ void __launch_bounds__(32) grid_kernel(int32_t* out) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) out[block] = block;
}
EXL_KERNEL(grid_kernel);

// The last block to arrive adds the results of all blocks in order, and resets the counter.
extern "C" __global__ void __launch_bounds__(32)
    last_block_kernel(float* partial, uint32_t* counter, float* out) {
    EXL_SHARED(char, memory);
    auto* last = reinterpret_cast<uint32_t*>(memory);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = 1.0f / static_cast<float>(blockIdx.x + 1);
        thread_fence();
        *last = atomic_add(counter, 1u) == gridDim.x - 1;
    }
    block_sync();
    if (*last == 0 || threadIdx.x != 0) return;
    float sum = 0.0f;
    for (unsigned i = 0; i < gridDim.x; i++) sum = add_rn(sum, load_cg(partial + i));
    *out = sum;
    *counter = 0;
}
EXL_KERNEL(last_block_kernel);

// Every type of argument.
struct Pair {
    const float* values;
    int32_t count;
};
extern "C" __global__ void __launch_bounds__(32)
    arguments_kernel(double* out, int64_t big, int32_t small, float real, Pair pair) {
    if (threadIdx.x != 0) return;
    out[0] = static_cast<double>(big);
    out[1] = small;
    out[2] = real;
    out[3] = pair.values[pair.count - 1];
}
EXL_KERNEL(arguments_kernel);

// ---- Memory ----------------------------------------------------------------------------------

// Copies 16 bytes a thread through shared memory in two groups; those from `valid` on are zeros.
extern "C" __global__ void __launch_bounds__(32)
    copy_kernel(const uint4* in, uint4* out, int32_t valid) {
    EXL_SHARED(uint4, memory);
    const int lane = lane_id();
    for (int half = 0; half < 2; half++) {
        const int i = half * 32 + lane;
        copy_async16(memory + i, in + i, i < valid);
        copy_async_commit();
    }
    copy_async_wait<1>();
    warp_sync();
    out[31 - lane] = memory[31 - lane];
    copy_async_wait<0>();
    warp_sync();
    out[63 - lane] = memory[63 - lane];
}
EXL_KERNEL(copy_kernel);

extern "C" __global__ void __launch_bounds__(32) hasty_copy_kernel(const uint4* in, uint4* out) {
    EXL_SHARED(uint4, memory);
    copy_async16(memory + lane_id(), in + lane_id());
    copy_async_commit();
    out[lane_id()] = memory[lane_id()];
    copy_async_wait<0>();
}
EXL_KERNEL(hasty_copy_kernel);

extern "C" __global__ void __launch_bounds__(32) loads_kernel(const uint32_t* in, uint32_t* out) {
    if (threadIdx.x != 0) return;
    const uint4 four = load_nc16(in), again = load_cg16(in + 4);
    const uint2 two = load_nc8(in + 8);
    prefetch_l2(in);
    const uint32_t values[] = {four.x,  four.y,  four.z,  four.w,  again.x,          again.y,
                               again.z, again.w, two.x, two.y, load_nc4(in + 10)};
    for (int i = 0; i < 11; i++) out[i] = values[i];
}
EXL_KERNEL(loads_kernel);

// ---- Matrices --------------------------------------------------------------------------------

// a [32, 4], b [32, 2] and d [32, 4]: fragments by lane.
#define EXL_SAMPLE_MMA(name, element, function)                                                \
    extern "C" __global__ void __launch_bounds__(32)                                           \
        name(const uint32_t* a, const uint32_t* b, element* d) {                               \
        const int lane = lane_id();                                                            \
        uint32_t left[4], right[2];                                                            \
        element sum[4];                                                                        \
        for (int i = 0; i < 4; i++) left[i] = a[4 * lane + i], sum[i] = d[4 * lane + i];       \
        for (int i = 0; i < 2; i++) right[i] = b[2 * lane + i];                                \
        function(sum, left, right);                                                            \
        for (int i = 0; i < 4; i++) d[4 * lane + i] = sum[i];                                  \
    }                                                                                          \
    EXL_KERNEL(name);
EXL_SAMPLE_MMA(mma_u8s8_kernel, int32_t, mma_u8s8_16x8x32)
EXL_SAMPLE_MMA(mma_s8s8_kernel, int32_t, mma_s8s8_16x8x32)
EXL_SAMPLE_MMA(mma_f16_kernel, float, mma_f16_16x8x16)
EXL_SAMPLE_MMA(mma_bf16_kernel, float, mma_bf16_16x8x16)

// in [32, 8] 16-bit elements: four 8x8 matrices; out [2, 32, 4]: plain, and transposed.
extern "C" __global__ void __launch_bounds__(32)
    load_matrix_kernel(const uint4* in, uint32_t* out) {
    EXL_SHARED(uint4, memory);
    const int lane = lane_id();
    memory[lane] = in[lane];
    warp_sync();
    uint32_t d[4], transposed[4];
    load_matrix_x4(d, memory + lane);
    load_matrix_x4_transposed(transposed, memory + lane);
    for (int i = 0; i < 4; i++) {
        out[4 * lane + i] = d[i];
        out[128 + 4 * lane + i] = transposed[i];
    }
}
EXL_KERNEL(load_matrix_kernel);

// ---- Numbers ---------------------------------------------------------------------------------

// out [7, n]
extern "C" __global__ void __launch_bounds__(256)
    integers_kernel(const uint32_t* a, const uint32_t* b, uint32_t* out, int32_t n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[i] = static_cast<uint32_t>(dp4a_us(a[i], b[i], 7));
    out[n + i] = static_cast<uint32_t>(dp4a_ss(a[i], b[i], -7));
    out[2 * n + i] = byte_perm(a[i], b[i], b[i] >> 8);
    out[3 * n + i] = funnel_shift_right(a[i], b[i], a[i] >> 7);
    out[4 * n + i] = static_cast<uint32_t>(count_ones(a[i]));
    out[5 * n + i] = static_cast<uint32_t>(leading_zeros(a[i] >> (b[i] & 31)));
    out[6 * n + i] = float_bits(bits_float(a[i]));
}
EXL_KERNEL(integers_kernel);

// halves [3, n]: float16, bfloat16, and a float16 of two at once; floats [7, n]
extern "C" __global__ void __launch_bounds__(256)
    floats_kernel(const float* in, uint16_t* halves, float* floats, int32_t n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float value = in[i];
    halves[i] = float_to_half(value);
    halves[n + i] = float_to_bf16(value);
    halves[2 * n + i] = static_cast<uint16_t>(floats_to_half2(0.0f, value) >> 16);
    floats[i] = half_to_float(halves[i]);
    floats[n + i] = bf16_to_float(halves[n + i]);
    floats[2 * n + i] = exp2_fast(value);
    floats[3 * n + i] = rcp_fast(value);
    floats[4 * n + i] = rsqrt_fast(fabsf(value));
    floats[5 * n + i] = static_cast<float>(round_int(value));
    floats[6 * n + i] = mul_rn(value, value) + bf162_to_float2(floats_to_bf162(value, 1.0f)).y +
                        half2_to_float2(floats_to_half2(1.0f, value)).x;
}
EXL_KERNEL(floats_kernel);

// Pairs of float16; out [4, n]
extern "C" __global__ void __launch_bounds__(256)
    halves_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out,
                  int32_t n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[i] = h2_fma(a[i], b[i], c[i]);
    out[n + i] = h2_add(a[i], b[i]);
    out[2 * n + i] = h2_sub(a[i], b[i]);
    out[3 * n + i] = h2_mul(a[i], b[i]);
}
EXL_KERNEL(halves_kernel);

// ---- Faults -----------------------------------------------------------------------------------

enum Fault : int32_t {
    kDivergentWarp, kDivergentBlock, kDivergentSites, kLeftEarly, kLeftCopies, kWroteBehind,
    kMisalignedLoad, kCopyToGlobal, kMatrixOfGlobal, kReadBehind, kReadGlobalBehind,
    kSignedOverflow,
};

extern "C" __global__ void __launch_bounds__(64)
    faulty_kernel(int32_t fault, uint4* global, int32_t shared_bytes) {
    EXL_SHARED(char, memory);
    const int i = threadIdx.x;
    uint32_t d[4] = {};
    switch (fault) {
        case kDivergentWarp:
            if (i < 16) shfl(i, 0);
            else ballot(true);
            break;
        case kDivergentBlock:
            if (i < 32) block_sync();
            else warp_sync();
            break;
        case kDivergentSites:
            if (i < 32) block_sync();
            else
                block_sync();
            break;
        case kLeftEarly:
            if (i == 40) return;
            block_sync();
            break;
        case kLeftCopies: copy_async16(memory + 16 * i, global + i); break;
        case kWroteBehind: memory[shared_bytes + i] = 1; break;
        case kMisalignedLoad: load_nc16(reinterpret_cast<char*>(global) + 4); break;
        case kCopyToGlobal: copy_async16(global, global + 1); break;
        case kMatrixOfGlobal: load_matrix_x4(d, global); break;
        case kReadBehind: global->x = static_cast<uint32_t>(memory[shared_bytes]); break;
        case kReadGlobalBehind: global->x = global[66].x; break;
        case kSignedOverflow: global->x = static_cast<uint32_t>(i + 0x7FFFFFFF); break;
    }
}
EXL_KERNEL(faulty_kernel);

}  // namespace exl
