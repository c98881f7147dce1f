// Rounds keys with feedback (feedback.py of the reference is the definition): blocks of
// kFeedbackBlock elements in turn, whose errors move the targets of all further elements.
//
// Input: a rotated head of a key, its groups' scales, and its matrix in global memory, float16
// [head_dim, padded], padded = round_up(head_dim, kGroup). Output: the targets of all elements,
// float32 [padded] in shared memory, which the grid of each group then rounds to codes. If a
// group has no finite error, targets are the head's elements.
//
// Work: one warp per head, because each block of elements waits for the one before. Up to 256
// elements, targets are in registers (lane l has elements l, l + 32, ...), and the matrix' rows
// come through a ring in shared memory, so that a step waits for its arithmetic only. With tables,
// a lane also has one of 32 intervals of values, in which there is at most one threshold: the
// level of a value takes three parallel shuffles instead of a binary search.
//
// A step is a chain of the error of an element (with tables 2 operations, 3 shuffles, a comparison
// and 2 operations), 4 shuffles and 4 sums: docs/cuda_attention.md has its cycles.
//
// Longer heads, which no tensor core attends for either, have their targets in shared memory.
#pragma once

#include "cuda/cache_grid.cuh"

namespace exl {

// Rows of the matrix that are copied at once, to one of kFeedbackSlots slots: those of 4 blocks,
// because 4 steps take longer than a read from the second-level cache.
constexpr int kFeedbackRows = 16;
constexpr int kFeedbackSlots = 2;
// For heads of up to 64 elements there are slots for all rows, so that steps copy nothing.
constexpr int kAllFeedbackSlots = 4;
EXL_HOST_DEVICE constexpr int feedback_slots(int registers) {
    return registers <= 2 ? kAllFeedbackSlots : kFeedbackSlots;
}
constexpr int kMaxFeedbackRegisters = 8;
// Short heads have up to this many groups. Long ones are for another kernel, because they need
// more registers.
constexpr int kShortFeedbackGroups = 4;
enum class Heads { kShort, kLong };

constexpr int kGroupBlocks = kGroup / kFeedbackBlock;

// What rounding needs of a group that has been searched.
struct GroupScale {
    float inverse;
    uint32_t bits;  // of the scale

    __device__ __forceinline__ float exact() const {
        return half_to_float(static_cast<uint16_t>(bits));
    }
    __device__ __forceinline__ int table() const { return bits & 1; }
    // False if the search found no finite error.
    __device__ __forceinline__ bool is_finite() const { return (bits & 0x7FFFu) < 0x7C00u; }
    // Every lane of the warp must call it.
    __device__ __forceinline__ GroupScale of_lane(int lane) const {
        return {shfl(inverse, lane), shfl(bits, lane)};
    }
};
// The scales of a head in shared memory. These are two arrays because compilers for compute
// capability 10.0 and newer join the halves of a pair in a register of 64 bits, and read halves
// that nothing has set.
struct GroupScales {
    float* inverses;
    uint32_t* bits;

    __device__ __forceinline__ GroupScale operator[](int group) const {
        return {inverses[group], bits[group]};
    }
};

// Steps of a head: all blocks but the last one move targets.
EXL_HOST_DEVICE constexpr int feedback_steps(int head_dim) {
    return ceil_div(head_dim, kFeedbackBlock) - 1;
}

// ---- The error of an element -------------------------------------------------------------------

// Values, divided by twice their scale and moved by a half, are cut into kIntervals: interval i
// has those that are nearest to i / (kIntervals - 1). Interval `lane` begins here, with a margin
// for the rounding of the division.
constexpr int kIntervals = 32;
EXL_HOST_DEVICE constexpr float interval_begin(int interval) {
    return static_cast<float>(2 * interval - 1) / (kIntervals - 1) - 1.0f - 0x1p-10f;
}
// Number of thresholds below an interval.
EXL_HOST_DEVICE constexpr uint32_t thresholds_below(int bits, int table, int interval) {
    uint32_t count = 0;
    for (int code = 0; code + 1 < 1 << bits; ++code) {
        count += threshold_of(bits, table, code) < interval_begin(interval);
    }
    return count;
}
// Eight of these numbers, 4 bits each.
EXL_HOST_DEVICE constexpr uint32_t eight_below(int bits, int table, int first) {
    uint32_t counts = 0;
    for (int i = 0; i < 8; ++i) counts |= thresholds_below(bits, table, first + i) << (4 * i);
    return counts;
}
// True if no interval, with both margins, has a second threshold.
EXL_HOST_DEVICE constexpr bool has_distant_thresholds(int bits) {
    const float width = 2.0f / (kIntervals - 1) + 0x1p-9f;
    for (int i = 0; i < kTables * ((1 << bits) - 2); ++i) {
        const int table = i / ((1 << bits) - 2), code = i % ((1 << bits) - 2);
        const float low = threshold_of(bits, table, code);
        if (threshold_of(bits, table, code + 1) - low <= width) return false;
    }
    return true;
}

// The interval of a lane in one table.
struct Interval {
    float threshold, low, high;  // the threshold in it, and the levels on its sides

