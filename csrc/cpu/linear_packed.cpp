// Entry of the quantised matrix product: cuts the scratch, quantises, multiplies.
//
// Work: rows in passes of kPassRows. Scratch of a pass, each part aligned to 64 bytes: spans,
// scales of levels, activation codes, scales, sums, then one buffer per thread. Python computes the
// same sizes when it plans the workspace.
#include <algorithm>

#include "linear.h"
#include "replay.h"
#include "scratch.h"
#include "threads.h"

namespace exl {
namespace {

// True if codes go from memory to the dot product without a buffer. AMX is faster than several
// blocks.
bool is_direct(int64_t rows) {
#if defined(EXL_AMX)
    if (amx_is_on()) return rows <= kDirectRows;
#endif
    return rows <= kMostDirectRows;
}

}  // namespace
}  // namespace exl

// out = x @ W + bias, or out += x @ W + bias if `add`.
//
// x: float32 [rows, in_features]; out: float32 [rows, out_stride]; scratch: uint8
// [scratch_bytes]. Returns 0, or -1 if the scratch is too small.
EXL_API int exl_linear(const float* x, int64_t rows, const ExlPackedLinear* w, float* out,
                       int64_t out_stride, int add, uint8_t* scratch, int64_t scratch_bytes) {
    using namespace exl;
    const int64_t max_rows = std::min<int64_t>(
        is_direct(rows) ? direct_rows(rows) : rows, kPassRows);
    int64_t blocks = 0;
    for (int64_t g = 0; g < w->num_groups; ++g) {
        blocks += ceil_div(w->groups[g].rows, kBlockRows);
    }
    ScratchCutter cutter = {reinterpret_cast<uintptr_t>(scratch)};
    Span* spans = cutter.take<Span>(blocks);
    float* level_scales = cutter.take<float>(blocks * kLevels);
    Activations a = {};
    a.codes = cutter.take<int8_t>(max_rows * blocks * kBlockRows * kPlanes);
    a.scales = cutter.take<float>(max_rows * blocks);
    a.negative_sums = cutter.take<int32_t>(max_rows * blocks);
    uint8_t* buffers = reinterpret_cast<uint8_t*>(cutter.next);
    const int64_t buffers_bytes = scratch + scratch_bytes - buffers;
    const int64_t max_threads = buffers_bytes / buffered_scratch_bytes();
    if (buffers_bytes < 0 || (!is_direct(rows) && max_threads < 1)) return -1;
    a.spans = spans;
    a.num_spans = cut_spans(*w, spans, &a.stored_rows);
    a.level_scales = level_scales;
    if (w->zeros == nullptr) decode_levels(*w, spans, a.num_spans, level_scales);
    for (int64_t first = 0; first < rows; first += kPassRows) {
        const int64_t count = std::min<int64_t>(rows - first, kPassRows);
        const Output output = {out + first * out_stride, out_stride, add != 0};
        const float* source = x + first * w->in_features;
        a.tiled = false;
        if (is_direct(count)) {
            a.block_rows = kDirectRows;
            quantize(*w, source, count, direct_rows(count), a);
            linear_direct(*w, a, count, output);
#if defined(EXL_AMX)
        } else if (amx_is_on()) {
            a.block_rows = kTileRows;
            a.tiled = true;
            quantize(*w, source, count, count, a);
            linear_amx(*w, a, count, output, buffers, max_threads);
#endif
        } else {
            a.block_rows = kMicroRows;
            quantize(*w, source, count, count, a);
            linear_buffered(*w, a, count, output, buffers, max_threads);
        }
    }
    return 0;
}
EXL_REPLAYED(linear)
