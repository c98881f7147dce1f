// Writes keys and values into the cache: rotation, search of each group's scale, packing.
//
// Layout: input float32 [rows, kv_heads, head_dim]; output as ExlCacheLayer (cache_codec.h). The
// reference codec in Python defines the search. If a half has open pages, its rotated heads are
// written there as well, without a search.
//
// Work per block: one head of one row, keys (even blocks in y) or values (odd ones). Its threads
// rotate the head in shared memory. Work per warp: groups of 32 elements. In the search a lane is
// one candidate scale, in the order of the reference, so that errors are summed without sums
// across lanes; 32 candidates take one pass over the group.
//
// A group costs about 20 instructions per element and pass, 700 in all for 4 bits.
//
// Keys of a layer with a matrix for it are rounded with feedback after the search
// (key_feedback.cuh): one warp finds the targets while the others write the open page, then each
// warp rounds its groups' targets to codes. Such layers have two kernels of their own, because the
// targets take twice the registers of all else, and those of long heads more.
//
// Shared memory: WriteMemory.
//
// Precondition: at least 64 threads per block, one for each float of the codebooks.
#include "cuda/cache_rotate.cuh"
#include "cuda/key_feedback.cuh"
#include "cuda/row_functions.cuh"

// RoPE of a step's queries and keys, and their norms in models that have them. Queries are
// rotated in place; keys before they are written to the cache, less their mean.
struct RopeCall {
    float* q;            // [rows, q_heads, head_dim]
    const float* table;  // [rows, 2, half]: cos, then sin; null if keys are already rotated
    const float* q_weight;
    const float* k_weight;  // [head_dim], or null
    const float* mean;      // of keys, [kv_heads, head_dim], or null
    int32_t q_heads;
    int32_t half;
    float eps;
    int32_t interleaved;  // not 0: elements 2 * i and 2 * i + 1 are a pair, see rotate_head
};

namespace exl {

constexpr int kWriteThreads = 256;
constexpr int kShortWriteThreads = kGroup * kShortFeedbackGroups;

// The shared memory of a block; `padded` is head_dim rounded up to whole groups.
struct WriteMemory {
    float* head;       // [padded]
    float* codebooks;  // [kCodebookFloats], see cache_grid.cuh
    // Only of layers with feedback:
    float* targets;      // [padded]
    GroupScales scales;  // [padded / kGroup] each, rounded up to an even number
    uint16_t* ring;      // see copy_rows; none for heads of more than kMaxFeedbackRegisters groups

    __device__ __forceinline__ WriteMemory(float* memory, int head_dim) {
        const int padded = round_up(head_dim, kGroup);
        head = memory;
        codebooks = head + padded;
        targets = codebooks + kCodebookFloats;
        const int scale_room = round_up(padded / kGroup, 2);
        scales.inverses = targets + padded;
        scales.bits = reinterpret_cast<uint32_t*>(scales.inverses + scale_room);
        ring = reinterpret_cast<uint16_t*>(scales.bits + scale_room);
    }
};

// The warps of a block that share a job, and this warp's place among them.
struct Warps {
    int own, count;
};

// A scale as float16 bits, with the table in its lowest bit if codes have tables.
template <int kBits>
__device__ __forceinline__ uint32_t scale_bits(float scale, int table) {
    const uint32_t bits = float_to_half(fmaxf(-kLargestHalf, fminf(kLargestHalf, scale)));
    return has_tables(kBits) ? (bits & 0xFFFEu) | static_cast<uint32_t>(table) : bits;
}
// The best scale so far. Without a finite error the scale remains NaN, so that a fault shows.
struct Trial {
    float error;
    uint32_t bits;
    int table;
};

// The candidate of the lane with the least error, the lowest lane among equals; the same in every
// lane.
__device__ __forceinline__ Trial least_of_warp(Trial trial) {
    int lane = lane_id();
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        const float error = shfl_xor(trial.error, mask);
        const int other = shfl_xor(lane, mask);
        if (error < trial.error || (error == trial.error && other < lane)) {
            trial.error = error;
            lane = other;
        }
    }
    trial.bits = shfl(trial.bits, lane);
    trial.table = shfl(trial.table, lane);
    return trial;
}

