// The matrix product of unquantised layers (ExlDenseLinear, packed.h).
//
// Layout: weights [tile][k][16] in float16, bfloat16 or float32, which become float32 in
// registers. Activations of more than one row are first regrouped in scratch as
// [block of r rows][k][r], so that a step of the inner loop reads r neighbours.
//
// Arithmetic: products are summed in float32 in the order of k, in one chain per output, so a
// row's result depends neither on the number of rows nor of threads. Several tiles and rows are
// computed together to hide the latency of a chain.
//
// Work per thread: panels of tiles; for each panel all blocks of rows.
// Precondition: scratch for min(rows, kDensePassRows) rows if rows > 1.
#include <algorithm>

#include "linear.h"
#include "replay.h"
#include "threads.h"
#include "unpack.h"

namespace exl {
namespace {

// Rows computed together. With two tiles, 24 of 32 registers hold sums; AVX2 has 16 registers and
// needs two per tile.
#if defined(EXL_AVX512)
constexpr int kDenseRows = 12;
#else
constexpr int kDenseRows = 4;
#endif
// Rows that share one pass over the weights (10 blocks of 12): enough arithmetic for each byte of
// weights, with a moderate size of the scratch.
constexpr int64_t kDensePassRows = 120;
// Bytes of weights, or elements to regroup, that are worth the cost of a claim.
constexpr int64_t kBytesPerTask = 32 * 1024;
constexpr int64_t kElementsPerTask = 16 * 1024;

// Tiles computed together for a number of rows: at least 4 chains, at most the sums that fit into
// registers (24 of 32 with AVX-512, 4 pairs of 16 with AVX2).
constexpr int tiles_for(int rows) {
    const int sums = kDenseRows * kPanelTiles;
    return sums / rows >= 4 ? 4 : sums / rows >= 2 ? 2 : 1;
}

struct Float32 {
    using Storage = float;
    static EXL_INLINE F32x16 get(const Storage* p) { return load(p); }
};
struct Float16 {
    using Storage = uint16_t;
    static EXL_INLINE F32x16 get(const Storage* p) { return load_half(p); }
};
struct Bfloat16 {
    using Storage = uint16_t;
    static EXL_INLINE F32x16 get(const Storage* p) { return load_bfloat16(p); }
};

// Stores rows of one tile; columns beyond out_features do not exist.
void store_tile(const ExlDenseLinear& w, int64_t tile, const F32x16* results, int rows,
                const Output& out) {
    const int64_t column = tile * kTileColumns;
    if (column >= w.out_features) return;
    const float* bias = w.bias ? w.bias + column : nullptr;
    for (int r = 0; r < rows; ++r) {
        finish(results[r], bias, out.out + r * out.stride + column, w.out_features - column,
               out.add);
    }
}

// Multiplies rows [row, row + Rows) with one panel of the output. x is [k][Rows].
template <class Type, int Rows>
void multiply_panel(const ExlDenseLinear& w, const float* x, int64_t panel, Output out) {
    constexpr int kTiles = tiles_for(Rows);
    using Storage = typename Type::Storage;
    const Storage* weight[kTiles];
    for (int j = 0; j < kTiles; ++j) {
        // A last panel with fewer tiles repeats the last tile and does not store it.
        const int64_t tile = std::min(panel * kTiles + j, w.tiles - 1);
        weight[j] = static_cast<const Storage*>(w.weight) + tile * w.in_features * kTileColumns;
    }
    F32x16 sums[Rows][kTiles];
    unrolled<Rows * kTiles>(
        [&](auto i) EXL_INLINED { sums[i / kTiles][i % kTiles] = broadcast(0.0f); });
    for (int64_t k = 0; k < w.in_features; ++k) {
        F32x16 weights[kTiles];
        unrolled<kTiles>(
            [&](auto j) EXL_INLINED { weights[j] = Type::get(weight[j] + k * kTileColumns); });
        unrolled<Rows>([&](auto r) EXL_INLINED {
            const F32x16 value = broadcast(x[k * Rows + r]);
            unrolled<kTiles>(
                [&](auto j) EXL_INLINED { sums[r][j] = fma(weights[j], value, sums[r][j]); });
        });
    }
    // Through memory, so that the code of storing with its branches exists once and not
    // Rows * kTiles times inline.
    F32x16 results[kTiles][Rows];
    unrolled<Rows * kTiles>([&](auto i) EXL_INLINED {
        results[i % kTiles][i / kTiles] = sums[i / kTiles][i % kTiles];
    });
    for (int j = 0; j < kTiles; ++j) {
        store_tile(w, panel * kTiles + j, results[j], Rows, out);
    }
}

using MultiplyPanel = void (*)(const ExlDenseLinear&, const float*, int64_t, Output);

template <class Type>
struct PanelTable {
    MultiplyPanel entry[kDenseRows + 1] = {};
    PanelTable() {
        unrolled<kDenseRows>(
            [&](auto i) EXL_INLINED { entry[i + 1] = multiply_panel<Type, i + 1>; });
    }
};

MultiplyPanel panel_function(const ExlDenseLinear& w, int64_t rows) {
    static const PanelTable<Float32> float32;
    static const PanelTable<Float16> float16;
    static const PanelTable<Bfloat16> bfloat16;
    switch (w.dtype) {
        case kExlFloat16: return float16.entry[rows];
        case kExlBfloat16: return bfloat16.entry[rows];
        default: return float32.entry[rows];
    }
}

// Multiplies all rows with tiles [first, end), in steps of the panel of a block of rows.
void multiply_tiles(const ExlDenseLinear& w, const float* x, int64_t rows, int64_t first,
                    int64_t end, const Output& out) {
    for (int64_t row = 0; row < rows; row += kDenseRows) {
        const int64_t count = std::min<int64_t>(rows - row, kDenseRows);
        const int tiles = tiles_for(static_cast<int>(count));
        const MultiplyPanel multiply = panel_function(w, count);
        const Output block = {out.out + row * out.stride, out.stride, out.add};
        for (int64_t tile = first; tile < end; tile += tiles) {
            multiply(w, x + row * w.in_features, tile / tiles, block);
        }
    }
}

// Regroups rows of x as [block][k][rows of the block].
void regroup(const float* x, int64_t rows, int64_t in_features, float* grouped) {
    const int64_t blocks = ceil_div(rows, kDenseRows);
    const int64_t block_elements = kDenseRows * in_features;
    const int64_t min_grain = ceil_div(kElementsPerTask, block_elements);
    parallel_for(blocks, min_grain, [&](int64_t first, int64_t end, int) {
        for (int64_t block = first; block < end; ++block) {
            const int64_t row = block * kDenseRows;
            const int64_t count = std::min<int64_t>(rows - row, kDenseRows);
            float* target = grouped + row * in_features;
            for (int64_t k = 0; k < in_features; ++k) {
                for (int64_t r = 0; r < count; ++r) {
                    target[k * count + r] = x[(row + r) * in_features + k];
                }
            }
        }
    });
}

}  // namespace
}  // namespace exl

