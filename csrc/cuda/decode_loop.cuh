// Main loop of decoding: the tiles of a warp, the kv_split of a block, and the kernel.
//
// See attention_decode.cu for layout, work and preconditions.
#pragma once

#include "cuda/decode_products.cuh"
#include "cuda/decode_rows.cuh"
#include "cuda/decode_softmax.cuh"

namespace exl {

constexpr int kThreads = 256;

// Tokens of a tile of an open page. Its tiles have more bytes a token than those of the codes
// beside it; half as many tokens take no more shared memory. 16 are the fewest of a product.
constexpr int kOpenTile = 16;

// The ring of a warp: its tiles in order, keys and values in turn, `units` copies ahead.
//
// kOpen: the tiles of the open page. Position 0, if it is in another page, is in a tile of its own,
// the last one of the last warp, which an open page needs last.
template <int kHeadDim, int kTile, bool kWhole, bool kOpen>
struct Ring {
    const AttentionCall& call;
    const RowGroup& group;
    TileBytes k_bytes, v_bytes;
    uint8_t* memory;
    int units, slot_bytes, first_tile, step, count;  // count: tiles of this warp
    bool has_first_token;

    __device__ __forceinline__ Ring(const AttentionCall& call, const DecodeLaunch& launch,
                                    const RowGroup& group, uint8_t* rings)
        : call(call), group(group),
          k_bytes(half(call.layer.k, call.layer.k_open).bits,
                  static_cast<int>(call.layer.head_dim)),
          v_bytes(half(call.layer.v, call.layer.v_open).bits,
                  static_cast<int>(call.layer.head_dim)),
          units(kOpen ? launch.open_units : launch.units), first_tile(0),
          step(kOpen ? launch.open_warps : static_cast<int>(blockDim.x) / 32),
          count(0), has_first_token(false) {
        slot_bytes = kTile * max(k_bytes.codes + 2 * k_bytes.groups,
                                 v_bytes.codes + 2 * v_bytes.groups);
        memory = rings + warp_id() * units * slot_bytes;
    }
    static __device__ __forceinline__ ExlCacheHalf half(const ExlCacheHalf& half,
                                                        const ExlOpenPages& open) {
        return kOpen ? open_tokens(half, open) : half;
    }
    // Starts on the tiles of tokens [first, end). The position of a tile alone decides its warp.
    __device__ __forceinline__ void begin(int first, int end, bool first_token = false) {
        const int tiles_begin = first / kTile, tiles_end = ceil_div(end, kTile);
        const int offset = (warp_id() - tiles_begin % step + step) % step;
        first_tile = tiles_begin + offset;
        count = first_tile < tiles_end ? ceil_div(tiles_end - first_tile, step) : 0;
        if constexpr (kOpen) {
            if (warp_id() >= step) count = 0;
            has_first_token = first_token && warp_id() == step - 1;
            count += has_first_token ? 1 : 0;
        }
        for (int unit = 0; unit < units; ++unit) issue(unit);
    }
    // True for the tile that has position 0 alone.
    __device__ __forceinline__ bool is_first_token(int tile) const {
        return kOpen && has_first_token && tile == count - 1;
    }
    __device__ __forceinline__ int token(int tile) const {
        return is_first_token(tile) ? 0 : (first_tile + tile * step) * kTile;
    }
    __device__ __forceinline__ uint8_t* slot(int unit) const {
        return memory + (unit & (units - 1)) * slot_bytes;
    }
    __device__ __forceinline__ void issue(int unit) {
        if (unit < 2 * count) {
            if constexpr (kOpen) {
                if (unit % 2) {
                    copy_open(call.layer.v, call.layer.v_open, v_bytes, unit);
                } else {
                    copy_open(call.layer.k, call.layer.k_open, k_bytes, unit);
                }
            } else {
                const int64_t token_index =
                    token_index_of(call.batch, group.sequence, call.layer.num_kv_heads,
                                   group.kv_head, token(unit / 2));
                if (unit % 2) {
                    copy(call.layer.v, v_bytes, token_index, slot(unit));
                } else {
                    copy(call.layer.k, k_bytes, token_index, slot(unit));
                }
            }
        }
        copy_async_commit();
    }
    __device__ __forceinline__ void copy_open(const ExlCacheHalf& pages, const ExlOpenPages& open,
                                              const TileBytes& bytes, int unit) {
        const int64_t heads = call.layer.num_kv_heads;
        if (is_first_token(unit / 2)) {
            const int64_t token_index =
                first_token_index(call.batch, open, group.sequence, heads, group.kv_head);
            copy_token(first_tokens(pages, open), bytes, token_index, kTile, slot(unit));
        } else {
            const int64_t token_index = open_token_index(
                call.batch, open, group.sequence, heads, group.kv_head, token(unit / 2));
            copy(open_tokens(pages, open), bytes, token_index, slot(unit));
        }
    }
    static __device__ __forceinline__ void copy(const ExlCacheHalf& half, const TileBytes& bytes,
                                                int64_t token_index, uint8_t* target) {
        if constexpr (!kWhole) {
            copy_tile(half, bytes, token_index, kTile, target, lane_id(), 32);
        } else if constexpr (kOpen) {
            if (half.bits == 8) return copy_whole_tile<kTile, kHeadDim, 8>(half, token_index, target);
            copy_whole_tile<kTile, kHeadDim, 16>(half, token_index, target);
        } else {
            switch (half.bits) {
                case 3: return copy_whole_tile<kTile, kHeadDim, 3>(half, token_index, target);
                case 4: return copy_whole_tile<kTile, kHeadDim, 4>(half, token_index, target);
                case 6: return copy_whole_tile<kTile, kHeadDim, 6>(half, token_index, target);
                case 8: return copy_whole_tile<kTile, kHeadDim, 8>(half, token_index, target);
                default: return copy_whole_tile<kTile, kHeadDim, 16>(half, token_index, target);
            }
        }
    }
    __device__ __forceinline__ Tile<kHeadDim, kTile, kWhole> wait(int unit) const {
        if (units == 4) {
            copy_async_wait<3>();
        } else if (units == 2) {
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        warp_sync();  // what other lanes copied is visible
        return {slot(unit), static_cast<int>(call.layer.head_dim)};
    }
    __device__ __forceinline__ void release(int unit) {
        warp_sync();  // no lane reads the slot any more
        issue(unit + units);
    }
};

template <int kHeadDim, int kTile, int kBits, typename Tile>
__device__ __forceinline__ void score_tile(const Tile& tile, const uint4* queries,
                                           float (&scores)[kTile / 16][4]) {
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
        scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = 0.0f;
        score_tokens<kHeadDim, kBits>(tile, i * 16, queries, scores[i]);
    }
}
// Adds a tile's values, of its tokens [begin, end). No row sees the others, and those from `end` on
// were never written.
template <int kHeadDim, int kTile, int kBits, typename Tile>
__device__ __forceinline__ void weigh_tile(const Tile& tile, int begin, int end,
                                           const uint32_t (&weights)[kTile / 16][2],
                                           float (&o)[kHeadDim / 16][4]) {
    if (end < kTile) clear_tokens<kBits>(tile, end, kTile);
    if (begin > 0) clear_tokens<kBits>(tile, 0, begin);
    static_assert(kTile <= 32);
    // Not unrolled, because both halves at once would need more registers than a thread has.
#pragma unroll 1
    for (int first = 0; first < kTile; first += 16) {
        const bool later = first != 0;
        const uint32_t chosen[2] = {later ? weights[kTile / 16 - 1][0] : weights[0][0],
                                    later ? weights[kTile / 16 - 1][1] : weights[0][1]};
        weigh_tokens<kHeadDim, kBits>(tile, first, chosen, o);
    }
}

// Prepares queries and attends the tiles of a warp's ring, whose first copies are on their way.
// kWaves: tokens whose waves BiasMemory holds.
template <int kHeadDim, int kTile, int kWaves, bool kWhole, bool kOpen>
__device__ __forceinline__ void attend_tiles(const AttentionCall& call, const RowGroup& group,
                                             const Pass& pass,
                                             Ring<kHeadDim, kTile, kWhole, kOpen>& ring,
                                             const DecodeMemory<kHeadDim>& memory,
                                             DecodeSums<kHeadDim>& sums) {
    const int k_bits = ring.half(call.layer.k, call.layer.k_open).bits;
    prepare_queries<kHeadDim, kWaves>(call, group, pass, k_bits, memory);
    const ScoreTransform transform(call.shape);
    const int sliding_window = static_cast<int>(call.shape.sliding_window);
    for (int tile = 0; tile < ring.count; ++tile) {
        float scores[kTile / 16][4];
        uint32_t weights[kTile / 16][2];
        const auto keys = ring.wait(2 * tile);
        if constexpr (kOpen) {
            if (ring.half(call.layer.k, call.layer.k_open).bits == 8) {
                score_tile<kHeadDim, kTile, 8>(keys, memory.queries, scores);
            } else {
                score_tile<kHeadDim, kTile, 16>(keys, memory.queries, scores);
            }
        } else {
            switch (call.layer.k.bits) {
                case 3: score_tile<kHeadDim, kTile, 3>(keys, memory.queries, scores); break;
                case 4: score_tile<kHeadDim, kTile, 4>(keys, memory.queries, scores); break;
                case 6: score_tile<kHeadDim, kTile, 6>(keys, memory.queries, scores); break;
                case 8: score_tile<kHeadDim, kTile, 8>(keys, memory.queries, scores); break;
                default: score_tile<kHeadDim, kTile, 16>(keys, memory.queries, scores);
            }
        }
        ring.release(2 * tile);
        const int first = ring.token(tile);
        if (call.bias.num_pairs != 0) {
            add_bias<kHeadDim, kTile, kWaves>(call, memory, first, scores);
        }
        // The open page's kv_split attends position 0.
        const int begin = !kOpen && first == 0 && has_open_pages(call.layer) ? 1 : 0;
        const int end = ring.is_first_token(tile) ? 1 : kTile;
        const bool all = begin == 0 && !ring.is_first_token(tile) &&
                         all_visible(pass.low_row, pass.high - 1, first, kTile, sliding_window);
        softmax_tile<kHeadDim, kTile>(scores, first, begin, end, all, transform, sliding_window,
                                      *memory.data, sums, weights);
        const auto values = ring.wait(2 * tile + 1);
        const int written = min(end, pass.high - first);
        if constexpr (kOpen) {
            if (ring.half(call.layer.v, call.layer.v_open).bits == 8) {
                weigh_tile<kHeadDim, kTile, 8>(values, begin, written, weights, sums.o);
            } else {
                weigh_tile<kHeadDim, kTile, 16>(values, begin, written, weights, sums.o);
            }
        } else {
            switch (call.layer.v.bits) {
                case 3:
                    weigh_tile<kHeadDim, kTile, 3>(values, begin, written, weights, sums.o);
                    break;
                case 4:
                    weigh_tile<kHeadDim, kTile, 4>(values, begin, written, weights, sums.o);
                    break;
                case 6:
                    weigh_tile<kHeadDim, kTile, 6>(values, begin, written, weights, sums.o);
                    break;
                case 8:
                    weigh_tile<kHeadDim, kTile, 8>(values, begin, written, weights, sums.o);
                    break;
                default:
                    weigh_tile<kHeadDim, kTile, 16>(values, begin, written, weights, sums.o);
            }
        }
        ring.release(2 * tile + 1);
    }
    copy_async_wait<0>();
}

// Attends one kv_split of the rows of one pass.
template <int kHeadDim, int kTile, bool kWhole>
__device__ __forceinline__ void attend_kv_split(const AttentionCall& call,
                                                const DecodeLaunch& launch, const RowGroup& group,
                                                const Pass& pass, int kv_split,
                                                const DecodeMemory<kHeadDim>& memory) {
    const int length = pass.pages * kPageLen;
    const bool has_open = launch.open_warps != 0, is_open = has_open && kv_split == pass.end - 1;
    const int own_page = has_open ? first_open(call.batch, group.sequence) : pass.high;
    Ring<kHeadDim, kTile, kWhole, false> ring(call, launch, group, memory.ring);
    Ring<kHeadDim, kOpenTile, kWhole, true> open_ring(call, launch, group, memory.ring);
    if (is_open) {
        open_ring.begin(max(own_page, pass.low), pass.high, own_page > 0 && pass.low == 0);
    } else {
        ring.begin(max(kv_split * length, pass.low), min((kv_split + 1) * length, own_page));
    }
    DecodeSums<kHeadDim> sums;
    int v_bits;
    if (is_open) {
        attend_tiles<kHeadDim, kOpenTile, kTile>(call, group, pass, open_ring, memory, sums);
        v_bits = open_tokens(call.layer.v, call.layer.v_open).bits;
    } else {
        attend_tiles<kHeadDim, kTile, kTile>(call, group, pass, ring, memory, sums);
        v_bits = call.layer.v.bits;
    }
    merge_warps<kHeadDim>(sums, reinterpret_cast<float*>(memory.ring));
    if (warp_id() == 0) spread_rows<kHeadDim>(call, v_bits, sums, memory);
}

// kWhole: heads have exactly kHeadDim elements. Values that are needed after a kv_split are
// computed again, because keeping them would cost registers in the loop over tiles.
template <int kHeadDim, int kTile, bool kWhole>
__device__ __forceinline__ void attention_decode(const AttentionCall& call,
                                                 const DecodeLaunch& launch, char* shared) {
    const DecodeMemory<kHeadDim> memory(shared);
    const int arrivals = Passes(call, launch, RowGroup(call, launch)).arrivals;
    if (static_cast<int>(blockIdx.x) >= arrivals) return;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        {
            const RowGroup group(call, launch);
            const Passes passes(call, launch, group);
            if (i >= passes.count) break;
            const Pass pass(call, launch, passes, i);
            const int kv_split = pass.first + blockIdx.x;
            if (kv_split >= pass.end) continue;
            block_sync();  // the first pass no longer reads shared memory
            attend_kv_split<kHeadDim, kTile, kWhole>(call, launch, group, pass, kv_split, memory);
        }
        block_sync();  // rows are read by all warps
        const RowGroup group(call, launch);
        const Pass pass(call, launch, Passes(call, launch, group), i);
        store_partials<kHeadDim>(call, launch, group, pass.first + blockIdx.x, memory);
    }
    merge_kv_splits<kHeadDim>(call, launch, memory);
}

// Blocks per multiprocessor, which limit the registers of a thread. Compute capability 7.5 has
// shared memory for only one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kBlocks = 1;
#else
constexpr int kBlocks = 2;
#endif

#define EXL_DECODE_KERNEL(name, head_dim, tile, whole, blocks)                                 \
    extern "C" __global__ void __launch_bounds__(kThreads, blocks)                             \
        attention_decode_##name##_kernel(const __grid_constant__ AttentionCall call,           \
                                         const __grid_constant__ DecodeLaunch launch) {        \
        EXL_SHARED(char, shared);                                                              \
        attention_decode<head_dim, tile, whole>(call, launch, shared);                         \
    }                                                                                          \
    EXL_KERNEL(attention_decode_##name##_kernel)

}  // namespace exl
