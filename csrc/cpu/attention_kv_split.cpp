// Attention over one kv_split: scores, softmax and weighted sums, tile by tile. See attention.h.
//
// Layout: a tile of keys [head_dim, kTileTokens] and of values [kTileTokens, value_stride];
// scores [rows, kTileTokens].
//
// Work: the calling thread handles all rows of a task. Both products keep a block of kBlockRows
// rows x kBlockVectors vectors in registers and run along the common dimension with one broadcast
// and one multiply-add per row and vector. Each score and each sum is therefore one chain of
// multiply-adds in a fixed order.
//
// Precondition: [first, end) lies within one kv_split.
#include <cmath>
#include <cstring>
#include <optional>

#include "attention.h"
#include "key_bias.h"
#include "simd_math.h"

namespace exl {
namespace {

#if defined(EXL_AVX512)
// Of 32 registers, 16 hold sums, 2 operands and 1 a broadcast.
constexpr int kBlockRows = 8;
constexpr int kBlockVectors = 2;
#else
// 4 rows of 16 lanes use 8 of AVX2's 16 registers.
constexpr int kBlockRows = 4;
constexpr int kBlockVectors = 1;
#endif
constexpr int kTileVectors = kTileTokens / kLanes;

EXL_INLINE float minus_infinity() { return -INFINITY; }

// a[rows, depth] b[depth, columns], float32; depth 0 for no product.
struct Product {
    const float* a = nullptr;
    int64_t a_stride = 0;
    const float* b = nullptr;
    int64_t b_stride = 0;
    int depth = 0;