// out = x @ W + bias, or out += x @ W + bias if `add`.
//
// x: float32 [rows, in_features]; out: float32 [rows, out_stride]; scratch: uint8
// [scratch_bytes]. Returns 0, or -1 if the scratch is too small.
EXL_API int exl_linear_dense(const float* x, int64_t rows, const ExlDenseLinear* w, float* out,
                             int64_t out_stride, int add, uint8_t* scratch,
                             int64_t scratch_bytes) {
    using namespace exl;
    const int64_t pass = std::min(rows, kDensePassRows);
    const int64_t needed = rows == 1 ? 0 : pass * w->in_features * 4;
    if (needed > scratch_bytes) return -1;
    // Work is cut into steps of 4 tiles, which every panel width divides.
    constexpr int64_t kStepTiles = 4;
    const int64_t steps = ceil_div(w->tiles, kStepTiles);
    const int64_t element_bytes = w->dtype == kExlFloat32 ? 4 : 2;
    const int64_t step_bytes = kStepTiles * kTileColumns * w->in_features * element_bytes;
    const int64_t min_grain = ceil_div(kBytesPerTask, step_bytes);
    for (int64_t first_row = 0; first_row < rows; first_row += kDensePassRows) {
        const int64_t count = std::min(rows - first_row, kDensePassRows);
        const Output output = {out + first_row * out_stride, out_stride, add != 0};
        const float* source = x + first_row * w->in_features;
        if (count > 1) {
            float* grouped = reinterpret_cast<float*>(scratch);
            regroup(source, count, w->in_features, grouped);
            source = grouped;
        }
        parallel_for(steps, balanced_grain(steps, min_grain), [&](int64_t first, int64_t end, int) {
            const int64_t last = std::min(end * kStepTiles, w->tiles);
            multiply_tiles(*w, source, count, first * kStepTiles, last, output);
        });
    }
    return 0;
}
EXL_REPLAYED(linear_dense)
