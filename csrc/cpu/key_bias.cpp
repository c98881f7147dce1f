// The contribution of key biases to scores. See key_bias.h.
#include "key_bias.h"

#include <cmath>

namespace exl {

void begin_bias(const ExlKeyBias& bias, int64_t sequence, int64_t head, BiasRows* rows) {
    rows->num_pairs = static_cast<int>(bias.num_pairs);
    const float* frequencies = bias.inv_freq + sequence * bias.half;
    for (int i = 0; i < rows->num_pairs; ++i) {
        const double frequency = frequencies[bias.pairs[head * bias.num_pairs + i]];
        rows->frequencies[i] = frequency;
        rows->cos_step[i] = std::cos(kLanes * frequency);
        rows->sin_step[i] = std::sin(kLanes * frequency);
        const double cos_one = std::cos(frequency), sin_one = std::sin(frequency);
        double c = 1.0, s = 0.0;
        for (int j = 0; j < kLanes; ++j) {
            rows->cos_lanes[i * kLanes + j] = static_cast<float>(c);
            rows->sin_lanes[i * kLanes + j] = static_cast<float>(s);
            const double next = c * cos_one - s * sin_one;
            s = s * cos_one + c * sin_one;
            c = next;
        }
    }
}

void set_bias_row(const ExlKeyBias& bias, int64_t head, const float* query, float scale,
                  int64_t row, BiasRows* rows) {
    float* factors = rows->factors + row * rows->depth();
    for (int i = 0; i < rows->num_pairs; ++i) {
        const int64_t index = head * bias.num_pairs + i;
        const int32_t pair = bias.pairs[index];
        const float first = bias.first[index] * scale, second = bias.second[index] * scale;
        const float q1 = query[pair], q2 = query[bias.half + pair];
        factors[2 * i] = q1 * first + q2 * second;
        factors[2 * i + 1] = q2 * first - q1 * second;
    }
}

BiasWaves::BiasWaves(const BiasRows& rows, int32_t first_tile) : rows_(rows) {
    const int32_t split_first = first_tile / kKvSplitTokens * kKvSplitTokens;
    for (int i = 0; i < rows_.num_pairs; ++i) {
        cos_[i] = std::cos(split_first * rows_.frequencies[i]);
        sin_[i] = std::sin(split_first * rows_.frequencies[i]);
        for (int32_t skipped = split_first; skipped < first_tile; skipped += kLanes) advance(i);
    }
}

void BiasWaves::advance(int pair) {
    const double c = cos_[pair], s = sin_[pair];
    cos_[pair] = c * rows_.cos_step[pair] - s * rows_.sin_step[pair];
    sin_[pair] = s * rows_.cos_step[pair] + c * rows_.sin_step[pair];
}

void BiasWaves::next(float* out) {
    for (int i = 0; i < rows_.num_pairs; ++i) {
        const F32x16 cos_lanes = load(rows_.cos_lanes + i * kLanes);
        const F32x16 sin_lanes = load(rows_.sin_lanes + i * kLanes);
        float* cosines = out + 2 * i * kTileTokens;
        float* sines = cosines + kTileTokens;
        for (int t = 0; t < kTileTokens; t += kLanes) {
            const F32x16 c = broadcast(static_cast<float>(cos_[i]));
            const F32x16 s = broadcast(static_cast<float>(sin_[i]));
            store(cosines + t, c * cos_lanes - s * sin_lanes);
            store(sines + t, s * cos_lanes + c * sin_lanes);
            advance(i);
        }
    }
}

}  // namespace exl
