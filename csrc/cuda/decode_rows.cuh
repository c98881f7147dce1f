// Rows of decoding: the rows of a block, the kv_splits of their tokens, and the merge of
// kv_splits.
//
// See attention_decode.cu for layout, work and preconditions.
#pragma once

#include "cuda/attention.cuh"

namespace exl {

constexpr int kRows = 8;  // columns of the B operand of an mma

struct DecodeLaunch {
    float* partials;        // [rows, num_heads, slots, head_dim + 2]: sums, largest, total
    int32_t* counters;      // [sequences, kv_heads * groups]; zero before and after a launch
    int32_t first_row;      // of the batch's decoding rows, not counting those of prompts
    int32_t rows;           // room of `partials`; further rows have a launch of their own
    int32_t slots;          // partials of a row
    int32_t max_kv_splits;  // of a row, without those that a sliding window or an open page adds
    int32_t units;          // slots of a warp's ring: 1, 2 or 4
    int32_t open_warps;     // warps of a block that attend an open page; 0: no open pages
    int32_t open_units;     // slots of such a warp's ring
    int32_t heads_per_kv;   // query heads per key/value head
    int32_t groups;         // number of groups of 8 rows, per key/value head and sequence
};

struct RowData {
    float factors[kRows];      // that multiply scores
    int32_t positions[kRows];  // -1: no such row
    float largest[kRows];
    float totals[kRows];
    int32_t is_last;
    int32_t padding[3];
};

// The kv_splits of the tokens that a row sees. An open page, with the first token, is one of its own,
// the last one; it does not change the number of pages of the others.
struct KvSplits {
    int pages;  // of one kv_split
    int first;  // number of the first kv_split, counted from the start of the sequence
    int count;
    __device__ __forceinline__ KvSplits(const AttentionCall& call, const DecodeLaunch& launch,
                                        int position) {
        const unsigned low = first_visible(position, static_cast<int>(call.shape.sliding_window));
        const unsigned last = position, limit = launch.max_kv_splits;
        const unsigned seen = (last - low + kPageLen) / kPageLen;
        const unsigned each = seen <= limit ? 1 : ceil_div(seen, limit);
        const unsigned begin = low / kPageLen, end = last / kPageLen;
        // An open page begins a kv_split also where another one would go on.
        const unsigned shift = launch.open_warps != 0 ? each - 1 : 0;
        pages = static_cast<int>(each);
        first = static_cast<int>(each == 1 ? begin : begin / each);
        count = static_cast<int>(each == 1 ? end : (end + shift) / each) - first + 1;
    }
};

// The rows of a block: `count` rows from `first_row` on, counted over the sequence's rows x the
// query heads of a key/value head.
struct RowGroup {
    int sequence, kv_head, heads_per_kv;
    int first_row, count;
    int past, q_first;
    // Index of the sequence's first row among the launch's rows; may be negative.
    int first_launch_row;
    __device__ __forceinline__ RowGroup(const AttentionCall& call, const DecodeLaunch& launch) {
        sequence = blockIdx.z;
        heads_per_kv = launch.heads_per_kv;
        // A division takes longer than this test, and mostly there is nothing to divide.
        kv_head = launch.groups == 1 ? blockIdx.y : blockIdx.y / launch.groups;
        const int begin = (static_cast<int>(blockIdx.y) - kv_head * launch.groups) * kRows;
        q_first = call.batch.q_start[sequence];
        past = call.batch.past_len[sequence];
        const int q_len = call.batch.q_start[sequence + 1] - q_first;
        first_launch_row = -launch.first_row;
        for (int i = 0; i < sequence; ++i) {
            const int rows = call.batch.q_start[i + 1] - call.batch.q_start[i];
            first_launch_row += rows <= kDecodeRows ? rows : 0;
        }
        const int end =
            min(begin + kRows, min(q_len, launch.rows - first_launch_row) * heads_per_kv);
        first_row = max(begin, -first_launch_row * heads_per_kv);
        count = q_len <= kDecodeRows ? end - first_row : 0;
    }
    __device__ __forceinline__ int token(int row) const {
        const int index = first_row + row;
        return index < heads_per_kv ? 0 : index / heads_per_kv;
    }
    __device__ __forceinline__ int position(int row) const { return past + token(row); }
    __device__ __forceinline__ int head(int row) const {
        return kv_head * heads_per_kv + first_row + row - token(row) * heads_per_kv;
    }
};

// The rows of a group, cut where the number of pages of their kv_splits changes; mostly one pass.
struct Passes {
    int low_row, change, high_row;  // positions; `change` begins the second pass
    int count, arrivals;  // arrivals: blocks that have a kv_split of a pass; 0 without rows
    __device__ __forceinline__ Passes(const AttentionCall& call, const DecodeLaunch& launch,
                                      const RowGroup& group);
};

// Rows of a group whose kv_splits have the same number of pages.
struct Pass {
    int pages, first, end;   // first, end: kv_splits
    int low_row, low, high;  // position of the first row; visible tokens [low, high)
    __device__ __forceinline__ Pass(const AttentionCall& call, const DecodeLaunch& launch,
                                    const Passes& passes, int index)
        : low_row(index == 0 ? passes.low_row : passes.change) {
        const int high_row = index == 0 ? passes.change - 1 : passes.high_row;
        const int sliding_window = static_cast<int>(call.shape.sliding_window);
        const KvSplits lowest(call, launch, low_row);
        pages = lowest.pages;
        first = lowest.first;
        end = lowest.first + lowest.count;
        if (high_row != low_row) {
            const KvSplits highest(call, launch, high_row);
            end = highest.first + highest.count;
        }
        low = first_visible(low_row, sliding_window);
        high = high_row + 1;
    }
};

__device__ __forceinline__ Passes::Passes(const AttentionCall& call, const DecodeLaunch& launch,
                                          const RowGroup& group)
    : low_row(0), change(0), high_row(0), count(0), arrivals(0) {
    if (group.count <= 0) return;
    low_row = group.position(0);
    high_row = group.position(group.count - 1);
    change = high_row + 1;
    if (high_row != low_row) {
        const int pages = KvSplits(call, launch, low_row).pages;
        change = low_row + 1;
        while (change <= high_row && KvSplits(call, launch, change).pages == pages) ++change;
    }
    count = change <= high_row ? 2 : 1;
    for (int i = 0; i < count; ++i) {
        const Pass pass(call, launch, *this, i);
        arrivals = max(arrivals, pass.end - pass.first);
    }
}

// The parts of a block's shared memory.
template <int kHeadDim>
struct DecodeMemory {
    uint4* queries;  // of a lane's eight elements: high bytes, then low bytes
    float* rows;
    RowData* data;
    uint8_t* ring;
    __device__ __forceinline__ explicit DecodeMemory(char* memory) {
        queries = reinterpret_cast<uint4*>(memory);
        rows = reinterpret_cast<float*>(memory + kHeadDim / kGroup * 32 * sizeof(uint4));
        data = reinterpret_cast<RowData*>(rows + kRows * kHeadDim);
        ring = reinterpret_cast<uint8_t*>(data + 1);
    }
};

// Address of the first partial of a row.
__device__ __forceinline__ float* partials_of(const AttentionCall& call,
                                              const DecodeLaunch& launch, const RowGroup& group,
                                              int row) {
    const int64_t index =
        static_cast<int64_t>(group.first_launch_row + group.token(row)) * call.shape.num_heads +
        group.head(row);
    return launch.partials + index * launch.slots * (call.layer.head_dim + 2);
}

// Stores the sums of the rows of this kv_split: in `out` if it is a row's only kv_split, otherwise
// in `partials`.
template <int kHeadDim>
__device__ __forceinline__ void store_partials(const AttentionCall& call,
                                               const DecodeLaunch& launch, const RowGroup& group,
                                               int kv_split, const DecodeMemory<kHeadDim>& memory) {
    const int warps = static_cast<int>(blockDim.x) / 32, lane = lane_id();
    const int head_dim = static_cast<int>(call.layer.head_dim);
    for (int row = warp_id(); row < group.count; row += warps) {
        const int position = memory.data->positions[row];
        if (position < 0) continue;
        const KvSplits kv_splits(call, launch, position);
        const int slot = kv_split - kv_splits.first;
        if (slot < 0 || slot >= kv_splits.count) continue;
        float x[kHeadDim / 32];
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) {
            const int element = lane + 32 * i;
            x[i] = element < head_dim ? memory.rows[row * kHeadDim + element] : 0.0f;
        }
        const float largest = memory.data->largest[row], total = memory.data->totals[row];
        if (kv_splits.count == 1) {
            const int head = group.head(row);
            const float whole = with_sink(call, head, largest, total);
            store_row(call, group.q_first + group.token(row), head, x,
                      1.0f / (whole * unit_factor(call.layer.v.bits)));
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

// Merges the kv_splits of a row in order, by one warp.
template <int kHeadDim>
__device__ void merge_kv_splits_of_row(const AttentionCall& call, const DecodeLaunch& launch,
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
            const float* largest_and_total = partial + (first + lane) * stride + head_dim;
            weight = exp2_fast(load_cg(largest_and_total) - largest);
            total = fmaf(weight, load_cg(largest_and_total + 1), total);
        }
        const int pass_count = min(32, count - first);
#pragma unroll 4
        for (int i = 0; i < pass_count; ++i) {
            const float kv_split_weight = shfl(weight, i);
            const float* sums = partial + (first + i) * stride;
#pragma unroll
            for (int k = 0; k < kHeadDim / 32; ++k) {
                const int element = lane + 32 * k;
                if (element < head_dim) x[k] = fmaf(kv_split_weight, load_cg(sums + element), x[k]);
            }
        }
    }
    const int head = group.head(row);
    total = with_sink(call, head, largest, warp_sum(total));
    store_row(call, group.q_first + group.token(row), head, x,
              1.0f / (total * unit_factor(call.layer.v.bits)));
}

// Merges the kv_splits of a group of rows, in the last block of the group to arrive.
template <int kHeadDim>
__device__ __forceinline__ void merge_kv_splits(const AttentionCall& call,
                                                const DecodeLaunch& launch,
                                                const DecodeMemory<kHeadDim>& memory) {
    const RowGroup group(call, launch);
    const int arrivals = Passes(call, launch, group).arrivals;
    if (arrivals < 2) return;
    int32_t* counter = launch.counters + blockIdx.z * gridDim.y + blockIdx.y;
    thread_fence();
    block_sync();  // the partials of the whole block are written
    if (threadIdx.x == 0) memory.data->is_last = atomic_add(counter, 1) == arrivals - 1;
    block_sync();  // is_last is read by all threads
    if (!memory.data->is_last) return;
    thread_fence();
    if (threadIdx.x == 0) *counter = 0;
    const int warps = static_cast<int>(blockDim.x) / 32;
    for (int row = warp_id(); row < group.count; row += warps) {
        const KvSplits kv_splits(call, launch, group.position(row));
        if (kv_splits.count > 1) {
            merge_kv_splits_of_row<kHeadDim>(call, launch, group, row, kv_splits.count);
        }
    }
}

}  // namespace exl