    // The product from a row, or from a column, on.
    Product from_row(int64_t row) const { return {a + row * a_stride, a_stride, b, b_stride, depth}; }
    Product from_column(int64_t column) const {
        return {a, a_stride, b + column, b_stride, depth};
    }
};

template <int Rows, int Vectors>
EXL_INLINE void accumulate(const Product& product, F32x16 (&sums)[Rows][Vectors]) {
    for (int k = 0; k < product.depth; ++k) {
        F32x16 columns[Vectors];
        for (int i = 0; i < Vectors; ++i) {
            columns[i] = load(product.b + k * product.b_stride + i * kLanes);
        }
        for (int r = 0; r < Rows; ++r) {
            const F32x16 factor = broadcast(product.a[r * product.a_stride + k]);
            for (int i = 0; i < Vectors; ++i) sums[r][i] = fma(factor, columns[i], sums[r][i]);
        }
    }
}

// c[Rows, Vectors * 16] = (Add ? c : 0) + product + more.
template <int Rows, int Vectors, bool Add>
EXL_INLINE void multiply_block(const Product& product, const Product& more, float* c,
                               int64_t c_stride) {
    F32x16 sums[Rows][Vectors];
    for (int r = 0; r < Rows; ++r) {
        for (int i = 0; i < Vectors; ++i) {
            sums[r][i] = Add ? load(c + r * c_stride + i * kLanes) : broadcast(0.0f);
        }
    }
    accumulate(product, sums);
    accumulate(more, sums);
    for (int r = 0; r < Rows; ++r) {
        for (int i = 0; i < Vectors; ++i) store(c + r * c_stride + i * kLanes, sums[r][i]);
    }
}

template <int Vectors, bool Add>
void multiply_columns(int64_t rows, const Product& product, const Product& more, float* c,
                      int64_t c_stride) {
    int64_t row = 0;
    const auto multiply_rows = [&](auto block) {
        multiply_block<decltype(block)::value, Vectors, Add>(
            product.from_row(row), more.from_row(row), c + row * c_stride, c_stride);
        row += decltype(block)::value;
    };
    while (rows - row >= kBlockRows) multiply_rows(std::integral_constant<int, kBlockRows>());
    if constexpr (kBlockRows > 4) {
        if (rows - row >= 4) multiply_rows(std::integral_constant<int, 4>());
    }
    if (rows - row >= 2) multiply_rows(std::integral_constant<int, 2>());
    if (rows - row >= 1) multiply_rows(std::integral_constant<int, 1>());
}

// c[rows, vectors * 16] = (Add ? c : 0) + product + more.
template <bool Add>
void multiply(int64_t rows, int vectors, const Product& product, const Product& more, float* c,
              int64_t c_stride) {
    int i = 0;
    for (; i + kBlockVectors <= vectors; i += kBlockVectors) {
        multiply_columns<kBlockVectors, Add>(rows, product.from_column(i * kLanes),
                                             more.from_column(i * kLanes), c + i * kLanes,
                                             c_stride);
    }
    for (; i < vectors; ++i) {
        multiply_columns<1, Add>(rows, product.from_column(i * kLanes),
                                 more.from_column(i * kLanes), c + i * kLanes, c_stride);
    }
}

EXL_INLINE float exp_of(float x) {
    float lanes[kLanes];
    store(lanes, exp(broadcast(x)));
    return lanes[0];
}

EXL_INLINE void scale_row(float* sums, int stride, float* totals, float factor) {
    const F32x16 f = broadcast(factor);
    for (int i = 0; i < stride; i += kLanes) store(sums + i, load(sums + i) * f);
    store(totals, load(totals) * f);
}

// Turns the scores of one row into weights. Keys [low, high) of the tile are visible; the others
// get exactly 0. Rescales the row's running sums if the maximum rises.
void softmax_tile(float* scores, int low, int high, float softcap, const Partial& partial,
                  int64_t row, int stride) {
    if (low >= high) {
        std::memset(scores, 0, kTileTokens * sizeof(float));
        return;
    }
    if (softcap != 0.0f) {
        const F32x16 cap = broadcast(softcap);
        for (int i = 0; i < kTileTokens; i += kLanes) {
            store(scores + i, cap * tanh(load(scores + i) / cap));
        }
    }
    for (int t = 0; t < low; ++t) scores[t] = minus_infinity();
    for (int t = high; t < kTileTokens; ++t) scores[t] = minus_infinity();
    F32x16 top = load(scores);
    for (int i = kLanes; i < kTileTokens; i += kLanes) top = max(top, load(scores + i));
    float* totals = partial.totals + row * kLanes;
    const float tile_largest = largest(top);
    if (tile_largest > partial.largest[row]) {
        const float factor = exp_of(partial.largest[row] - tile_largest);
        scale_row(partial.sums + row * stride, stride, totals, factor);
        partial.largest[row] = tile_largest;
    }
    const F32x16 shift = broadcast(partial.largest[row]);
    for (int i = 0; i < kTileTokens; i += kLanes) {
        store(scores + i, exp(load(scores + i) - shift));
    }
    // exp() returns at least 2^-126, but a key that is not visible must have the weight 0.
    for (int t = 0; t < low; ++t) scores[t] = 0.0f;
    for (int t = high; t < kTileTokens; ++t) scores[t] = 0.0f;
    F32x16 total = load(totals);
    for (int i = 0; i < kTileTokens; i += kLanes) total = total + load(scores + i);
    store(totals, total);
}

// Where a tile is stored.
struct Place {
    const ExlCacheHalf* half;
    int64_t token_index;
};

Place place_of(const Head& head, const ExlCacheHalf& pages, const ExlOpenPages& open,
               int32_t tile) {
    const bool is_open = open.tokens.codes != nullptr && tile >= head.first_open;
    const int64_t page = is_open ? head.open_page : head.pages[tile / kPageLen];
    return {is_open ? &open.tokens : &pages,
            (page * head.layer->num_kv_heads + head.index) * kPageLen + tile % kPageLen};
}

// Replaces position 0 of the tile by the first token that is stored with open pages.
void replace_first(const Head& head, const TileScratch& scratch) {
    const ExlCacheLayer& layer = *head.layer;
    const int head_dim = static_cast<int>(layer.head_dim);
    const int64_t token_index = head.open_page * layer.num_kv_heads + head.index;
    if (layer.v_open.first.codes) {
        expand_values(layer.v_open.first, token_index, 1, head_dim, scratch.values);
    }
    if (layer.k_open.first.codes) {
        // Scores are computed later, so their memory is free.
        expand_values(layer.k_open.first, token_index, 1, head_dim, scratch.scores);
        for (int i = 0; i < head_dim; ++i) scratch.keys[i * kTileTokens] = scratch.scores[i];
    }
}

// Number of the `count` tokens from `first` on that lie before `position`.
EXL_INLINE int tokens_before(int32_t position, int32_t first, int count) {
    return position <= first ? 0 : position - first >= count ? count : position - first;
}

}  // namespace

void attend(const Head& head, const Rows& rows, int32_t first, int32_t end,
            const TileScratch& scratch, const Partial& partial) {
    const int head_dim = static_cast<int>(head.layer->head_dim);
    const int stride = value_stride(head_dim);
    std::memset(partial.sums, 0, rows.count * stride * sizeof(float));
    std::memset(partial.totals, 0, rows.count * kLanes * sizeof(float));
    for (int64_t r = 0; r < rows.count; ++r) partial.largest[r] = minus_infinity();
    const int32_t first_tile = first / kTileTokens * kTileTokens;
    std::optional<BiasWaves> waves;
    if (rows.bias) waves.emplace(*rows.bias, first_tile);
    for (int32_t tile = first_tile; tile < end; tile += kTileTokens) {
        const int tokens = end - tile < kTileTokens ? end - tile : kTileTokens;
        const ExlCacheLayer& layer = *head.layer;
        const Place keys = place_of(head, layer.k, layer.k_open, tile);
        const Place values = place_of(head, layer.v, layer.v_open, tile);
        expand_keys(*keys.half, keys.token_index, tokens, head_dim, scratch.keys);
        expand_values(*values.half, values.token_index, tokens, head_dim, scratch.values);
        if (tile == 0 && head.first_open > 0) replace_first(head, scratch);
        const int vectors = ceil_div(tokens, kLanes);
        alignas(64) float angles[2 * kMaxBiasPairs * kTileTokens];
        Product bias;
        if (waves) {
            waves->next(angles);
            const int depth = rows.bias->depth();
            bias = {rows.bias->factors, depth, angles, kTileTokens, depth};
        }
        multiply<false>(rows.count, vectors,
                        {rows.queries, head_dim, scratch.keys, kTileTokens, head_dim}, bias,
                        scratch.scores, kTileTokens);
        for (int64_t r = 0; r < rows.count; ++r) {
            softmax_tile(scratch.scores + r * kTileTokens,
                         tokens_before(rows.low[r], tile, tokens),
                         tokens_before(rows.high[r], tile, tokens), head.softcap, partial, r,
                         stride);
        }
        multiply<true>(rows.count, stride / kLanes,
                       {scratch.scores, kTileTokens, scratch.values, stride, tokens}, {},
                       partial.sums, stride);
    }
}

void merge_row(const Partial& into, int64_t into_row, const Partial& from, int64_t from_row,
               int stride) {
    const float* from_sums = from.sums + from_row * stride;
    const float* from_totals = from.totals + from_row * kLanes;
    float* into_sums = into.sums + into_row * stride;
    float* into_totals = into.totals + into_row * kLanes;
    const float from_largest = from.largest[from_row];
    float& into_largest = into.largest[into_row];
    if (from_largest == minus_infinity()) return;
    if (into_largest == minus_infinity()) {
        std::memcpy(into_sums, from_sums, stride * sizeof(float));
        std::memcpy(into_totals, from_totals, kLanes * sizeof(float));
        into_largest = from_largest;
        return;
    }
    const float top = from_largest > into_largest ? from_largest : into_largest;
    const F32x16 into_factor = broadcast(exp_of(into_largest - top));
    const F32x16 from_factor = broadcast(exp_of(from_largest - top));
    for (int i = 0; i < stride; i += kLanes) {
        const F32x16 kept = load(into_sums + i) * into_factor;
        store(into_sums + i, fma(load(from_sums + i), from_factor, kept));
    }
    store(into_totals, fma(load(from_totals), from_factor, load(into_totals) * into_factor));
    into_largest = top;
}

}  // namespace exl
