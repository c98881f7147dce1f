// The quantised matrix product for few rows (decoding). See linear.h for the arithmetic.
//
// Purpose: read the codes once at the speed of memory, from each tile's start to its end, unpack
// them in registers and multiply immediately.
//
// Layout: codes as ExlPackedLinear (packed.h), activations as Activations (linear.h).
// Work per thread: runs of tiles. The rows of a tile are in blocks, whose sums are held in registers.
// The first block reads the tile from memory, the others from a cache.
// Preconditions: rows <= kMostDirectRows; activations in blocks of kDirectRows, direct_rows(rows)
// together.
#include "linear.h"
#include "threads.h"
#include "unpack.h"

namespace exl {
namespace {

// Bytes of codes that are worth the cost of a claim: about 2 us of memory traffic.
constexpr int64_t kBytesPerTask = 32 * 1024;

// Codes are prefetched twice: far ahead into the second-level cache, because the processor itself
// loads too few lines ahead of a loop that computes, and shortly before their use into the first
// level. On Sapphire Rapids the first makes 4-bit codes come at 15 instead of 9 GB/s a core, where
// plain loads reach 15; the second adds 8 % for 2 bits, 1 to 3 % for others and nothing for 8. With
// every second line only a fifth is lost. Half of either distance costs 5 to 10 %, twice gains
// nothing. Prefetching beyond the end of the codes has no effect.
constexpr int kFarBytes = 6144;
constexpr int kNearBytes = 768;

struct Tile {
    const uint8_t* codes;
    TileTables tables;
};

// zero[group, n] * negative_sum; without zero points, zero is 2^(Bits - 1).
template <int Bits>
EXL_INLINE I32x16 zero_term(const TileTables& tables, int64_t group, int32_t negative_sum) {
    if (EXL_LIKELY(tables.zeros == nullptr)) return broadcast(negative_sum * (1 << (Bits - 1)));
    return tables.group_zeros(group) * broadcast(negative_sum);
}

// Sums that may be held together: 16 of 32 registers, which leaves room for codes and activations.
constexpr int kMaxSums = 16;

// How the codes of a span become sums. If a wide code costs nothing, codes are used without a
// shift down in their bytes, which saves shifts. Every shift then has its own sums, which are
// shifted down at the end, exactly.
template <int Bits, int Rows>
struct SpanLayout {
    static constexpr int kSums = Rows * kPlanes;
    static constexpr int kFields = 8 / high_width(Bits);
    static constexpr bool kUnshifted =
        kWideDotIsFree && kFields == 2 && kFields * kSums <= kMaxSums;
    // With few rows several sums per row run in parallel, because the latency of a dot product is
    // 4 to 5 cycles and one can start in every cycle. Sums of pairs are added in one cycle.
    static constexpr int kWanted = kDotsInPairs || kSums >= 4 ? 1 : 4 / kSums;
    static constexpr int kChains = kUnshifted ? kFields : kWanted;

