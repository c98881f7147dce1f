// Attention of few query rows over a long cache: what decoding is, with or without drafts.
//
// Reading the cache once, at the memory's speed, is all that matters. A block takes one key/
// value head of one sequence, up to 8 query rows that share it (query heads x rows), and one
// split of the tokens; its warps take tiles of kTile tokens in turn, each through a ring of
// its own in shared memory, filled ahead by asynchronous copies. Nothing unpacked is stored.
//
// Keys stay integers: a group of 32 elements of 16 tokens is the A operand of m16n8k32, and
// queries, as two bytes of 15 bits of their row's largest magnitude, are B. So scores are as
// exact as the cache, however large keys are; a group's sum meets its scale in float32.
// Values times their scales become float16, A of m16n8k16 (16 elements x 16 tokens), and
// weights are B. Both unpack without a sum across lanes, since a product does not care in
// which order its elements stand.
//
// Splits: whole pages, at fixed places of the sequence. How many pages a split has depends on
// how much its row sees, at most `most_splits` of them, so the launch is the same for every
// length. A row's softmax runs over tiles in a fixed order, tiles that it does not see change
// nothing, and a call whose rows differ in the pages of their splits treats them one after the
// other: a row's result is the same bits alone, in a batch, or among drafts.
//
// Where a row has several splits, each leaves its sums in `partials`, float32
// [sequences of the launch, max_rows, num_heads, slots, head_dim + 2] (sums, largest, total);
// the last block of a key/value head to arrive, which a counter tells, adds them in order.
//
// Grid: splits, kv_heads * groups of 8 rows, sequences. Shared memory: queries as B fragments
// [kHeadDim / 32][32 lanes] of 16 bytes, rows float32 [8, kHeadDim], RowData, then per warp
// `units` slots of a tile's keys or values; merging warps reuses those.
#include "cuda/attention.cuh"

namespace exl {

constexpr int kThreads = 256;
constexpr int kRows = 8;  // columns of an mma
// Queries as integers: 128 * high + low, high in -127..127 and low in -64..63.
constexpr float kQueryUnit = 127.0f * 128.0f;
// An int32 sum below 2^22 that begins here is, as bits, the float32 kSumBase + sum.
constexpr int32_t kSumStart = 0x4B400000;
constexpr float kSumBase = 12582912.0f;
constexpr uint32_t kSigned = 0x80808080u;

struct DecodeLaunch {
    float* partials;
    int32_t* counters;  // zero before and after
    int32_t first_sequence;
    int32_t max_rows;     // of a sequence
    int32_t slots;        // partials of a row
    int32_t most_splits;  // of a row, not counting one more that a window may touch
    int32_t units;        // slots of a warp's ring: 1, 2 or 4
};

struct RowData {
    float factors[kRows];    // on scores
    int32_t positions[kRows];  // -1: no such row
    float largest[kRows];
    float totals[kRows];
    int32_t is_last;
    int32_t padding[3];
};

// Where the tokens that a row sees are cut.
struct Splits {
    int pages;  // of one
    int first;  // its number, counted from the sequence's beginning
    int count;
    __device__ __forceinline__ Splits(int position, int window, int most_splits) {
        const int low = first_seen(position, window);
        const int seen = (position - low + kPageLen) / kPageLen;
        pages = (seen + most_splits - 1) / most_splits;
        first = low / kPageLen / pages;
        count = position / kPageLen / pages - first + 1;
    }
};

// The rows of a block: `first_row`.. of the sequence's rows x the heads that share a kv head.
struct RowGroup {
    int sequence, kv_head, sharing;
    int first_row, count;
    int past, q_first;
    __device__ __forceinline__ RowGroup(const AttentionCall& call, int first_sequence) {
        const int num_kv_heads = static_cast<int>(call.layer.num_kv_heads);
        const int groups = gridDim.y / num_kv_heads;
        sequence = first_sequence + blockIdx.z;
        kv_head = blockIdx.y / groups;
        sharing = static_cast<int>(call.shape.num_heads) / num_kv_heads;
        q_first = call.batch.q_start[sequence];
        past = call.batch.past_len[sequence];
        const int q_len = call.batch.q_start[sequence + 1] - q_first;
        first_row = blockIdx.y % groups * kRows;
        count = q_len > kDecodeRows ? 0 : min(kRows, q_len * sharing - first_row);
    }
    __device__ __forceinline__ int token(int row) const { return (first_row + row) / sharing; }
    __device__ __forceinline__ int position(int row) const { return past + token(row); }
    __device__ __forceinline__ int head(int row) const {
        return kv_head * sharing + (first_row + row) % sharing;
    }
};

// A block's shared memory.
template <int kHeadDim>
struct Memory {
    uint4* queries;  // high bytes of a lane's eight elements, then their low bytes
    float* rows;
    RowData* data;
    uint8_t* ring;
    __device__ __forceinline__ explicit Memory(char* memory) {
        queries = reinterpret_cast<uint4*>(memory);
        rows = reinterpret_cast<float*>(memory + kHeadDim / kGroup * 32 * sizeof(uint4));
        data = reinterpret_cast<RowData*>(rows + kRows * kHeadDim);
        ring = reinterpret_cast<uint8_t*>(data + 1);
    }
};

// What an integer product with a key is worth.
__device__ __forceinline__ float key_unit(int bits) {
    return 1.0f / (kQueryUnit * (is_quantized(bits) ? 128.0f : kBlockUnit));
}

// Four elements as high and low bytes.
__device__ __forceinline__ uint2 query_bytes(const float (&x)[4]) {
    uint32_t high = 0, low = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int number = round_int(x[i] * kQueryUnit);
        const int upper = (number + 64) >> 7;
        high |= static_cast<uint32_t>(upper & 255) << (8 * i);
        low |= static_cast<uint32_t>((number - 128 * upper) & 255) << (8 * i);
    }
    return make_uint2(high, low);
}

