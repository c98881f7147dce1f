// Writes keys and values into the cache: rotation, search of each group's scale, packing.
//
// Layout: input float32 [rows, kv_heads, head_dim]; output as ExlCacheHalf (cache_codec.h). The
// reference codec in Python defines the search, feedback.py beside it the rounding of keys.
//
// Work per thread: a task is one head of one row, of keys or of values; all its buffers are on
// the stack. Each group is rounded up to 49 times (48 candidates, or 32 with tables, and a
// refit), which is about 50 operations per element of 4 bits on AVX-512. That is below one
// percent of a layer's matrix products. Rounding with feedback adds about 40 operations for each
// block of 4 elements, and one for each element of a later block and 4 elements of this one.
//
// Precondition: head_dim <= kMaxHeadDim.
#include <cmath>
#include <cstring>

#include "cache_codec.h"
#include "cache_rotate.h"
#include "replay.h"
#include "threads.h"

namespace exl {
namespace {

constexpr int kMaxHeadDim = 1024;  // MAX_HEAD_DIM in Python
constexpr int kVectors = kGroup / kLanes;
// Heads that are worth a second thread: about 2 us each.
constexpr int64_t kHeadsPerTask = 2;

// Rounds kLanes scales to float16; `exact` receives the float32 values of the results.
void round_scales(const float* scales, uint16_t* halves, float* exact) {
    const F32x16 bounded =
        max(broadcast(-kLargestHalf), min(broadcast(kLargestHalf), load(scales)));
    store_half(halves, bounded);
    store(exact, load_half(halves));
}

// Also stores `table` in the lowest bit, for codes that have two tables.
template <int Bits>
void round_scales(const float* scales, int table, uint16_t* halves, float* exact) {
    round_scales(scales, halves, exact);
    if (!has_tables(Bits)) return;
    for (int i = 0; i < kLanes; ++i) {
        halves[i] = static_cast<uint16_t>((halves[i] & 0xfffeu) | static_cast<unsigned>(table));
    }
    store(exact, load_half(halves));
}

// The least of kLanes errors with its lane number in the lowest bits. This avoids sixteen
// comparisons with unpredictable branches. The lost bits, 2^-19 of the error, change the choice
// only between errors that are practically equal.
EXL_INLINE float least_with_lane(F32x16 errors) {
    constexpr int32_t kLaneBits = kLanes - 1;
    int32_t numbers[kLanes];
    for (int i = 0; i < kLanes; ++i) numbers[i] = i;
    const I32x16 marked = (as_int(errors) & broadcast(~kLaneBits)) | load(numbers);
    return -largest(broadcast(0.0f) - as_float(marked));
}
EXL_INLINE int lane_of(float marked) {
    int32_t bits;
    std::memcpy(&bits, &marked, 4);
    return bits & (kLanes - 1);
}

// The levels of one table.
template <int Bits, bool = has_tables(Bits)>
struct Grid;

template <int Bits>
struct Grid<Bits, false> {
    static constexpr float kHalf = 1 << (Bits - 1);

    explicit Grid(int) {}
    I32x16 nearest(F32x16 x) const {
        const F32x16 code = round(x * broadcast(kHalf));
        return to_int(max(broadcast(-kHalf), min(broadcast(kHalf - 1), code)) + broadcast(kHalf));
    }
    F32x16 level(I32x16 code) const {
        return (to_float(code) - broadcast(kHalf)) * broadcast(1 / kHalf);
    }
    F32x16 nearest_level(F32x16 x) const {
        const F32x16 code = round(x * broadcast(kHalf));
        return max(broadcast(-kHalf), min(broadcast(kHalf - 1), code)) * broadcast(1 / kHalf);
    }
};

template <int Bits>
struct Grid<Bits, true> {
    static constexpr int kLevels = 1 << Bits;
    // A whole vector can be loaded from each array.
    float levels[kLanes] = {};
    float thresholds[kLanes] = {};

