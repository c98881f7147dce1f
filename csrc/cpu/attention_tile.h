// Tiles of the cache as float32: what attention computes with.
//
// A tile is up to kTileTokens tokens of one head and lies within one page. Keys become
// [head_dim][kTileTokens], tokens side by side, so that a score is a sum down a column and
// needs no sum across lanes. Values become [token][value_stride(head_dim)]. Both stay
// rotated as they are stored.
#pragma once

#include "cache_codec.h"
#include "cache_simd.h"

namespace exl {

constexpr int kTileTokens = 64;
static_assert(kPageLen % kTileTokens == 0, "a tile lies within one page");

// Floats of one expanded value: head_dim rounded up to whole vectors, padded with zeros.
constexpr int value_stride(int head_dim) { return (head_dim + kLanes - 1) / kLanes * kLanes; }

// Expands the keys of `tokens` tokens. token_index counts tokens of [pages, kv_heads, kPageLen].
// The number of tokens is rounded up to kLanes; the columns beyond `tokens` receive unspecified
// values, possibly not finite. out [head_dim, kTileTokens].
void expand_keys(const ExlCacheHalf& keys, int64_t token_index, int tokens,
                 int head_dim, float* out);

// Expands the values of exactly `tokens` tokens. out [tokens, value_stride(head_dim)].
void expand_values(const ExlCacheHalf& values, int64_t token_index, int tokens,
                   int head_dim, float* out);

}  // namespace exl