// Rows of the group whose splits have `pages` pages become B fragments; the others zeros.
template <int kHeadDim>
__device__ void stage_queries(const AttentionCall& call, const DecodeLaunch& launch,
                              const RowGroup& group, int pages, const Memory<kHeadDim>& memory) {
    const int warps = static_cast<int>(blockDim.x) / 32;
    const int window = static_cast<int>(call.shape.window);
    for (int row = warp_id(); row < kRows; row += warps) {
        float x[kHeadDim / 32] = {};
        float largest = 0.0f;
        const bool active = row < group.count &&
                            Splits(group.position(row), window, launch.most_splits).pages == pages;
        if (active) {
            load_query(call, group.q_first + group.token(row), group.head(row), x);
            largest = largest_of_warp(x);
        }
        const float inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) {
            memory.rows[row * kHeadDim + lane_id() + 32 * i] = x[i] * inverse;
        }
        if (lane_id() == 0) {
            const Softening soften(call.shape);
            memory.data->factors[row] = largest * soften.factor * key_unit(call.layer.k.bits);
            memory.data->positions[row] = active ? group.position(row) : -1;
        }
    }
    block_sync();  // rows are read by all
    const int head_dim = static_cast<int>(call.layer.head_dim);
    for (int item = threadIdx.x; item < kHeadDim / kGroup * 32; item += blockDim.x) {
        const int lane = item % 32, unit = item / 32 * 2 + lane % 4 / 2;
        const float* row = memory.rows + lane / 4 * kHeadDim;
        float x[2][4] = {};
        for (int i = 0; i < 8 && unit * kUnit < head_dim; ++i) {
            x[i / 4][i % 4] =
                row[element_of(call.layer.k.bits, head_dim, unit, lane % 2 * 8 + i)];
        }
        const uint2 first = query_bytes(x[0]), second = query_bytes(x[1]);
        memory.queries[item] = make_uint4(first.x, second.x, first.y, second.y);
    }
    block_sync();  // fragments are read by all
}

// A tile in shared memory.
struct Tile {
    const uint8_t* codes;
    const uint16_t* scales;
    TileBytes bytes;
    int head_dim;
    __device__ __forceinline__ const uint8_t* row(int token) const {
        return codes + token * bytes.codes;
    }
    __device__ __forceinline__ const uint16_t* scales_of(int token) const {
        return scales + token * bytes.groups;
    }
};

// A group's integer products of 16 tokens with the queries' high and low bytes.
struct Products {
    int32_t high[4], low[4];
    __device__ __forceinline__ explicit Products(int32_t start) {
#pragma unroll
        for (int i = 0; i < 4; ++i) high[i] = low[i] = start;
    }
};

