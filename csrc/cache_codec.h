// The quantised key/value cache: constants and structs that Python and C++ share.
//
// Purpose: one definition of the cache's layout for the CPU library and the CUDA kernels. The
// reference codec in Python defines the meaning of codes and scales and the order of bytes;
// CacheLayer defines the shapes of the tensors. ctypes mirrors of the structs below have the
// same fields in the same order.
//
// Layout of one token of one head: groups of kGroup elements consecutively. A group of b-bit
// codes is stored as bit planes, the highest bits first: 8 bits as one plane, 4 bits as one
// plane, 6 bits as a plane of 4 and a plane of 2, 3 bits as a plane of 2 and a plane of 1. A plane
// of w bits with n codes has n * w / 8 bytes; byte i holds codes i, i + bytes, i + 2 * bytes, ...
// from its lowest bits on.
#pragma once

#include <cstdint>

#include "common.h"

namespace exl {

constexpr int kPageLen = 256;  // tokens
constexpr int kMaxBiasPairs = 32;  // MAX_BIAS_PAIRS in Python; a warp has one pair per lane
constexpr int kGroup = 32;     // elements that share one scale
constexpr int kCodeStep = 8;   // a short last group is padded to a multiple of this number of codes

// Codes of 4 and 3 bits have two tables of levels, in units of 1/128 of the scale. The lowest bit of
// the scale selects the table. tools/fit_codebooks.py found the levels.
EXL_HOST_DEVICE constexpr bool has_tables(int bits) { return bits <= 4; }
constexpr int kTables = 2;
EXL_HOST_DEVICE constexpr int codebook_level(int bits, int table, int code) {
    constexpr int8_t kFourBits[kTables][16] = {
        {-127, -105, -88, -71, -56, -41, -26, -13, 1, 14, 27, 42, 57, 73, 91, 111},
        {-127, -99, -79, -62, -47, -32, -19, -5, 9, 23, 37, 52, 68, 86, 106, 127},
    };
    constexpr int8_t kThreeBits[kTables][8] = {
        {-127, -87, -56, -27, 0, 28, 59, 96},
        {-127, -86, -51, -20, 10, 41, 76, 120},
    };
    return bits == 4 ? kFourBits[table][code] : kThreeBits[table][code];
}
constexpr float kCodebookUnit = 1.0f / 128;

// The scales that the writer tries: evenly spaced factors times a group's largest magnitude. The
// reference codec describes how range and steps were chosen.
struct ScaleSearch {
    float first, last;
    int steps;
};
EXL_HOST_DEVICE constexpr ScaleSearch scale_search(int bits) {
    return bits == 8   ? ScaleSearch{0.99f, 1.08f, 24}
           : bits == 6 ? ScaleSearch{0.95f, 1.16f, 24}
           : bits == 4 ? ScaleSearch{0.82f, 1.14f, 8}
                       : ScaleSearch{0.8f, 1.1f, 8};
}
constexpr int kRefits = 1;
// Elements of a key that are rounded at once before their errors are fed to the further ones.
// backends/reference/feedback.py defines this; BLOCK in Python.
constexpr int kFeedbackBlock = 4;
constexpr float kLargestHalf = 65504.0f;  // the largest finite float16
constexpr uint16_t kHalfNaN = 0x7e00;     // the scale of a group without a finite error

// Elements of one Hadamard transform: the largest power of two that divides head_dim.
EXL_HOST_DEVICE constexpr int rotation_block(int head_dim) { return head_dim & -head_dim; }

// True if an element of a head is negated before the Hadamard transform.
EXL_HOST_DEVICE constexpr bool rotation_negates(uint32_t index) {
    // Any well mixed bits would do; these multipliers are odd primes, as in common hash functions.
    uint32_t mixed = index * 0x9E3779B1u;
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77u;
    return (mixed >> 16) & 1u;
}

// Cache of 16 bits: value = code * scale / kBlockUnit, where the float16 scale is stored in the
// lowest bits of the first 16 codes. Elements [first, first + block_elements) share a scale.
constexpr float kBlockUnit = 32768.0f;         // 2^15, one more than the largest int16
constexpr float kLargestBlockCode = 32766.0f;  // stays an int16 with its lowest bit set
EXL_HOST_DEVICE constexpr int block_elements(int head_dim, int first) {
    // A remainder of fewer than 16 elements could not hold the bits of a scale of its own, so it
    // joins the group before it.
    const int left = head_dim - first;
    return left >= kGroup + 16 || left == kGroup ? kGroup : left;
}

EXL_HOST_DEVICE constexpr bool is_quantized(int bits) { return bits < 16; }
EXL_HOST_DEVICE constexpr int num_groups(int head_dim, int bits) {
    return is_quantized(bits) ? ceil_div(head_dim, kGroup) : 0;
}
EXL_HOST_DEVICE constexpr int padded_codes(int elements) {
    return round_up(elements, kCodeStep);
}
// Bytes of the codes of one head of one token.
EXL_HOST_DEVICE constexpr int code_bytes(int head_dim, int bits) {
    return (is_quantized(bits) ? padded_codes(head_dim) : head_dim) * bits / 8;
}

}  // namespace exl

extern "C" {

// The keys or the values of one layer.
struct ExlCacheHalf {
    void* codes;       // [pages, kv_heads, kPageLen, code_bytes(head_dim, bits)]
    uint16_t* scales;  // float16 [pages, kv_heads, kPageLen, num_groups]; null if bits >= 16
    int32_t bits;      // 3, 4, 6, 8, 16 (int16 codes with embedded scales) or 32 (float32)
};

// The open pages of the keys or the values of one layer (layout.py). Vectors are rotated, also
// those of 16 bits.
struct ExlOpenPages {
    ExlCacheHalf tokens;  // open pages in place of pages; codes is null if there are none
    ExlCacheHalf first;   // the first token of each sequence: [open pages, kv_heads, ...]
};

struct ExlCacheLayer {
    ExlCacheHalf k;
    ExlCacheHalf v;
    ExlOpenPages k_open;
    ExlOpenPages v_open;
    // float16 [kv_heads, head_dim, round_up(head_dim, kGroup)]: row i has the shares of element i's
    // rounding error that are added to the targets of elements of later blocks, and zeros before.
    // Null: keys are rounded element by element.
    const uint16_t* key_feedback;
    int64_t num_kv_heads;
    int64_t head_dim;
};

// The sequences of one call; mirrors Batch. Rows [q_start[s], q_start[s + 1]) belong to sequence
// s and stand at positions past_len[s] and later.
struct ExlBatch {
    const int32_t* q_start;     // [num_sequences + 1]
    const int32_t* past_len;    // [num_sequences]
    const int32_t* page_table;  // [num_sequences, max_pages]: page numbers
    const int32_t* open_pages;  // [num_sequences]; null if no layer has open pages
    int64_t num_sequences;
    int64_t max_pages;
};

// A layer's key bias with the RoPE frequencies of a batch; mirrors KeyBias.
struct ExlKeyBias {
    const int32_t* pairs;   // [kv_heads, num_pairs]: element i of a pair (i, half + i)
    const float* first;     // [kv_heads, num_pairs]: bias of element i
    const float* second;    // [kv_heads, num_pairs]: bias of element half + i
    const float* inv_freq;  // [num_sequences, half]
    int64_t num_pairs;
    int64_t half;
    float rope_factor;
};

// Mirrors AttentionShape, without the fields that ExlCacheLayer has.
struct ExlAttentionShape {
    int64_t num_heads;
    int64_t sliding_window;  // number of tokens that a row sees; 0: all
    float scale;
    float softcap;  // 0: no soft cap
};
}
