// Attention of few query rows over a long cache: what decoding is, with or without drafts.
//
// Reading the cache once, at the memory's speed, is all that matters. A block takes one key/
// value head of one sequence, up to 8 query rows that share it (query heads x rows), and one
// split of the tokens; its warps take tiles of kTile tokens in turn, each through a ring of
// its own in shared memory, filled ahead by asynchronous copies. Nothing unpacked is stored.
//
// Keys stay integers: a group of 32 elements of 16 tokens is the A operand of m16n8k32, and
// queries, as two bytes of 15 bits of their row's largest magnitude, are B. So scores are as
// exact as the cache, however large keys are; a group's sum meets its scale in float32.
// Values times their scales become float16, A of m16n8k16 (16 elements x 16 tokens), and
// weights are B. Both unpack without a sum across lanes, since a product does not care in
// which order its elements stand.
//
// Splits: whole pages, at fixed places of the sequence. How many pages a split has depends on
// how much its row sees, at most `most_splits` of them, so the launch is the same for every
// length. A row's softmax runs over tiles in a fixed order, tiles that it does not see change
// nothing, and a call whose rows differ in the pages of their splits treats them one after the
// other: a row's result is the same bits alone, in a batch, or among drafts.
//
// Where a row has several splits, each leaves its sums in `partials`, float32
// [sequences of the launch, max_rows, num_heads, slots, head_dim + 2] (sums, largest, total);
// the last block of a key/value head to arrive, which a counter tells, adds them in order.
//
// Grid: splits, kv_heads * groups of 8 rows, sequences. Shared memory: queries as B fragments
// [kHeadDim / 32][32 lanes] of 16 bytes, rows float32 [8, kHeadDim], RowData, then per warp
// `units` slots of a tile's keys or values; merging warps reuses those.
#include "cuda/decode_gather.cuh"
#include "cuda/decode_products.cuh"
#include "cuda/decode_rows.cuh"

namespace exl {

constexpr int kThreads = 256;

// A warp's way through its tiles: keys and values in turn, `units` copies ahead.
template <int kHeadDim, int kTile, bool kWhole>
struct Ring {
    const AttentionCall& call;
    const RowGroup& group;
    TileBytes k_bytes, v_bytes;
    uint8_t* memory;
    int units, slot_bytes, first_tile, step, count;  // count: tiles of this warp