// Lane (g, t) has eight elements of a group of tokens g and g + 8: half t % 2 of unit t / 2.
// d[0], d[1] are token g, rows 2t and 2t + 1; d[2], d[3] token g + 8.
template <int kBits>
__device__ __forceinline__ void score_group(const Tile& tile, int token, int group,
                                            const uint4& query, float (&d)[4]) {
    const unsigned lane = lane_id();
    const int unit = 2 * group + static_cast<int>(lane % 4 / 2), half = lane % 2;
    uint32_t upper[2] = {}, lower[2] = {};
    const uint32_t upper_scale = tile.scales_of(token)[group];
    const uint32_t lower_scale = tile.scales_of(token + 8)[group];
    if (unit * kUnit < tile.head_dim) {
        unpack_half_unit<kBits, kSigned>(tile.row(token), tile.head_dim, unit, half,
                                         Codebook<kSigned>(upper_scale), upper);
        unpack_half_unit<kBits, kSigned>(tile.row(token + 8), tile.head_dim, unit, half,
                                         Codebook<kSigned>(lower_scale), lower);
    }
    Products products(kSumStart);
    const uint32_t a[4] = {upper[0], lower[0], upper[1], lower[1]};
    const uint32_t high[2] = {query.x, query.y}, low[2] = {query.z, query.w};
    mma_s8s8_16x8x32(products.high, a, high);
    mma_s8s8_16x8x32(products.low, a, low);
    const float scales[2] = {half_to_float(static_cast<uint16_t>(upper_scale)),
                             half_to_float(static_cast<uint16_t>(lower_scale))};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float high_sum = bits_float(static_cast<uint32_t>(products.high[i])) - kSumBase;
        const float low_sum = bits_float(static_cast<uint32_t>(products.low[i])) - kSumBase;
        d[i] = fmaf(scales[i / 2], fmaf(high_sum, 128.0f, low_sum), d[i]);
    }
}

// The same of 16 bits: 256 * (signed) high byte + (unsigned) low byte. The first two lanes of
// a token have the codes that hold the scale.
__device__ __forceinline__ void score_block(const Tile& tile, int token, int group,
                                            const uint4& query, float (&d)[4]) {
    const unsigned lane = lane_id();
    const bool exists = group * kGroup + static_cast<int>(lane % 4) * 8 < tile.head_dim;
    uint32_t high_bytes[4] = {}, low_bytes[4] = {};
    float scales[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint4 c = make_uint4(0, 0, 0, 0);
        if (exists) {
            c = *reinterpret_cast<const uint4*>(tile.row(token + 8 * i) +
                                                group * (kGroup * 2) + lane % 4 * 16);
        }
        high_bytes[i] = byte_perm(c.x, c.y, 0x7531);
        high_bytes[i + 2] = byte_perm(c.z, c.w, 0x7531);
        low_bytes[i] = byte_perm(c.x, c.y, 0x6420);
        low_bytes[i + 2] = byte_perm(c.z, c.w, 0x6420);
        const uint32_t pairs = (c.x & 0x10001u) | (c.y & 0x10001u) << 2 |
                               (c.z & 0x10001u) << 4 | (c.w & 0x10001u) << 6;
        const uint32_t bits = (pairs | pairs >> 15) & 255u;
        const uint32_t scale = shfl(bits, lane & ~3u) | shfl(bits, (lane & ~3u) | 1u) << 8;
        scales[i] = half_to_float(static_cast<uint16_t>(scale));
    }
    Products upper(0), lower(0);
    const uint32_t high[2] = {query.x, query.y}, low[2] = {query.z, query.w};
    mma_s8s8_16x8x32(upper.high, high_bytes, high);
    mma_s8s8_16x8x32(upper.low, high_bytes, low);
    mma_u8s8_16x8x32(lower.high, low_bytes, high);
    mma_u8s8_16x8x32(lower.low, low_bytes, low);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float high_sum = static_cast<float>(upper.high[i] * 256 + lower.high[i]);
        const float low_sum = static_cast<float>(upper.low[i] * 256 + lower.low[i]);
        d[i] = fmaf(scales[i / 2], fmaf(high_sum, 128.0f, low_sum), d[i]);
    }
}

// Adds the scores of 16 tokens from first_token on.
template <int kHeadDim, int kBits>
__device__ __forceinline__ void score_tokens(const Tile& tile, int first_token,
                                             const uint4* queries, float (&d)[4]) {
    const int token = first_token + lane_id() / 4;
#pragma unroll
    for (int group = 0; group < kHeadDim / kGroup; ++group) {
        if (group * kGroup >= tile.head_dim) break;
        const uint4 query = queries[group * 32 + lane_id()];
        if constexpr (kBits == 16) {
            score_block(tile, token, group, query, d);
        } else {
            score_group<kBits>(tile, token, group, query, d);
        }
    }
}

// Four tokens' values of a unit as float16, zeros for tokens that are not there.
template <int kBits>
struct TokenScales {
    uint32_t first, second;  // of tokens 0 and 1, 2 and 3
    __device__ __forceinline__ TokenScales(const uint32_t (&scales)[4])
        : first(scales[0] | scales[1] << 16), second(scales[2] | scales[3] << 16) {}
};