// Tries every scale and table. y: kGroup elements in shared memory, of which `elements` count.
template <int kBits>
__device__ Trial search(const float* y, int elements, float largest, const float* codebooks) {
    constexpr ScaleSearch kSearch = scale_search(kBits);
    constexpr int kSigned = 2 * kSearch.steps;
    constexpr int kCandidates = (has_tables(kBits) ? kTables : 1) * kSigned;
    Trial best{infinity(), kHalfNaN, 0};
    for (int first = 0; first < kCandidates; first += 32) {
        const int candidate = first + lane_id();
        const int table = candidate / kSigned % kTables, step = candidate % kSearch.steps;
        const float fraction = static_cast<float>(step) / (kSearch.steps - 1);
        const float factor = kSearch.first + (kSearch.last - kSearch.first) * fraction;
        const bool negative = candidate % kSigned >= kSearch.steps;
        Trial trial{0.0f, scale_bits<kBits>(largest * (negative ? -factor : factor), table), table};
        const float exact = half_to_float(static_cast<uint16_t>(trial.bits));
        const float inverse = inverse_of(exact);
        const Grid<kBits> grid(codebooks, table);
#pragma unroll 4
        for (int i = 0; i < elements; ++i) {
            const float difference = fmaf(grid.level(grid.nearest(y[i] * inverse)), exact, -y[i]);
            trial.error = fmaf(difference, difference, trial.error);
        }
        if (!(trial.error < infinity()) || candidate >= kCandidates) trial.error = infinity();
        trial = least_of_warp(trial);
        if (trial.error < best.error) best = trial;
    }
    return best;
}

// Fits the scale to its codes by least squares and keeps it if the error is smaller. value: this
// lane's element, 0 beyond the group.
template <int kBits>
__device__ void refit(Trial* best, float value, bool counts, const float* codebooks) {
    const Grid<kBits> grid(codebooks, best->table);
    const float exact = half_to_float(static_cast<uint16_t>(best->bits));
    const float level = counts ? grid.level(grid.nearest(value * inverse_of(exact))) : 0.0f;
    const float norm = warp_sum(level * level);
    const float scale = warp_sum(level * value) / fmaxf(norm, 1e-30f);
    const uint32_t bits = scale_bits<kBits>(scale, best->table);
    const float fitted = half_to_float(static_cast<uint16_t>(bits));
    const float other = grid.level(grid.nearest(value * inverse_of(fitted)));
    const float difference = counts ? fmaf(other, fitted, -value) : 0.0f;
    const float error = warp_sum(difference * difference);
    if (error < best->error) {
        best->error = error;
        best->bits = bits;
    }
}

// Writes the plane of kWidth bits that begins at bit kShift of the codes, one byte per lane.
template <int kWidth, int kShift>
__device__ __forceinline__ uint8_t* pack_plane(uint32_t code, int count, uint8_t* out) {
    const int bytes = count * kWidth / 8;
    uint32_t byte = 0;
#pragma unroll
    for (int field = 0; field < 8 / kWidth; ++field) {
        const uint32_t part = shfl(code, (lane_id() + field * bytes) & 31);
        byte |= (part >> kShift & ((1u << kWidth) - 1)) << (field * kWidth);
    }
    if (lane_id() < bytes) out[lane_id()] = static_cast<uint8_t>(byte);
    return out + bytes;
}

// Finds the scale of a group, by one warp. value: this lane's element of `y`.
template <int kBits>
__device__ __forceinline__ Trial best_scale(const float* y, int elements, float value,
                                            const float* codebooks) {
    Trial best = search<kBits>(y, elements, warp_max(fabsf(value)), codebooks);
    for (int i = 0; i < kRefits; ++i) {
        refit<kBits>(&best, value, lane_id() < elements, codebooks);
    }
    return best;
}

// Writes the codes of a group, by one warp, which has a scaled element in each lane. A group whose
// scale is NaN has codes 0.
template <int kBits>
__device__ __forceinline__ void write_codes(float scaled, int table, int elements, int group,
                                            const float* codebooks, uint8_t* codes) {
    const Grid<kBits> grid(codebooks, table);
    const uint32_t code =
        lane_id() < elements ? static_cast<uint32_t>(grid.nearest(scaled)) : 0;
    const int stored = padded_codes(elements);
    uint8_t* out = codes + group * code_bytes(kGroup, kBits);
    if constexpr (kBits == 6) {
        pack_plane<2, 0>(code, stored, pack_plane<4, 2>(code, stored, out));
    } else if constexpr (kBits == 3) {
        pack_plane<1, 0>(code, stored, pack_plane<2, 1>(code, stored, out));
    } else {
        pack_plane<kBits, 0>(code, stored, out);
    }
}