    __device__ __forceinline__ Ring(const AttentionCall& call, const RowGroup& group, int units,
                                    uint8_t* rings)
        : call(call), group(group),
          k_bytes(call.layer.k.bits, static_cast<int>(call.layer.head_dim)),
          v_bytes(call.layer.v.bits, static_cast<int>(call.layer.head_dim)), units(units) {
        slot_bytes = kTile * max(k_bytes.codes + 2 * k_bytes.groups,
                                 v_bytes.codes + 2 * v_bytes.groups);
        memory = rings + warp_id() * units * slot_bytes;
    }
    // Tiles of [first, end) tokens; which warp has which depends on their place alone.
    __device__ __forceinline__ void begin(int first, int end) {
        step = static_cast<int>(blockDim.x) / 32;
        const int tiles_begin = first / kTile, tiles_end = (end + kTile - 1) / kTile;
        const int offset = (warp_id() - tiles_begin % step + step) % step;
        first_tile = tiles_begin + offset;
        count = first_tile < tiles_end ? (tiles_end - first_tile + step - 1) / step : 0;
        for (int unit = 0; unit < units; ++unit) issue(unit);
    }
    __device__ __forceinline__ int token(int tile) const {
        return (first_tile + tile * step) * kTile;
    }
    __device__ __forceinline__ uint8_t* slot(int unit) const {
        return memory + (unit & (units - 1)) * slot_bytes;
    }
    __device__ __forceinline__ void issue(int unit) {
        if (unit < 2 * count) {
            const int64_t place = place_of(call.batch, group.sequence, call.layer.num_kv_heads,
                                           group.kv_head, token(unit / 2));
            if (unit % 2) {
                copy_tile(call.layer.v, v_bytes, place, kTile, slot(unit), lane_id(), 32);
            } else {
                copy_tile(call.layer.k, k_bytes, place, kTile, slot(unit), lane_id(), 32);
            }
        }
        copy_async_commit();
    }
    __device__ __forceinline__ Tile<kHeadDim, kTile, kWhole> wait(int unit) const {
        if (units == 4) {
            copy_async_wait<3>();
        } else if (units == 2) {
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        warp_sync();  // what other lanes copied is there
        return {slot(unit), static_cast<int>(call.layer.head_dim)};
    }
    __device__ __forceinline__ void release(int unit) {
        warp_sync();  // all lanes are done with it
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
// Tokens from `end` on were never written.
template <int kHeadDim, int kTile, int kBits, typename Tile>
__device__ __forceinline__ void weigh_tile(const Tile& tile, int end,
                                           const uint32_t (&weights)[kTile / 16][2],
                                           float (&o)[kHeadDim / 16][4]) {
    if (end < kTile) clear_tokens<kTile, kBits>(tile, end);
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
        weigh_tokens<kHeadDim, kBits>(tile, i * 16, weights[i], o);
    }
}

// A warp's tiles of its ring. total: tokens of the sequence, all that was ever written.
template <int kHeadDim, int kTile, bool kWhole>
__device__ __forceinline__ void attend_tiles(const AttentionCall& call,
                                             Ring<kHeadDim, kTile, kWhole>& ring, int total,
                                             const Memory<kHeadDim>& memory,
                                             Gathered<kHeadDim>& gathered) {
    const Softening soften(call.shape);
    const int window = static_cast<int>(call.shape.window);
    for (int tile = 0; tile < ring.count; ++tile) {
        float scores[kTile / 16][4];
        uint32_t weights[kTile / 16][2];
        const auto keys = ring.wait(2 * tile);
        switch (call.layer.k.bits) {
            case 4: score_tile<kHeadDim, kTile, 4>(keys, memory.queries, scores); break;
            case 6: score_tile<kHeadDim, kTile, 6>(keys, memory.queries, scores); break;
            case 8: score_tile<kHeadDim, kTile, 8>(keys, memory.queries, scores); break;
            default: score_tile<kHeadDim, kTile, 16>(keys, memory.queries, scores);
        }
        ring.release(2 * tile);
        weights_of<kHeadDim, kTile>(scores, ring.token(tile), soften, window, *memory.data,
                                    gathered, weights);
        const auto values = ring.wait(2 * tile + 1);
        const int end = total - ring.token(tile);
        switch (call.layer.v.bits) {
            case 4: weigh_tile<kHeadDim, kTile, 4>(values, end, weights, gathered.o); break;
            case 6: weigh_tile<kHeadDim, kTile, 6>(values, end, weights, gathered.o); break;
            case 8: weigh_tile<kHeadDim, kTile, 8>(values, end, weights, gathered.o); break;
            default: weigh_tile<kHeadDim, kTile, 16>(values, end, weights, gathered.o);
        }
        ring.release(2 * tile + 1);
    }
    copy_async_wait<0>();
}

// One split of the rows of one pass.
template <int kHeadDim, int kTile, bool kWhole>
__device__ __forceinline__ void attend_split(const AttentionCall& call,
                                             const DecodeLaunch& launch, const RowGroup& group,
                                             const Pass& pass, int split,
                                             const Memory<kHeadDim>& memory) {
    const int length = pass.pages * kPageLen;
    Ring<kHeadDim, kTile, kWhole> ring(call, group, launch.units, memory.ring);
    ring.begin(max(split * length, pass.low), min((split + 1) * length, pass.high));
    stage_queries<kHeadDim>(call, launch, group, pass, memory);
    Gathered<kHeadDim> gathered;
    attend_tiles<kHeadDim, kTile, kWhole>(call, ring, pass.high, memory, gathered);
    merge_warps<kHeadDim>(gathered, reinterpret_cast<float*>(memory.ring));
    if (warp_id() == 0) spread_rows<kHeadDim>(call, gathered, memory);
    block_sync();  // rows are read by all
    leave_rows<kHeadDim>(call, launch, group, split, memory);
}

// kWhole: heads have exactly kHeadDim elements.
template <int kHeadDim, int kTile, bool kWhole>
__device__ __forceinline__ void attention_decode(const AttentionCall& call,
                                                 const DecodeLaunch& launch, char* shared) {
    const RowGroup group(call, launch);
    if (group.count <= 0) return;
    const Memory<kHeadDim> memory(shared);
    const int index = blockIdx.x;
    const int low_row = group.position(0), high_row = group.position(group.count - 1);
    // One pass, but where the number of pages changes between the group's rows.
    const int change = low_row == high_row ? high_row + 1
                                           : pages_change(call, launch, low_row, high_row);
    const int passes = change <= high_row ? 2 : 1;
    int arrivals = 0;
    for (int i = 0; i < passes; ++i) {
        const Pass pass(call, launch, i ? change : low_row, i ? high_row : change - 1);
        arrivals = max(arrivals, pass.end - pass.first);
    }
    if (index >= arrivals) return;
#pragma unroll 1
    for (int i = 0; i < passes; ++i) {
        const Pass pass(call, launch, i ? change : low_row, i ? high_row : change - 1);
        if (pass.first + index >= pass.end) continue;
        block_sync();  // the first pass's shared memory is no longer read
        attend_split<kHeadDim, kTile, kWhole>(call, launch, group, pass, pass.first + index,
                                              memory);
    }
    if (arrivals > 1) combine<kHeadDim>(call, launch, group, arrivals, memory);
}

// Blocks of a multiprocessor, which bounds the registers of a thread. Compute capability 7.5 has
// shared memory for one.
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

EXL_DECODE_KERNEL(64, 64, 32, true, kBlocks);
EXL_DECODE_KERNEL(128, 128, 32, true, kBlocks);
EXL_DECODE_KERNEL(256, 256, 16, true, 1);
EXL_DECODE_KERNEL(up_to_128, 128, 32, false, kBlocks);
EXL_DECODE_KERNEL(up_to_256, 256, 16, false, 1);

}  // namespace exl
