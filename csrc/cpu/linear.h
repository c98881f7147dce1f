// What the parts of the quantised matrix product share.
//
// A call quantises its activations once, to 15 bits, then multiplies integers. Per group, or
// per 128 stored rows of a longer one (a *span*), a row of activations has one float32 scale
// and the sum of its integers:
//
//     out[row, n] += scale[group, n] * x_scale[row, span] * (dot - zero[group, n] * x_sum)
//
// The bracket is an exact integer, and spans are added in order, so a row's result does not
// depend on how many rows or threads a call has.
//
// Machines multiply 8-bit integers, so an activation is two of them, 128 * high + low (its
// two *planes*), and a dot product is 128 * dot(high) + dot(low). Eight bits alone move a
// layer's output by 0.6 % and the fixtures' logits by 2.7 % (relative L2); fifteen by less
// than float16 weights do. Decoding waits for memory either way.
#pragma once

#include <cstdint>

#include "packed.h"
#include "simd.h"

namespace exl {

// Rows of one activation scale: 128 codes of up to 255 times kLargestActivation make at most
// 0.53e9, so that sums fit into an int32, the zero point's share included.
constexpr int kSpanRows = 128;
constexpr int kPlanes = 2;
constexpr int kPlaneShift = 7;
// Its high plane is 127, and low planes lie in -64..63.
constexpr int kLargestActivation = 127 << kPlaneShift;
// Rows that share one pass over the weights; more would only enlarge the scratch.
constexpr int kPassRows = 256;
// Stored rows that are unpacked at a time: with two tiles 64 KiB, a small part of a second
// level cache.
constexpr int kChunkRows = 2048;

#if defined(EXL_AVX512)
// 6 rows of 2 planes and 2 tiles: 24 of 32 registers hold sums, 2 codes, 1 activations.
constexpr int kMicroRows = 6;
constexpr int kPanelTiles = 2;
// Rows up to which codes go from memory to the dot product without a buffer between.
constexpr int kDirectRows = 8;
#else
// AVX2 has 16 registers, two a tile: 2 rows of 2 planes and 1 tile hold 8 sums.
constexpr int kMicroRows = 2;
constexpr int kPanelTiles = 1;
constexpr int kDirectRows = 2;
#endif
constexpr int kPanelColumns = kPanelTiles * kTileColumns;

// Stored rows of a group that share an activation scale. Row numbers count the rows that
// fill up a group's last block.
struct Span {
    int32_t first_row;
    int32_t rows;  // a multiple of kBlockRows
    int32_t group;
    int32_t bits;
    int32_t offset;      // bytes from the start of a tile
    int32_t source_row;  // the same as first_row without fill
    int32_t source_rows;
};

// Activations of one pass. Rows stand in blocks of up to `block_rows`; a block of r rows that
// begins at row i occupies
//     codes [stored_rows / 4][r][plane] words of 4 rows, from byte i * kPlanes * stored_rows,
//     scales and sums [num_spans][r], from element i * num_spans.
struct Activations {
    const Span* spans;
    int64_t num_spans;
    int64_t stored_rows;
    int64_t block_rows;
    int8_t* codes;
    float* scales;
    int32_t* negative_sums;
};

// Cuts groups into spans. Returns their number, at most stored_rows / kBlockRows.
int64_t cut_spans(const ExlPackedLinear& w, Span* spans, int64_t* stored_rows);

// Quantises rows [0, rows) of x and fills up with zero rows to `padded_rows`.
void quantize(const ExlPackedLinear& w, const float* x, int64_t rows, int64_t padded_rows,
              const Activations& a);

// Rows that linear_direct is compiled for: the next power of two.
inline int64_t direct_rows(int64_t rows) {
    int64_t padded = 1;
    while (padded < rows) padded *= 2;
    return padded;
}

struct Output {
    float* out;
    int64_t stride;
    bool add;
};

// 128 * high + low of integer sums.
EXL_INLINE I32x16 join_planes(I32x16 high, I32x16 low) {
    return shift_left(high, kPlaneShift) + low;
}

// Up to kDirectRows rows: codes stream from memory into the dot product.
void linear_direct(const ExlPackedLinear& w, const Activations& a, int64_t rows, Output out);

// Any number of rows: codes are unpacked into `scratch` and used for all rows. Every one of
// most_threads threads has buffered_scratch_bytes() of it.
void linear_buffered(const ExlPackedLinear& w, const Activations& a, int64_t rows, Output out,
                     uint8_t* scratch, int64_t most_threads);
constexpr int64_t buffered_scratch_bytes() {
    return int64_t{kChunkRows} * kPanelColumns + int64_t{kPassRows} * kPanelColumns * 4;
}

// Adds bias and what stands in `out`, and stores the columns that exist.
EXL_INLINE void finish(F32x16 value, const float* bias, float* out, int64_t columns, bool add) {
    if (columns >= kTileColumns) {
        if (bias) value = value + load(bias);
        if (add) value = load(out) + value;
        store(out, value);
        return;
    }
    float lanes[kTileColumns];
    store(lanes, value);
    for (int64_t i = 0; i < columns; ++i) {
        float result = lanes[i];
        if (bias) result = result + bias[i];
        out[i] = add ? out[i] + result : result;
    }
}

}  // namespace exl