    explicit Grid(int table) {
        for (int i = 0; i < kLevels; ++i) {
            levels[i] = codebook_level(Bits, table, i) * kCodebookUnit;
        }
        for (int i = 0; i + 1 < kLevels; ++i) thresholds[i] = 0.5f * (levels[i] + levels[i + 1]);
    }
    I32x16 nearest(F32x16 x) const { return count_below<kLevels>(thresholds, x); }
    F32x16 level(I32x16 code) const { return look_up<kLevels>(load(levels), code); }
    F32x16 nearest_level(F32x16 x) const { return level(nearest(x)); }
};

// A candidate scale: its float16 bits, their float32 value, its table, the squared error.
struct Trial {
    uint16_t half = kHalfNaN;  // remains if no candidate has a finite error
    float exact = 0.0f;
    int table = 0;
    float error = INFINITY;
};

// One group and the grids to which it may be rounded.
template <int Bits>
struct GroupSearch {
    F32x16 y[kVectors];
    F32x16 counts[kVectors];  // 1 for an element, 0 for padding of the group
    const Grid<Bits>* grids;

    EXL_INLINE I32x16 codes(const Trial& trial, int i) const {
        const float inverse = trial.exact == 0.0f ? 0.0f : 1.0f / trial.exact;
        return grids[trial.table].nearest(y[i] * broadcast(inverse));
    }
    EXL_INLINE float error_of(const Trial& trial) const {
        const F32x16 minus = broadcast(-trial.exact);
        F32x16 errors = broadcast(0.0f);
        for (int i = 0; i < kVectors; ++i) {
            const F32x16 level = grids[trial.table].level(codes(trial, i));
            const F32x16 difference = fma(level, minus, y[i]) * counts[i];
            errors = fma(difference, difference, errors);
        }
        return sum(errors);
    }

    // Tries kLanes scales and replaces `best` if one of them has a smaller error. Each lane is one
    // scale, so that errors are summed without a sum across lanes.
    void search(const float* y, int elements, const float* scales, int table,
                Trial* best) const {
        uint16_t halves[kLanes];
        float exact[kLanes], inverse[kLanes];
        round_scales<Bits>(scales, table, halves, exact);
        for (int i = 0; i < kLanes; ++i) inverse[i] = exact[i] == 0.0f ? 0.0f : 1.0f / exact[i];
        const F32x16 factors = load(inverse), minus = broadcast(0.0f) - load(exact);
        F32x16 sums = broadcast(0.0f);
        for (int e = 0; e < elements; ++e) {
            const F32x16 element = broadcast(y[e]);
            const F32x16 level = grids[table].nearest_level(element * factors);
            const F32x16 difference = fma(level, minus, element);
            sums = fma(difference, difference, sums);
        }
        const float min_grain = least_with_lane(sums);
        if (!(min_grain < best->error)) return;
        const int lane = lane_of(min_grain);
        *best = {halves[lane], exact[lane], table, min_grain};
    }

    // Fits the scale to the codes by least squares and keeps it if the error is smaller.
    void refit(Trial* best) const {
        F32x16 products = broadcast(0.0f), norms = broadcast(0.0f);
        for (int i = 0; i < kVectors; ++i) {
            const F32x16 level = grids[best->table].level(codes(*best, i)) * counts[i];
            products = fma(level, y[i], products);
            norms = fma(level, level, norms);
        }
        const float norm = sum(norms);
        if (norm == 0.0f) return;
        const float candidate[kLanes] = {sum(products) / norm};
        uint16_t halves[kLanes];
        float exact[kLanes];
        round_scales<Bits>(candidate, best->table, halves, exact);
        Trial trial{halves[0], exact[0], best->table, 0.0f};
        trial.error = error_of(trial);
        if (trial.error < best->error) *best = trial;
    }
};

template <int Bits>
struct Quantizer {
    // Candidate scales of both signs, for each table.
    static constexpr ScaleSearch kSearch = scale_search(Bits);
    static constexpr int kCandidates = 2 * kSearch.steps;
    static_assert(kCandidates % kLanes == 0, "candidates fill whole vectors");

    Grid<Bits> grids[kTables] = {Grid<Bits>(0), Grid<Bits>(1)};
    float factors[kCandidates];

    Quantizer() {
        for (int i = 0; i < kSearch.steps; ++i) {
            const float fraction = static_cast<float>(i) / (kSearch.steps - 1);
            factors[i] = kSearch.first + (kSearch.last - kSearch.first) * fraction;
            factors[kSearch.steps + i] = -factors[i];
        }
    }

