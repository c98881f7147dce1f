// The names of csrc/cuda/platform.cuh for the CPU; that file documents them.
//
// Included by emulation.h, which implements them.
#pragma once

// Default arguments are the caller's source location.
#define EXL_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace exl {

inline int lane_id() { return threadIdx.x & 31; }
inline int warp_id() { return threadIdx.x >> 5; }

inline void warp_sync(EXL_SITE) {
    exl_emulation::wait_warp({"warp_sync", file, line}, [](auto&) {}, nullptr);
}
inline void block_sync(EXL_SITE) { exl_emulation::wait_block({"block_sync", file, line}); }

template <typename T>
T shfl(T value, int source_lane, EXL_SITE) {
    return exl_emulation::shuffle<T>({"shfl", file, line}, value, source_lane & 31);
}
template <typename T>
T shfl_xor(T value, int lane_mask, EXL_SITE) {
    return exl_emulation::shuffle<T>({"shfl_xor", file, line}, value,
                                     (lane_id() ^ lane_mask) & 31);
}
template <typename T>
T shfl_down(T value, int delta, EXL_SITE) {
    const int source = lane_id() + delta;
    return exl_emulation::shuffle<T>({"shfl_down", file, line}, value,
                                     source < 32 ? source : lane_id());
}
template <typename T>
T shfl_up(T value, int delta, EXL_SITE) {
    const int source = lane_id() - delta;
    return exl_emulation::shuffle<T>({"shfl_up", file, line}, value,
                                     source >= 0 ? source : lane_id());
}
inline uint32_t ballot(bool predicate, EXL_SITE) {
    struct Vote {
        bool predicate;
        uint32_t result;
    } mine{predicate, 0};
    exl_emulation::wait_warp({"ballot", file, line}, [](auto& operands) {
        uint32_t votes = 0;
        for (int lane = 0; lane < 32; lane++)
            votes |= static_cast<uint32_t>(static_cast<Vote*>(operands[lane])->predicate) << lane;
        for (void* operand : operands) static_cast<Vote*>(operand)->result = votes;
    }, &mine);
    return mine.result;
}

// Fibers share an OS thread and switch at collectives only, so a plain addition is atomic.
inline int32_t atomic_add(int32_t* address, int32_t value) {
    const int32_t before = *address;
    *address = static_cast<int32_t>(static_cast<uint32_t>(before) + static_cast<uint32_t>(value));
    return before;
}
inline uint32_t atomic_add(uint32_t* address, uint32_t value) {
    const uint32_t before = *address;
    *address = before + value;
    return before;
}
inline void thread_fence() {}

inline uint4 load_nc16(const void* source) {
    return exl_emulation::load<uint4>(source, "load_nc16");
}
inline uint2 load_nc8(const void* source) {
    return exl_emulation::load<uint2>(source, "load_nc8");
}
inline uint32_t load_nc4(const void* source) {
    return exl_emulation::load<uint32_t>(source, "load_nc4");
}
inline uint4 load_cg16(const void* source) {
    return exl_emulation::load<uint4>(source, "load_cg16");
}
inline float load_cg(const float* source) { return *source; }
inline void prefetch_l2(const void*) {}

inline void copy_async16(void* shared, const void* source, bool valid = true) {
    exl_emulation::copy_async(shared, source, valid);
}
inline void copy_async_commit() { exl_emulation::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
    exl_emulation::copy_async_wait(kPending);
}

