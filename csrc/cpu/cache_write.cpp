// Keys and values into the cache: rotation, search of each group's scale, packing.
//
// Layout and search are defined in exl_loader/kernels/reference_codec.py. Work: one head of
// one row, keys and values alike; everything a head needs is on the stack.
//
// Cost: 34 roundings of each group (32 candidates, 2 refits), some 50 operations an element
// of 4 bits on AVX-512; beside a layer's matrix products that is under one percent.
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "cache_codec.h"
#include "cache_rotate.h"
#include "threads.h"

namespace exl {
namespace {

constexpr int kMaxHeadDim = 1024;  // config.MAX_HEAD_DIM
constexpr int kVectors = kGroup / kLanes;
// Heads that are worth a second thread: about 2 us each.
constexpr int64_t kHeadsPerTask = 2;
constexpr float kLargestHalf = 65504.0f;

// Rounds kLanes scales to float16 and says what the halves are worth.
void round_scales(const float* scales, uint16_t* halves, float* exact) {
    const F32x16 bounded =
        max(broadcast(-kLargestHalf), min(broadcast(kLargestHalf), load(scales)));
    store_half(halves, bounded);
    store(exact, load_half(halves));
}

// The same with `table` in the lowest bit, where codes have tables.
template <int Bits>
void round_scales(const float* scales, int table, uint16_t* halves, float* exact) {
    round_scales(scales, halves, exact);
    if (Bits != 4) return;
    for (int i = 0; i < kLanes; ++i) {
        halves[i] = static_cast<uint16_t>((halves[i] & 0xfffeu) | static_cast<unsigned>(table));
    }
    store(exact, load_half(halves));
}

// The grid of one table.
template <int Bits>
struct Grid {
    static constexpr float kHalf = 1 << (Bits - 1);

    explicit Grid(int) {}
    I32x16 nearest(F32x16 x) const {
        const F32x16 code = round(x * broadcast(kHalf));
        return to_int(max(broadcast(-kHalf), min(broadcast(kHalf - 1), code)) + broadcast(kHalf));
    }
    F32x16 level(I32x16 code) const {
        return (to_float(code) - broadcast(kHalf)) * broadcast(1 / kHalf);
    }
};

template <>
struct Grid<4> {
    float levels[kLevels];
    float thresholds[kLevels];

    explicit Grid(int table) {
        for (int i = 0; i < kLevels; ++i) levels[i] = kCodebooks[table][i] * kCodebookUnit;
        for (int i = 0; i + 1 < kLevels; ++i) thresholds[i] = 0.5f * (levels[i] + levels[i + 1]);
        thresholds[kLevels - 1] = levels[kLevels - 1];
    }
    I32x16 nearest(F32x16 x) const { return count_below(thresholds, x); }
    F32x16 level(I32x16 code) const { return lookup16(levels, code); }
};

// The best codes and scale found so far for one group.
template <int Bits>
struct GroupSearch {
    F32x16 y[kVectors];
    F32x16 counts[kVectors];  // 1 where a lane is an element, 0 where it fills up the group
    I32x16 codes[kVectors];
    float error = INFINITY;
    uint16_t scale = 0x7e00;  // NaN: stays where no attempt has a finite error
    int table = 0;

    // Rounds the group to the grid of one scale, float16 `half` worth `exact`.
    void attempt(const Grid<Bits>& grid, int candidate_table, uint16_t half, float exact) {
        const F32x16 inverse = broadcast(exact == 0.0f ? 0.0f : 1.0f / exact);
        const F32x16 minus = broadcast(-exact);
        I32x16 found[kVectors];
        F32x16 errors = broadcast(0.0f);
        for (int i = 0; i < kVectors; ++i) {
            found[i] = grid.nearest(y[i] * inverse);
            const F32x16 difference = fma(grid.level(found[i]), minus, y[i]) * counts[i];
            errors = fma(difference, difference, errors);
        }
        const float total = sum(errors);
        if (!(total < error)) return;
        error = total;
        scale = half;
        table = candidate_table;
        for (int i = 0; i < kVectors; ++i) codes[i] = found[i];
    }

