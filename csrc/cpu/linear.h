// The quantised matrix product: declarations shared by its sources.
//
// Purpose: out = x @ W + bias for packed weights (ExlPackedLinear, packed.h).
//
// Arithmetic: a call quantises its activations once, to 15 bits, then multiplies integers. A
// *span* is a group, or 128 stored rows of a longer group. Per span, a row of activations has one
// float32 scale and the sum of its integers:
//
//     out[row, n] += scale[group, n] * x_scale[row, span] * (dot - zero[group, n] * x_sum)
//
// The bracket is an exact integer and spans are added in order, so a row's result does not
// depend on the number of rows or threads of a call.
//
// The processor multiplies 8-bit integers, so an activation is a pair of them,
// 128 * high + low (its two *planes*), and a dot product is 128 * dot(high) + dot(low). With only
// 8 bits a layer's output changes by 0.6 % and the fixtures' logits by 2.7 % (relative L2); with
// 15 bits the change is smaller than that of float16 weights. The second plane costs decoding no
// time because decoding is bound by memory.
#pragma once

#include <cstdint>

#include "packed.h"
#include "simd.h"

namespace exl {

// Rows of one activation scale. 128 codes of up to 255 times kLargestActivation make at
// most 0.53e9, below 2^29, so that the sum and the zero point's term fit into an int32 together.
constexpr int kSpanRows = 128;
constexpr int kPlanes = 2;
// Rows that share one pass over the weights. More rows would only enlarge the scratch.
constexpr int kPassRows = 256;
// Stored rows that are unpacked at a time: with two tiles 64 KiB, a small part of a second-level
// cache.
constexpr int kChunkRows = 2048;

#if defined(EXL_AVX512)
// 6 rows of 2 planes and 2 tiles: of 32 registers 24 hold sums, 2 codes and 1 activations.
constexpr int kMicroRows = 6;
constexpr int kPanelTiles = 2;
// Rows of a block for which codes go from memory to the dot product without a buffer.
constexpr int kDirectRows = 8;
// Up to this number of rows, in blocks of kDirectRows, that is faster than a buffer, although each
// block unpacks the codes again. A core of Zen 5, 2048 x 5632 in 4 bits, direct and buffered, in us:
// 538 and 894 for 9 rows, 882 and 1237 for 16, 1752 and 2046 for 32, 2625 and 2832 for 48, equal
// for 64.
constexpr int kMostDirectRows = 48;
#else
// AVX2 has 16 registers and needs two per tile: 2 rows of 2 planes and 1 tile use 8 for sums.
constexpr int kMicroRows = 2;
constexpr int kPanelTiles = 1;
constexpr int kDirectRows = 2;
constexpr int kMostDirectRows = kDirectRows;
#endif
constexpr int kPanelColumns = kPanelTiles * kTileColumns;
// Rows of a tile register of AMX, and the stored rows that it multiplies in one instruction.
constexpr int kTileRows = 16;
constexpr int kStepRows = 64;

// Stored rows of a group that share an activation scale. Row numbers include the padding of a
// group's last block, except in source_row and source_rows.
struct Span {
    int32_t first_row;
    int32_t rows;  // a multiple of kBlockRows
    int32_t group;
    int32_t bits;
    int32_t offset;      // in bytes, from the start of a tile
    int32_t source_row;  // first_row without the padding
    int32_t source_rows;
};

// Activations of one pass. Rows are in blocks of up to `block_rows`; a block of r rows that
// begins at row i occupies
//     codes [stored_rows / 4][r][plane] words of 4 rows, from byte i * kPlanes * stored_rows,
//     scales and sums [num_spans][r], from element i * num_spans.
// If `tiled`, the codes of each span are [step][plane][r][stored rows of the step] instead; a step
// has kStepRows stored rows, the last step of a span maybe fewer.
struct Activations {
    const Span* spans;
    int64_t num_spans;
    const float* level_scales;  // [num_spans][kLevels], if the layer's scales are levels
    int64_t stored_rows;
    int64_t block_rows;
    bool tiled;
    int8_t* codes;
    float* scales;
    int32_t* negative_sums;
};

// Writes the scale of every level for each span: half((level + 1)^2 * scale_units[group]).
void decode_levels(const ExlPackedLinear& w, const Span* spans, int64_t num_spans,
                   float* level_scales);

// Cuts groups into spans. Returns their number, at most stored_rows / kBlockRows.
int64_t cut_spans(const ExlPackedLinear& w, Span* spans, int64_t* stored_rows);

// Quantises rows [0, rows) of x and appends zero rows up to `padded_rows`.
void quantize(const ExlPackedLinear& w, const float* x, int64_t rows, int64_t padded_rows,
              const Activations& a);

// The scales and zero points of a tile.
struct TileTables {
    const uint8_t* scales;  // [num_groups][16]: float16 if there are zero points, else levels
    const uint8_t* zeros;   // [num_groups][16]; null: each is 2^(bits - 1)
    bool wide_zeros;        // zero points are bytes, not fields of 4 bits

