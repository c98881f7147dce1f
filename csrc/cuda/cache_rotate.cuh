// The rotation of heads (the reference codec in Python is the definition), and the location of a
// batch's rows.
//
// Layout: a head of up to 32 * kRegisters elements is spread over a warp; lane i holds elements
// i, i + 32, i + 64, ... The steps of the Hadamard transform below 32 are therefore shuffles, the
// others need no exchange, and reads and writes are coalesced. Longer heads are in shared memory.
#pragma once

#include "cache_codec.h"
#include "cuda/platform.cuh"

namespace exl {

template <int kRegisters>
__device__ __forceinline__ void hadamard_of_warp(float (&x)[kRegisters], int block) {
    const int lane = lane_id();
    for (int step = 1; step < 32 && step < block; step *= 2) {
#pragma unroll
        for (int i = 0; i < kRegisters; ++i) {
            const float partner = shfl_xor(x[i], step);
            x[i] = lane & step ? partner - x[i] : x[i] + partner;
        }
    }
#pragma unroll
    for (int step = 1; step < kRegisters; step *= 2) {
        if (32 * step >= block) continue;
#pragma unroll
        for (int i = 0; i < kRegisters; ++i) {
            if (i & step || i + step >= kRegisters) continue;
            const float a = x[i], b = x[i + step];
            x[i] = a + b;
            x[i + step] = a - b;
        }
    }
}

__device__ __forceinline__ float rotation_factor(int head_dim, int element) {
    const float size = 1.0f / sqrtf(static_cast<float>(rotation_block(head_dim)));
    return rotation_negates(static_cast<uint32_t>(element)) ? -size : size;
}

// Rotates or rotates back. Elements beyond head_dim must be zero and stay zero.
template <int kRegisters>
__device__ __forceinline__ void rotate_of_warp(float (&x)[kRegisters], int head_dim) {
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) x[i] *= rotation_factor(head_dim, lane_id() + 32 * i);
    hadamard_of_warp(x, rotation_block(head_dim));
}
template <int kRegisters>
__device__ __forceinline__ void rotate_back_of_warp(float (&x)[kRegisters], int head_dim) {
    hadamard_of_warp(x, rotation_block(head_dim));
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) x[i] *= rotation_factor(head_dim, lane_id() + 32 * i);
}

// The Hadamard transform by a block, for heads of any size: x [head_dim] in shared memory, not
// scaled. Precondition: a barrier after the last write to x. Ends with a barrier.
__device__ __forceinline__ void hadamard_of_block(float* x, int head_dim) {
    const int block = rotation_block(head_dim);
    for (int step = 1; step < block; step *= 2) {
        for (int i = threadIdx.x; i < head_dim / 2; i += blockDim.x) {
            const int first = i / step * (2 * step) + i % step;
            const float a = x[first], b = x[first + step];
            x[first] = a + b;
            x[first + step] = a - b;
        }
        block_sync();  // the next step reads what other threads wrote
    }
}

// Returns the sequence of a row.
__device__ __forceinline__ int sequence_of(const ExlBatch& batch, int row) {
    int sequence = 0;
    while (row >= batch.q_start[sequence + 1]) ++sequence;
    return sequence;
}

// Index of a token of a head, counted in tokens of [pages, kv_heads, kPageLen].
__device__ __forceinline__ int64_t token_index_of(const ExlBatch& batch, int sequence,
                                                  int64_t num_kv_heads, int kv_head, int position) {
    const int64_t page = batch.page_table[sequence * batch.max_pages + position / kPageLen];
    return (page * num_kv_heads + kv_head) * kPageLen + position % kPageLen;
}

}  // namespace exl
