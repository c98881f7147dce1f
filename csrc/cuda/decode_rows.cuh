// Decoding's rows: which a block has, where their tokens are split, and how splits are added.
//
// See attention_decode.cu.
#pragma once

#include "cuda/attention.cuh"

namespace exl {

constexpr int kRows = 8;  // columns of an mma

struct DecodeLaunch {
    float* partials;
    int32_t* counters;  // zero before and after
    int32_t first_row;    // of the batch's decoding rows, counted without prompts
    int32_t rows;         // that `partials` has room for; others have a launch of their own
    int32_t slots;        // partials of a row
    int32_t most_splits;  // of a row, not counting one more that a window may touch
    int32_t units;        // slots of a warp's ring: 1, 2 or 4
    int32_t sharing;      // query heads of a kv head
    int32_t groups;       // of 8 rows of a kv head and sequence
};

struct RowData {
    float factors[kRows];    // on scores
    int32_t positions[kRows];  // -1: no such row
    float largest[kRows];
    float totals[kRows];
    int32_t is_last;
    int32_t padding[3];
};

// Where the tokens that a row sees are cut.
struct Splits {
    int pages;  // of one
    int first;  // its number, counted from the sequence's beginning
    int count;
    __device__ __forceinline__ Splits(int position, int window, int most_splits) {
        const unsigned low = first_seen(position, window), last = position;
        const unsigned seen = (last - low + kPageLen) / kPageLen, most = most_splits;
        const unsigned each = seen <= most ? 1 : (seen + most - 1) / most;
        const unsigned begin = low / kPageLen, end = last / kPageLen;
        pages = static_cast<int>(each);
        first = static_cast<int>(each == 1 ? begin : begin / each);
        count = static_cast<int>(each == 1 ? end : end / each) - first + 1;
    }
};

// The rows of a block: `first_row`.. of the sequence's rows x the heads that share a kv head.
struct RowGroup {
    int sequence, kv_head, sharing;
    int first_row, count;
    int past, q_first;
    int place;  // of the sequence's first row among the launch's rows, may be below 0
    __device__ __forceinline__ RowGroup(const AttentionCall& call, const DecodeLaunch& launch) {
        sequence = blockIdx.z;
        sharing = launch.sharing;
        // Divisions take longer than what they spare where there is nothing to divide.
        kv_head = launch.groups == 1 ? blockIdx.y : blockIdx.y / launch.groups;
        const int begin = (static_cast<int>(blockIdx.y) - kv_head * launch.groups) * kRows;
        q_first = call.batch.q_start[sequence];
        past = call.batch.past_len[sequence];
        const int q_len = call.batch.q_start[sequence + 1] - q_first;
        place = -launch.first_row;
        for (int i = 0; i < sequence; ++i) {
            const int rows = call.batch.q_start[i + 1] - call.batch.q_start[i];
            place += rows <= kDecodeRows ? rows : 0;
        }
        const int end = min(begin + kRows, min(q_len, launch.rows - place) * sharing);
        first_row = max(begin, -place * sharing);
        count = q_len <= kDecodeRows ? end - first_row : 0;
    }
    __device__ __forceinline__ int token(int row) const {
        const int index = first_row + row;
        return index < sharing ? 0 : index / sharing;
    }
    __device__ __forceinline__ int position(int row) const { return past + token(row); }
    __device__ __forceinline__ int head(int row) const {
        return kv_head * sharing + first_row + row - token(row) * sharing;
    }
};

// A group's rows, cut where the pages of their splits change: mostly it is one pass.
struct Passes {
    int low_row, change, high_row;  // positions; `change` begins the second pass
    int count, arrivals;            // blocks that have a split of a pass; 0 without rows
    __device__ __forceinline__ Passes(const AttentionCall& call, const DecodeLaunch& launch,
                                      const RowGroup& group);
};

// Rows of a group whose splits have the same number of pages.
struct Pass {
    int pages, first, end;   // splits
    int low_row, low, high;  // the first row's position; tokens that are seen
    __device__ __forceinline__ Pass(const AttentionCall& call, const DecodeLaunch& launch,
                                    const Passes& passes, int index)
        : low_row(index == 0 ? passes.low_row : passes.change) {
        const int high_row = index == 0 ? passes.change - 1 : passes.high_row;
        const int window = static_cast<int>(call.shape.window);
        const Splits lowest(low_row, window, launch.most_splits);
        pages = lowest.pages;
        first = lowest.first;
        end = lowest.first + lowest.count;
        if (high_row != low_row) {
            const Splits highest(high_row, window, launch.most_splits);
            end = highest.first + highest.count;
        }
        low = first_seen(low_row, window);
        high = high_row + 1;
    }
};

__device__ __forceinline__ Passes::Passes(const AttentionCall& call, const DecodeLaunch& launch,
                                          const RowGroup& group)
    : low_row(0), change(0), high_row(0), count(0), arrivals(0) {
    if (group.count <= 0) return;
    const int window = static_cast<int>(call.shape.window);
    low_row = group.position(0);
    high_row = group.position(group.count - 1);
    change = high_row + 1;
    if (high_row != low_row) {
        const int pages = Splits(low_row, window, launch.most_splits).pages;
        change = low_row + 1;
        while (change <= high_row && Splits(change, window, launch.most_splits).pages == pages) {
            ++change;
        }
    }
    count = change <= high_row ? 2 : 1;
    for (int i = 0; i < count; ++i) {
        const Pass pass(call, launch, *this, i);
        arrivals = max(arrivals, pass.end - pass.first);
    }
}

// A block's shared memory.
template <int kHeadDim>
struct Memory {
    uint4* queries;  // high bytes of a lane's eight elements, then their low bytes
    float* rows;
    RowData* data;
    uint8_t* ring;
    __device__ __forceinline__ explicit Memory(char* memory) {
        queries = reinterpret_cast<uint4*>(memory);
        rows = reinterpret_cast<float*>(memory + kHeadDim / kGroup * 32 * sizeof(uint4));
        data = reinterpret_cast<RowData*>(rows + kRows * kHeadDim);
        ring = reinterpret_cast<uint8_t*>(data + 1);
    }
};

// Where a row's partials begin.
__device__ __forceinline__ float* partials_of(const AttentionCall& call,
                                              const DecodeLaunch& launch, const RowGroup& group,
                                              int row) {
    const int64_t index = static_cast<int64_t>(group.place + group.token(row)) *
                              call.shape.num_heads + group.head(row);
    return launch.partials + index * launch.slots * (call.layer.head_dim + 2);
}

// Rows of this split to where they belong: to `out` where it is their only one.
template <int kHeadDim>
__device__ __forceinline__ void leave_rows(const AttentionCall& call, const DecodeLaunch& launch,
                           const RowGroup& group, int split, const Memory<kHeadDim>& memory) {
    const int warps = static_cast<int>(blockDim.x) / 32, lane = lane_id();
    const int head_dim = static_cast<int>(call.layer.head_dim);
    for (int row = warp_id(); row < group.count; row += warps) {
        const int position = memory.data->positions[row];
        if (position < 0) continue;
        const Splits splits(position, static_cast<int>(call.shape.window), launch.most_splits);
        const int slot = split - splits.first;
        if (slot < 0 || slot >= splits.count) continue;
        float x[kHeadDim / 32];
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) {
            const int element = lane + 32 * i;
            x[i] = element < head_dim ? memory.rows[row * kHeadDim + element] : 0.0f;
        }
        const float largest = memory.data->largest[row], total = memory.data->totals[row];
        if (splits.count == 1) {
            store_row(call, group.q_first + group.token(row), group.head(row), x,
                      1.0f / (total * unit_factor(call.layer.v.bits)));
            continue;
        }
        float* partial = partials_of(call, launch, group, row) + slot * (head_dim + 2);
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) {
            if (lane + 32 * i < head_dim) partial[lane + 32 * i] = x[i];
        }
        if (lane == 0) {
            partial[head_dim] = largest;
            partial[head_dim + 1] = total;
        }
    }
}

