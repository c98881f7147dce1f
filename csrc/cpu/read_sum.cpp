// Sums a buffer, to measure how fast memory is read: the upper limit of decoding.
//
// Layout: int32, contiguous. Work per thread: consecutive claims of 256 KiB, in vectors of 64
// bytes: nothing but loads and as many additions.
#include <atomic>
#include <cstdint>

#include "api.h"
#include "simd.h"
#include "threads.h"

namespace exl {
namespace {

// Vectors that are summed independently, so that no load waits for an addition.
constexpr int64_t kChains = 8;
constexpr int64_t kClaim = 64 * 1024;
static_assert(kClaim % (kChains * kLanes) == 0, "a claim is whole vectors");

int32_t sum_claim(const int32_t* data) {
    I32x16 chains[kChains];
    for (auto& chain : chains) chain = broadcast(int32_t{0});
    for (int64_t i = 0; i < kClaim; i += kChains * kLanes) {
        for (int64_t c = 0; c < kChains; ++c) chains[c] = chains[c] + load(data + i + c * kLanes);
    }
    for (int64_t c = 1; c < kChains; ++c) chains[0] = chains[0] + chains[c];
    int32_t lanes[kLanes];
    store(lanes, chains[0]);
    uint32_t total = 0;
    for (const int32_t lane : lanes) total += static_cast<uint32_t>(lane);
    return static_cast<int32_t>(total);
}

}  // namespace
}  // namespace exl

// Writes the sum of data[0..count) modulo 2^32 to out.
EXL_API void exl_read_sum(const int32_t* data, int64_t count, int32_t* out) {
    using namespace exl;
    std::atomic<uint32_t> total{0};
    const int64_t claims = count / kClaim;
    parallel_for(claims, 1, [&](int64_t first, int64_t end, int) {
        uint32_t part = 0;
        for (int64_t i = first; i < end; ++i) {
            part += static_cast<uint32_t>(sum_claim(data + i * kClaim));
        }
        total += part;
    });
    for (int64_t i = claims * kClaim; i < count; ++i) total += static_cast<uint32_t>(data[i]);
    *out = static_cast<int32_t>(total.load());
}
