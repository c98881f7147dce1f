// The largest logits of each row in order, and the sum of all others: what a sampler needs of a
// row of 32k to 256k logits, in 8 KiB instead of up to a MiB.
//
// Logits are told apart by their distance to the row's largest, in bins of 1/64 up to 32; what
// is further away has less than 1e-13 of its probability. Of the bins, as many from the first
// are taken as hold kMost logits or fewer, so equal logits are taken together or not at all.
// Bins are a monotone function of the logit in float32 as well: every logit that is taken is
// larger than every other one.
//
// Three launches, because each needs what all blocks of the one before have found:
//   survey_logits_kernel   the largest logit, and whether all are finite
//   count_logits_kernel    how many are in each bin
//   take_logits_kernel     takes them, sums the others; a row's last block sorts
// Work: grid.x blocks share a row tile by tile (kernels/cuda/ops_sampling.py), grid.y rows.
// Sums are added in an order that the row's width alone decides.
//
// Scratch of a row (words of 4 bytes; kScratchWords before those of blocks):
//   keys[kMost], counts[kBins], taken, arrived, 2 unused, largest[blocks], others[blocks],
//   up to a multiple of 4
// Result of a row: all_finite, number taken, largest, sum of exp(logit - largest) of the others;
// ids[kMost], logits[kMost], falling, equal ones by rising id. Of a row that is not finite:
// nothing is taken.
#include "cuda/platform.cuh"

namespace exl {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = 8;
constexpr int kTile = kPerThread * kThreads;
constexpr int kMost = 2 * kThreads;  // a pair a thread is what the sort wants
constexpr int kBins = 2048;
constexpr float kBinsPerUnit = 64.0f;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kScratchWords = 2 * kMost + kBins + 4;
constexpr int kHeaderWords = 4;
constexpr uint64_t kNothing = ~0ull;  // behind every key

__device__ __forceinline__ float infinity() { return bits_float(0x7F800000u); }

struct RowScratch {
    uint64_t* keys;
    int32_t* counts;
    int32_t* taken;
    int32_t* arrived;
    float* largest;
    float* others;
};

__device__ __forceinline__ RowScratch scratch_of_row(int32_t* scratch) {
    const int blocks = gridDim.x;
    const int row_words = kScratchWords + (2 * blocks + 3) / 4 * 4;  // keys are read by fours
    int32_t* words = scratch + static_cast<int64_t>(blockIdx.y) * row_words;
    int32_t* counts = words + 2 * kMost;
    float* floats = reinterpret_cast<float*>(words + kScratchWords);
    return {reinterpret_cast<uint64_t*>(words), counts, counts + kBins, counts + kBins + 1,
            floats, floats + blocks};
}

// Infinite where a logit of the row is not finite; the same in every lane. Called by whole warps.
__device__ __forceinline__ float largest_of_row(const float* largest) {
    float result = -infinity();
    for (int block = lane_id(); block < static_cast<int>(gridDim.x); block += 32) {
        result = fmaxf(result, largest[block]);
    }
    return warp_max(result);
}

// kBins or more where it is not among them.
__device__ __forceinline__ int bin_of(float logit, float largest) {
    const float distance = (largest - logit) * kBinsPerUnit;
    return distance < static_cast<float>(kBins) ? static_cast<int>(distance) : kBins;
}

// Rises where the logit falls, and with the id of equal logits; both zeros are equal.
__device__ __forceinline__ uint64_t key_of(float logit, int id) {
    const uint32_t bits = float_bits(logit + 0.0f);
    const uint32_t falling = bits & 0x80000000u ? bits : ~bits & 0x7FFFFFFFu;
    return static_cast<uint64_t>(falling) << 32 | static_cast<uint32_t>(id);
}
__device__ __forceinline__ float logit_of(uint64_t key) {
    const uint32_t falling = static_cast<uint32_t>(key >> 32);
    return bits_float(falling & 0x80000000u ? falling : ~falling & 0x7FFFFFFFu);
}

// Calls use(id, logit) for this thread's logits of the block's tiles. A tile's are read before
// the first is used: what `use` writes might be one of them, for all the compiler knows.
template <typename Use>
__device__ __forceinline__ void each_logit(const float* row, int size, Use use) {
    for (int tile = blockIdx.x * kTile; tile < size; tile += gridDim.x * kTile) {
        const int first = tile + threadIdx.x;
        float logits[kPerThread];
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            const int id = first + i * kThreads;
            logits[i] = id < size ? row[id] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            const int id = first + i * kThreads;
            if (id < size) use(id, logits[i]);
        }
    }
}

