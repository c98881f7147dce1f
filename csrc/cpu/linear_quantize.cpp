// Quantises activations to two planes of int8, once per call of a quantised matrix product.
//
// Each span (see linear.h) of each row is gathered through the permutation, divided by its
// largest magnitude / kLargestActivation, rounded to nearest even and separated into planes.
// Rows that pad a block are zero. A span with a NaN or an infinity gets the scale NaN, so that
// the fault shows in the output instead of vanishing in integers.
//
// Layout: input float32 [rows, in_features], output as Activations (linear.h).
// Work per thread: whole rows; several threads only for many elements.
#include <cmath>
#include <cstring>
#include <limits>

#include "linear.h"
#include "threads.h"

namespace exl {
namespace {

constexpr float kLargest = kLargestActivation;
// Elements that are worth a second thread: about 2 us of work.
constexpr int64_t kElementsPerTask = 4096;

// The largest magnitude as the bits of a float. For non-negative floats the order of the bits is
// the order of the numbers, with infinity and NaN above all.
EXL_INLINE int32_t largest_magnitude_bits(const float* x, int count) {
    I32x16 bits = broadcast(int32_t{0});
    for (int i = 0; i < count; i += kLanes) bits = max(bits, magnitude_bits(load(x + i)));
    return largest(bits);
}

// The planes of 16 activations.
struct Planes {
    I32x16 high, low;
};

// Where the planes of a row's span go: words of 4 stored rows, whose neighbours are `stride` words
// apart.
struct InterleavedWords {
    int32_t* words;
    int64_t stride;

    // Stores planes(i) for every 16 of `count` activations.
    template <class Function>
    EXL_INLINE void fill(int count, const Function& planes) const {
        constexpr int kWords = kLanes / kRegisterRows;
        for (int i = 0; i < count; i += kLanes) {
            const Planes p = planes(i);
            int32_t quads[kPlanes][kWords];
            store_bytes(reinterpret_cast<int8_t*>(quads[0]), p.high);
            store_bytes(reinterpret_cast<int8_t*>(quads[1]), p.low);
            for (int j = 0; j < kWords; ++j) {
                int32_t* quad = words + (i / kRegisterRows + j) * stride;
                quad[0] = quads[0][j];
                quad[1] = quads[1][j];
            }
        }
    }
};

// The same for `tiled` activations: row `r` of a block of `rows` rows.
struct TiledBytes {
    int8_t* span;
    int r, rows;

