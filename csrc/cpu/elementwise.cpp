// Elementwise operations: activations, gates, sums, limits, soft caps.
//
// Layout: float32, contiguous. Work per thread: runs of elements, a multiple of 16. The tail is
// computed by the same vector code, so an element's result does not depend on its position.
#include <cmath>

#include "common.h"
#include "replay.h"
#include "simd_math.h"
#include "threads.h"

namespace exl {
namespace {

// Elements that are worth the cost of a claim: about 5 us of reading and writing.
constexpr int64_t kElementsPerTask = 16 * 1024;

// Calls f(offset, count) over the elements in steps of 16; count is below 16 only in the tail.
template <class Function>
void for_each_vector(int64_t elements, const Function& f) {
    const int64_t vectors = ceil_div(elements, kLanes);
    parallel_for(vectors, balanced_grain(vectors, kElementsPerTask / kLanes),
                 [&](int64_t first, int64_t end, int) {
                     const int64_t full = end * kLanes <= elements ? end : end - 1;
                     for (int64_t v = first; v < full; ++v) f(v * kLanes, int64_t{kLanes});
                     if (full < end) f(full * kLanes, elements - full * kLanes);
                 });
}

EXL_INLINE F32x16 load_up_to(const float* p, int64_t count) {
    return count == kLanes ? load(p) : load_part(p, count);
}
EXL_INLINE void store_up_to(float* p, F32x16 a, int64_t count) {
    if (count == kLanes) {
        store(p, a);
    } else {
        store_part(p, a, count);
    }
}

EXL_INLINE F32x16 silu(F32x16 x) {
    const F32x16 one = broadcast(1.0f);
    return x / (one + exp(broadcast(0.0f) - x));
}

// x/2 (1 + tanh u) = x / (1 + e^-2u); the second form has no cancellation for negative x.
EXL_INLINE F32x16 gelu_tanh(F32x16 x) {
    const F32x16 inner = fma(broadcast(kGeluCubic) * x * x, x, x);
    return x / (broadcast(1.0f) + exp(broadcast(kMinusTwoRootTwoOverPi) * inner));
}

// x/2 erfc(-x / sqrt 2), which has no cancellation for negative x.
EXL_INLINE F32x16 gelu(F32x16 x) {
    float lanes[kLanes];
    store(lanes, x);
    for (float& lane : lanes) lane = 0.5f * lane * std::erfc(kMinusRootHalf * lane);
    return load(lanes);
}

// NaN stays NaN because `max` returns its second operand if an operand is NaN.
EXL_INLINE F32x16 relu(F32x16 x) { return max(broadcast(0.0f), x); }

EXL_INLINE F32x16 quick_gelu(F32x16 x) {
    return x / (broadcast(1.0f) + exp(broadcast(kMinusQuickGelu) * x));
}

// NaN stays NaN, as in `relu`.
EXL_INLINE F32x16 clamped_swiglu(F32x16 gate, F32x16 up) {
    const F32x16 limit = broadcast(kSwigluLimit);
    const F32x16 factor = max(broadcast(-kSwigluLimit), min(limit, up)) + broadcast(1.0f);
    return quick_gelu(min(limit, gate)) * factor;
}

// Calls f(function) with the vector function of an activation, so that f is compiled for each.
template <class Function>
void with_activation(int32_t activation, const Function& f) {
    switch (activation) {
        case kSilu: return f([](F32x16 x) { return silu(x); });
        case kGeluTanh: return f([](F32x16 x) { return gelu_tanh(x); });
        case kGelu: return f([](F32x16 x) { return gelu(x); });
        case kRelu: return f([](F32x16 x) { return relu(x); });
        case kRelu2: return f([](F32x16 x) { return relu(x) * relu(x); });
        case kQuickGelu: return f([](F32x16 x) { return quick_gelu(x); });
    }
}

}  // namespace
}  // namespace exl

// out = activation(gate) * up; gate, up, out: float32 [elements]. out may be gate or up.
EXL_API void exl_gate(const float* gate, const float* up, float* out, int64_t elements,
                      int32_t activation) {
    using namespace exl;
    with_activation(activation, [&](const auto& function) {
        for_each_vector(elements, [&](int64_t offset, int64_t count) {
            const F32x16 activated = function(load_up_to(gate + offset, count));
            store_up_to(out + offset, activated * load_up_to(up + offset, count), count);
        });
    });
    if (activation != kClampedSwiglu) return;
    for_each_vector(elements, [&](int64_t offset, int64_t count) {
        const F32x16 product = clamped_swiglu(load_up_to(gate + offset, count),
                                              load_up_to(up + offset, count));
        store_up_to(out + offset, product, count);
    });
}
EXL_REPLAYED(gate)

// out = activation(x); x, out: float32 [elements], may be the same.
EXL_API void exl_activate(const float* x, float* out, int64_t elements, int32_t activation) {
    using namespace exl;
    with_activation(activation, [&](const auto& function) {
        for_each_vector(elements, [&](int64_t offset, int64_t count) {
            store_up_to(out + offset, function(load_up_to(x + offset, count)), count);
        });
    });
}
EXL_REPLAYED(activate)

// x += y * factor; x, y: float32 [elements].
EXL_API void exl_add(float* x, const float* y, float factor, int64_t elements) {
    using namespace exl;
    const F32x16 factors = broadcast(factor);
    for_each_vector(elements, [&](int64_t offset, int64_t count) {
        const F32x16 total = load_up_to(x + offset, count);
        store_up_to(x + offset, fma(load_up_to(y + offset, count), factors, total), count);
    });
}
EXL_REPLAYED(add)

// x = min(max(x, -limit), limit); x: float32 [elements]. NaN stays NaN, as in `relu`.
EXL_API void exl_clamp(float* x, float limit, int64_t elements) {
    using namespace exl;
    const F32x16 largest = broadcast(limit), least = broadcast(-limit);
    for_each_vector(elements, [&](int64_t offset, int64_t count) {
        store_up_to(x + offset, max(least, min(largest, load_up_to(x + offset, count))), count);
    });
}
EXL_REPLAYED(clamp)

// x = cap * tanh(x / cap); x: float32 [elements].
EXL_API void exl_softcap(float* x, float cap, int64_t elements) {
    using namespace exl;
    const F32x16 caps = broadcast(cap);
    for_each_vector(elements, [&](int64_t offset, int64_t count) {
        store_up_to(x + offset, caps * tanh(load_up_to(x + offset, count) / caps), count);
    });
}
EXL_REPLAYED(softcap)
