// Quantises activations to two planes of int8 (linear_quantize.cuh), once per input of quantised
// matrix products.
//
// Layout: input float32 rows, output as QuantizedRows (linear_layout.cuh). Work per warp: one
// row_block. Grid: x: row_blocks, y: rows, or (row, choice) pairs for experts. No shared memory.
#include "cuda/linear_quantize.cuh"

namespace {

using namespace exl;

constexpr int kQuantizeThreads = 128;

}  // namespace

// Quantises rows.
//
// x: float32 [rows, in_features]; perm: int32 [in_features] or null; codes: uint8
// [rows][block][64]; activation_scales: [rows][row_block].
extern "C" __global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows_kernel(const float* x, const int32_t* perm, int32_t in_features, uint8_t* codes,
                         ActivationScale* activation_scales) {
    const int row_block = static_cast<int>(blockIdx.x) * (kQuantizeThreads / 32) + warp_id();
    const int row_blocks = stream_row_blocks(in_features);
    if (row_block >= row_blocks) return;
    const int64_t row = blockIdx.y;
    const float* source = x + row * in_features;
    gather_and_quantize([&](int channel) { return source[channel]; }, perm, in_features, row_block,
                        codes + row * stream_blocks(in_features) * kBlockCodeBytes,
                        activation_scales + row * row_blocks);
}
EXL_KERNEL(quantize_rows_kernel);

// Quantises rows for experts: pair p is row p / pairs_per_row of x, with the permutation of expert
// experts[p]. pairs_per_row is top_k if the pairs of a token share its row, 1 if each has its own.
//
// x: float32 [rows, in_features]; layers: [experts] StreamLayer; experts: int32 [pairs]; codes:
// uint8 [pairs][block][64]; activation_scales: [pairs][row_block].
extern "C" __global__ void __launch_bounds__(kQuantizeThreads)
    quantize_pairs_kernel(const float* x, const StreamLayer* layers, const int32_t* experts,
                          int32_t pairs_per_row, int32_t in_features, uint8_t* codes,
                          ActivationScale* activation_scales) {
    const int row_block = static_cast<int>(blockIdx.x) * (kQuantizeThreads / 32) + warp_id();
    const int row_blocks = stream_row_blocks(in_features);
    if (row_block >= row_blocks) return;
    const int64_t pair = blockIdx.y;
    const float* source = x + pair / pairs_per_row * in_features;
    gather_and_quantize([&](int channel) { return source[channel]; }, layers[experts[pair]].perm,
                        in_features, row_block,
                        codes + pair * stream_blocks(in_features) * kBlockCodeBytes,
                        activation_scales + pair * row_blocks);
}
EXL_KERNEL(quantize_pairs_kernel);
