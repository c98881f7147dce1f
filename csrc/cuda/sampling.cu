// The largest logits of each row in order, and the sum of all others.
//
// Purpose: give a sampler what it needs of a row of 32k to 256k logits in 8 KiB instead of up to a
// MiB.
//
// Logits are sorted into bins by their distance to the row's largest logit: 2048 bins of 1/64, up
// to a distance of 32, where a logit has less than 1e-13 of the largest probability. The bins from
// the first on are taken as long as they hold at most kMaxTaken logits in total, so equal logits
// are taken together or not at all. Bins are a monotone function of the logit in float32 as well,
// so every taken logit is larger than every other one.
//
// Three launches, because each needs the results of all blocks of the one before:
//   survey_logits_kernel   finds the largest logit, and whether all are finite
//   count_logits_kernel    counts the logits of each bin
//   take_logits_kernel     takes logits and sums the others; the last block of a row sorts
//
// Work: grid.x blocks share a row tile by tile, grid.y rows. Sums are added in an order that
// depends only on the row's width.
//
// Layout of the scratch of a row (words of 4 bytes; kScratchWords before those of blocks):
//   keys[kMaxTaken], counts[kBins], taken, arrived, 2 unused, largest[blocks], others[blocks],
//   padded to a multiple of 4
// Layout of the result of a row: all_finite, number taken, largest, sum of exp(logit - largest) of
// the others; ids[kMaxTaken], logits[kMaxTaken], by falling logits and by rising ids among equal
// ones. If a row is not finite, nothing is taken.
//
// Shared memory: survey kWarps floats; count kBins int32; take kMaxTaken keys of 8 bytes.
#include "cuda/platform.cuh"

namespace exl {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = 8;
constexpr int kTile = kPerThread * kThreads;
constexpr int kMaxTaken = 2 * kThreads;  // the sort handles a pair per thread
constexpr int kBins = 2048;
constexpr float kBinsPerUnit = 64.0f;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kScratchWords = 2 * kMaxTaken + kBins + 4;
constexpr int kHeaderWords = 4;
constexpr uint64_t kNothing = ~0ull;  // sorts after every key

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
    int32_t* counts = words + 2 * kMaxTaken;
    float* floats = reinterpret_cast<float*>(words + kScratchWords);
    return {reinterpret_cast<uint64_t*>(words), counts, counts + kBins, counts + kBins + 1,
            floats, floats + blocks};
}

// The largest logit of a row; infinite if a logit is not finite. The same in every lane. Must be
// called by whole warps.
__device__ __forceinline__ float largest_of_row(const float* largest) {
    float result = -infinity();
    for (int block = lane_id(); block < static_cast<int>(gridDim.x); block += 32) {
        result = fmaxf(result, largest[block]);
    }
    return warp_max(result);
}

// The bin of a logit; kBins if it is beyond the last bin.
__device__ __forceinline__ int bin_of(float logit, float largest) {
    const float distance = (largest - logit) * kBinsPerUnit;
    return distance < static_cast<float>(kBins) ? static_cast<int>(distance) : kBins;
}

// A key that rises as the logit falls, and rises with the id of equal logits; both zeros are equal.
__device__ __forceinline__ uint64_t key_of(float logit, int id) {
    const uint32_t bits = float_bits(logit + 0.0f);
    const uint32_t falling = bits & 0x80000000u ? bits : ~bits & 0x7FFFFFFFu;
    return static_cast<uint64_t>(falling) << 32 | static_cast<uint32_t>(id);
}
__device__ __forceinline__ float logit_of(uint64_t key) {
    const uint32_t falling = static_cast<uint32_t>(key >> 32);
    return bits_float(falling & 0x80000000u ? falling : ~falling & 0x7FFFFFFFu);
}

// Calls use(id, logit) for this thread's logits of the block's tiles. All logits of a tile are read
// before the first is used, because the compiler must assume that `use` writes to them.
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