    template <int kBits>
    static __device__ __forceinline__ Interval of_lane(const float* codebooks, int table) {
        static_assert(has_distant_thresholds(kBits), "an interval has one threshold at most");
        constexpr uint32_t kBelow[kTables][4] = {
            {eight_below(kBits, 0, 0), eight_below(kBits, 0, 8), eight_below(kBits, 0, 16),
             eight_below(kBits, 0, 24)},
            {eight_below(kBits, 1, 0), eight_below(kBits, 1, 8), eight_below(kBits, 1, 16),
             eight_below(kBits, 1, 24)}};
        constexpr int kLast = (1 << kBits) - 1;
        const int eight = lane_id() / 8;
        const uint32_t low_half = eight % 2 ? kBelow[table][1] : kBelow[table][0];
        const uint32_t high_half = eight % 2 ? kBelow[table][3] : kBelow[table][2];
        const uint32_t counts = eight / 2 ? high_half : low_half;
        const int code = counts >> (lane_id() % 8 * 4) & 15;
        const Grid<kBits> grid(codebooks, table);
        return {code < kLast ? grid.thresholds[code] : infinity(),
                grid.level(static_cast<float>(code)),
                grid.level(static_cast<float>(min(code + 1, kLast)))};
    }
};

// Codes with tables. Every lane of the warp must call `error`.
struct TableRounding {
    Interval first, second;  // in both tables
    Interval own;            // in the group's table
    float half_inverse, inverse, minus_exact;

    template <int kBits>
    static __device__ __forceinline__ TableRounding make(const float* codebooks) {
        return {Interval::of_lane<kBits>(codebooks, 0), Interval::of_lane<kBits>(codebooks, 1),
                {}, 0.0f, 0.0f, 0.0f};
    }
    __device__ __forceinline__ void set_group(const GroupScale& scale) {
        own = scale.table() ? second : first;
        inverse = scale.inverse;
        half_inverse = 0.5f * inverse;
        minus_exact = -scale.exact();
    }
    __device__ __forceinline__ float error(float target) const {
        // The sum's five lowest bits are the interval, and a shuffle reads no others.
        const float place = fma_saturated(target, half_inverse, 0.5f);
        const int lane = float_bits(fmaf(place, kIntervals - 1, 12582912.0f));
        const float threshold = shfl(own.threshold, lane), low = shfl(own.low, lane);
        const float high = shfl(own.high, lane);
        const float level = mul_rn(target, inverse) > threshold ? high : low;
        return fmaf(level, minus_exact, target);
    }
};

// Codes on a uniform grid.
template <int kBits>
struct UniformRounding {
    float inverse, minus_step;