// o[i] += weights x values of half a unit of 16 tokens, i counting pairs of elements.
template <int kBits>
__device__ __forceinline__ void weigh_half_unit(const Tile& tile, const int (&tokens)[4],
                                                const uint32_t (&scales)[4], int unit, int half,
                                                const uint32_t (&weights)[2], float (*o)[4]) {
    const TokenScales<kBits> pairs(scales);
    uint32_t levels[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        unpack_half_unit<kBits>(tile.row(tokens[i]), tile.head_dim, unit, half,
                                Codebook<>(scales[i]), levels[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // Elements 2i and 2i + 1: the bytes of two tokens side by side.
        const uint32_t selector = i % 2 ? 0x7362 : 0x5140;
        const uint32_t x = byte_perm(levels[0][i / 2], levels[1][i / 2], selector);
        const uint32_t y = byte_perm(levels[2][i / 2], levels[3][i / 2], selector);
        const uint32_t a[4] = {
            h2_mul(low_levels(x), pairs.first), h2_mul(high_levels(x), pairs.first),
            h2_mul(low_levels(y), pairs.second), h2_mul(high_levels(y), pairs.second)};
        mma_f16_16x8x16(o[i], a, weights);
    }
}

// The same of 16 bits; factors are scales / kBlockUnit.
__device__ __forceinline__ void weigh_half_unit(const Tile& tile, const int (&tokens)[4],
                                                const float (&factors)[4], int unit, int half,
                                                const uint32_t (&weights)[2], float (*o)[4]) {
    uint4 codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        codes[i] = *reinterpret_cast<const uint4*>(tile.row(tokens[i]) + unit * (kUnit * 2) +
                                                   half * kUnit);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 x[4];
#pragma unroll
        for (int token = 0; token < 4; ++token) {
            const uint4& c = codes[token];
            const uint32_t word = i == 0 ? c.x : i == 1 ? c.y : i == 2 ? c.z : c.w;
            x[token] = block_values(word, factors[token]);
        }
        const uint32_t a[4] = {floats_to_half2(x[0].x, x[1].x), floats_to_half2(x[0].y, x[1].y),
                               floats_to_half2(x[2].x, x[3].x), floats_to_half2(x[2].y, x[3].y)};
        mma_f16_16x8x16(o[i], a, weights);
    }
}

// Adds 16 tokens' values times their weights (B fragments). Lane (g, t) has tokens 2t, 2t + 1,
// 2t + 8, 2t + 9 and half units g * kHalves..; tokens from `end` on were never written.
template <int kHeadDim, int kBits>
__device__ __forceinline__ void weigh_tokens(const Tile& tile, int first_token, int end,
                                             const uint32_t (&weights)[2],
                                             float (&o)[kHeadDim / 16][4]) {
    constexpr int kHalves = kHeadDim / 64;
    const int g = lane_id() / 4, token = first_token + lane_id() % 4 * 2;
    const int tokens[4] = {token, token + 1, token + 8, token + 9};
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
        const int unit = (g * kHalves + h) / 2, half = (g * kHalves + h) % 2;
        const bool exists = unit * kUnit < tile.head_dim;
        const int known = exists ? unit : 0;
        if constexpr (kBits == 16) {
            float factors[4];
            for (int i = 0; i < 4; ++i) {
                const bool valid = exists && tokens[i] < end;
                factors[i] = valid ? block_factor(tile.row(tokens[i]), known) : 0.0f;
            }
            weigh_half_unit(tile, tokens, factors, known, half, weights, o + 4 * h);
        } else {
            uint32_t scales[4];
            for (int i = 0; i < 4; ++i) {
                const bool valid = exists && tokens[i] < end;
                scales[i] = valid ? tile.scales_of(tokens[i])[known / 2] : 0;
            }
            weigh_half_unit<kBits>(tile, tokens, scales, known, half, weights, o + 4 * h);
        }
    }
}

// What a warp's rows have gathered; lane (g, t) has rows 2t and 2t + 1, totals of its own
// tokens alone.
template <int kHeadDim>
struct Gathered {
    float o[kHeadDim / 16][4];
    float largest[2], totals[2];

