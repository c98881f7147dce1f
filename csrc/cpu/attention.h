// Attention over the packed cache: what its parts share.
//
// A query row (one query head of one token) sees keys [low, high). Positions are cut into
// splits of kSplitTokens and these into tiles, at fixed places of the sequence. Within a
// split a row keeps a running maximum, a sum and a weighted sum of values, tile after tile;
// splits are then merged in order. Every step works on one row with a fixed order of
// operations, so a row's result is the same bits whether it is computed alone or among
// others, by one thread or many, decoding or in prefill.
#pragma once

#include "attention_tile.h"

namespace exl {

// Tokens of a split: two pages are some 20 us of work for 8 heads, worth a thread's claim.
constexpr int kSplitTokens = 512;
static_assert(kSplitTokens % kTileTokens == 0, "a split is whole tiles");

// Rows of one prefill task: enough that expanding a tile is small beside using it.
constexpr int kTaskRows = 128;

// What a row has gathered from some of its keys.
struct Partial {
    float* sums;     // [rows, value_stride]: sum of exp(score - largest) * value
    float* totals;   // [rows, kLanes]: sum of exp(score - largest), lane by lane
    float* largest;  // [rows]: largest score, -inf where no key was visible
};

struct BiasRows;  // key_bias.h

// Rows of one key/value head of one sequence. Queries are rotated where keys are, and scaled.
struct Rows {
    int64_t count;
    const float* queries;            // [count, head_dim]
    const int32_t* low;              // [count]: first position that a row sees
    const int32_t* high;             // [count]: one past the last
    const BiasRows* bias = nullptr;  // what a key bias adds, if anything
};

// Where a sequence's head lies in the cache.
struct Head {
    const ExlCacheLayer* layer;
    const int32_t* pages;
    int64_t index;
    float softcap;
};

// Memory of attend(): keys [head_dim, kTileTokens], values [kTileTokens, value_stride],
// scores [rows, kTileTokens].
struct TileScratch {
    float* keys;
    float* values;
    float* scores;
};

// Attends rows to positions [first, end), within one split, from nothing into `partial`.
void attend(const Head& head, const Rows& rows, int32_t first, int32_t end,
            const TileScratch& scratch, const Partial& partial);

// Adds row `from` of one partial, of later positions, to row `into` of another.
void merge_row(const Partial& into, int64_t into_row, const Partial& from, int64_t from_row,
               int stride);

}  // namespace exl