#define EXL_EMULATED_MMA(function, element, finish)                                            \
    inline void function(element (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],      \
                         EXL_SITE) {                                                           \
        exl_emulation::Fragments mine{d, a, b};                                                \
        exl_emulation::wait_warp({#function, file, line}, exl_emulation::finish, &mine);       \
    }
EXL_EMULATED_MMA(mma_u8s8_16x8x32, int32_t, finish_mma_u8s8)
EXL_EMULATED_MMA(mma_s8s8_16x8x32, int32_t, finish_mma_s8s8)
EXL_EMULATED_MMA(mma_f16_16x8x16, float, finish_mma_f16)
EXL_EMULATED_MMA(mma_bf16_16x8x16, float, finish_mma_bf16)
#undef EXL_EMULATED_MMA
constexpr bool kHasBf16Mma = true;

inline void load_matrix(const exl_emulation::Site& site, exl_emulation::Finish finish,
                        uint32_t (&d)[4], const void* shared_row) {
    exl_emulation::check_aligned(shared_row, 16, site.operation);
    if (!exl_emulation::is_shared(shared_row, 16))
        exl_emulation::fail("%s of an address that is not shared memory", site.operation);
    exl_emulation::Fragments mine{d, static_cast<const uint32_t*>(shared_row), nullptr};
    exl_emulation::wait_warp(site, finish, &mine);
}
inline void load_matrix_x4(uint32_t (&d)[4], const void* shared_row, EXL_SITE) {
    load_matrix({"load_matrix_x4", file, line}, exl_emulation::finish_load_matrix, d, shared_row);
}
inline void load_matrix_x4_transposed(uint32_t (&d)[4], const void* shared_row, EXL_SITE) {
    load_matrix({"load_matrix_x4_transposed", file, line},
                exl_emulation::finish_load_matrix_transposed, d, shared_row);
}

// Element c of row r is in lane 4 * r + c / 2; the low half of a word is the even element.
inline uint32_t transpose_matrix(uint32_t a, EXL_SITE) {
    const int column = lane_id() / 4, row = lane_id() % 4 * 2, shift = 16 * (column % 2);
    const uint32_t even = shfl(a, 4 * row + column / 2, file, line) >> shift & 0xFFFFu;
    const uint32_t odd = shfl(a, 4 * (row + 1) + column / 2, file, line) >> shift & 0xFFFFu;
    return even | odd << 16;
}

inline int32_t dp4a_us(uint32_t a, uint32_t b, int32_t c) {
    for (int shift = 0; shift < 32; shift += 8)
        c += static_cast<uint8_t>(a >> shift) * static_cast<int8_t>(b >> shift);
    return c;
}
inline int32_t dp4a_ss(uint32_t a, uint32_t b, int32_t c) {
    for (int shift = 0; shift < 32; shift += 8)
        c += static_cast<int8_t>(a >> shift) * static_cast<int8_t>(b >> shift);
    return c;
}
inline uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t nibble = selector >> (4 * i) & 15;
        uint8_t byte = static_cast<uint8_t>(both >> (8 * (nibble & 7)));
        if (nibble & 8) byte = byte & 0x80 ? 0xFF : 0;
        result |= static_cast<uint32_t>(byte) << (8 * i);
    }
    return result;
}
inline uint32_t funnel_shift_right(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline int count_ones(uint32_t value) { return __builtin_popcount(value); }
inline int leading_zeros(uint32_t value) { return value ? __builtin_clz(value) : 32; }

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float mul_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
// The GPU's conversion saturates and converts NaN to 0.
inline int32_t round_int(float value) {
    if (!(value == value)) return 0;
    if (value >= 2147483648.0f) return INT32_MAX;
    if (value < -2147483648.0f) return INT32_MIN;
    return static_cast<int32_t>(std::nearbyint(value));
}
inline float fma_saturated(float a, float b, float c) {
    return std::fmin(1.0f, std::fmax(0.0f, std::fma(a, b, c)));
}
inline float ceil_small(float value) {
    if (!(std::fabs(value) < 0x1p22f)) exl_emulation::fail("ceil_small of %g", value);
    return std::ceil(value);
}
inline float exp2_fast(float value) {
    const float result = std::exp2(value);
    return result < 0x1p-126f ? 0.0f : result;
}
inline float rcp_fast(float value) { return 1.0f / value; }
inline float rsqrt_fast(float value) { return 1.0f / std::sqrt(value); }

inline float half_to_float(uint16_t bits) { return exl_emulation::half_value(bits); }
inline uint16_t float_to_half(float value) { return exl_emulation::half_nearest(value); }
inline float2 half2_to_float2(uint32_t bits) {
    return {half_to_float(static_cast<uint16_t>(bits)),
            half_to_float(static_cast<uint16_t>(bits >> 16))};
}
inline uint32_t floats_to_half2(float low, float high) {
    return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
inline float bf16_to_float(uint16_t bits) {
    return bits_float(static_cast<uint32_t>(bits) << 16);
}
inline float2 bf162_to_float2(uint32_t bits) {
    return {bits_float(bits << 16), bits_float(bits & 0xFFFF0000u)};
}
inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = float_bits(value);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
inline uint32_t floats_to_bf162(float low, float high) {
    return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
}

// The sum of a half and a product of two is exact in a double, except bits far below a half's.
template <typename Function>
uint32_t each_half(Function function) {
    return function(0) | static_cast<uint32_t>(function(16)) << 16;
}
inline uint32_t h2_fma(uint32_t a, uint32_t b, uint32_t c) {
    return each_half([=](int shift) {
        const auto part = [shift](uint32_t v) {
            return static_cast<double>(half_to_float(static_cast<uint16_t>(v >> shift)));
        };
        return exl_emulation::half_nearest(part(a) * part(b) + part(c));
    });
}
inline uint32_t h2_add(uint32_t a, uint32_t b) { return h2_fma(a, 0x3C003C00u, b); }
inline uint32_t h2_sub(uint32_t a, uint32_t b) { return h2_fma(b, 0xBC00BC00u, a); }
// Adding minus zero changes no product, not even its sign.
inline uint32_t h2_mul(uint32_t a, uint32_t b) { return h2_fma(a, b, 0x80008000u); }

}  // namespace exl

#undef EXL_SITE
