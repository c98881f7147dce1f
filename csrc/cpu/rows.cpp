// Operations on whole rows: embedding, gathering, scattering, gated sums, the choice of experts.
//
// Layout: float32, contiguous; embedding tables of any ExlDtype. Work per thread: whole rows.
// Row numbers are checked before anything is written; a wrong number returns -1 so that memory
// outside of a tensor is never read.
#include <cmath>
#include <cstring>
#include <limits>

#include "packed.h"
#include "replay.h"
#include "simd.h"
#include "threads.h"

namespace exl {
namespace {

// Elements to copy, or logits to compare, that are worth the cost of a claim: about 5 us.
constexpr int64_t kElementsPerTask = 16 * 1024;
constexpr int64_t kRoutesPerTask = 1024;

bool within(const int32_t* rows, int64_t count, int64_t limit) {
    for (int64_t i = 0; i < count; ++i) {
        if (rows[i] < 0 || rows[i] >= limit) return false;
    }
    return true;
}

// Element `index` of a table, as float32.
EXL_INLINE float element(const void* table, int64_t dtype, int64_t index) {
    switch (dtype) {
        case kExlFloat16: return half_to_float(static_cast<const uint16_t*>(table)[index]);
        case kExlBfloat16: return bfloat16_to_float(static_cast<const uint16_t*>(table)[index]);
        default: return static_cast<const float*>(table)[index];
    }
}

void copy_row(const void* table, int64_t dtype, int64_t start, int64_t step, int64_t size,
              float factor, float* out) {
    for (int64_t i = 0; i < size; ++i) {
        out[i] = element(table, dtype, start + i * step) * factor;
    }
}

template <class Function>
void for_each_row(int64_t rows, int64_t size, const Function& f) {
    const int64_t min_grain = ceil_div(kElementsPerTask, size);
    parallel_for(rows, balanced_grain(rows, min_grain), [&](int64_t first, int64_t end, int) {
        for (int64_t row = first; row < end; ++row) f(row);
    });
}

// The most experts of a layer, MAX_EXPERTS of checkpoint/config.py.
constexpr int64_t kMaxExperts = 1024;

// How experts are chosen; see exl_moe_route.
struct Routing {
    const float* correction;
    int64_t experts;
    int64_t top_k;
    bool sigmoid;
    bool normalize;
    double factor;
};

// The expert after (value, index) in falling order of values; among equal values the lower index
// comes first. -1 if there is none.
template <class Value>
int64_t next_expert(const Value* values, int64_t experts, Value value, int64_t index) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
        const bool later = values[e] < value || (values[e] == value && e > index);
        if (later && (best < 0 || values[e] > values[best])) best = e;
    }
    return best;
}

template <class Value>
void choose_experts(const Value* values, const Routing& routing, int32_t* chosen) {
    Value value = std::numeric_limits<Value>::infinity();
    int64_t index = -1;
    for (int64_t k = 0; k < routing.top_k; ++k) {
        index = next_expert(values, routing.experts, value, index);
        // Only NaN leaves no expert to choose; the weights then become NaN as well.
        if (index < 0) index = k;
        value = values[index];
        chosen[k] = static_cast<int32_t>(index);
    }
}

// Sigmoids, or the exponentials of a softmax before their division by `total`, the sum over all
// experts.
struct Scores {
    const float* logits;
    bool sigmoid;
    float largest = 0.0f;
    double total = 1.0;

    Scores(const float* row, const Routing& routing) : logits(row), sigmoid(routing.sigmoid) {
        if (sigmoid) return;
        constexpr float kAbove = std::numeric_limits<float>::infinity();
        const int64_t first = next_expert(logits, routing.experts, kAbove, -1);
        if (first >= 0) largest = logits[first];
        total = 0.0;
        for (int64_t e = 0; e < routing.experts; ++e) total += (*this)[e];
    }
    double operator[](int64_t expert) const {
        const double logit = logits[expert];
        return sigmoid ? 1.0 / (1.0 + std::exp(-logit)) : std::exp(logit - largest);
    }
};

void route_row(const float* logits, const Routing& routing, float* weights, int32_t* chosen) {
    const Scores scores(logits, routing);
    if (routing.correction == nullptr) {
        // By logits, because different logits may round to equal scores.
        choose_experts(logits, routing, chosen);
    } else {
        double values[kMaxExperts];
        for (int64_t e = 0; e < routing.experts; ++e) {
            values[e] = scores[e] / scores.total + routing.correction[e];
        }
        choose_experts(values, routing, chosen);
    }
    double chosen_total = 0.0;
    for (int64_t k = 0; k < routing.top_k; ++k) chosen_total += scores[chosen[k]];
    const double divisor = routing.normalize ? chosen_total : scores.total;
    for (int64_t k = 0; k < routing.top_k; ++k) {
        weights[k] = static_cast<float>(scores[chosen[k]] / divisor * routing.factor);
    }
}

}  // namespace
}  // namespace exl

