// The quantised matrix product for few rows: decoding.
//
// Bound by memory: codes are read once, from each tile's start to its end, unpacked in
// registers and multiplied at once. Layout of codes: formats/packed.py; of activations:
// linear.h. Work: a thread takes runs of tiles; for a tile it keeps the sums of all its rows
// in registers.
//
// Preconditions: rows <= kDirectRows, activations in one block of direct_rows(rows).
#include "linear.h"
#include "threads.h"
#include "unpack.h"

namespace exl {
namespace {

// Bytes of codes that a claim of work is worth at least: about 2 us of memory traffic.
constexpr int64_t kBytesPerTask = 32 * 1024;

// Widths with a plane of single bits take the most instructions a byte, and the processor
// sees too little of the memory ahead: asking for it gains 10 to 25 %. The others lose as
// much by the additional instructions (measured on Zen 4).
template <int Bits>
constexpr bool kPrefetched = Bits == 3 || Bits == 5;
// Half a page, about 100 ns of decoding. Beyond the end of the codes it asks in vain.
constexpr int kPrefetchBytes = 2048;

struct Tile {
    const uint8_t* codes;
    const uint16_t* scales;
    const uint8_t* zeros;
};

EXL_INLINE I32x16 zero_points(const uint8_t* zeros, int group, int bits) {
    return zeros ? load_bytes(zeros + group * kTileColumns)
                 : broadcast(static_cast<int32_t>(1 << (bits - 1)));
}

// Adds one span of one tile to integer sums. With few rows several sums per row run side by
// side, because a dot product's result takes 4 to 5 cycles and one can start every cycle.
template <int Bits, int Rows>
EXL_INLINE void span_sums(const uint8_t* codes, const int32_t* x, int blocks, I32x16* sums) {
    constexpr int kSums = Rows * kPlanes;
    constexpr int kChains = kSums >= 4 ? 1 : 4 / kSums;
    // Indexed by constants only (`unrolled`): what a running index touches stays in memory.
    I32x16 partial[kChains][kSums];
    unrolled<kChains * kSums>([&](auto i) EXL_INLINED {
        partial[i / kSums][i % kSums] = broadcast(int32_t{0});
    });
    for (int block = 0; block < blocks; ++block) {
        if constexpr (kPrefetched<Bits>) {
            for (int i = 0; i < Bits; ++i) prefetch(codes + kPrefetchBytes + i * kRegisterBytes);
        }
        unrolled<kBlockRegisters>([&](auto j) EXL_INLINED {
            const U8x64 c = block_register<Bits, j>(codes);
            unrolled<kSums>([&](auto i) EXL_INLINED {
                I32x16& sum = partial[j % kChains][i];
                sum = dot<(Bits > 7)>(sum, c, x[j * kSums + i]);
            });
        });
        codes += Bits * kBlockBitBytes;
        x += kBlockRegisters * kSums;
    }
    unrolled<(kChains - 1) * kSums>([&](auto i) EXL_INLINED {
        partial[0][i % kSums] = partial[0][i % kSums] + partial[1 + i / kSums][i % kSums];
    });
    unrolled<Rows>([&](auto r) EXL_INLINED {
        sums[r] = sums[r] + join_planes(partial[0][kPlanes * r], partial[0][kPlanes * r + 1]);
    });
}

// Adds spans [first, end), all of Bits bits, to the sums of one tile.
template <int Bits, int Rows>
void add_spans(const Tile& tile, const Activations& a, int64_t first, int64_t end,
               F32x16* totals) {
    F32x16 running[Rows];
    unrolled<Rows>([&](auto r) EXL_INLINED { running[r] = totals[r]; });
    const int32_t* x = reinterpret_cast<const int32_t*>(a.codes);
    for (int64_t s = first; s < end; ++s) {
        const Span& span = a.spans[s];
        const I32x16 zeros = zero_points(tile.zeros, span.group, Bits);
        I32x16 sums[Rows];
        unrolled<Rows>([&](auto r) EXL_INLINED {
            sums[r] = zeros * broadcast(a.negative_sums[s * Rows + r]);
        });
        span_sums<Bits, Rows>(tile.codes + span.offset,
                              x + span.first_row / kRegisterRows * Rows * kPlanes,
                              span.rows / kBlockRows, sums);
        const F32x16 scales = load_half(tile.scales + span.group * kTileColumns);
        unrolled<Rows>([&](auto r) EXL_INLINED {
            const F32x16 scale = scales * broadcast(a.scales[s * Rows + r]);
            running[r] = fma(to_float(sums[r]), scale, running[r]);
        });
    }
    unrolled<Rows>([&](auto r) EXL_INLINED { totals[r] = running[r]; });
}

template <int Rows>
void multiply_tile(const ExlPackedLinear& w, const Activations& a, int64_t t, int64_t rows,
                   const Output& out) {
    const int64_t table = t * w.num_groups * kTileColumns;
    const Tile tile = {w.codes + t * w.tile_bytes, w.scales + table,
                       w.zeros ? w.zeros + table : nullptr};
    F32x16 totals[Rows];
    for (int r = 0; r < Rows; ++r) totals[r] = broadcast(0.0f);
    for (int64_t first = 0; first < a.num_spans;) {
        const int bits = a.spans[first].bits;
        int64_t end = first + 1;
        while (end < a.num_spans && a.spans[end].bits == bits) ++end;
        with_bits(bits, [&](auto b) EXL_INLINED { add_spans<b, Rows>(tile, a, first, end, totals); });
        first = end;
    }
    const int64_t column = t * kTileColumns;
    const float* bias = w.bias ? w.bias + column : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
        finish(totals[r], bias, out.out + r * out.stride + column, w.out_features - column,
               out.add);
    }
}

template <int Rows>
void multiply(const ExlPackedLinear& w, const Activations& a, int64_t rows, const Output& out) {
    const int64_t least = (kBytesPerTask + w.tile_bytes - 1) / w.tile_bytes;
    parallel_for(w.tiles, balanced_grain(w.tiles, least), [&](int64_t first, int64_t end, int) {
        for (int64_t t = first; t < end; ++t) multiply_tile<Rows>(w, a, t, rows, out);
    });
}

}  // namespace

void linear_direct(const ExlPackedLinear& w, const Activations& a, int64_t rows, Output out) {
    switch (direct_rows(rows)) {
        case 1: return multiply<1>(w, a, rows, out);
        case 2: return multiply<2>(w, a, rows, out);
#if defined(EXL_AVX512)
        case 4: return multiply<4>(w, a, rows, out);
        case 8: return multiply<8>(w, a, rows, out);
#endif
    }
}

}  // namespace exl