    __device__ __forceinline__ void set_group(const GroupScale& scale) {
        inverse = scale.inverse;
        minus_step = scale.exact() * (-1.0f / Grid<kBits>::kHalf);
    }
    __device__ __forceinline__ float error(float target) const {
        const float steps = ceil_small(Grid<kBits>::bounded(mul_rn(target, inverse)));
        return fmaf(steps, minus_step, target);
    }
};

// ---- The matrix' rows --------------------------------------------------------------------------

// Requests the lines that the head's steps read, by all threads of a block.
__device__ __forceinline__ void prefetch_feedback(const uint16_t* feedback, int head_dim) {
    constexpr int kLine = 64;  // elements
    const int padded = round_up(head_dim, kGroup);
    for (int row = threadIdx.x; row < head_dim; row += blockDim.x) {
        for (int column = row / kLine * kLine; column < padded; column += kLine) {
            prefetch_l2(feedback + row * padded + column);
        }
    }
}

// Copies rows kFeedbackRows * stage and on to a slot of the ring, by one warp. Columns of groups
// that are complete and those beyond `padded` become zeros.
template <int kRegisters>
__device__ __forceinline__ void copy_rows(const uint16_t* feedback, int head_dim, int stage,
                                          uint16_t* ring) {
    constexpr int kWidth = kGroup * kRegisters, kPart = 8, kParts = 32 * kPart;
    const int padded = round_up(head_dim, kGroup), last = head_dim - 1;
    if (stage * kFeedbackRows < head_dim) {
        const int column = lane_id() * kPart % kWidth;
        const int first = stage * kFeedbackRows + lane_id() * kPart / kWidth;
        const bool is_read = column >= stage * kFeedbackRows / kGroup * kGroup && column < padded;
        uint16_t* slot =
            ring + stage % feedback_slots(kRegisters) * kFeedbackRows * kWidth + lane_id() * kPart;
#pragma unroll
        for (int i = 0; i < kFeedbackRows * kWidth / kParts; ++i) {
            // Beyond the head the last row, which is 0.
            const int row = min(first + i * (kParts / kWidth), last);
            copy_async16(slot + i * kParts, feedback + row * padded + column, is_read);
        }
    }
    copy_async_commit();
}

// Requests the first rows, by the warp that rounds.
template <Heads kHeads>
__device__ __forceinline__ void begin_feedback(const uint16_t* feedback, int head_dim,
                                               uint16_t* ring) {
    const int groups = ceil_div(head_dim, kGroup);
    if constexpr (kHeads == Heads::kLong) {
        if (groups <= kMaxFeedbackRegisters) {
            copy_rows<kMaxFeedbackRegisters>(feedback, head_dim, 0, ring);
        }
    } else if (groups <= 2) {
        for (int stage = 0; stage < kAllFeedbackSlots; ++stage) {
            copy_rows<2>(feedback, head_dim, stage, ring);
        }
    } else {
        copy_rows<kShortFeedbackGroups>(feedback, head_dim, 0, ring);
    }
}

// ---- The steps ---------------------------------------------------------------------------------

// A head of up to 32 * kRegisters elements. Precondition: begin_feedback.
template <int kRegisters, class Rounding>
__device__ __forceinline__ void move_registers(const float* y, int head_dim, Rounding rounding,
                                               GroupScales scales, const uint16_t* feedback,
                                               uint16_t* ring, float* targets) {
    constexpr int kWidth = kGroup * kRegisters, kStageBlocks = kFeedbackRows / kFeedbackBlock;
    const int padded = round_up(head_dim, kGroup);
    float target[kRegisters];
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
        target[i] = kGroup * i < padded ? y[kGroup * i + lane_id()] : 0.0f;
    }
    const GroupScale own = scales[min(lane_id(), ceil_div(head_dim, kGroup) - 1)];
    const int steps = ballot(own.is_finite()) == 0xFFFFFFFFu ? feedback_steps(head_dim) : 0;
    GroupScale scale = own.of_lane(0);
#pragma unroll
    for (int group = 0; group < kRegisters; ++group) {
        if (group * kGroupBlocks >= steps) break;
        rounding.set_group(scale);
        // The next group's is loaded before it is needed.
        if (group + 1 < kRegisters) scale = own.of_lane(group + 1);
        const int end = min((group + 1) * kGroupBlocks, steps);
#pragma unroll 1
        for (int first = group * kGroupBlocks; first < end; first += kStageBlocks) {
            const int stage = first / kStageBlocks;
            if (kRegisters > 2 || stage == 0) {
                copy_async_wait<0>();
                warp_sync();  // the stage's rows have arrived, those before are no longer read
            }
            if (kRegisters > 2) copy_rows<kRegisters>(feedback, head_dim, stage + 1, ring);
            const uint16_t* rows =
                ring + stage % feedback_slots(kRegisters) * kFeedbackRows * kWidth + lane_id();
            const int lane = first % kGroupBlocks * kFeedbackBlock;
            // Steps beyond the head's move nothing: the rows of its last block are 0.
#pragma unroll(kRegisters <= 4 ? 2 : 1)
            for (int block = 0; block < kStageBlocks; ++block) {
                float shares[kFeedbackBlock][kRegisters];
#pragma unroll
                for (int i = 0; i < kFeedbackBlock; ++i) {
#pragma unroll
                    for (int j = group; j < kRegisters; ++j) {
                        const int row = block * kFeedbackBlock + i;
                        shares[i][j] = half_to_float(rows[row * kWidth + j * kGroup]);
                    }
                }
                const float error = rounding.error(target[group]);
#pragma unroll
                for (int i = 0; i < kFeedbackBlock; ++i) {
                    const float moved = shfl(error, lane + block * kFeedbackBlock + i);
#pragma unroll
                    for (int j = group; j < kRegisters; ++j) {
                        target[j] = fmaf(moved, shares[i][j], target[j]);
                    }
                }
            }
        }
    }
    copy_async_wait<0>();
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) {
        if (kGroup * i < padded) targets[kGroup * i + lane_id()] = target[i];
    }
}