// out[t] = table[ids[t]] * factor. Returns 0, or -1 if an id is outside of the table.
//
// ids: int32 [rows]; table: dtype [vocab, size]; out: float32 [rows, size].
EXL_API int exl_embed(const int32_t* ids, int64_t rows, const void* table, int64_t dtype,
                      int64_t vocab, int64_t size, float factor, float* out) {
    using namespace exl;
    if (!within(ids, rows, vocab)) return -1;
    for_each_row(rows, size, [&](int64_t t) {
        copy_row(table, dtype, ids[t] * size, 1, size, factor, out + t * size);
    });
    return 0;
}
EXL_REPLAYED(embed)

// exl_embed from a head in tiles: row id is column id % 16 of tile id / 16.
//
// ids: int32 [rows]; out: float32 [rows, table->in_features].
EXL_API int exl_embed_tiled(const int32_t* ids, int64_t rows, const ExlDenseLinear* table,
                            float factor, float* out) {
    using namespace exl;
    const int64_t size = table->in_features;
    if (!within(ids, rows, table->out_features)) return -1;
    for_each_row(rows, size, [&](int64_t t) {
        const int64_t tile = ids[t] / kTileColumns, lane = ids[t] % kTileColumns;
        copy_row(table->weight, table->dtype, tile * size * kTileColumns + lane, kTileColumns,
                 size, factor, out + t * size);
    });
    return 0;
}
EXL_REPLAYED(embed_tiled)

// out[i] = x[rows[i]]. Returns 0, or -1 if a row is outside of x.
//
// x: float32 [x_rows, size]; rows: int32 [count]; out: float32 [count, size].
EXL_API int exl_gather_rows(const float* x, int64_t x_rows, const int32_t* rows, int64_t count,
                            int64_t size, float* out) {
    using namespace exl;
    if (!within(rows, count, x_rows)) return -1;
    for_each_row(count, size, [&](int64_t i) {
        std::memcpy(out + i * size, x + rows[i] * size, sizeof(float) * size);
    });
    return 0;
}
EXL_REPLAYED(gather_rows)

// out[rows[i]] += weights[i] * x[i]. Returns 0, or -1 if a row is outside of out.
//
// x: float32 [count, size]; rows: int32 [count], distinct; weights: float32 [count]; out: float32
// [out_rows, size].
EXL_API int exl_scatter_add_rows(const float* x, const int32_t* rows, const float* weights,
                                 int64_t count, int64_t size, float* out, int64_t out_rows) {
    using namespace exl;
    if (!within(rows, count, out_rows)) return -1;
    for_each_row(count, size, [&](int64_t i) {
        float* target = out + rows[i] * size;
        for (int64_t j = 0; j < size; ++j) target[j] += weights[i] * x[i * size + j];
    });
    return 0;
}
EXL_REPLAYED(scatter_add_rows)

// x[t] += sigmoid(logits[t]) * y[t]; x, y: float32 [rows, size]; logits: float32 [rows].
EXL_API void exl_add_gated_rows(float* x, const float* y, const float* logits, int64_t rows,
                                int64_t size) {
    using namespace exl;
    for_each_row(rows, size, [&](int64_t t) {
        const double exact = 1.0 / (1.0 + std::exp(-static_cast<double>(logits[t])));
        const float gate = static_cast<float>(exact);
        for (int64_t i = t * size; i < (t + 1) * size; ++i) x[i] += gate * y[i];
    });
}
EXL_REPLAYED(add_gated_rows)

// Chooses the top_k experts of each row and their weights. A score is the sigmoid of a logit if
// `sigmoid` is not 0, else the softmax over all experts. The experts are those of the largest
// logits, or, if `correction` is not null, of the largest score + correction. Their weights are
// their scores, divided by the sum of the chosen scores if `normalize` is not 0, times `factor`.
//
// logits: float32 [rows, experts]; correction: float32 [experts], or null; weights: float32 and
// chosen: int32 [rows, top_k]; top_k <= experts <= 1024.
EXL_API void exl_moe_route(const float* logits, const float* correction, int64_t rows,
                           int64_t experts, int64_t top_k, int sigmoid, int normalize,
                           float factor, float* weights, int32_t* chosen) {
    using namespace exl;
    const Routing routing{correction, experts, top_k, sigmoid != 0, normalize != 0, factor};
    const int64_t min_grain = ceil_div(kRoutesPerTask, experts);
    parallel_for(rows, balanced_grain(rows, min_grain), [&](int64_t first, int64_t end, int) {
        for (int64_t row = first; row < end; ++row) {
            route_row(logits + row * experts, routing, weights + row * top_k,
                      chosen + row * top_k);
        }
    });
}
EXL_REPLAYED(moe_route)
