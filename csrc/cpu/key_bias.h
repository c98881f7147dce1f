// What a layer's key bias adds to scores, where keys are stored without it.
//
// The formula is in exl_loader/key_bias.py: for each pair of bias elements two more terms of a
// dot product, factors of the query row times the cosine and sine of position * frequency. So
// a tile of scores gets one more product, [rows, 2 * pairs] x [2 * pairs, kTileTokens].
#pragma once

#include "attention.h"

namespace exl {

constexpr int kMaxBiasPairs = 32;  // cache.MAX_BIAS_PAIRS

// The rows of a task; some 32 KiB, on its thread's stack.
struct BiasRows {
    int num_pairs;
    double frequencies[kMaxBiasPairs];
    float factors[kTaskRows * 2 * kMaxBiasPairs];  // [rows, num_pairs, (cosine's, sine's)]
    int depth() const { return 2 * num_pairs; }
};

// Begins the rows of one key/value head of one sequence.
void begin_bias(const ExlKeyBias& bias, int64_t sequence, int64_t head, BiasRows* rows);

// Computes the factors of a row from its query [head_dim], as it is behind RoPE.
void set_bias_row(const ExlKeyBias& bias, int64_t head, const float* query, float scale,
                  int64_t row, BiasRows* rows);

// Cosines and sines along a split, tile by tile.
//
// Angles begin with an exact one at the split's first position, wherever the caller begins, and
// go on by complex products in double: so a position has the same bits in every call.
class BiasWaves {
  public:
    BiasWaves(const BiasRows& rows, int32_t first_tile);
    // out [2 * pairs, kTileTokens]: the next tile's.
    void next(float* out);

  private:
    void advance(int pair);

    int num_pairs_;
    double cos_[kMaxBiasPairs], sin_[kMaxBiasPairs];            // at the next position
    double cos_step_[kMaxBiasPairs], sin_step_[kMaxBiasPairs];  // of kLanes positions
    float cos_lanes_[kMaxBiasPairs * kLanes], sin_lanes_[kMaxBiasPairs * kLanes];
};

}  // namespace exl