// How many bins from the first hold kMost logits or fewer, and how many these are. `words` is
// shared, kWarps + 2 of them.
__device__ __forceinline__ int2 choose_bins(const int32_t* counts, int32_t* words) {
    const int first = threadIdx.x * kBinsPerThread;
    int sum = 0;
    for (int i = 0; i < kBinsPerThread; ++i) sum += counts[first + i];
    int before = sum;  // inclusive in the warp, at first
    for (int delta = 1; delta < 32; delta <<= 1) {
        const int lower = shfl_up(before, delta);
        if (lane_id() >= delta) before += lower;
    }
    if (lane_id() == 31) words[warp_id()] = before;
    block_sync();  // the warps' sums are read by those behind them
    before -= sum;
    for (int warp = 0; warp < warp_id(); ++warp) before += words[warp];
    // Exactly one thread has the bin that is too much; where none is, the last thread's word.
    int bins = first;
    int end = before;
    while (bins < first + kBinsPerThread && end + counts[bins] <= kMost) end += counts[bins++];
    if (before <= kMost && (bins < first + kBinsPerThread || bins == kBins)) {
        words[kWarps] = bins;
        words[kWarps + 1] = end;
    }
    block_sync();  // the choice is read by all
    return make_int2(words[kWarps], words[kWarps + 1]);
}

// Rising; `size` a power of two up to kMost. Bitonic: a pair a thread a step.
__device__ __forceinline__ void sort_keys(uint64_t* keys, int size) {
    const int thread = threadIdx.x;
    for (int run = 2; run <= size; run <<= 1) {
        for (int apart = run >> 1; apart > 0; apart >>= 1) {
            block_sync();  // each step reads what others wrote in the one before
            const int low = 2 * thread - (thread & (apart - 1));
            if (low < size) {
                const uint64_t a = keys[low];
                const uint64_t b = keys[low + apart];
                if ((a > b) == ((low & run) == 0)) {
                    keys[low] = b;
                    keys[low + apart] = a;
                }
            }
        }
    }
    block_sync();  // sorted keys are read by all
}

}  // namespace exl

// Also empties the row's counts. logits: float32, rows `stride` apart, of which `size` count.
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    survey_logits_kernel(const float* logits, int64_t stride, int32_t size, int32_t* scratch) {
    using namespace exl;
    EXL_SHARED(float, of_warps);
    const RowScratch mine = scratch_of_row(scratch);
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < kBins + 2; i += gridDim.x * kThreads) {
        mine.counts[i] = 0;
    }
    float largest = -infinity();
    each_logit(logits + blockIdx.y * stride, size, [&](int, float logit) {
        const bool finite = (float_bits(logit) & 0x7FFFFFFFu) < 0x7F800000u;
        largest = fmaxf(largest, finite ? logit : infinity());
    });
    largest = warp_max(largest);
    if (lane_id() == 0) of_warps[warp_id()] = largest;
    block_sync();  // of_warps is read by the first thread
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < kWarps; ++warp) largest = fmaxf(largest, of_warps[warp]);
    mine.largest[blockIdx.x] = largest;
}
EXL_KERNEL(survey_logits_kernel);

