// The quantised matrix product for many rows on Intel's AMX tiles. See linear.h for the arithmetic.
//
// Purpose: linear_buffered with the integer dot products on the tile unit, which does 1,024
// multiplications of bytes in a cycle. The integers are exact and every span is scaled and added
// in the same order, so the results have the bits of linear_buffered.
//
// Codes: a tile multiplies signed bytes, so codes are unpacked with their zero point subtracted and
// the span's integer is one dot product. Only a code of 8 bits with a zero point of its own does
// not fit: it is unpacked minus 128, and the rest of the zero point is a term of the sum.
//
// Layout of the activations: `tiled`, see Activations. Layout of the scratch of a thread: codes of a
// chunk as B tiles, [span][tile of the panel][step of 64 stored rows][16 quads of rows][64 bytes],
// each span padded to whole steps by zeros; then float32 sums [tile of the panel][row][16].
//
// Work per thread: panels of up to kAmxTiles tiles of columns. For each chunk of stored rows the
// thread unpacks the panel's codes and multiplies them with all blocks of kTileRows rows. A span's
// activations stay in four tile registers for all tiles of the panel. The sums of a tile are stored,
// then scaled and added while the tile unit multiplies the next tile.
//
// Tile registers: 0-1 sums of the high and the low plane; 2-3 codes of two steps; 4-5 planes of
// activations of the first step, 6-7 of the second.
//
// Preconditions: amx_is_on(); rows <= kPassRows; activations in blocks of kTileRows, tiled.
#include "linear.h"

#include <atomic>
#include <cstring>

#include "api.h"
#include "threads.h"
#include "unpack.h"

#if defined(EXL_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace exl {
namespace {

#if defined(EXL_AMX)

std::atomic<bool> is_on{false};

constexpr int kTileBytes = kStepRows * kTileColumns;
// Tiles of columns of a panel, and steps of a chunk: its codes are 16 KiB, which stay in the
// first-level cache while all blocks of rows use them.
constexpr int kAmxTiles = 4;
constexpr int kChunkSteps = 4;
constexpr int kCodesBytes = kChunkSteps * kAmxTiles * kTileBytes;
static_assert(kSpanRows <= 2 * kStepRows, "a span's activations are in registers");
static_assert(kCodesBytes + kAmxTiles * kPassRows * kTileColumns * 4 <= buffered_scratch_bytes(),
              "the scratch is that of linear_buffered");

// Operand of LDTILECFG: 8 tiles; a row of each has 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "as the processor reads it");

// The configuration for each number of rows of activations. A table of constants, because GCC 12
// takes LDTILECFG for a load of 8 bytes and removes other stores to a local variable.
struct TileConfigs {
    TileConfig entry[kTileRows + 1] = {};
    constexpr TileConfigs() {
        for (int rows = 0; rows <= kTileRows; ++rows) {
            for (int tile = 0; tile < 8; ++tile) {
                const bool is_codes = tile == 2 || tile == 3;
                entry[rows].rows[tile] = static_cast<uint8_t>(is_codes ? kTileRows : rows);
            }
        }
    }
};
constexpr TileConfigs kConfigs;

// The tile registers of this thread, configured while the object lives. The configuration belongs
// to a thread: without it a tile instruction ends the process. Other code finds none, as before.
class Tiles {
public:
    Tiles() = default;
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
    ~Tiles() { _tile_release(); }