// Writes `count` elements that share a scale, at most 47, by one warp; cache of 16 bits.
__device__ void write_block(const float* x, int count, int16_t* out) {
    const int lane = lane_id();
    float largest = 0.0f;
    bool finite = true;
    for (int i = lane; i < count; i += 32) {
        largest = fmaxf(largest, fabsf(x[i]));
        finite = finite && fabsf(x[i]) < infinity();
    }
    finite = ballot(finite) == 0xFFFFFFFFu;
    // 2^-10 exceeds the rounding error of float16, 2^-25 that of its subnormal numbers.
    const float above = fminf(fmaf(warp_max(largest), 1.0f + 0x1p-10f, 0x1p-25f), kLargestHalf);
    const uint32_t bits = finite ? float_to_half(above) : kHalfNaN;
    const float exact = half_to_float(static_cast<uint16_t>(bits));
    const float inverse = exact > 0.0f ? kBlockUnit / exact : 0.0f;
    for (int i = lane; i < count; i += 32) {
        const float steps = finite ? x[i] * inverse : 0.0f;
        const float bounded = fmaxf(-kLargestBlockCode, fminf(kLargestBlockCode, steps));
        const int mark = static_cast<int>(bits >> (i & 31) & 1);
        const int code = i < 16 ? 2 * round_int((bounded - mark) * 0.5f) + mark
                                : round_int(bounded);
        out[i] = static_cast<int16_t>(code);
    }
}

__device__ void write_blocks(const float* x, int head_dim, Warps warps, int16_t* out) {
    if (head_dim < 16) {
        if (warps.own == 0 && lane_id() < head_dim) {
            out[lane_id()] = static_cast<int16_t>(float_to_half(x[lane_id()]));
        }
        return;
    }
    for (int first = 0, index = 0; first < head_dim; ++index) {
        const int count = block_elements(head_dim, first);
        if (index % warps.count == warps.own) write_block(x + first, count, out + first);
        first += count;
    }
}

// Writes one group in 8 bits without a search, by one warp; quantize_plainly in Python defines it.
__device__ void write_group_plainly(const float* y, int head_dim, int group, uint8_t* codes,
                                    uint16_t* scales) {
    const int elements = min(kGroup, head_dim - group * kGroup);
    const float value = y[group * kGroup + lane_id()];
    const bool finite = ballot(fabsf(value) < infinity()) == 0xFFFFFFFFu;
    // The first of the elements of largest magnitude, as in the reference.
    const float magnitude = warp_max(fabsf(value));
    const uint32_t largest = ballot(fabsf(value) == magnitude);
    const float scale = -shfl(value, 31 - leading_zeros(largest & (0u - largest)));
    const uint32_t bits = finite ? scale_bits<8>(scale, 0) : kHalfNaN;
    const float exact = half_to_float(static_cast<uint16_t>(bits));
    const float inverse = finite && exact != 0.0f ? 128.0f / exact : 0.0f;
    const float steps = finite ? value * inverse : 0.0f;
    const int code = round_int(fmaxf(-128.0f, fminf(127.0f, steps))) + 128;
    if (lane_id() < padded_codes(elements)) {
        // Codes that pad a short group are 0.
        codes[group * kGroup + lane_id()] =
            lane_id() < elements ? static_cast<uint8_t>(code) : uint8_t{0};
    }
    if (lane_id() == 0) scales[group] = static_cast<uint16_t>(bits);
}

// Rotates the head and searches its scales. Writes codes as well unless `has_feedback`.
template <int kBits>
__device__ void write_quantized(const WriteMemory& memory, int head_dim, bool has_feedback,
                                uint8_t* codes, uint16_t* scales) {
    float* y = memory.head;
    for (int i = threadIdx.x; i < head_dim; i += blockDim.x) y[i] *= rotation_factor(head_dim, i);
    if constexpr (has_tables(kBits)) fill_codebooks<kBits>(memory.codebooks);
    block_sync();  // signs and codebooks are complete
    hadamard_of_block(y, head_dim);
    const int warps = static_cast<int>(blockDim.x) / 32;
    for (int group = warp_id(); group < num_groups(head_dim, kBits); group += warps) {
        const int elements = min(kGroup, head_dim - group * kGroup);
        const float value = y[group * kGroup + lane_id()];
        const Trial best =
            best_scale<kBits>(y + group * kGroup, elements, value, memory.codebooks);
        const float inverse = inverse_of(half_to_float(static_cast<uint16_t>(best.bits)));
        if (lane_id() == 0) scales[group] = static_cast<uint16_t>(best.bits);
        if (has_feedback) {
            if (lane_id() == 0) {
                memory.scales.inverses[group] = inverse;
                memory.scales.bits[group] = best.bits;
            }
        } else {
            write_codes<kBits>(value * inverse, best.table, elements, group,
                               memory.codebooks, codes);
        }
    }
}