    template <class Function>
    EXL_INLINE void fill(int count, const Function& planes) const {
        for (int first = 0; first < count; first += kStepRows) {
            const int step = count - first < kStepRows ? count - first : kStepRows;
            int8_t* high = span + first * kPlanes * rows + r * step;
            int8_t* low = high + rows * step;
            for (int i = 0; i < step; i += kLanes) {
                const Planes p = planes(first + i);
                store_bytes(high + i, p.high);
                store_bytes(low + i, p.low);
            }
        }
    }
};

// Quantises `count` floats, a multiple of kBlockRows, into `target`. Returns the scale;
// *negative_sum receives the negated sum of the integers.
template <class Target>
float quantize_span(const float* x, int count, const Target& target, int32_t* negative_sum) {
    const int32_t bits = largest_magnitude_bits(x, count);
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    const bool finite = bits < 0x7f800000;
    const bool usable = finite && magnitude >= kSmallestMagnitude;
    if (!usable) {
        target.fill(count, [](int) EXL_INLINED {
            return Planes{broadcast(int32_t{0}), broadcast(int32_t{0})};
        });
        *negative_sum = 0;
        return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    }
    const F32x16 inverse = broadcast(kLargest / magnitude);
    const I32x16 half = broadcast(int32_t{1 << (kPlaneShift - 1)});
    I32x16 total = broadcast(int32_t{0});
    target.fill(count, [&](int i) EXL_INLINED {
        const I32x16 whole = to_int(load(x + i) * inverse);
        const I32x16 high = shift_right_signed<kPlaneShift>(whole + half);
        total = total + whole;
        return Planes{high, whole - shift_left(high, kPlaneShift)};
    });
    *negative_sum = -sum(total);
    return magnitude / kLargest;
}

template <bool Tiled>
void quantize_row(const ExlPackedLinear& w, const float* x, const Activations& a, int64_t row,
                  int64_t padded_rows) {
    const int64_t block = row / a.block_rows * a.block_rows;
    const int64_t stride =
        padded_rows - block < a.block_rows ? padded_rows - block : a.block_rows;
    int8_t* codes = a.codes + block * kPlanes * a.stored_rows;
    float* scales = a.scales + block * a.num_spans + (row - block);
    int32_t* sums = a.negative_sums + block * a.num_spans + (row - block);
    for (int64_t s = 0; s < a.num_spans; ++s) {
        const Span& span = a.spans[s];
        float gathered[kSpanRows];
        const float* values = gathered;
        if (x == nullptr) {
            std::memset(gathered, 0, sizeof(gathered));
        } else if (w.perm == nullptr && span.rows == span.source_rows) {
            values = x + span.source_row;
        } else {
            int first = 0;
#if defined(EXL_AMX)
            // Processors with AMX gather faster than they load one by one.
            if constexpr (Tiled) {
                for (; w.perm && first + kLanes <= span.source_rows; first += kLanes) {
                    store(gathered + first, gather(x, w.perm + span.source_row + first));
                }
            }
#endif
            for (int i = first; i < span.source_rows; ++i) {
                const int64_t stored = span.source_row + i;
                gathered[i] = x[w.perm ? w.perm[stored] : stored];
            }
            for (int i = span.source_rows; i < span.rows; ++i) gathered[i] = 0.0f;
        }
        int8_t* span_codes = codes + int64_t{span.first_row} * stride * kPlanes;
        if constexpr (Tiled) {
            const TiledBytes target = {span_codes, static_cast<int>(row - block),
                                       static_cast<int>(stride)};
            scales[s * stride] = quantize_span(values, span.rows, target, sums + s * stride);
        } else {
            int32_t* words = reinterpret_cast<int32_t*>(span_codes) + (row - block) * kPlanes;
            const InterleavedWords target = {words, stride * kPlanes};
            scales[s * stride] = quantize_span(values, span.rows, target, sums + s * stride);
        }
    }
}

}  // namespace

void decode_levels(const ExlPackedLinear& w, const Span* spans, int64_t num_spans,
                   float* level_scales) {
    static_assert(kLevels == kLanes, "a vector has a lane for each level");
    float squares[kLevels];
    for (int level = 0; level < kLevels; ++level) {
        squares[level] = static_cast<float>((level + 1) * (level + 1));
    }
    for (int64_t s = 0; s < num_spans; ++s) {
        const float unit = half_to_float(w.scale_units[spans[s].group]);
        uint16_t rounded[kLevels];
        store_half(rounded, load(squares) * broadcast(unit));
        store(level_scales + s * kLevels, load_half(rounded));
    }
}

int64_t cut_spans(const ExlPackedLinear& w, Span* spans, int64_t* stored_rows) {
    int64_t count = 0;
    int32_t row = 0;
    for (int64_t g = 0; g < w.num_groups; ++g) {
        const Group& group = w.groups[g];
        for (int32_t first = 0; first < group.rows; first += kSpanRows) {
            const int32_t left = group.rows - first;
            const int32_t source_rows = left < kSpanRows ? left : kSpanRows;
            const int32_t rows = round_up(source_rows, kBlockRows);
            const int32_t offset =
                group.offset + first / kBlockRows * group.bits * kBlockBitBytes;
            spans[count++] = {row,  rows,       static_cast<int32_t>(g), group.bits, offset,
                              group.first_row + first, source_rows};
            row += rows;
        }
    }
    *stored_rows = row;
    return count;
}

void quantize(const ExlPackedLinear& w, const float* x, int64_t rows, int64_t padded_rows,
              const Activations& a) {
    const int64_t min_grain = ceil_div(kElementsPerTask, w.in_features);
    parallel_for(padded_rows, balanced_grain(padded_rows, min_grain),
                 [&](int64_t first, int64_t end, int) {
                     const auto quantize = a.tiled ? quantize_row<true> : quantize_row<false>;
                     for (int64_t row = first; row < end; ++row) {
                         const float* source = row < rows ? x + row * w.in_features : nullptr;
                         quantize(w, source, a, row, padded_rows);
                     }
                 });
}

}  // namespace exl