    // Fits the scale to the codes by least squares, and tries that.
    void refit(const Grid<Bits>& grid) {
        F32x16 products = broadcast(0.0f), norms = broadcast(0.0f);
        for (int i = 0; i < kVectors; ++i) {
            const F32x16 level = grid.level(codes[i]) * counts[i];
            products = fma(level, y[i], products);
            norms = fma(level, level, norms);
        }
        const float norm = sum(norms);
        if (norm == 0.0f) return;
        float candidate[kLanes] = {sum(products) / norm};
        uint16_t half[kLanes];
        float exact[kLanes];
        round_scales<Bits>(candidate, table, half, exact);
        attempt(grid, table, half[0], exact[0]);
    }
};

template <int Bits>
struct Searcher {
    static constexpr int kNumTables = Bits == 4 ? kTables : 1;
    static constexpr ScaleSearch kSearch = scale_search(Bits);
    static_assert(kSearch.steps <= kLanes, "the steps of one sign are one vector");

    Grid<Bits> grids[kTables] = {Grid<Bits>(0), Grid<Bits>(1)};

    // y: kGroup floats, of which `elements` count and the others are zero.
    void run(const float* y, int elements, uint8_t* codes, uint16_t* scale) const {
        GroupSearch<Bits> search;
        float counts[kGroup];
        float largest = 0.0f;
        for (int i = 0; i < kGroup; ++i) {
            counts[i] = i < elements ? 1.0f : 0.0f;
            const float magnitude = std::fabs(y[i]);
            largest = magnitude > largest ? magnitude : largest;
        }
        for (int i = 0; i < kVectors; ++i) {
            search.y[i] = load(y + kLanes * i);
            search.counts[i] = load(counts + kLanes * i);
            search.codes[i] = broadcast(int32_t{0});
        }
        for (int table = 0; table < kNumTables; ++table) {
            for (const float sign : {1.0f, -1.0f}) {
                float candidates[kLanes] = {};
                for (int i = 0; i < kSearch.steps; ++i) {
                    const float share = static_cast<float>(i) / (kSearch.steps - 1);
                    const float factor = kSearch.first + (kSearch.last - kSearch.first) * share;
                    candidates[i] = largest * (sign * factor);
                }
                uint16_t halves[kLanes];
                float exact[kLanes];
                round_scales<Bits>(candidates, table, halves, exact);
                for (int i = 0; i < kSearch.steps; ++i) {
                    search.attempt(grids[table], table, halves[i], exact[i]);
                }
            }
        }
        for (int i = 0; i < kRefits; ++i) search.refit(grids[search.table]);
        *scale = search.scale;
        store_codes_of(search, codes);
    }