// Writes the codes of targets.
template <int kBits>
__device__ void write_targets(const WriteMemory& memory, int head_dim, uint8_t* codes) {
    const int warps = static_cast<int>(blockDim.x) / 32;
    for (int group = warp_id(); group < num_groups(head_dim, kBits); group += warps) {
        const GroupScale scale = memory.scales[group];
        write_codes<kBits>(memory.targets[group * kGroup + lane_id()] * scale.inverse,
                           scale.table(), min(kGroup, head_dim - group * kGroup), group,
                           memory.codebooks, codes);
    }
}

// Writes a rotated head to token `token_index` of open pages or first tokens.
__device__ __forceinline__ void write_open_token(const float* y, int head_dim, Warps warps,
                                                 const ExlCacheHalf& open, int64_t token_index) {
    auto* codes = static_cast<uint8_t*>(open.codes) + token_index * code_bytes(head_dim, open.bits);
    if (open.bits == 16) {
        return write_blocks(y, head_dim, warps, reinterpret_cast<int16_t*>(codes));
    }
    const int groups = num_groups(head_dim, 8);
    for (int group = warps.own; group < groups; group += warps.count) {
        write_group_plainly(y, head_dim, group, codes, open.scales + token_index * groups);
    }
}

// Writes the block's rotated head to the open page, and position 0 as the first token as well. The
// position is computed again, because keeping it would cost registers in the search.
__device__ __forceinline__ void write_open(const float* y, Warps warps,
                                           const ExlCacheLayer& layer, const ExlBatch& batch,
                                           const ExlOpenPages& open) {
    const int head_dim = static_cast<int>(layer.head_dim), row = blockIdx.x;
    const int sequence = sequence_of(batch, row);
    const int position = batch.past_len[sequence] + row - batch.q_start[sequence];
    const int64_t head = batch.open_pages[sequence] * layer.num_kv_heads + blockIdx.y / 2;
    write_open_token(y, head_dim, warps, open.tokens, head * kPageLen + position % kPageLen);
    if (position == 0) write_open_token(y, head_dim, warps, open.first, head);
}

// Finds the targets of a key, by one warp.
template <Heads kHeads>
__device__ __forceinline__ void find_targets(const WriteMemory& memory, int head_dim, int bits,
                                             const uint16_t* feedback) {
    if (bits == 6) {
        return move_targets<kHeads>(memory.head, head_dim, UniformRounding<6>{}, memory.scales,
                                    feedback, memory.ring, memory.targets);
    }
    const TableRounding rounding = bits == 4 ? TableRounding::make<4>(memory.codebooks)
                                             : TableRounding::make<3>(memory.codebooks);
    move_targets<kHeads>(memory.head, head_dim, rounding, memory.scales, feedback, memory.ring,
                         memory.targets);
}

// Rotates query heads from `first` on, one head per warp.
__device__ __forceinline__ void rotate_queries(const RopeCall& rope, int head_dim, int row,
                                               int first) {
    const int head = first + warp_id();
    if (head >= rope.q_heads) return;  // whole warps leave
    const float* cos = rope.table + static_cast<int64_t>(row) * 2 * rope.half;
    float* x = rope.q + (static_cast<int64_t>(row) * rope.q_heads + head) * head_dim;
    rotate_head(x, cos, cos + rope.half, head_dim, rope.half, rope.interleaved != 0,
                rope.q_weight, rope.eps, nullptr);
}