    // Finds the scale of a group and its codes, each element rounded alone.
    //
    // y: kGroup floats, of which the first `elements` count and the others are zero.
    Trial run(const float* y, int elements, uint8_t* codes) const {
        GroupSearch<Bits> group;
        float counts[kGroup];
        float largest = 0.0f;
        for (int i = 0; i < kGroup; ++i) {
            counts[i] = i < elements ? 1.0f : 0.0f;
            const float magnitude = std::fabs(y[i]);
            largest = magnitude > largest ? magnitude : largest;
        }
        for (int i = 0; i < kVectors; ++i) {
            group.y[i] = load(y + kLanes * i);
            group.counts[i] = load(counts + kLanes * i);
        }
        group.grids = grids;
        Trial best;
        float candidates[kCandidates];
        for (int i = 0; i < kCandidates; ++i) candidates[i] = largest * factors[i];
        for (int table = 0; table < (has_tables(Bits) ? kTables : 1); ++table) {
            for (int i = 0; i < kCandidates; i += kLanes) {
                group.search(y, elements, candidates + i, table, &best);
            }
        }
        for (int i = 0; i < kRefits; ++i) group.refit(&best);
        for (int i = 0; i < kVectors; ++i) {
            int32_t lanes[kLanes];
            store(lanes, group.codes(best, i));
            for (int j = 0; j < kLanes; ++j) {
                codes[kLanes * i + j] = static_cast<uint8_t>(lanes[j]);
            }
        }
        return best;
    }

