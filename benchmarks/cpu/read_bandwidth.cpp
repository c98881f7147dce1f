// Measures how fast this machine reads memory: the upper limit of decoding.
//
// Sums a buffer in 64-byte vectors on the kernels' own thread pool, in contiguous parts, one a
// thread: nothing but loads and as many additions.
#include <cstdint>

#include "cpu/simd.h"
#include "cpu/threads.h"

extern "C" int64_t read_bandwidth_sum(const int32_t* data, int64_t count) {
    using namespace exl;
    constexpr int64_t kChains = 8;
    constexpr int64_t kPart = 64 * 1024;  // int32 of a claim: 256 KiB
    int64_t total = 0;
    int32_t sums[256] = {};
    parallel_for(count / kPart, 1, [&](int64_t first, int64_t end, int thread) {
        I32x16 acc[kChains];
        for (auto& a : acc) a = broadcast(int32_t{0});
        for (int64_t i = first * kPart; i < end * kPart; i += kChains * kLanes) {
            for (int64_t c = 0; c < kChains; ++c) acc[c] = acc[c] + load(data + i + c * kLanes);
        }
        int32_t lanes[kLanes];
        for (int64_t c = 1; c < kChains; ++c) acc[0] = acc[0] + acc[c];
        store(lanes, acc[0]);
        for (const int32_t lane : lanes) sums[thread % 256] += lane;
    });
    for (const int32_t sum : sums) total += sum;
    return total;
}