    __device__ __forceinline__ Gathered() {
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
        largest[0] = largest[1] = -infinity();
        totals[0] = totals[1] = 0.0f;
    }
    __device__ __forceinline__ void scale(const float (&factors)[2]) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) o[i][j] *= factors[j % 2];
        }
        totals[0] *= factors[0];
        totals[1] *= factors[1];
    }
    // Brings both rows to new maxima, which are no less than the old ones.
    __device__ __forceinline__ void raise(const float (&to)[2]) {
        const bool same = to[0] == largest[0] && to[1] == largest[1];
        if (ballot(!same) == 0) return;  // factors would be 1
        float factors[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            factors[n] = exp2_fast(largest[n] - finite_base(to[n]));
            largest[n] = to[n];
        }
        scale(factors);
    }
};

// Scores of a tile into weights, as B fragments of its groups of 16 tokens.
template <int kHeadDim, int kTile>
__device__ __forceinline__ void weights_of(float (&scores)[kTile / 16][4], int first_token,
                                           const Softening& soften, int window,
                                           const RowData& data, Gathered<kHeadDim>& gathered,
                                           uint32_t (&weights)[kTile / 16][2]) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    float largest[2] = {gathered.largest[0], gathered.largest[1]};
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int row = 2 * t + j % 2, token = first_token + i * 16 + j / 2 * 8 + g;
            const float score = soften(scores[i][j] * data.factors[row]);
            scores[i][j] = sees(data.positions[row], token, window) ? score : -infinity();
            largest[j % 2] = fmaxf(largest[j % 2], scores[i][j]);
        }
    }
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
        largest[0] = fmaxf(largest[0], shfl_xor(largest[0], mask));
        largest[1] = fmaxf(largest[1], shfl_xor(largest[1], mask));
    }
    gathered.raise(largest);
    const float base[2] = {finite_base(largest[0]), finite_base(largest[1])};
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            scores[i][j] = exp2_fast(scores[i][j] - base[j % 2]);
            gathered.totals[j % 2] += scores[i][j];
        }
        weights[i][0] = transpose_matrix(floats_to_half2(scores[i][0], scores[i][1]));
        weights[i][1] = transpose_matrix(floats_to_half2(scores[i][2], scores[i][3]));
    }
}

// A warp's way through its tiles: keys and values in turn, `units` copies ahead.
template <int kTile>
struct Ring {
    const AttentionCall& call;
    const RowGroup& group;
    TileBytes k_bytes, v_bytes;
    uint8_t* memory;
    int units, slot_bytes, first_tile, step, count;  // count: tiles of this warp

    __device__ __forceinline__ Ring(const AttentionCall& call, const RowGroup& group, int units,
                                    uint8_t* rings)
        : call(call), group(group),
          k_bytes(call.layer.k.bits, static_cast<int>(call.layer.head_dim)),
          v_bytes(call.layer.v.bits, static_cast<int>(call.layer.head_dim)), units(units) {
        slot_bytes = kTile * max(k_bytes.codes + 2 * k_bytes.groups,
                                 v_bytes.codes + 2 * v_bytes.groups);
        memory = rings + warp_id() * units * slot_bytes;
    }
    // Tiles of [first, end) tokens; which warp has which depends on their place alone.
    __device__ __forceinline__ void begin(int first, int end) {
        step = static_cast<int>(blockDim.x) / 32;
        const int tiles_begin = first / kTile, tiles_end = (end + kTile - 1) / kTile;
        const int offset = (warp_id() - tiles_begin % step + step) % step;
        first_tile = tiles_begin + offset;
        count = first_tile < tiles_end ? (tiles_end - first_tile + step - 1) / step : 0;
        for (int unit = 0; unit < units; ++unit) issue(unit);
    }
    __device__ __forceinline__ int token(int tile) const {
        return (first_tile + tile * step) * kTile;
    }
    __device__ __forceinline__ uint8_t* slot(int unit) const {
        return memory + (unit & (units - 1)) * slot_bytes;
    }
    __device__ __forceinline__ void issue(int unit) {
        if (unit < 2 * count) {
            const int64_t place = place_of(call.batch, group.sequence, call.layer.num_kv_heads,
                                           group.kv_head, token(unit / 2));
            const bool values = unit % 2;
            copy_tile(values ? call.layer.v : call.layer.k, values ? v_bytes : k_bytes, place,
                      kTile, slot(unit), lane_id(), 32);
        }
        copy_async_commit();
    }
    __device__ __forceinline__ Tile wait(int unit) const {
        if (units == 4) {
            copy_async_wait<3>();
        } else if (units == 2) {
            copy_async_wait<1>();
        } else {
            copy_async_wait<0>();
        }
        warp_sync();  // what other lanes copied is there
        const TileBytes& bytes = unit % 2 ? v_bytes : k_bytes;
        const uint8_t* codes = slot(unit);
        return {codes, reinterpret_cast<const uint16_t*>(codes + kTile * bytes.codes), bytes,
                static_cast<int>(call.layer.head_dim)};
    }
    __device__ __forceinline__ void release(int unit) {
        warp_sync();  // all lanes are done with it
        issue(unit + units);
    }
};