    // Rounds a head again with feedback, which feedback.py in Python defines.
    //
    // y: a finite head, then kGroup zeros. best: of each group. feedback: float16 [head_dim,
    // round_up(head_dim, kGroup)]. codes: [head_dim].
    void feed_back(const float* y, int head_dim, const Trial* best, const uint16_t* feedback,
                   uint8_t* codes) const {
        alignas(64) float target[kMaxHeadDim + kGroup];
        const int stride = round_up(head_dim, kGroup);
        std::memcpy(target, y, static_cast<size_t>(stride) * sizeof(float));
        for (int first = 0; first < head_dim; first += kFeedbackBlock) {
            // The whole vector with the block is rounded, because it is loaded as it was stored.
            const int start = first / kLanes * kLanes;
            const Trial& trial = best[first / kGroup];
            const Grid<Bits>& grid = grids[trial.table];
            const float inverse = trial.exact == 0.0f ? 0.0f : 1.0f / trial.exact;
            const F32x16 x = load(target + start);
            const I32x16 rounded = grid.nearest(x * broadcast(inverse));
            int32_t lanes[kLanes];
            float errors[kLanes];
            store(lanes, rounded);
            store(errors, fma(grid.level(rounded), broadcast(-trial.exact), x));
            const int left = head_dim - first;
            const int count = left < kFeedbackBlock ? left : kFeedbackBlock;
            for (int i = first; i < first + count; ++i) {
                codes[i] = static_cast<uint8_t>(lanes[i - start]);
            }
            if (left <= kFeedbackBlock) return;
            // Shares are 0 up to the block's end, so whole vectors may be moved.
            const uint16_t* shares = feedback + static_cast<int64_t>(first) * stride;
            for (int j = (first + kFeedbackBlock) / kLanes * kLanes; j < head_dim; j += kLanes) {
                F32x16 moved = load(target + j);
                for (int i = 0; i < kFeedbackBlock; ++i) {
                    moved = fma(broadcast(errors[first - start + i]),
                                load_half(shares + i * stride + j), moved);
                }
                store(target + j, moved);
            }
        }
    }
};

// Writes the plane of `width` bits that begins at bit `shift` of the codes. Returns the address
// after the plane.
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
    if (bits == 6) return pack_plane(codes, count, 2, 0, pack_plane(codes, count, 4, 2, out));
    if (bits == 3) return pack_plane(codes, count, 1, 0, pack_plane(codes, count, 2, 1, out));
    return pack_plane(codes, count, bits, 0, out);
}

// y: a rotated head, then kGroup zeros. feedback: the head's, or null.
template <int Bits>
void quantize_head(const float* y, int head_dim, const uint16_t* feedback, uint8_t* codes,
                   uint16_t* scales) {
    static const Quantizer<Bits> quantizer;
    Trial best[kMaxHeadDim / kGroup];
    uint8_t unpacked[kMaxHeadDim + kGroup];
    bool finite = true;
    for (int first = 0; first < head_dim; first += kGroup) {
        const int elements = head_dim - first < kGroup ? head_dim - first : kGroup;
        Trial& trial = best[first / kGroup];
        trial = quantizer.run(y + first, elements, unpacked + first);
        scales[first / kGroup] = trial.half;
        finite = finite && trial.error < INFINITY;
    }
    if (feedback != nullptr && finite) quantizer.feed_back(y, head_dim, best, feedback, unpacked);
    for (int first = 0; first < head_dim; first += kGroup) {
        const int elements = head_dim - first < kGroup ? head_dim - first : kGroup;
        const int stored = padded_codes(elements);
        for (int i = elements; i < stored; ++i) unpacked[first + i] = 0;
        codes = pack_group(unpacked + first, stored, Bits, codes);
    }
}

// A float16 slightly above the largest magnitude of x; NaN if an element is not finite.
uint16_t shared_scale(const float* x, int count) {
    float largest = 0.0f;
    bool finite = true;
    for (int i = 0; i < count; ++i) {
        const float magnitude = std::fabs(x[i]);
        finite = finite && magnitude < INFINITY;
        largest = magnitude > largest ? magnitude : largest;
    }
    const float candidate[kLanes] = {finite ? largest * (1.0f + 0x1p-10f) + 0x1p-25f : 0.0f};
    uint16_t halves[kLanes];
    float exact[kLanes];
    round_scales(candidate, halves, exact);
    return finite ? halves[0] : kHalfNaN;
}

// Encodes elements that share a scale, for the cache of 16 bits (cache_codec.h).
void encode_block(const float* x, int count, int16_t* out) {
    const uint16_t scale = shared_scale(x, count);
    const float exact = half_to_float(scale);
    const bool usable = exact > 0.0f;  // neither zero nor NaN
    const F32x16 inverse = broadcast(usable ? kBlockUnit / exact : 0.0f);
    for (int first = 0; first < count; first += kLanes) {
        const int left = count - first < kLanes ? count - first : kLanes;
        F32x16 steps = usable ? load_part(x + first, left) * inverse : inverse;
        steps = max(broadcast(-kLargestBlockCode), min(broadcast(kLargestBlockCode), steps));
        if (first == 0) {
            float bits[kLanes];
            for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<float>(scale >> i & 1);
            const F32x16 marks = load(bits);
            steps = fma(round((steps - marks) * broadcast(0.5f)), broadcast(2.0f), marks);
        }
        int32_t codes[kLanes];
        store(codes, to_int(steps));
        for (int i = 0; i < left; ++i) out[first + i] = static_cast<int16_t>(codes[i]);
    }
}

void half_head(const float* x, int head_dim, int16_t* out) {
    if (head_dim < kLanes) {
        uint16_t halves[kLanes];
        store_half(halves, load_part(x, head_dim));
        std::memcpy(out, halves, static_cast<size_t>(head_dim) * sizeof(uint16_t));
        return;
    }
    for (int first = 0, count; first < head_dim; first += count) {
        count = block_elements(head_dim, first);
        encode_block(x + first, count, out + first);
    }
}

// Writes one head of one token. x: for quantised halves as quantize_head's y, else the head
// [head_dim]. feedback: of quantised keys, or null. token_index counts tokens of [pages, kv_heads,
// kPageLen].
void write_head(const ExlCacheHalf& half, const float* x, int head_dim, const uint16_t* feedback,
                int64_t token_index) {
    uint8_t* codes =
        static_cast<uint8_t*>(half.codes) + token_index * code_bytes(head_dim, half.bits);
    uint16_t* scales = half.scales + token_index * num_groups(head_dim, half.bits);
    switch (half.bits) {
        case 3: return quantize_head<3>(x, head_dim, feedback, codes, scales);
        case 4: return quantize_head<4>(x, head_dim, feedback, codes, scales);
        case 6: return quantize_head<6>(x, head_dim, feedback, codes, scales);
        case 8: return quantize_head<8>(x, head_dim, nullptr, codes, scales);
        case 16: return half_head(x, head_dim, reinterpret_cast<int16_t*>(codes));
        default: std::memcpy(codes, x, static_cast<size_t>(head_dim) * sizeof(float));
    }
}

// Quantises a rotated head to 8 bits without a search; quantize_plainly in Python defines it.
void quantize_plainly(const float* y, int head_dim, uint8_t* codes, uint16_t* scales) {
    for (int first = 0; first < head_dim; first += kGroup) {
        const int elements = head_dim - first < kGroup ? head_dim - first : kGroup;
        float largest = 0.0f;
        bool finite = true;
        for (int i = first; i < first + elements; ++i) {
            finite = finite && std::fabs(y[i]) < INFINITY;
            if (std::fabs(y[i]) > std::fabs(largest)) largest = y[i];
        }
        const float candidate[kLanes] = {finite ? -largest : 0.0f};
        uint16_t halves[kLanes];
        float exact[kLanes];
        round_scales(candidate, halves, exact);
        scales[first / kGroup] = finite ? halves[0] : kHalfNaN;
        const bool usable = finite && exact[0] != 0.0f;
        const F32x16 inverse = broadcast(usable ? 128.0f / exact[0] : 0.0f);
        const int stored = padded_codes(elements);
        for (int at = 0; at < stored; at += kLanes) {
            const int left = elements - at < kLanes ? elements - at : kLanes;
            F32x16 steps = usable ? load_part(y + first + at, left) * inverse : inverse;
            steps = max(broadcast(-128.0f), min(broadcast(127.0f), round(steps)));
            int32_t lanes[kLanes];
            store(lanes, to_int(steps));
            // Codes that pad a short group are 0.
            for (int i = 0; i < kLanes && at + i < stored; ++i) {
                const int code = i < left ? lanes[i] + 128 : 0;
                codes[first + at + i] = static_cast<uint8_t>(code);
            }
        }
    }
}

// Writes a rotated head y of one token to open pages. token_index as for write_head.
void write_open(const ExlCacheHalf& half, const float* y, int head_dim, int64_t token_index) {
    if (half.bits == 8) {
        return quantize_plainly(
            y, head_dim, static_cast<uint8_t*>(half.codes) + token_index * code_bytes(head_dim, 8),
            half.scales + token_index * num_groups(head_dim, 8));
    }
    half_head(y, head_dim, static_cast<int16_t*>(half.codes) + token_index * head_dim);
}

// Returns the sequence of a row.
int64_t sequence_of(const ExlBatch& batch, int64_t row) {
    int64_t s = 0;
    while (row >= batch.q_start[s + 1]) ++s;
    return s;
}

}  // namespace
}  // namespace exl