    static void store_codes_of(const GroupSearch<Bits>& search, uint8_t* codes) {
        for (int i = 0; i < kVectors; ++i) {
            int32_t lanes[kLanes];
            store(lanes, search.codes[i]);
            for (int j = 0; j < kLanes; ++j) {
                codes[kLanes * i + j] = static_cast<uint8_t>(lanes[j]);
            }
        }
    }
};

// Adds the plane of `width` bits that ends `shift` bits above the codes' lowest bit. Returns
// the first byte behind it.
uint8_t* pack_plane(const uint8_t* codes, int count, int width, int shift, uint8_t* out) {
    const int bytes = count * width / 8;
    for (int i = 0; i < bytes; ++i) {
        unsigned byte = 0;
        for (int field = 0; field < 8 / width; ++field) {
            const unsigned code = codes[field * bytes + i];
            byte |= ((code >> shift) & ((1u << width) - 1)) << (field * width);
        }
        out[i] = static_cast<uint8_t>(byte);
    }
    return out + bytes;
}

uint8_t* pack_group(const uint8_t* codes, int count, int bits, uint8_t* out) {
    if (bits == 8) return pack_plane(codes, count, 8, 0, out);
    if (bits == 4) return pack_plane(codes, count, 4, 0, out);
    return pack_plane(codes, count, 2, 0, pack_plane(codes, count, 4, 2, out));
}

template <int Bits>
void quantize_head(const float* x, int head_dim, uint8_t* codes, uint16_t* scales) {
    static const Searcher<Bits> searcher;
    float y[kMaxHeadDim + kGroup];
    rotate(x, head_dim, 1.0f, y);
    for (int i = 0; i < kGroup; ++i) y[head_dim + i] = 0.0f;
    for (int first = 0; first < head_dim; first += kGroup) {
        const int elements = head_dim - first < kGroup ? head_dim - first : kGroup;
        uint8_t group[kGroup];
        searcher.run(y + first, elements, group, scales + first / kGroup);
        const int stored = padded_codes(elements);
        for (int i = elements; i < stored; ++i) group[i] = 0;
        codes = pack_group(group, stored, Bits, codes);
    }
}

void float_head(const float* x, int head_dim, uint16_t* out) {
    int i = 0;
    for (; i + kLanes <= head_dim; i += kLanes) store_half(out + i, load(x + i));
    if (i == head_dim) return;
    uint16_t rest[kLanes];
    store_half(rest, load_lanes(x + i, head_dim - i));
    std::memcpy(out + i, rest, static_cast<size_t>(head_dim - i) * sizeof(uint16_t));
}

// Writes one head to the token that stands at `place` of [pages, kv_heads, kPageLen].
void write_head(const ExlCacheHalf& half, const float* x, int head_dim, int64_t place) {
    uint8_t* codes = static_cast<uint8_t*>(half.codes) + place * code_bytes(head_dim, half.bits);
    uint16_t* scales = half.scales + place * num_groups(head_dim, half.bits);
    switch (half.bits) {
        case 4: return quantize_head<4>(x, head_dim, codes, scales);
        case 6: return quantize_head<6>(x, head_dim, codes, scales);
        case 8: return quantize_head<8>(x, head_dim, codes, scales);
        case 16: return float_head(x, head_dim, reinterpret_cast<uint16_t*>(codes));
        default: std::memcpy(codes, x, static_cast<size_t>(head_dim) * sizeof(float));
    }
}

// The sequence that a row belongs to.
int64_t sequence_of(const ExlBatch& batch, int64_t row) {
    int64_t s = 0;
    while (row >= batch.q_start[s + 1]) ++s;
    return s;
}

}  // namespace
}  // namespace exl

// k, v: float32 [rows, kv_heads, head_dim].
extern "C" void exl_write_cache(const ExlCacheLayer* layer, const ExlBatch* batch, const float* k,
                                const float* v) {
    using namespace exl;
    const int64_t heads = layer->num_kv_heads;
    const int head_dim = static_cast<int>(layer->head_dim);
    const int64_t rows = batch->q_start[batch->num_sequences];
    const int64_t items = rows * heads * 2;
    parallel_for(items, balanced_grain(items, kHeadsPerTask),
                 [&](int64_t first, int64_t end, int) {
        for (int64_t item = first; item < end; ++item) {
            const int64_t row = item / (2 * heads), head = item / 2 % heads;
            const int64_t s = sequence_of(*batch, row);
            const int64_t position = batch->past_len[s] + row - batch->q_start[s];
            const int64_t page =
                batch->page_table[s * batch->max_pages + position / kPageLen];
            const int64_t place = (page * heads + head) * kPageLen + position % kPageLen;
            const bool values = item % 2;
            const float* x = (values ? v : k) + (row * heads + head) * head_dim;
            write_head(values ? layer->v : layer->k, x, head_dim, place);
        }
    });
}