// Adds a row's splits in order, by one warp.
template <int kHeadDim>
__device__ void combine_row(const AttentionCall& call, const DecodeLaunch& launch,
                            const RowGroup& group, int row, int count) {
    const int lane = lane_id(), head_dim = static_cast<int>(call.layer.head_dim);
    const float* partial = partials_of(call, launch, group, row);
    const int stride = head_dim + 2;
    float largest = -infinity();
    for (int i = lane; i < count; i += 32) {
        largest = fmaxf(largest, load_cg(partial + i * stride + head_dim));
    }
    largest = warp_max(largest);
    float x[kHeadDim / 32] = {};
    float total = 0.0f;
    for (int first = 0; first < count; first += 32) {
        float weight = 0.0f;
        if (first + lane < count) {
            const float* ends = partial + (first + lane) * stride + head_dim;
            weight = exp2_fast(load_cg(ends) - largest);
            total = fmaf(weight, load_cg(ends + 1), total);
        }
        const int here = min(32, count - first);
#pragma unroll 4
        for (int i = 0; i < here; ++i) {
            const float share = shfl(weight, i);
            const float* sums = partial + (first + i) * stride;
#pragma unroll
            for (int k = 0; k < kHeadDim / 32; ++k) {
                const int element = lane + 32 * k;
                if (element < head_dim) x[k] = fmaf(share, load_cg(sums + element), x[k]);
            }
        }
    }
    total = warp_sum(total);
    store_row(call, group.q_first + group.token(row), group.head(row), x,
              1.0f / (total * unit_factor(call.layer.v.bits)));
}

// The last block of a group of rows to come here adds their splits.
template <int kHeadDim>
__device__ __forceinline__ void combine(const AttentionCall& call, const DecodeLaunch& launch,
                                        const Memory<kHeadDim>& memory) {
    const RowGroup group(call, launch);
    const int arrivals = Passes(call, launch, group).arrivals;
    if (arrivals < 2) return;
    int32_t* counter = launch.counters + blockIdx.z * gridDim.y + blockIdx.y;
    thread_fence();
    block_sync();  // the whole block's partials are out
    if (threadIdx.x == 0) memory.data->is_last = atomic_add(counter, 1) == arrivals - 1;
    block_sync();  // is_last is read by all
    if (!memory.data->is_last) return;
    thread_fence();
    if (threadIdx.x == 0) *counter = 0;
    const int warps = static_cast<int>(blockDim.x) / 32;
    for (int row = warp_id(); row < group.count; row += warps) {
        const Splits splits(group.position(row), static_cast<int>(call.shape.window),
                            launch.most_splits);
        if (splits.count > 1) combine_row<kHeadDim>(call, launch, group, row, splits.count);
    }
}

}  // namespace exl
