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
// [rows of the launch, num_heads, slots, head_dim + 2] (sums, largest, total); the last block of
// a key/value head to arrive, which a counter tells, adds them in order.
//
// Grid: splits, kv_heads * groups of 8 rows, sequences. Shared memory: queries as B fragments
// [kHeadDim / 32][32 lanes] of 16 bytes, rows float32 [8, kHeadDim], RowData, then per warp
// `units` slots of a tile's keys or values, which merging warps reuses; BiasMemory.
#include "cuda/decode_split.cuh"

namespace exl {

EXL_DECODE_KERNEL(64, 64, 32, true, kBlocks);
EXL_DECODE_KERNEL(128, 128, 32, true, kBlocks);
EXL_DECODE_KERNEL(256, 256, 16, true, 1);

}  // namespace exl
