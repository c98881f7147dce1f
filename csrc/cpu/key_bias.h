// The contribution of a layer's key bias to scores, if keys are stored without the bias.
//
// Purpose: for each pair of bias elements the score gains two terms of a dot product: factors
// that depend on the query row, times the cosine and the sine of position * frequency. A tile of
// scores therefore gets one more product, [rows, 2 * pairs] x [2 * pairs, kTileTokens].
// ExlKeyBias describes the bias; KeyBias in Python derives the formula.
//
// Work: the thread that attends a task prepares the factors of its rows (BiasRows) and walks
// along the kv_split with the waves (BiasWaves). Precondition: at most kMaxBiasPairs pairs per
// key/value head and kTaskRows rows per task, which Python checks before it plans a key bias.
#pragma once

#include "attention.h"

namespace exl {

// The key bias of a task's rows; about 37 KiB on the stack of its thread.
struct BiasRows {
    int num_pairs;
    double frequencies[kMaxBiasPairs];
    double cos_step[kMaxBiasPairs], sin_step[kMaxBiasPairs];  // of kLanes positions
    float cos_lanes[kMaxBiasPairs * kLanes], sin_lanes[kMaxBiasPairs * kLanes];
    float factors[kTaskRows * 2 * kMaxBiasPairs];  // [rows, num_pairs, 2 (cosine, sine)]
    int depth() const { return 2 * num_pairs; }
};

// Prepares `rows` for one key/value head of one sequence; factors are set by set_bias_row.
void begin_bias(const ExlKeyBias& bias, int64_t sequence, int64_t head, BiasRows* rows);

// Computes the factors of one row from its query [head_dim], after RoPE.
void set_bias_row(const ExlKeyBias& bias, int64_t head, const float* query, float scale,
                  int64_t row, BiasRows* rows);

// Cosines and sines along a kv_split, tile by tile.
//
// Angles start with an exact value at the first position of the kv_split, even if the caller
// starts at a later tile, and advance by complex products in float64. A position therefore has
// the same bits in every call.
class BiasWaves {
  public:
    BiasWaves(const BiasRows& rows, int32_t first_tile);
    // Computes the next tile's waves: out [2 * pairs, kTileTokens].
    void next(float* out);

  private:
    void advance(int pair);

    const BiasRows& rows_;
    double cos_[kMaxBiasPairs], sin_[kMaxBiasPairs];  // at the next position
};

}  // namespace exl