    void configure(int rows) {
        if (rows == rows_) return;
        rows_ = rows;
        _tile_loadconfig(&kConfigs.entry[rows]);
    }

private:
    int rows_ = 0;
};

// Requests a cache line for writing. Compilers that know AMX on Linux have this builtin.
EXL_INLINE void prefetch_to_write(const float* p) { __builtin_prefetch(p, 1, 3); }

// GCC 12 does not say which memory its tile instructions read and write.
EXL_INLINE void compiler_fence() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// The products of a span with a tile, for each plane.
struct alignas(64) Products {
    int32_t values[kPlanes][kTileRows][kTileColumns];
};

// Decoded scales of a panel for each span of a chunk, and zero points less 128 for has_zero_term().
struct PanelTables {
    alignas(64) float scales[kChunkSteps][kAmxTiles][kTileColumns];
    alignas(64) int32_t zeros[kChunkSteps][kAmxTiles][kTileColumns];
};

// Tiles [first, first + count) of columns, count <= kAmxTiles.
struct Panel {
    const ExlPackedLinear& w;
    int64_t first;
    int count;
};

// True if the codes of a span are unpacked minus 128, not minus their zero points.
bool has_zero_term(const ExlPackedLinear& w, const Span& span) {
    return span.bits == 8 && w.zeros != nullptr;
}

int steps_of(const Span& span) { return static_cast<int>(ceil_div(span.rows, kStepRows)); }

// Unpacks a span of one tile, minus the zero point of each column.
template <int Bits>
void unpack_span(const uint8_t* codes, int blocks, U8x64 zeros, uint8_t* buffer) {
    constexpr int kBlockBytes = kBlockRegisters * kRegisterBytes;
    for (int block = 0; block < blocks; ++block) {
        // Those of the next chunk, which is next in memory.
        for (int i = 0; i < Bits; ++i) {
            prefetch_far(codes + kChunkSteps * kStepRows / kBlockRows * Bits * kBlockBitBytes +
                         i * kRegisterBytes);
        }
        unrolled<kBlockRegisters>([&](auto j) EXL_INLINED {
            const U8x64 code = block_register<Bits, j>(codes);
            store_codes(buffer + j * kRegisterBytes, {_mm512_sub_epi8(code.v, zeros.v)});
        });
        codes += Bits * kBlockBitBytes;
        buffer += kBlockBytes;
    }
    if (blocks * kBlockRows % kStepRows) std::memset(buffer, 0, kBlockBytes);
}

void unpack_chunk(const Panel& panel, const Activations& a, int64_t first, int64_t end,
                  uint8_t* buffer, PanelTables& tables) {
    const ExlPackedLinear& w = panel.w;
    for (int j = 0; j < panel.count; ++j) {
        const int64_t tile = panel.first + j;
        const uint8_t* codes = w.codes + tile * w.tile_bytes;
        const TileTables tile_tables(w, tile);
        uint8_t* span_buffer = buffer;
        for (int64_t s = first; s < end; ++s) {
            const Span& span = a.spans[s];
            I32x16 zeros = broadcast(int32_t{1 << (span.bits - 1)});
            if (w.zeros) {
                const I32x16 own = tile_tables.group_zeros(span.group);
                store(tables.zeros[s - first][j], own - broadcast(int32_t{128}));
                if (!has_zero_term(w, span)) zeros = own;
            }
            // The lowest byte of each lane for its 4 codes.
            const U8x64 bytes = {(zeros * broadcast(int32_t{0x01010101})).v};
            const int step_bytes = steps_of(span) * kTileBytes;
            with_bits(span.bits, [&](auto b) EXL_INLINED {
                unpack_span<b>(codes + span.offset, span.rows / kBlockRows, bytes,
                               span_buffer + j * step_bytes);
            });
            store(tables.scales[s - first][j],
                  tile_tables.group_scales(span.group, a.level_scales + s * kLevels));
            span_buffer += panel.count * step_bytes;
        }
    }
}

// Products in memory that wait for being scaled and added while the tile unit multiplies the next
// tile. One set of products for all, because two would take twice the room in the first-level
// cache.
struct Pipeline {
    Products products;
    int rows = 0;  // 0: nothing waits
    const float* scales;
    const int32_t* zeros;  // null: no zero term
    const float* x_scales;
    const int32_t* x_negative_sums;
    float* sums;  // [rows][kTileColumns]

    template <bool ZeroTerm>
    EXL_INLINE void add_row(int r, F32x16 scale, I32x16 zero, const float* x_scale,
                            const int32_t* x_negative_sum, float* sum) const {
        I32x16 product = join_planes(load(products.values[0][r]), load(products.values[1][r]));
        if constexpr (ZeroTerm) product = product + zero * broadcast(x_negative_sum[r]);
        float* target = sum + r * kTileColumns;
        store(target, fma(to_float(product), scale * broadcast(x_scale[r]), load(target)));
    }

