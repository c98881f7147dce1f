// Attention over the packed cache: declarations shared by the attention sources.
//
// Purpose: out = softmax(scale * q . k) v for every query row (one query head of one token),
// which sees the keys at positions [low, high).
//
// Order of operations: positions are cut into kv_splits of kKvSplitTokens tokens and these into
// tiles of kTileTokens tokens, both at fixed positions of the sequence. Within a kv_split a row
// keeps a running maximum, a sum of weights and a weighted sum of values, updated tile by tile;
// kv_splits are merged in order. Every step works on one row with a fixed order of operations,
// so a row's result has the same bits if it is computed alone or among others, by one thread or
// by many, in decoding or in prefill.
//
// Layout of an expanded tile: a tile holds up to kTileTokens tokens of one head and lies within
// one page. Keys are [head_dim][kTileTokens], so that a score is a sum down a column and needs
// no sum across lanes. Values are [token][value_stride(head_dim)]. Both stay rotated, as they
// are stored.
#pragma once

#include "cache_codec.h"
#include "cache_simd.h"

namespace exl {

constexpr int kTileTokens = 64;
static_assert(kPageLen % kTileTokens == 0, "a tile lies within one page");

// Floats of one expanded value: head_dim rounded up to whole vectors, padded with zeros.
constexpr int value_stride(int head_dim) { return round_up(head_dim, kLanes); }

// Tokens of a kv_split: two pages are about 20 us of work for 8 heads, enough to be worth the
// cost of claiming a task.
constexpr int kKvSplitTokens = 512;
static_assert(kKvSplitTokens % kTileTokens == 0, "a kv_split is whole tiles");

// Rows of one prefill task: enough that the time to expand a tile is small beside its use.
constexpr int kTaskRows = 128;

// Running results of some rows over a part of their keys.
struct Partial {
    float* sums;     // [rows, value_stride]: sum of exp(score - largest) * value
    float* totals;   // [rows, kLanes]: sum of exp(score - largest), one partial sum per lane
    float* largest;  // [rows]: largest score; -inf while no key was visible
};

struct BiasRows;  // key_bias.h

// Rows of one key/value head of one sequence. Queries are multiplied by the scale, and rotated
// if the cache stores rotated keys.
struct Rows {
    int64_t count;
    const float* queries;            // [count, head_dim]
    const int32_t* low;              // [count]: first visible position
    const int32_t* high;             // [count]: one past the last visible position
    const BiasRows* bias = nullptr;  // the key bias of these rows; null: none
};

// Location of one key/value head of one sequence in the cache.
struct Head {
    const ExlCacheLayer* layer;
    const int32_t* pages;
    int64_t index;
    float softcap;
    int64_t open_page;   // of the sequence
    int32_t first_open;  // first position of the open page; no position is as large if there is none
};

// Tile buffers of attend(): keys [head_dim, kTileTokens], values [kTileTokens, value_stride],
// scores [rows, kTileTokens].
struct TileScratch {
    float* keys;
    float* values;
    float* scores;
};

// Expands the keys of `tokens` tokens. token_index counts tokens of [pages, kv_heads, kPageLen].
// The number of tokens is rounded up to kLanes; the columns beyond `tokens` receive unspecified
// values, possibly not finite. out [head_dim, kTileTokens].
void expand_keys(const ExlCacheHalf& keys, int64_t token_index, int tokens,
                 int head_dim, float* out);

// Expands the values of exactly `tokens` tokens. out [tokens, value_stride(head_dim)].
void expand_values(const ExlCacheHalf& values, int64_t token_index, int tokens,
                   int head_dim, float* out);

// Attends the rows to positions [first, end), which lie within one kv_split. Overwrites
// `partial`.
void attend(const Head& head, const Rows& rows, int32_t first, int32_t end,
            const TileScratch& scratch, const Partial& partial);

// Merges row `from_row` of `from`, which covers later positions, into row `into_row` of `into`.
void merge_row(const Partial& into, int64_t into_row, const Partial& from, int64_t from_row,
               int stride);

}  // namespace exl
