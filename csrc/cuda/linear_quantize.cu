// Activations to two planes of int8 (linear_quantize.cuh), once per input of quantised matrix
// products.
//
// Work: a warp a window; grid.x windows, grid.y rows. For experts grid.y counts (row, choice)
// pairs, each with the permutation of the expert it was given.
#include "cuda/linear_quantize.cuh"

namespace {

using namespace exl;

constexpr int kQuantizeThreads = 128;

}  // namespace

// x float32 [rows, in_features]; perm int32 [in_features] or null; codes and notes as
// QuantizedRows says.
extern "C" __global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows_kernel(const float* x, const int32_t* perm, int32_t in_features,
                         uint8_t* codes, Note* notes) {
    const int window = static_cast<int>(blockIdx.x) * (kQuantizeThreads / 32) + warp_id();
    const int windows = stream_windows(in_features);
    if (window >= windows) return;
    const int64_t row = blockIdx.y;
    const float* source = x + row * in_features;
    quantize_row_window([&](int channel) { return source[channel]; }, perm, in_features, window,
                        codes + row * stream_blocks(in_features) * kBlockCodeBytes,
                        notes + row * windows);
}
EXL_KERNEL(quantize_rows_kernel);

// The same for experts: pair p is row p / pairs_per_row of x, and goes to expert experts[p] of
// `layers`. pairs_per_row is top_k where the pairs of a token share its row, 1 where each has
// a row of its own.
extern "C" __global__ void __launch_bounds__(kQuantizeThreads)
    quantize_pairs_kernel(const float* x, const StreamLayer* layers, const int32_t* experts,
                          int32_t pairs_per_row, int32_t in_features, uint8_t* codes,
                          Note* notes) {
    const int window = static_cast<int>(blockIdx.x) * (kQuantizeThreads / 32) + warp_id();
    const int windows = stream_windows(in_features);
    if (window >= windows) return;
    const int64_t pair = blockIdx.y;
    const float* source = x + pair / pairs_per_row * in_features;
    quantize_row_window([&](int channel) { return source[channel]; },
                        layers[experts[pair]].perm, in_features, window,
                        codes + pair * stream_blocks(in_features) * kBlockCodeBytes,
                        notes + pair * windows);
}
EXL_KERNEL(quantize_pairs_kernel);
