// Attention of few query rows over a long cache: decoding, with or without drafts.
//
// Purpose: read the cache once at the speed of memory. Nothing unpacked is stored.
//
// Layout: the cache as ExlCacheLayer, queries and outputs [rows, num_heads, head_dim]. head_dim
// is 64, 128 or 256.
//
// Work per block: one key/value head of one sequence, up to 8 query rows that share it (query
// heads x rows), and one kv_split of the tokens. Work per warp: every n-th tile of kTile tokens,
// each through the warp's own ring in shared memory, which asynchronous copies fill ahead.
//
// Arithmetic: keys stay integers. A group of 32 elements of 16 tokens is the A operand of
// m16n8k32; queries, as two bytes with 15 bits relative to the largest magnitude of their row,
// are B. Scores are therefore as exact as the cache, even if keys are large; the integer sum of a
// group is multiplied by its scale in float32. Values times their scales become float16, A of
// m16n8k16 (16 elements x 16 tokens), and weights are B. Both are unpacked without a sum across
// lanes, because the order of elements does not matter to a product.
//
// Kv_splits: whole pages at fixed positions of the sequence. The number of pages of a kv_split
// depends on the number of tokens that its row sees, so that there are at most `max_kv_splits`
// and the launch is the same for every length. A row's softmax runs over tiles in a fixed order
// and tiles outside of its view change nothing. If the rows of a block differ in the number of
// pages of their kv_splits, the block handles them in two passes. A row's result therefore has
// the same bits alone, in a batch, or among drafts.
//
// Open page: the last kv_split, by a loop of its own, because its keys and values have more bits
// and another order of elements (queries follow it). Position 0 is attended there, too, and not
// where its page is.
//
// If a row has several kv_splits, each stores its sums in `partials`, float32
// [rows of the launch, num_heads, slots, head_dim + 2] (sums, largest, total). A counter
// identifies the last block of a key/value head to finish; that block merges them in order.
//
// Grid: kv_splits, kv_heads * groups of 8 rows, sequences.
//
// Shared memory: queries as B fragments [kHeadDim / 32][32 lanes] of 16 bytes; rows float32
// [8, kHeadDim]; RowData; then per warp a ring of `units` slots, each for the keys or values of a
// tile, reused by merge_warps; BiasMemory. Rings for an open page, of `open_warps` warps and
// `open_units` slots, take the same memory.
//
// Preconditions: cache of 3, 4, 6, 8 or 16 bits; `units` is 1, 2 or 4; counters are zero; with open
// pages the rows of a sequence lie in one page.
#include "cuda/decode_loop.cuh"

namespace exl {

EXL_DECODE_KERNEL(64, 64, 32, true, kBlocks);
EXL_DECODE_KERNEL(128, 128, 32, true, kBlocks);
EXL_DECODE_KERNEL(256, 256, 16, true, 1);

}  // namespace exl