extern "C" __global__ void __launch_bounds__(exl::kThreads)
    count_logits_kernel(const float* logits, int64_t stride, int32_t size, int32_t* scratch) {
    using namespace exl;
    EXL_SHARED(int32_t, counts);
    const RowScratch mine = scratch_of_row(scratch);
    const float largest = largest_of_row(mine.largest);
    if (largest == infinity()) return;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) counts[bin] = 0;
    block_sync();  // all are 0 before any is counted
    each_logit(logits + blockIdx.y * stride, size, [&](int, float logit) {
        const int bin = bin_of(logit, largest);
        if (bin < kBins) atomic_add(counts + bin, 1);
    });
    block_sync();  // the block's counts are complete
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
        if (counts[bin] != 0) atomic_add(mine.counts + bin, counts[bin]);
    }
}
EXL_KERNEL(count_logits_kernel);

extern "C" __global__ void __launch_bounds__(exl::kThreads)
    take_logits_kernel(const float* logits, int64_t stride, int32_t size, int32_t* scratch,
                       int32_t* out) {
    using namespace exl;
    EXL_SHARED(uint64_t, keys);  // and before the sort, kWarps + 3 words
    int32_t* words = reinterpret_cast<int32_t*>(keys);
    const RowScratch mine = scratch_of_row(scratch);
    const float largest = largest_of_row(mine.largest);
    const bool finite = largest < infinity();
    const int2 choice = choose_bins(mine.counts, words);
    const int bins = finite ? choice.x : 0;
    const int taken = finite ? choice.y : 0;
    float others = 0.0f;
    each_logit(logits + blockIdx.y * stride, size, [&](int id, float logit) {
        if (!finite) return;
        if (bin_of(logit, largest) < bins) {
            mine.keys[atomic_add(mine.taken, 1)] = key_of(logit, id);
        } else {
            others += expf(logit - largest);
        }
    });
    others = warp_sum(others);
    block_sync();  // the choice has been read: its words are free
    float* of_warps = reinterpret_cast<float*>(words);
    if (lane_id() == 0) of_warps[warp_id()] = others;
    thread_fence();  // this thread's keys are there before the block is counted
    block_sync();    // of_warps is read by the first thread
    if (threadIdx.x == 0) {
        others = 0.0f;
        for (int warp = 0; warp < kWarps; ++warp) others += of_warps[warp];
        mine.others[blockIdx.x] = others;
        thread_fence();
        words[kWarps] = atomic_add(mine.arrived, 1);
    }
    block_sync();  // who is last is known to all
    if (words[kWarps] != static_cast<int>(gridDim.x) - 1) return;
    thread_fence();

    out += static_cast<int64_t>(blockIdx.y) * (kHeaderWords + 2 * kMost);
    if (threadIdx.x == 0) {
        others = 0.0f;
        for (int block = 0; block < static_cast<int>(gridDim.x); ++block) {
            others += load_cg(mine.others + block);
        }
        out[0] = finite;
        out[1] = taken;
        out[2] = static_cast<int32_t>(float_bits(largest));
        out[3] = static_cast<int32_t>(float_bits(others));
    }
    block_sync();  // words are read before keys take their place
    const int place = 2 * threadIdx.x;
    const uint4 pair = load_cg16(mine.keys + place);
    keys[place] = place < taken ? static_cast<uint64_t>(pair.y) << 32 | pair.x : kNothing;
    keys[place + 1] = place + 1 < taken ? static_cast<uint64_t>(pair.w) << 32 | pair.z : kNothing;
    int width = 2;
    while (width < taken) width <<= 1;
    sort_keys(keys, width);
    for (int i = threadIdx.x; i < taken; i += kThreads) {
        out[kHeaderWords + i] = static_cast<int32_t>(keys[i] & 0xFFFFFFFFu);
        out[kHeaderWords + kMost + i] = static_cast<int32_t>(float_bits(logit_of(keys[i])));
    }
}
EXL_KERNEL(take_logits_kernel);
