// Activations to int8, once per call of a quantised matrix product.
//
// Each span (see linear.h) of each row: gathered through the permutation, divided by its
// largest magnitude / 127 and rounded to nearest even, so that values are in -127..127. Rows
// that fill up a block are zero. A span with a NaN or an infinity gets the scale NaN, so the
// fault shows in the output instead of vanishing in integers.
//
// Work: one row of one call at a time, rows split over threads where there are many.
#include <cmath>
#include <cstring>
#include <limits>

#include "linear.h"
#include "threads.h"

namespace exl {
namespace {

constexpr float kLargestCode = 127.0f;
// Below this a span counts as zero: 127 / magnitude has to stay finite, and nothing that
// small can matter beside other spans.
constexpr float kSmallestMagnitude = 1e-30f;
// Elements that are worth a second thread: about 2 us of work.
constexpr int64_t kElementsPerTask = 4096;

// The largest magnitude, as the bits of a float: for these, the order of integers is the
// order of numbers, with infinity and NaN above all.
EXL_INLINE int32_t largest_magnitude_bits(const float* x, int count) {
    int32_t largest = 0;
    for (int i = 0; i < count; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

// Quantises `count` floats (a multiple of kBlockRows), writes words of four at `stride`
// words. Returns the scale; adds up the integers in *sum.
float quantize_span(const float* x, int count, int32_t* words, int64_t stride, int32_t* sum) {
    const int32_t bits = largest_magnitude_bits(x, count);
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    const bool finite = bits < 0x7f800000;
    const bool usable = finite && magnitude >= kSmallestMagnitude;
    const F32x16 inverse = broadcast(usable ? kLargestCode / magnitude : 0.0f);
    int32_t total = 0;
    for (int i = 0; i < count; i += kLanes) {
        int32_t lanes[kLanes] = {};
        if (usable) store(lanes, to_int(load(x + i) * inverse));
        int8_t codes[kLanes];
        for (int j = 0; j < kLanes; ++j) {
            codes[j] = static_cast<int8_t>(lanes[j]);
            total += lanes[j];
        }
        for (int j = 0; j < kLanes / kRegisterRows; ++j) {
            std::memcpy(words + (i / kRegisterRows + j) * stride, codes + j * kRegisterRows, 4);
        }
    }
    *sum = total;
    if (!finite) return std::numeric_limits<float>::quiet_NaN();
    return usable ? magnitude / kLargestCode : 0.0f;
}

void quantize_row(const ExlPackedLinear& w, const float* x, const Activations& a, int64_t row,
                  int64_t padded_rows) {
    const int64_t block = row / a.block_rows * a.block_rows;
    const int64_t stride =
        padded_rows - block < a.block_rows ? padded_rows - block : a.block_rows;
    int32_t* words =
        reinterpret_cast<int32_t*>(a.codes + block * a.stored_rows) + (row - block);
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
            for (int i = 0; i < span.source_rows; ++i) {
                const int64_t stored = span.source_row + i;
                gathered[i] = x[w.perm ? w.perm[stored] : stored];
            }
            for (int i = span.source_rows; i < span.rows; ++i) gathered[i] = 0.0f;
        }
        int32_t sum;
        scales[s * stride] = quantize_span(
            values, span.rows, words + span.first_row / kRegisterRows * stride, stride, &sum);
        sums[s * stride] = -sum;
    }
}

}  // namespace

int64_t cut_spans(const ExlPackedLinear& w, Span* spans, int64_t* stored_rows) {
    int64_t count = 0;
    int32_t row = 0;
    for (int64_t g = 0; g < w.num_groups; ++g) {
        const Group& group = w.groups[g];
        for (int32_t first = 0; first < group.rows; first += kSpanRows) {
            const int32_t left = group.rows - first;
            const int32_t source_rows = left < kSpanRows ? left : kSpanRows;
            const int32_t rows = (source_rows + kBlockRows - 1) / kBlockRows * kBlockRows;
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
    const int64_t least = (kElementsPerTask + w.in_features - 1) / w.in_features;
    parallel_for(padded_rows, balanced_grain(padded_rows, least),
                 [&](int64_t first, int64_t end, int) {
                     for (int64_t row = first; row < end; ++row) {
                         const float* source = row < rows ? x + row * w.in_features : nullptr;
                         quantize_row(w, source, a, row, padded_rows);
                     }
                 });
}

}  // namespace exl