    // Adds what waits.
    EXL_INLINE void flush() {
        if (rows == 0) return;
        const F32x16 scale = load(scales);
        // Copies, because for the compiler a vector that is stored may be one of the pointers.
        const float* x_scale = x_scales;
        const int32_t* x_negative_sum = x_negative_sums;
        float* sum = sums;
        if (EXL_LIKELY(rows == kTileRows && zeros == nullptr)) {
            const I32x16 none = broadcast(int32_t{0});
            unrolled<kTileRows>([&](auto r) EXL_INLINED {
                add_row<false>(r, scale, none, x_scale, x_negative_sum, sum);
            });
        } else {
            // A product with 0 for the spans without the term.
            const I32x16 zero = zeros ? load(zeros) : broadcast(int32_t{0});
            const int count = rows;
            for (int r = 0; r < count; ++r) {
                add_row<true>(r, scale, zero, x_scale, x_negative_sum, sum);
            }
        }
        rows = 0;
    }
};

// Multiplies spans [first, end) of a panel for the block of `rows` rows that begins at row `block`.
// sums: those of the block in the panel's first tile, `tile_sums` elements before the next tile's.
// out: the output of the block, whose cache lines are requested, because a wait for each of them
// would be a quarter of the time; null if the spans are not the last ones.
void multiply_block(const Panel& panel, const PanelTables& tables, const Activations& a,
                    int64_t first, int64_t end, int64_t block, int rows, const uint8_t* codes,
                    float* sums, int64_t tile_sums, const float* out, int64_t out_stride,
                    Pipeline& pipeline) {
    const int8_t* x = a.codes + block * kPlanes * a.stored_rows;
    const int8_t* next_block = x + (kTileRows * a.stored_rows +
                                    int64_t{a.spans[first].first_row} * rows) * kPlanes;
    for (int64_t s = first; s < end; ++s) {
        const Span& span = a.spans[s];
        const int8_t* high = x + int64_t{span.first_row} * kPlanes * rows;
        const int8_t* next = s + 1 < end ? high + span.rows * kPlanes * rows : next_block;
        const bool two_steps = span.rows > kStepRows;
        const int step = two_steps ? kStepRows : span.rows;
        _tile_loadd(4, high, step);
        _tile_loadd(5, high + rows * step, step);
        if (two_steps) {
            const int second = span.rows - kStepRows;
            high += kStepRows * kPlanes * rows;
            _tile_loadd(6, high, second);
            _tile_loadd(7, high + rows * second, second);
        }
        const int64_t table = block * a.num_spans + s * rows;
        for (int j = 0; j < panel.count; ++j) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_loadd(2, codes, kRegisterBytes);
            _tile_dpbssd(0, 4, 2);
            _tile_dpbssd(1, 5, 2);
            codes += kTileBytes;
            if (two_steps) {
                _tile_loadd(3, codes, kRegisterBytes);
                _tile_dpbssd(0, 6, 3);
                _tile_dpbssd(1, 7, 3);
                codes += kTileBytes;
            }
            for (int r = 0; r < rows; ++r) {
                prefetch_near(reinterpret_cast<const uint8_t*>(next) + j * kTileBytes +
                              r * kRegisterBytes);
            }
            if (out && s == first) {
                for (int r = 0; r < rows; ++r) {
                    prefetch_to_write(out + r * out_stride + j * kTileColumns);
                }
            }
            pipeline.flush();
            compiler_fence();
            _tile_stored(0, pipeline.products.values[0], kRegisterBytes);
            _tile_stored(1, pipeline.products.values[1], kRegisterBytes);
            compiler_fence();
            pipeline.rows = rows;
            pipeline.scales = tables.scales[s - first][j];
            pipeline.zeros = has_zero_term(panel.w, span) ? tables.zeros[s - first][j] : nullptr;
            pipeline.x_scales = a.scales + table;
            pipeline.x_negative_sums = a.negative_sums + table;
            pipeline.sums = sums + j * tile_sums;
        }
    }
}

// Writes a block of rows of a panel.
void finish_block(const Panel& panel, int rows, const float* sums, int64_t tile_sums,
                  const Output& out) {
    const ExlPackedLinear& w = panel.w;
    for (int64_t r = 0; r < rows; ++r) {
        for (int j = 0; j < panel.count; ++j) {
            const int64_t column = (panel.first + j) * kTileColumns;
            finish(load(sums + j * tile_sums + r * kTileColumns),
                   w.bias ? w.bias + column : nullptr, out.out + r * out.stride + column,
                   w.out_features - column, out.add);
        }
    }
}