template <int kHeadDim, int kTile, int kBits>
__device__ __forceinline__ void score_tile(const Tile& tile, const uint4* queries,
                                           float (&scores)[kTile / 16][4]) {
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
        scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = 0.0f;
        score_tokens<kHeadDim, kBits>(tile, i * 16, queries, scores[i]);
    }
}
template <int kHeadDim, int kTile, int kBits>
__device__ __forceinline__ void weigh_tile(const Tile& tile, int end,
                                           const uint32_t (&weights)[kTile / 16][2],
                                           float (&o)[kHeadDim / 16][4]) {
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
        weigh_tokens<kHeadDim, kBits>(tile, i * 16, end, weights[i], o);
    }
}

// A warp's tiles of its ring. total: tokens of the sequence, all that was ever written.
template <int kHeadDim, int kTile>
__device__ __forceinline__ void attend_tiles(const AttentionCall& call, Ring<kTile>& ring,
                                             int total, const Memory<kHeadDim>& memory,
                                             Gathered<kHeadDim>& gathered) {
    const Softening soften(call.shape);
    const int window = static_cast<int>(call.shape.window);
    for (int tile = 0; tile < ring.count; ++tile) {
        float scores[kTile / 16][4];
        uint32_t weights[kTile / 16][2];
        const Tile keys = ring.wait(2 * tile);
        switch (call.layer.k.bits) {
            case 4: score_tile<kHeadDim, kTile, 4>(keys, memory.queries, scores); break;
            case 6: score_tile<kHeadDim, kTile, 6>(keys, memory.queries, scores); break;
            case 8: score_tile<kHeadDim, kTile, 8>(keys, memory.queries, scores); break;
            default: score_tile<kHeadDim, kTile, 16>(keys, memory.queries, scores);
        }
        ring.release(2 * tile);
        weights_of<kHeadDim, kTile>(scores, ring.token(tile), soften, window, *memory.data,
                                    gathered, weights);
        const Tile values = ring.wait(2 * tile + 1);
        const int end = total - ring.token(tile);
        switch (call.layer.v.bits) {
            case 4: weigh_tile<kHeadDim, kTile, 4>(values, end, weights, gathered.o); break;
            case 6: weigh_tile<kHeadDim, kTile, 6>(values, end, weights, gathered.o); break;
            case 8: weigh_tile<kHeadDim, kTile, 8>(values, end, weights, gathered.o); break;
            default: weigh_tile<kHeadDim, kTile, 16>(values, end, weights, gathered.o);
        }
        ring.release(2 * tile + 1);
    }
    copy_async_wait<0>();
}

// Adds what warps gathered, in a tree whose order is that of the warps; warp 0 has the result.
template <int kHeadDim>
__device__ __forceinline__ void merge_warps(Gathered<kHeadDim>& mine, float* memory) {
    constexpr int kFloats = kHeadDim / 16 * 4 + 4;
    const int warps = static_cast<int>(blockDim.x) / 32, warp = warp_id();
    for (int step = 1; step < warps; step *= 2) {
        float* slot = memory + warp / (2 * step) * kFloats * 32 + lane_id();
        block_sync();  // rings, or what the last round wrote, are no longer read
        if (warp % (2 * step) == step) {
#pragma unroll
            for (int i = 0; i < kHeadDim / 4; ++i) slot[i * 32] = mine.o[i / 4][i % 4];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                slot[(kFloats - 4 + n) * 32] = mine.largest[n];
                slot[(kFloats - 2 + n) * 32] = mine.totals[n];
            }
        }
        block_sync();  // slots are written
        if (warp % (2 * step) == 0) {
            float largest[2], theirs[2];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const float other = slot[(kFloats - 4 + n) * 32];
                largest[n] = fmaxf(mine.largest[n], other);
                theirs[n] = exp2_fast(other - finite_base(largest[n]));
            }
            mine.raise(largest);
#pragma unroll
            for (int i = 0; i < kHeadDim / 4; ++i) {
                mine.o[i / 4][i % 4] = fmaf(slot[i * 32], theirs[i % 2], mine.o[i / 4][i % 4]);
            }
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                mine.totals[n] = fmaf(slot[(kFloats - 2 + n) * 32], theirs[n], mine.totals[n]);
            }
        }
    }
}