// Returns the number of bins to take, and the number of logits in them. `words` is shared memory of
// kWarps + 2 words.
__device__ __forceinline__ int2 choose_bins(const int32_t* counts, int32_t* words) {
    const int first = threadIdx.x * kBinsPerThread;
    int sum = 0;
    for (int i = 0; i < kBinsPerThread; ++i) sum += counts[first + i];
    int before = sum;  // first inclusive, within the warp
    for (int delta = 1; delta < 32; delta <<= 1) {
        const int lower = shfl_up(before, delta);
        if (lane_id() >= delta) before += lower;
    }
    if (lane_id() == 31) words[warp_id()] = before;
    block_sync();  // the sums of the warps are read by later warps
    before -= sum;
    for (int warp = 0; warp < warp_id(); ++warp) before += words[warp];
    // Exactly one thread has the first bin that exceeds the limit; if there is none, the last
    // thread writes.
    int bins = first;
    int end = before;
    while (bins < first + kBinsPerThread && end + counts[bins] <= kMaxTaken) end += counts[bins++];
    if (before <= kMaxTaken && (bins < first + kBinsPerThread || bins == kBins)) {
        words[kWarps] = bins;
        words[kWarps + 1] = end;
    }
    block_sync();  // the choice is read by all
    return make_int2(words[kWarps], words[kWarps + 1]);
}

// Sorts `size` keys in rising order, size a power of two up to kMaxTaken. Bitonic: one pair per
// thread and step.
__device__ __forceinline__ void sort_keys(uint64_t* keys, int size) {
    const int thread = threadIdx.x;
    for (int run = 2; run <= size; run <<= 1) {
        for (int distance = run >> 1; distance > 0; distance >>= 1) {
            block_sync();  // each step reads what others wrote in the one before
            const int low = 2 * thread - (thread & (distance - 1));
            if (low < size) {
                const uint64_t a = keys[low];
                const uint64_t b = keys[low + distance];
                if ((a > b) == ((low & run) == 0)) {
                    keys[low] = b;
                    keys[low + distance] = a;
                }
            }
        }
    }
    block_sync();  // sorted keys are read by all
}

}  // namespace exl

// Finds the largest logit of each block's part of a row. Also clears the row's counts.
//
// logits: float32, `size` columns, rows `stride` apart; scratch: see the layout above.
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    survey_logits_kernel(const float* logits, int64_t stride, int32_t size, int32_t* scratch) {
    using namespace exl;
    EXL_SHARED(float, warp_results);
    const RowScratch row_scratch = scratch_of_row(scratch);
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < kBins + 2; i += gridDim.x * kThreads) {
        row_scratch.counts[i] = 0;
    }
    float largest = -infinity();
    each_logit(logits + blockIdx.y * stride, size, [&](int, float logit) {
        const bool finite = (float_bits(logit) & 0x7FFFFFFFu) < 0x7F800000u;
        largest = fmaxf(largest, finite ? logit : infinity());
    });
    largest = warp_max(largest);
    if (lane_id() == 0) warp_results[warp_id()] = largest;
    block_sync();  // warp_results are read by the first thread
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < kWarps; ++warp) largest = fmaxf(largest, warp_results[warp]);
    row_scratch.largest[blockIdx.x] = largest;
}
EXL_KERNEL(survey_logits_kernel);

// Counts the logits of each bin. logits, scratch: as for survey_logits_kernel, which must run
// before.
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    count_logits_kernel(const float* logits, int64_t stride, int32_t size, int32_t* scratch) {
    using namespace exl;
    EXL_SHARED(int32_t, counts);
    const RowScratch row_scratch = scratch_of_row(scratch);
    const float largest = largest_of_row(row_scratch.largest);
    if (largest == infinity()) return;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) counts[bin] = 0;
    block_sync();  // all are 0 before any is counted
    each_logit(logits + blockIdx.y * stride, size, [&](int, float logit) {
        const int bin = bin_of(logit, largest);
        if (bin < kBins) atomic_add(counts + bin, 1);
    });
    block_sync();  // the block's counts are complete
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
        if (counts[bin] != 0) atomic_add(row_scratch.counts + bin, counts[bin]);
    }
}
EXL_KERNEL(count_logits_kernel);