    static constexpr int up_shift(int index) { return kUnshifted ? unshifted_up(Bits, index) : 0; }
};

// Adds one block of one tile to partial sums.
template <int Bits, int Rows, class Partial>
EXL_INLINE void add_block(const uint8_t* codes, const int32_t* x, Partial& partial) {
    using Layout = SpanLayout<Bits, Rows>;
    constexpr int kSums = Layout::kSums;
#if defined(EXL_DOTS_IN_PAIRS)
    // The products of two rows are at most 2 * 127 times the largest code. As many as an int16
    // holds are added before they are widened. Of 8 bits it holds those of a low plane only, whose
    // values are in -64..63.
    constexpr int kHeld = 32767 / (2 * 127 * ((1 << Bits) - 1));
    if constexpr (kHeld > 0) {
        constexpr int kRegisters = kHeld < kBlockRegisters ? kHeld : kBlockRegisters;
        static_assert(kBlockRegisters % kRegisters == 0, "whole rounds");
        unrolled<kBlockRegisters / kRegisters>([&](auto round) EXL_INLINED {
            I16x32 pairs[kSums];
            unrolled<kRegisters>([&](auto i) EXL_INLINED {
                constexpr int kIndex = round * kRegisters + i;
                const U8x64 c = block_register<Bits, kIndex>(codes);
                unrolled<kSums>([&](auto k) EXL_INLINED {
                    const I16x32 products = pair_products(c, x[kIndex * kSums + k]);
                    pairs[k] = i == 0 ? products : pairs[k] + products;
                });
            });
            unrolled<kSums>([&](auto k) EXL_INLINED {
                partial[0][k] = add_pairs(partial[0][k], pairs[k]);
            });
        });
        return;
    }
#endif
    unrolled<kBlockRegisters>([&](auto j) EXL_INLINED {
        constexpr int kUp = Layout::up_shift(j);
        const U8x64 c = block_register<Bits, j, kUp>(codes);
        unrolled<kSums>([&](auto i) EXL_INLINED {
            constexpr bool kIsLow = i % kPlanes == 1;
            I32x16& sum = partial[j % Layout::kChains][i];
            sum = dot_loaded<(Bits + kUp > 7) && !(kDotsInPairs && kIsLow)>(
                sum, c, x + j * kSums + i);
        });
    });
}

// Adds one span of one tile to the integer sums of its rows.
template <int Bits, int Rows>
EXL_INLINE void span_sums(const uint8_t* codes, const int32_t* x, int blocks, I32x16* sums) {
    using Layout = SpanLayout<Bits, Rows>;
    constexpr int kSums = Layout::kSums, kChains = Layout::kChains;
    // Indexed by constants only (`unrolled`), because an array with a running index would live in
    // memory.
    I32x16 partial[kChains][kSums];
    unrolled<kChains * kSums>([&](auto i) EXL_INLINED {
        constexpr bool kFirst = i < kSums && i % kPlanes == 1;
        partial[i / kSums][i % kSums] = kFirst ? sums[i / kPlanes] : broadcast(int32_t{0});
    });
    for (int block = 0; block < blocks; ++block) {
        for (int i = 0; i < Bits; ++i) {
            prefetch_far(codes + kFarBytes + i * kRegisterBytes);
            if constexpr (Bits < 8) prefetch_near(codes + kNearBytes + i * kRegisterBytes);
        }
        add_block<Bits, Rows>(codes, x, partial);
        codes += Bits * kBlockBitBytes;
        x += kBlockRegisters * kSums;
    }
    unrolled<kChains * kSums>([&](auto i) EXL_INLINED {
        I32x16& sum = partial[i / kSums][i % kSums];
        sum = shift_right_signed<Layout::up_shift(i / kSums)>(sum);
        if constexpr (i >= kSums) partial[0][i % kSums] = partial[0][i % kSums] + sum;
    });
    unrolled<Rows>([&](auto r) EXL_INLINED {
        sums[r] = join_planes(partial[0][kPlanes * r], partial[0][kPlanes * r + 1]);
    });
}

// Adds spans [first, end), all of Bits bits, to the float32 sums of one tile.
template <int Bits, int Rows>
void add_spans(const Tile& tile, const Activations& a, int64_t first, int64_t end,
               F32x16* totals) {
    F32x16 running[Rows];
    unrolled<Rows>([&](auto r) EXL_INLINED { running[r] = totals[r]; });
    const int32_t* x = reinterpret_cast<const int32_t*>(a.codes);
    for (int64_t s = first; s < end; ++s) {
        const Span& span = a.spans[s];
        // Unsigned, so that a division is a shift.
        const uint32_t first_row = static_cast<uint32_t>(span.first_row);
        const uint32_t span_rows = static_cast<uint32_t>(span.rows);
        I32x16 sums[Rows];
        unrolled<Rows>([&](auto r) EXL_INLINED {
            sums[r] = zero_term<Bits>(tile.tables, span.group, a.negative_sums[s * Rows + r]);
        });
        span_sums<Bits, Rows>(tile.codes + span.offset,
                              x + first_row / kRegisterRows * Rows * kPlanes,
                              static_cast<int>(span_rows / kBlockRows), sums);
        const F32x16 scales =
            tile.tables.group_scales(span.group, a.level_scales + s * kLevels);
        unrolled<Rows>([&](auto r) EXL_INLINED {
            const F32x16 scale = scales * broadcast(a.scales[s * Rows + r]);
            running[r] = fma(to_float(sums[r]), scale, running[r]);
        });
    }
    unrolled<Rows>([&](auto r) EXL_INLINED { totals[r] = running[r]; });
}

// Multiplies one tile with a block of Rows rows, of which `rows` are stored.
template <int Rows>
void multiply_block(const ExlPackedLinear& w, const Activations& a, int64_t t, int64_t rows,
                    const Output& out) {
    const Tile tile = {w.codes + t * w.tile_bytes, TileTables(w, t)};
    F32x16 totals[Rows];
    for (int r = 0; r < Rows; ++r) totals[r] = broadcast(0.0f);
    for (int64_t first = 0; first < a.num_spans;) {
        const int bits = a.spans[first].bits;
        int64_t end = first + 1;
        while (end < a.num_spans && a.spans[end].bits == bits) ++end;
        with_bits(bits, [&](auto b) EXL_INLINED {
            add_spans<b, Rows>(tile, a, first, end, totals);
        });
        first = end;
    }
    const int64_t column = t * kTileColumns;
    const float* bias = w.bias ? w.bias + column : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
        finish(totals[r], bias, out.out + r * out.stride + column, w.out_features - column,
               out.add);
    }
}

// The activations of the block that begins at row `first`.
Activations block_of(const Activations& a, int64_t first) {
    Activations block = a;
    block.codes += first * kPlanes * a.stored_rows;
    block.scales += first * a.num_spans;
    block.negative_sums += first * a.num_spans;
    return block;
}

void multiply_tile(const ExlPackedLinear& w, const Activations& a, int64_t t, int64_t rows,
                   const Output& out) {
    for (int64_t first = 0; first < rows; first += kDirectRows) {
        const int64_t count = rows - first < kDirectRows ? rows - first : kDirectRows;
        const Activations block = block_of(a, first);
        const Output output = {out.out + first * out.stride, out.stride, out.add};
        switch (direct_block_rows(count)) {
            case 1: multiply_block<1>(w, block, t, count, output); break;
            case 2: multiply_block<2>(w, block, t, count, output); break;
#if defined(EXL_AVX512)
            case 4: multiply_block<4>(w, block, t, count, output); break;
            case 8: multiply_block<8>(w, block, t, count, output); break;
#endif
        }
    }
}

}  // namespace

void linear_direct(const ExlPackedLinear& w, const Activations& a, int64_t rows, Output out) {
    const int64_t min_grain = ceil_div(kBytesPerTask, w.tile_bytes);
    parallel_for(w.tiles, balanced_grain(w.tiles, min_grain), [&](int64_t first, int64_t end, int) {
        for (int64_t t = first; t < end; ++t) multiply_tile(w, a, t, rows, out);
    });
}

}  // namespace exl