// Warp 0's fragments become rows in shared memory.
template <int kHeadDim>
__device__ __forceinline__ void spread_rows(const AttentionCall& call,
                                            Gathered<kHeadDim>& gathered,
                                            const Memory<kHeadDim>& memory) {
    constexpr int kHalves = kHeadDim / 64;
    const int g = lane_id() / 4, t = lane_id() % 4;
    const int head_dim = static_cast<int>(call.layer.head_dim);
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
        gathered.totals[0] += shfl_xor(gathered.totals[0], mask);
        gathered.totals[1] += shfl_xor(gathered.totals[1], mask);
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
        const int half = g * kHalves + i / 4;
        if (half / 2 * kUnit >= head_dim) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int place = half % 2 * 8 + i % 4 * 2 + j / 2;
            const int element = element_of(call.layer.v.bits, head_dim, half / 2, place);
            memory.rows[(2 * t + j % 2) * kHeadDim + element] = gathered.o[i][j];
        }
    }
    if (g == 0) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            memory.data->largest[2 * t + n] = gathered.largest[n];
            memory.data->totals[2 * t + n] = gathered.totals[n];
        }
    }
}

// Where a row's partials begin.
__device__ __forceinline__ float* partials_of(const AttentionCall& call,
                                              const DecodeLaunch& launch, const RowGroup& group,
                                              int row) {
    const int64_t index = (static_cast<int64_t>(blockIdx.z) * launch.max_rows + group.token(row)) *
                              call.shape.num_heads + group.head(row);
    return launch.partials + index * launch.slots * (call.layer.head_dim + 2);
}

// Rows of this split to where they belong: to `out` where it is their only one.
template <int kHeadDim>
__device__ void leave_rows(const AttentionCall& call, const DecodeLaunch& launch,
                           const RowGroup& group, int split, const Memory<kHeadDim>& memory) {
    const int warps = static_cast<int>(blockDim.x) / 32, lane = lane_id();
    const int head_dim = static_cast<int>(call.layer.head_dim);
    for (int row = warp_id(); row < group.count; row += warps) {
        const int position = memory.data->positions[row];
        if (position < 0) continue;
        const Splits splits(position, static_cast<int>(call.shape.window), launch.most_splits);
        const int slot = split - splits.first;
        if (slot < 0 || slot >= splits.count) continue;
        float x[kHeadDim / 32];
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) {
            const int element = lane + 32 * i;
            x[i] = element < head_dim ? memory.rows[row * kHeadDim + element] : 0.0f;
        }
        const float largest = memory.data->largest[row], total = memory.data->totals[row];
        if (splits.count == 1) {
            store_row(call, group.q_first + group.token(row), group.head(row), x,
                      1.0f / (total * unit_factor(call.layer.v.bits)));
            continue;
        }
        float* partial = partials_of(call, launch, group, row) + slot * (head_dim + 2);
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) {
            if (lane + 32 * i < head_dim) partial[lane + 32 * i] = x[i];
        }
        if (lane == 0) {
            partial[head_dim] = largest;
            partial[head_dim + 1] = total;
        }
    }
}

// Adds a row's splits in order, by one warp.
template <int kHeadDim>
__device__ void combine_row(const AttentionCall& call, const DecodeLaunch& launch,
                            const RowGroup& group, int row, int count) {
    const int lane = lane_id(), head_dim = static_cast<int>(call.layer.head_dim);
    const float* partial = partials_of(call, launch, group, row);
    const int stride = head_dim + 2;
    float largest = -infinity();
    for (int i = lane; i < count; i += 32) {
        largest = fmaxf(largest, load_cg(partial + i * stride + head_dim));
    }
    largest = warp_max(largest);
    float x[kHeadDim / 32] = {};
    float total = 0.0f;
    for (int first = 0; first < count; first += 32) {
        float weight = 0.0f;
        if (first + lane < count) {
            const float* ends = partial + (first + lane) * stride + head_dim;
            weight = exp2_fast(load_cg(ends) - largest);
            total = fmaf(weight, load_cg(ends + 1), total);
        }
        const int here = min(32, count - first);
#pragma unroll 4
        for (int i = 0; i < here; ++i) {
            const float share = shfl(weight, i);
            const float* sums = partial + (first + i) * stride;
#pragma unroll
            for (int k = 0; k < kHeadDim / 32; ++k) {
                const int element = lane + 32 * k;
                if (element < head_dim) x[k] = fmaf(share, load_cg(sums + element), x[k]);
            }
        }
    }
    total = warp_sum(total);
    store_row(call, group.q_first + group.token(row), group.head(row), x,
              1.0f / (total * unit_factor(call.layer.v.bits)));
}