// Writes the keys and values of all rows of a batch into a layer's cache.
//
// layer, batch: see cache_codec.h. k, v: float32 [rows, kv_heads, head_dim] with
// rows = batch->q_start[num_sequences].
EXL_API void exl_write_cache(const ExlCacheLayer* layer, const ExlBatch* batch, const float* k,
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
            const int64_t token_index = (page * heads + head) * kPageLen + position % kPageLen;
            const bool values = item % 2;
            const ExlCacheHalf& half = values ? layer->v : layer->k;
            const ExlOpenPages& open = values ? layer->v_open : layer->k_open;
            const float* x = (values ? v : k) + (row * heads + head) * head_dim;
            if (!is_quantized(half.bits)) {
                write_head(half, x, head_dim, nullptr, token_index);
                continue;
            }
            float y[kMaxHeadDim + kGroup];
            rotate(x, head_dim, 1.0f, y);
            for (int i = 0; i < kGroup; ++i) y[head_dim + i] = 0.0f;
            const uint16_t* feedback = values ? nullptr : layer->key_feedback;
            if (feedback != nullptr) {
                feedback += head * head_dim * round_up(head_dim, kGroup);
            }
            write_head(half, y, head_dim, feedback, token_index);
            if (open.tokens.codes == nullptr) continue;
            const int64_t open_head = batch->open_pages[s] * heads + head;
            write_open(open.tokens, y, head_dim, open_head * kPageLen + position % kPageLen);
            if (position == 0) write_open(open.first, y, head_dim, open_head);
        }
    });
}
EXL_REPLAYED(write_cache)
