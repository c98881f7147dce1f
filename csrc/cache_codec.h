// The quantised key/value cache: constants and structs that Python and C++ share.
//
// What codes and scales mean, and in which order bytes stand, is defined in
// exl_loader/kernels/reference_codec.py; the tensors' shapes are in exl_loader/cache.py.
// kernels/ops_attention.py mirrors the structs.
#pragma once

#include <cstdint>

// Functions that CPU code and kernels share. A kernel may call only what is declared for the
// device. A table has to be local to such a function: for nvcc a namespace-scope array belongs to
// the CPU, and a kernel may use no element of it whose index is not a constant.
#if defined(__CUDACC__)
#define EXL_HOST_DEVICE __host__ __device__
#else
#define EXL_HOST_DEVICE
#endif

namespace exl {

constexpr int kPageLen = 256;  // tokens
constexpr int kGroup = 32;     // elements of a scale
constexpr int kCodeStep = 8;   // codes of a short last group are padded to this

// Levels of 4-bit codes in units of 1/128 of the scale, by the lowest bit of the scale.
constexpr int kTables = 2;
constexpr int kLevels = 16;
EXL_HOST_DEVICE constexpr int codebook_level(int table, int code) {
    constexpr int8_t kCodebooks[kTables][kLevels] = {
        {-127, -105, -88, -71, -56, -41, -26, -13, 1, 14, 27, 42, 57, 73, 91, 111},
        {-127, -99, -79, -62, -47, -32, -19, -5, 9, 23, 37, 52, 68, 86, 106, 127},
    };
    return kCodebooks[table][code];
}
constexpr float kCodebookUnit = 1.0f / 128;

// The scales that the writer tries: evenly spaced factors on a group's largest magnitude.
struct ScaleSearch {
    float first, last;
    int steps;
};
EXL_HOST_DEVICE constexpr ScaleSearch scale_search(int bits) {
    return bits == 8   ? ScaleSearch{0.99f, 1.08f, 24}
           : bits == 6 ? ScaleSearch{0.95f, 1.16f, 24}
                       : ScaleSearch{0.82f, 1.14f, 8};
}
constexpr int kRefits = 1;

// The sign that an element of a head gets before the Hadamard transform.
EXL_HOST_DEVICE constexpr bool rotation_negates(uint32_t index) {
    uint32_t mixed = index * 0x9E3779B1u;
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77u;
    return (mixed >> 16) & 1u;
}

// 16 bits, see reference_fp16.py: value = code * scale / kBlockUnit, the scale in the lowest
// bits of the first 16 codes. Elements [first, first + this) share a scale.
constexpr float kBlockUnit = 32768.0f;
constexpr float kLargestBlockCode = 32766.0f;
EXL_HOST_DEVICE constexpr int block_elements(int head_dim, int first) {
    // What is left behind a whole group may be too short for a scale of its own.
    const int left = head_dim - first;
    return left >= kGroup + 16 || left == kGroup ? kGroup : left;
}

EXL_HOST_DEVICE constexpr bool is_quantized(int bits) { return bits < 16; }
EXL_HOST_DEVICE constexpr int num_groups(int head_dim, int bits) {
    return is_quantized(bits) ? (head_dim + kGroup - 1) / kGroup : 0;
}
EXL_HOST_DEVICE constexpr int padded_codes(int elements) {
    return (elements + kCodeStep - 1) / kCodeStep * kCodeStep;
}
// Bytes of one head's codes for one token.
EXL_HOST_DEVICE constexpr int code_bytes(int head_dim, int bits) {
    return (is_quantized(bits) ? padded_codes(head_dim) : head_dim) * bits / 8;
}

}  // namespace exl

extern "C" {

// Keys or values of one layer.
struct ExlCacheHalf {
    void* codes;       // [pages, kv_heads, kPageLen, code_bytes]
    uint16_t* scales;  // float16 [pages, kv_heads, kPageLen, groups]; null where bits >= 16
    int32_t bits;      // 4, 6, 8, 16 (blocks) or 32 (float32)
};

struct ExlCacheLayer {
    ExlCacheHalf k;
    ExlCacheHalf v;
    int64_t num_kv_heads;
    int64_t head_dim;
};

// interface.Batch.
struct ExlBatch {
    const int32_t* q_start;     // [num_sequences + 1]
    const int32_t* past_len;    // [num_sequences]
    const int32_t* page_table;  // [num_sequences, max_pages]
    int64_t num_sequences;
    int64_t max_pages;
};

// key_bias.KeyBias, with a batch's frequencies.
struct ExlKeyBias {
    const int32_t* pairs;   // [kv_heads, num_pairs]: element i of a pair (i, half + i)
    const float* first;     // [kv_heads, num_pairs]: the bias of element i
    const float* second;    // the same of element half + i
    const float* inv_freq;  // [num_sequences, half]
    int64_t num_pairs;
    int64_t half;
    float rope_factor;
};

// interface.AttentionShape, apart from what ExlCacheLayer has.
struct ExlAttentionShape {
    int64_t num_heads;
    int64_t window;  // 0: all
    float scale;
    float softcap;  // 0: none
};
}