void multiply_panel(const Panel& panel, const Activations& a, int64_t rows, const Output& out,
                    uint8_t* scratch, Tiles& tiles) {
    float* sums = reinterpret_cast<float*>(scratch + kCodesBytes);
    const int64_t tile_sums = rows * kTileColumns;
    std::memset(sums, 0, sizeof(float) * tile_sums * panel.count);
    PanelTables tables;
    Pipeline pipeline;
    for (int64_t first = 0; first < a.num_spans;) {
        int steps = 0;
        int64_t end = first;
        while (end < a.num_spans && steps + steps_of(a.spans[end]) <= kChunkSteps) {
            steps += steps_of(a.spans[end++]);
        }
        unpack_chunk(panel, a, first, end, scratch, tables);
        compiler_fence();
        for (int64_t block = 0; block < rows; block += kTileRows) {
            const int64_t left = rows - block;
            const int count = static_cast<int>(left < kTileRows ? left : kTileRows);
            float* block_sums = sums + block * kTileColumns;
            tiles.configure(count);
            float* target = out.out + block * out.stride;
            const bool is_last = end == a.num_spans;
            multiply_block(panel, tables, a, first, end, block, count, scratch, block_sums,
                           tile_sums, is_last ? target + panel.first * kTileColumns : nullptr,
                           out.stride, pipeline);
            if (!is_last) continue;
            pipeline.flush();
            finish_block(panel, count, block_sums, tile_sums, {target, out.stride, out.add});
        }
        // The next chunk overwrites the tables.
        pipeline.flush();
        first = end;
    }
}

struct CpuId {
    unsigned a = 0, b = 0, c = 0, d = 0;
    CpuId(unsigned leaf, unsigned part) {
        // Fails and leaves zeros if the processor does not have the leaf.
        __get_cpuid_count(leaf, part, &a, &b, &c, &d);
    }
};

bool has_bit(unsigned word, int bit) { return (word >> bit & 1) != 0; }

// Asks processor and system for the tile registers, and the system for permission to use them,
// which holds for every thread of the process.
bool tiles_are_permitted() {
    if (!has_bit(CpuId(1, 0).c, 27)) return false;  // OSXSAVE, which permits XGETBV
    const unsigned features = CpuId(7, 0).d;
    if (!has_bit(features, 24) || !has_bit(features, 25)) return false;  // AMX-TILE, AMX-INT8
    const CpuId palette(0x1d, 1);
    if ((palette.b & 0xffff) < kStepRows || palette.b >> 16 < 8 ||
        (palette.c & 0xffff) < kTileRows) {
        return false;
    }
    unsigned enabled, upper;
    asm volatile("xgetbv" : "=a"(enabled), "=d"(upper) : "c"(0));
    constexpr int kConfigState = 17, kDataState = 18;
    if (!has_bit(enabled, kConfigState) || !has_bit(enabled, kDataState)) return false;
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequestPermission, kDataState) == 0;
}

#endif  // EXL_AMX

}  // namespace

#if defined(EXL_AMX)
bool amx_is_on() { return is_on.load(std::memory_order_relaxed); }

void linear_amx(const ExlPackedLinear& w, const Activations& a, int64_t rows, Output out,
                uint8_t* scratch, int64_t max_threads) {
    // Whole panels, or less if some threads would have none.
    const int64_t share = w.tiles / num_threads();
    const int64_t min_grain = share < 1 ? 1 : share < kAmxTiles ? share : kAmxTiles;
    const int64_t grain = balanced_grain(w.tiles, min_grain);
    parallel_for(w.tiles, grain, [&](int64_t first, int64_t end, int thread) {
        uint8_t* thread_scratch = scratch + thread * buffered_scratch_bytes();
        Tiles tiles;
        for (int64_t tile = first; tile < end; tile += kAmxTiles) {
            const int64_t left = end - tile;
            const Panel panel = {w, tile, static_cast<int>(left < kAmxTiles ? left : kAmxTiles)};
            multiply_panel(panel, a, rows, out, thread_scratch, tiles);
        }
    }, max_threads);
}
#endif

}  // namespace exl

// Turns products on AMX tiles on or off; they are off until then. Returns 1 if they are on, 0 if
// they are off, -1 if the processor or the system does not permit them, and -2 if the library was
// compiled for processors without them.
EXL_API int exl_set_amx(int on) {
#if defined(EXL_AMX)
    if (on && !exl::tiles_are_permitted()) return -1;
    exl::is_on.store(on != 0);
    return on != 0;
#else
    return on ? -2 : 0;
#endif
}
