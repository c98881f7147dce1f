// The quantised matrix product for many rows (prefill). See linear.h for the arithmetic.
//
// Purpose: unpack each code once for all rows; the time is bound by integer dot products.
//
// Layout of the scratch of a thread: unpacked codes of a panel
//     [stored rows / 4][tile of the panel][64 bytes],
// then float32 sums [row][panel column]. Scales and zero points of the chunk's spans are decoded
// on the stack (ChunkTables), because every block of activation rows reads them.
//
// Work per thread: a panel of kPanelTiles tiles. For kChunkRows stored rows at a time, the thread
// unpacks the panel's codes into its scratch and multiplies them with all blocks of activation
// rows. The inner kernel holds the sums of kMicroRows rows (two planes each) and kPanelTiles
// tiles in registers: each step loads one vector of codes per tile and one word of activations
// per plane for rows * planes * tiles dot products. After each span the integers are scaled and
// added to the float32 sums.
//
// Preconditions: rows <= kPassRows; activations in blocks of kMicroRows.
#include <cstring>

#include "linear.h"
#include "threads.h"
#include "unpack.h"

namespace exl {
namespace {

template <int Bits>
void unpack_span(const uint8_t* codes, int blocks, uint8_t* buffer) {
    constexpr int kStep = kPanelTiles * kRegisterBytes;
    for (int block = 0; block < blocks; ++block) {
        unrolled<kBlockRegisters>([&](auto j) EXL_INLINED {
            store_codes(buffer + j * kStep, block_register<Bits, j>(codes));
        });
        codes += Bits * kBlockBitBytes;
        buffer += kBlockRegisters * kStep;
    }
}

// The tiles of one panel. If the last panel has fewer tiles than kPanelTiles, the missing ones
// repeat the last tile and their sums are not stored.
struct Panel {
    const ExlPackedLinear& w;
    int64_t index;