// A head of any size.
template <class Rounding>
__device__ __forceinline__ void move_in_memory(const float* y, int head_dim, Rounding rounding,
                                               GroupScales scales, const uint16_t* feedback,
                                               float* targets) {
    const int padded = round_up(head_dim, kGroup);
    bool finite = true;
    for (int i = lane_id(); i < padded; i += 32) {
        targets[i] = y[i];
        finite = finite && scales[i / kGroup].is_finite();
    }
    const int steps = ballot(finite) == 0xFFFFFFFFu ? feedback_steps(head_dim) : 0;
    for (int block = 0; block < steps; ++block) {
        warp_sync();  // the block's targets are complete
        if (block % kGroupBlocks == 0) rounding.set_group(scales[block / kGroupBlocks]);
        const int first = block * kFeedbackBlock;
        const float error = rounding.error(targets[first + lane_id() % kFeedbackBlock]);
        float moved[kFeedbackBlock];
        for (int i = 0; i < kFeedbackBlock; ++i) moved[i] = shfl(error, i);
        const uint16_t* rows = feedback + static_cast<int64_t>(first) * padded;
        for (int j = first + kFeedbackBlock + lane_id(); j < head_dim; j += 32) {
            float target = targets[j];
            for (int i = 0; i < kFeedbackBlock; ++i) {
                target = fmaf(moved[i], half_to_float(rows[i * padded + j]), target);
            }
            targets[j] = target;
        }
    }
}

// Finds the targets of a head, by one warp. Precondition: begin_feedback by this warp.
template <Heads kHeads, class Rounding>
__device__ __forceinline__ void move_targets(const float* y, int head_dim, Rounding rounding,
                                             GroupScales scales, const uint16_t* feedback,
                                             uint16_t* ring, float* targets) {
    const int groups = ceil_div(head_dim, kGroup);
    if constexpr (kHeads == Heads::kLong) {
        if (groups <= kMaxFeedbackRegisters) {
            move_registers<kMaxFeedbackRegisters>(y, head_dim, rounding, scales, feedback, ring,
                                                  targets);
        } else {
            move_in_memory(y, head_dim, rounding, scales, feedback, targets);
        }
    } else if (groups <= 2) {
        move_registers<2>(y, head_dim, rounding, scales, feedback, ring, targets);
    } else {
        move_registers<kShortFeedbackGroups>(y, head_dim, rounding, scales, feedback, ring,
                                             targets);
    }
}

}  // namespace exl