// The body of the kernels: writes a key or a value, or rotates queries.
//
// kFeedback: whether the layer has a matrix. kHeads: the length of its heads, if it has one.
template <bool kFeedback, Heads kHeads = Heads::kShort>
__device__ __forceinline__ void write_row(const ExlCacheLayer& layer, const ExlBatch& batch,
                                          const float* k, const float* v, const RopeCall& rope) {
    EXL_SHARED(float, shared);
    const int head_dim = static_cast<int>(layer.head_dim), row = blockIdx.x;
    const int head_blocks = 2 * static_cast<int>(layer.num_kv_heads);
    if (static_cast<int>(blockIdx.y) >= head_blocks) {
        const int first = (static_cast<int>(blockIdx.y) - head_blocks) * (blockDim.x / 32);
        return rotate_queries(rope, head_dim, row, first);
    }
    const int head = blockIdx.y / 2;
    const ExlCacheHalf half = blockIdx.y % 2 ? layer.v : layer.k;
    const float* x = (blockIdx.y % 2 ? v : k) +
                     (static_cast<int64_t>(row) * layer.num_kv_heads + head) * head_dim;
    const int sequence = sequence_of(batch, row);
    const int position = batch.past_len[sequence] + row - batch.q_start[sequence];
    const int64_t token_index = token_index_of(batch, sequence, layer.num_kv_heads, head, position);
    auto* codes = static_cast<uint8_t*>(half.codes) + token_index * code_bytes(head_dim, half.bits);
    uint16_t* scales = half.scales + token_index * num_groups(head_dim, half.bits);
    const int padded = round_up(head_dim, kGroup);
    const WriteMemory memory(shared, head_dim);
    const bool has_feedback = kFeedback && blockIdx.y % 2 == 0;
    const uint16_t* feedback = layer.key_feedback;
    if (has_feedback) {
        feedback += static_cast<int64_t>(head) * head_dim * padded;
        prefetch_feedback(feedback, head_dim);
        if (warp_id() == 0) begin_feedback<kHeads>(feedback, head_dim, memory.ring);
    }
    for (int i = threadIdx.x; i < padded; i += blockDim.x) {
        memory.head[i] = i < head_dim ? x[i] : 0.0f;
    }
    block_sync();  // the head is complete
    if (rope.table != nullptr && blockIdx.y % 2 == 0) {
        const float* cos = rope.table + static_cast<int64_t>(row) * 2 * rope.half;
        if (warp_id() == 0) {
            rotate_head(memory.head, cos, cos + rope.half, head_dim, rope.half,
                        rope.interleaved != 0, rope.k_weight, rope.eps,
                        rope.mean == nullptr ? nullptr : rope.mean + head * head_dim);
        }
        block_sync();  // the key is rotated
    }
    if (half.bits == 32) {
        for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
            reinterpret_cast<float*>(codes)[i] = memory.head[i];
        }
        return;
    }
    Warps warps{warp_id(), static_cast<int>(blockDim.x) / 32};
    switch (half.bits) {
        case 3: write_quantized<3>(memory, head_dim, has_feedback, codes, scales); break;
        case 4: write_quantized<4>(memory, head_dim, has_feedback, codes, scales); break;
        case 6: write_quantized<6>(memory, head_dim, has_feedback, codes, scales); break;
        case 8: write_quantized<8>(memory, head_dim, false, codes, scales); break;
        default:
            return write_blocks(memory.head, head_dim, warps, reinterpret_cast<int16_t*>(codes));
    }
    if (has_feedback) {
        block_sync();  // scales are complete
        if (warp_id() == 0) find_targets<kHeads>(memory, head_dim, half.bits, feedback);
        warps = {warp_id() - 1, warps.count - 1};
    }
    const ExlOpenPages open = blockIdx.y % 2 ? layer.v_open : layer.k_open;
    if (open.tokens.codes != nullptr && warps.own >= 0) {
        write_open(memory.head, warps, layer, batch, open);
    }
    if (!has_feedback) return;
    block_sync();  // targets are complete
    switch (half.bits) {
        case 3: return write_targets<3>(memory, head_dim, codes);
        case 4: return write_targets<4>(memory, head_dim, codes);
        default: return write_targets<6>(memory, head_dim, codes);
    }
}

// Writes the keys and values of all rows, and rotates queries if `rope` has a table.
//
// k, v: float32 [rows, kv_heads, head_dim]. Grid x: rows, because their number may exceed the
// limit of y. Grid y: 2 * kv_heads, then, if `rope` has a table, blocks for as many query heads
// as a block has warps.
extern "C" __global__ void __launch_bounds__(kWriteThreads)
    cache_write_kernel(ExlCacheLayer layer, ExlBatch batch, const float* k, const float* v,
                       RopeCall rope) {
    write_row<false>(layer, batch, k, v, rope);
}
EXL_KERNEL(cache_write_kernel);

// The same for layers with a matrix. The number of blocks on a multiprocessor bounds registers: to
// 80 a thread for short heads and 128 for long ones. Without it the compiler spills some of them.
extern "C" __global__ void __launch_bounds__(kShortWriteThreads, 6)
    cache_write_feedback_kernel(ExlCacheLayer layer, ExlBatch batch, const float* k,
                                const float* v, RopeCall rope) {
    write_row<true, Heads::kShort>(layer, batch, k, v, rope);
}
EXL_KERNEL(cache_write_feedback_kernel);
extern "C" __global__ void __launch_bounds__(kWriteThreads, 2)
    cache_write_feedback_long_kernel(ExlCacheLayer layer, ExlBatch batch, const float* k,
                                     const float* v, RopeCall rope) {
    write_row<true, Heads::kLong>(layer, batch, k, v, rope);
}
EXL_KERNEL(cache_write_feedback_long_kernel);

}  // namespace exl