    int64_t tile(int j) const {
        const int64_t wanted = index * kPanelTiles + j;
        return wanted < w.tiles ? wanted : w.tiles - 1;
    }
};

// Decoded scales and zero points of a panel, for each span of a chunk.
struct ChunkTables {
    static constexpr int kSpans = kChunkRows / kBlockRows;
    alignas(64) float scales[kSpans][kPanelColumns];
    alignas(64) int32_t zeros[kSpans][kPanelColumns];
};

// Multiplies one span: Rows rows x kPanelTiles tiles. x is [rows / 4][Rows][kPlanes] words, sums
// is [Rows][kPanelColumns]; span_scales and span_zeros are [kPanelColumns].
template <int Rows, bool Wide>
void multiply_span(const float* span_scales, const int32_t* span_zeros, const Span& span,
                   const uint8_t* codes, const int32_t* x, const float* x_scales,
                   const int32_t* x_negative_sums, float* sums) {
    // Indexed by constants only (`unrolled`), because an array with a running index would live in
    // memory.
    constexpr int kWords = Rows * kPlanes;
    I32x16 acc[kWords][kPanelTiles];
    F32x16 scales[kPanelTiles];
    unrolled<kPanelTiles>([&](auto j) EXL_INLINED {
        scales[j] = load(span_scales + j * kTileColumns);
        const I32x16 zeros = load(span_zeros + j * kTileColumns);
        unrolled<Rows>([&](auto r) EXL_INLINED {
            acc[kPlanes * r][j] = broadcast(int32_t{0});
            acc[kPlanes * r + 1][j] = zeros * broadcast(x_negative_sums[r]);
        });
    });
    for (int step = 0; step < span.rows / kRegisterRows; ++step) {
        U8x64 c[kPanelTiles];
        unrolled<kPanelTiles>(
            [&](auto j) EXL_INLINED { c[j] = load_codes(codes + j * kRegisterBytes); });
        unrolled<kWords>([&](auto i) EXL_INLINED {
            const int32_t word = x[i];
            unrolled<kPanelTiles>(
                [&](auto j) EXL_INLINED { acc[i][j] = dot<Wide>(acc[i][j], c[j], word); });
        });
        codes += kPanelTiles * kRegisterBytes;
        x += kWords;
    }
    unrolled<Rows>([&](auto r) EXL_INLINED {
        const F32x16 x_scale = broadcast(x_scales[r]);
        unrolled<kPanelTiles>([&](auto j) EXL_INLINED {
            float* target = sums + r * kPanelColumns + j * kTileColumns;
            const I32x16 sum = join_planes(acc[kPlanes * r][j], acc[kPlanes * r + 1][j]);
            store(target, fma(to_float(sum), scales[j] * x_scale, load(target)));
        });
    });
}

// Multiplies spans [first, end) for the block of Rows rows that begins at row `block`.
template <int Rows>
void multiply_block(const ChunkTables& tables, const Activations& a, int64_t first, int64_t end,
                    int64_t block, const uint8_t* codes, float* sums) {
    const int32_t* x = reinterpret_cast<const int32_t*>(a.codes + block * kPlanes * a.stored_rows);
    const float* x_scales = a.scales + block * a.num_spans;
    const int32_t* x_sums = a.negative_sums + block * a.num_spans;
    const int32_t chunk_row = a.spans[first].first_row;
    for (int64_t s = first; s < end; ++s) {
        const Span& span = a.spans[s];
        const auto multiply =
            span.bits > 7 ? multiply_span<Rows, true> : multiply_span<Rows, false>;
        multiply(tables.scales[s - first], tables.zeros[s - first], span,
                 codes + int64_t{span.first_row - chunk_row} * kPanelColumns,
                 x + span.first_row / kRegisterRows * Rows * kPlanes, x_scales + s * Rows,
                 x_sums + s * Rows, sums);
    }
}

using MultiplyBlock = void (*)(const ChunkTables&, const Activations&, int64_t, int64_t, int64_t,
                               const uint8_t*, float*);

// multiply_block for 1 to kMicroRows rows.
struct MultiplyTable {
    MultiplyBlock entry[kMicroRows + 1] = {};
    MultiplyTable() {
        unrolled<kMicroRows>([&](auto i) EXL_INLINED { entry[i + 1] = multiply_block<i + 1>; });
    }
};
const MultiplyTable multiply_table;

void unpack_chunk(const Panel& panel, const Activations& a, int64_t first, int64_t end,
                  uint8_t* buffer, ChunkTables& tables) {
    for (int j = 0; j < kPanelTiles; ++j) {
        const int64_t tile = panel.tile(j);
        const uint8_t* codes = panel.w.codes + tile * panel.w.tile_bytes;
        const TileTables tile_tables(panel.w, tile);
        for (int64_t s = first; s < end; ++s) {
            const Span& span = a.spans[s];
            uint8_t* target =
                buffer + int64_t{span.first_row - a.spans[first].first_row} * kPanelColumns;
            with_bits(span.bits, [&](auto b) EXL_INLINED {
                unpack_span<b>(codes + span.offset, span.rows / kBlockRows,
                               target + j * kRegisterBytes);
            });
            const I32x16 zeros = tile_tables.zeros
                                     ? tile_tables.group_zeros(span.group)
                                     : broadcast(static_cast<int32_t>(1 << (span.bits - 1)));
            store(tables.scales[s - first] + j * kTileColumns,
                  tile_tables.group_scales(span.group, a.level_scales + s * kLevels));
            store(tables.zeros[s - first] + j * kTileColumns, zeros);
        }
    }
}

void multiply_panel(const ExlPackedLinear& w, const Activations& a, int64_t p, int64_t rows,
                    const Output& out, uint8_t* scratch) {
    uint8_t* buffer = scratch;
    float* sums = reinterpret_cast<float*>(scratch + int64_t{kChunkRows} * kPanelColumns);
    std::memset(sums, 0, sizeof(float) * rows * kPanelColumns);
    const Panel panel = {w, p};
    ChunkTables tables;
    for (int64_t first = 0; first < a.num_spans;) {
        const int32_t limit = a.spans[first].first_row + kChunkRows;
        int64_t end = first;
        while (end < a.num_spans && a.spans[end].first_row + a.spans[end].rows <= limit) ++end;
        unpack_chunk(panel, a, first, end, buffer, tables);
        for (int64_t block = 0; block < rows; block += kMicroRows) {
            const int64_t left = rows - block < kMicroRows ? rows - block : kMicroRows;
            multiply_table.entry[left](tables, a, first, end, block, buffer,
                                       sums + block * kPanelColumns);
        }
        first = end;
    }
    for (int j = 0; j < kPanelTiles; ++j) {
        const int64_t column = p * kPanelColumns + j * kTileColumns;
        if (column >= w.out_features) break;
        for (int64_t r = 0; r < rows; ++r) {
            finish(load(sums + r * kPanelColumns + j * kTileColumns),
                   w.bias ? w.bias + column : nullptr, out.out + r * out.stride + column,
                   w.out_features - column, out.add);
        }
    }
}

}  // namespace

void linear_buffered(const ExlPackedLinear& w, const Activations& a, int64_t rows, Output out,
                     uint8_t* scratch, int64_t max_threads) {
    const int64_t panels = ceil_div(w.tiles, kPanelTiles);
    parallel_for(panels, balanced_grain(panels, 1), [&](int64_t first, int64_t end, int thread) {
        uint8_t* thread_scratch = scratch + thread * buffered_scratch_bytes();
        for (int64_t p = first; p < end; ++p) multiply_panel(w, a, p, rows, out, thread_scratch);
    }, max_threads);
}

}  // namespace exl