    TileTables(const ExlPackedLinear& w, int64_t tile) : wide_zeros(w.zero_bits == 8) {
        const int64_t columns = tile * w.num_groups * kTileColumns;
        scales = static_cast<const uint8_t*>(w.scales) + (w.zeros ? columns * 2 : columns / 2);
        zeros = w.zeros ? w.zeros + columns * w.zero_bits / 8 : nullptr;
    }
    // level_scales: those of a span of the group.
    EXL_INLINE F32x16 group_scales(int64_t group, const float* level_scales) const {
        // GPTQ takes the branch, because its groups are seldom short and thus seldom opened.
        if (EXL_LIKELY(zeros == nullptr)) {
            return look_up_half_bytes(level_scales, scales + group * kHalfBytes);
        }
        return load_half(reinterpret_cast<const uint16_t*>(scales) + group * kTileColumns);
    }
    // Precondition: zeros is not null.
    EXL_INLINE I32x16 group_zeros(int64_t group) const {
        return wide_zeros ? load_bytes(zeros + group * kTileColumns)
                          : load_half_bytes(zeros + group * kHalfBytes);
    }
};

// Number of rows of a block that linear_direct is compiled for: the next power of two.
inline int64_t direct_block_rows(int64_t rows) {
    int64_t padded = 1;
    while (padded < rows) padded *= 2;
    return padded;
}

// Number of rows that linear_direct computes: blocks of kDirectRows, and a last one.
inline int64_t direct_rows(int64_t rows) {
    const int64_t last = rows % kDirectRows;
    return rows - last + (last ? direct_block_rows(last) : 0);
}

struct Output {
    float* out;
    int64_t stride;
    bool add;
};

// Joins the integer sums of the two planes: 128 * high + low.
EXL_INLINE I32x16 join_planes(I32x16 high, I32x16 low) {
    return shift_left(high, kPlaneShift) + low;
}

// For up to kMostDirectRows rows: codes go from memory straight into the dot product.
void linear_direct(const ExlPackedLinear& w, const Activations& a, int64_t rows, Output out);

// For any number of rows: codes are unpacked into `scratch` and used for all rows. Each of
// max_threads threads has buffered_scratch_bytes() bytes of it.
void linear_buffered(const ExlPackedLinear& w, const Activations& a, int64_t rows, Output out,
                     uint8_t* scratch, int64_t max_threads);
constexpr int64_t buffered_scratch_bytes() {
    return int64_t{kChunkRows} * kPanelColumns + int64_t{kPassRows} * kPanelColumns * 4;
}

#if defined(EXL_AMX)
// True if the tiles of AMX are used (exl_set_amx).
bool amx_is_on();

// linear_buffered with tiles, for activations in blocks of kTileRows, tiled. It uses as much scratch.
void linear_amx(const ExlPackedLinear& w, const Activations& a, int64_t rows, Output out,
                uint8_t* scratch, int64_t max_threads);
#endif

// Adds the bias and, if `add`, the present content of `out`. Stores the columns that exist.
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