// Takes the largest logits, sums the others, and sorts in the last block of a row.
//
// logits, scratch: as for count_logits_kernel, which must run before; out: int32
// [rows, kHeaderWords + 2 * kMaxTaken], see the layout above.
extern "C" __global__ void __launch_bounds__(exl::kThreads)
    take_logits_kernel(const float* logits, int64_t stride, int32_t size, int32_t* scratch,
                       int32_t* out) {
    using namespace exl;
    EXL_SHARED(uint64_t, keys);  // before the sort, kWarps + 3 words
    int32_t* words = reinterpret_cast<int32_t*>(keys);
    const RowScratch row_scratch = scratch_of_row(scratch);
    const float largest = largest_of_row(row_scratch.largest);
    const bool finite = largest < infinity();
    const int2 choice = choose_bins(row_scratch.counts, words);
    const int bins = finite ? choice.x : 0;
    const int taken = finite ? choice.y : 0;
    float others = 0.0f;
    each_logit(logits + blockIdx.y * stride, size, [&](int id, float logit) {
        if (!finite) return;
        if (bin_of(logit, largest) < bins) {
            row_scratch.keys[atomic_add(row_scratch.taken, 1)] = key_of(logit, id);
        } else {
            others += expf(logit - largest);
        }
    });
    others = warp_sum(others);
    block_sync();  // the choice has been read, so its words are free
    float* warp_results = reinterpret_cast<float*>(words);
    if (lane_id() == 0) warp_results[warp_id()] = others;
    thread_fence();  // this thread's keys are visible before the block is counted
    block_sync();    // warp_results are read by the first thread
    if (threadIdx.x == 0) {
        others = 0.0f;
        for (int warp = 0; warp < kWarps; ++warp) others += warp_results[warp];
        row_scratch.others[blockIdx.x] = others;
        thread_fence();
        words[kWarps] = atomic_add(row_scratch.arrived, 1);
    }
    block_sync();  // all threads know the last block
    if (words[kWarps] != static_cast<int>(gridDim.x) - 1) return;
    thread_fence();

    out += static_cast<int64_t>(blockIdx.y) * (kHeaderWords + 2 * kMaxTaken);
    if (threadIdx.x == 0) {
        others = 0.0f;
        for (int block = 0; block < static_cast<int>(gridDim.x); ++block) {
            others += load_cg(row_scratch.others + block);
        }
        out[0] = finite;
        out[1] = taken;
        out[2] = static_cast<int32_t>(float_bits(largest));
        out[3] = static_cast<int32_t>(float_bits(others));
    }
    block_sync();  // words are read before keys take their place
    const int pair_index = 2 * threadIdx.x;
    const uint4 pair = load_cg16(row_scratch.keys + pair_index);
    keys[pair_index] = pair_index < taken ? static_cast<uint64_t>(pair.y) << 32 | pair.x : kNothing;
    keys[pair_index + 1] =
        pair_index + 1 < taken ? static_cast<uint64_t>(pair.w) << 32 | pair.z : kNothing;
    int width = 2;
    while (width < taken) width <<= 1;
    sort_keys(keys, width);
    for (int i = threadIdx.x; i < taken; i += kThreads) {
        out[kHeaderWords + i] = static_cast<int32_t>(keys[i] & 0xFFFFFFFFu);
        out[kHeaderWords + kMaxTaken + i] = static_cast<int32_t>(float_bits(logit_of(keys[i])));
    }
}
EXL_KERNEL(take_logits_kernel);