// The last block of a group of rows to come here adds their splits.
template <int kHeadDim>
__device__ void combine(const AttentionCall& call, const DecodeLaunch& launch,
                        const RowGroup& group, int arrivals, const Memory<kHeadDim>& memory) {
    int32_t* counter = launch.counters + blockIdx.z * gridDim.y + blockIdx.y;
    thread_fence();
    block_sync();  // the whole block's partials are out
    if (threadIdx.x == 0) memory.data->is_last = atomic_add(counter, 1) == arrivals - 1;
    block_sync();  // is_last is read by all
    if (!memory.data->is_last) return;
    thread_fence();
    if (threadIdx.x == 0) *counter = 0;
    const int warps = static_cast<int>(blockDim.x) / 32;
    for (int row = warp_id(); row < group.count; row += warps) {
        const Splits splits(group.position(row), static_cast<int>(call.shape.window),
                            launch.most_splits);
        if (splits.count > 1) combine_row<kHeadDim>(call, launch, group, row, splits.count);
    }
}

// The rows of a group whose splits have as many pages as those of `position`: their first
// and last splits.
struct Pass {
    int pages, first, end;  // splits
    int low, high;          // tokens
    __device__ __forceinline__ Pass(const AttentionCall& call, const DecodeLaunch& launch,
                                    const RowGroup& group, int like) {
        const int window = static_cast<int>(call.shape.window);
        pages = Splits(group.position(like), window, launch.most_splits).pages;
        first = low = 0x7FFFFFFF;
        end = high = 0;
        for (int position = group.position(0); position <= group.position(group.count - 1);
             ++position) {
            const Splits splits(position, window, launch.most_splits);
            if (splits.pages != pages) continue;
            first = min(first, splits.first);
            end = max(end, splits.first + splits.count);
            low = min(low, first_seen(position, window));
            high = position + 1;
        }
    }
};

template <int kHeadDim, int kTile>
__device__ __forceinline__ void attention_decode(const AttentionCall& call,
                                                 const DecodeLaunch& launch, char* shared) {
    const RowGroup group(call, launch.first_sequence);
    if (group.count <= 0) return;
    const Memory<kHeadDim> memory(shared);
    const int index = blockIdx.x;
    int arrivals = 0, passes = 1;
    {
        const Pass first(call, launch, group, 0), last(call, launch, group, group.count - 1);
        arrivals = max(first.end - first.first, last.end - last.first);
        if (first.pages != last.pages) passes = 2;
    }
    if (index >= arrivals) return;
    for (int i = 0; i < passes; ++i) {
        const Pass pass(call, launch, group, i == 0 ? 0 : group.count - 1);
        const int split = pass.first + index, length = pass.pages * kPageLen;
        if (split >= pass.end) continue;
        Ring<kTile> ring(call, group, launch.units, memory.ring);
        block_sync();  // the last pass's shared memory is no longer read
        ring.begin(max(split * length, pass.low), min((split + 1) * length, pass.high));
        stage_queries<kHeadDim>(call, launch, group, pass.pages, memory);
        Gathered<kHeadDim> gathered;
        attend_tiles<kHeadDim, kTile>(call, ring, pass.high, memory, gathered);
        merge_warps<kHeadDim>(gathered, reinterpret_cast<float*>(memory.ring));
        if (warp_id() == 0) spread_rows<kHeadDim>(call, gathered, memory);
        block_sync();  // rows are read by all
        leave_rows<kHeadDim>(call, launch, group, split, memory);
    }
    if (arrivals > 1) combine<kHeadDim>(call, launch, group, arrivals, memory);
}

// blocks: of a multiprocessor, which bounds the registers of a thread.
#define EXL_DECODE_KERNEL(head_dim, tile, blocks)                                              \
    extern "C" __global__ void __launch_bounds__(kThreads, blocks)                             \
        attention_decode_##head_dim##_##tile##_kernel(                                         \
            const __grid_constant__ AttentionCall call,                                        \
            const __grid_constant__ DecodeLaunch launch) {                                     \
        EXL_SHARED(char, shared);                                                              \
        attention_decode<head_dim, tile>(call, launch, shared);                                \
    }                                                                                          \
    EXL_KERNEL(attention_decode_##head_dim##_##tile##_kernel)

EXL_DECODE_KERNEL(64, 32, 2);
EXL_DECODE_KERNEL(128, 32, 2);
EXL_DECODE_KERNEL(256, 16, 1);

}  // namespace exl
