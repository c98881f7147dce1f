// Attention on the CPU: which thread attends which rows to which keys. See attention.h.
//
// Layout: queries and outputs [rows, num_heads, head_dim] float32; the cache as ExlCacheLayer.
//
// Work per thread: a sequence with one row (decoding) is cut into kv_splits. Each kv_split of a
// key/value head is a task that writes its partial to a slot; then the slots are merged. A
// sequence with more rows (prefill) is cut into blocks of rows. A task goes through all
// kv_splits of its block and head and merges as it goes, so every expanded tile serves up to
// kTaskRows rows.
//
// Scratch: a ThreadScratch for each thread, then as many slots as fit. If the slots do not
// suffice for all decoding sequences, these run in several passes.
//
// Preconditions: num_heads is a multiple of num_kv_heads; pages of all visible positions were
// written; with open pages the rows of a sequence lie in one page; the scratch holds one ThreadScratch and the slots of the longest decoding sequence.
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "cache_rotate.h"
#include "key_bias.h"
#include "replay.h"
#include "scratch.h"
#include "threads.h"

namespace exl {
namespace {

// Sequences of one decode pass; the numbers of their first slots are in an array on the stack.
constexpr int kPassSequences = 64;

struct Call {
    const ExlCacheLayer& layer;
    const ExlBatch& batch;
    const ExlAttentionShape& shape;
    const ExlKeyBias* bias;  // null: none
    const float* sinks;      // [num_heads], or null
    const float* q;
    float* out;

    int head_dim() const { return static_cast<int>(layer.head_dim); }
    int stride() const { return value_stride(head_dim()); }
    // Number of query heads that share one key/value head.
    int64_t heads_per_kv() const { return shape.num_heads / layer.num_kv_heads; }
    int64_t tokens_per_task() const {
        return heads_per_kv() < kTaskRows ? kTaskRows / heads_per_kv() : 1;
    }
    int64_t task_rows() const { return tokens_per_task() * heads_per_kv(); }
    int32_t low(int32_t position) const {
        const int64_t low = shape.sliding_window ? position + 1 - shape.sliding_window : 0;
        return low > 0 ? static_cast<int32_t>(low) : 0;
    }
    Head head(int64_t sequence, int64_t index) const {
        const int32_t* pages = batch.page_table + sequence * batch.max_pages;
        if (batch.open_pages == nullptr) return {&layer, pages, index, shape.softcap, 0, INT32_MAX};
        const int32_t first_open = batch.past_len[sequence] / kPageLen * kPageLen;
        return {&layer, pages, index, shape.softcap, batch.open_pages[sequence], first_open};
    }
};

Partial take_partial(ScratchCutter& cutter, int64_t rows, int stride) {
    return {cutter.take<float>(rows * stride), cutter.take<float>(rows * kLanes),
            cutter.take<float>(rows)};
}

// Scratch of one thread.
struct ThreadScratch {
    TileScratch tile;
    float* queries;
    int32_t* low;
    int32_t* high;
    Partial kv_split;
    Partial whole;
    uintptr_t end;

    ThreadScratch(const Call& call, uintptr_t memory) {
        const int64_t rows = call.task_rows();
        ScratchCutter cutter{memory};
        tile.keys = cutter.take<float>(int64_t{call.head_dim()} * kTileTokens);
        tile.values = cutter.take<float>(int64_t{kTileTokens} * call.stride());
        tile.scores = cutter.take<float>(rows * kTileTokens);
        queries = cutter.take<float>(rows * call.head_dim());
        low = cutter.take<int32_t>(rows);
        high = cutter.take<int32_t>(rows);
        kv_split = take_partial(cutter, rows, call.stride());
        whole = take_partial(cutter, rows, call.stride());
        end = cutter.next;
    }
};

int64_t thread_bytes(const Call& call) {
    return static_cast<int64_t>(ThreadScratch(call, 0).end);
}
int64_t slot_bytes(const Call& call) {
    ScratchCutter cutter{0};
    take_partial(cutter, call.shape.num_heads, call.stride());
    return static_cast<int64_t>(cutter.next);
}
uintptr_t address(const uint8_t* memory, int64_t offset) {
    return reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(offset);
}

// Prepares the rows of `tokens` tokens, from row `first_row` of the call and from `position` on,
// for the query heads of key/value head `head`. Order of rows: by token, then by query head.
Rows prepare_rows(const Call& call, int64_t first_row, int32_t position, int64_t tokens,
                  int64_t head, const ThreadScratch& scratch) {
    const int head_dim = call.head_dim();
    const int64_t heads_per_kv = call.heads_per_kv();
    int64_t count = 0;
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < heads_per_kv; ++h, ++count) {
            const int64_t source = (first_row + t) * call.shape.num_heads + head * heads_per_kv + h;
            const float* in = call.q + source * head_dim;
            float* out = scratch.queries + count * head_dim;
            if (is_quantized(call.layer.k.bits)) {
                rotate(in, head_dim, call.shape.scale, out);
            } else {
                for (int i = 0; i < head_dim; ++i) out[i] = in[i] * call.shape.scale;
            }
            const int32_t own_position = position + static_cast<int32_t>(t);
            scratch.low[count] = call.low(own_position);
            scratch.high[count] = own_position + 1;
        }
    }
    return {count, scratch.queries, scratch.low, scratch.high};
}

// Prepares the key bias of the rows of prepare_rows; returns null if the layer has none.
const BiasRows* prepare_bias(const Call& call, int64_t s, int64_t first_row, int64_t tokens,
                             int64_t head, BiasRows* rows) {
    if (!call.bias) return nullptr;
    begin_bias(*call.bias, s, head, rows);
    const float scale = call.shape.scale * call.bias->rope_factor;
    const int64_t heads_per_kv = call.heads_per_kv();
    for (int64_t r = 0; r < tokens * heads_per_kv; ++r) {
        const int64_t q_head = head * heads_per_kv + r % heads_per_kv;
        const int64_t source = (first_row + r / heads_per_kv) * call.shape.num_heads + q_head;
        set_bias_row(*call.bias, head, call.q + source * call.head_dim(), scale, r, rows);
    }
    return rows;
}

// Divides by the sum of weights, that of the head's sink included, rotates back and writes one head
// of one row.
void finish_row(const Call& call, const Partial& partial, int64_t row, int64_t token,
                int64_t head) {
    const int head_dim = call.head_dim();
    float* sums = partial.sums + row * call.stride();
    float* out = call.out + (token * call.shape.num_heads + head) * head_dim;
    float total = sum(load(partial.totals + row * kLanes));
    if (call.sinks != nullptr) total += std::exp(call.sinks[head] - partial.largest[row]);
    const float factor = 1.0f / total;
    if (is_quantized(call.layer.v.bits)) {
        rotate_back(sums, head_dim, factor, out);
    } else {
        for (int i = 0; i < head_dim; ++i) out[i] = sums[i] * factor;
    }
}

// ---- prefill ----

// Attends tokens [first, first + tokens) of a sequence's rows in the call, for one key/value head.
void prefill_task(const Call& call, int64_t s, int64_t first, int64_t tokens, int64_t head,
                  const ThreadScratch& scratch) {
    const int64_t first_row = call.batch.q_start[s] + first;
    const int32_t position = call.batch.past_len[s] + static_cast<int32_t>(first);
    BiasRows bias;
    Rows rows = prepare_rows(call, first_row, position, tokens, head, scratch);
    rows.bias = prepare_bias(call, s, first_row, tokens, head, &bias);
    const Head cache_head = call.head(s, head);
    const int32_t end = rows.high[rows.count - 1];
    for (int64_t r = 0; r < rows.count; ++r) scratch.whole.largest[r] = -INFINITY;
    const int32_t low = rows.low[0];
    for (int32_t split_first = low / kKvSplitTokens * kKvSplitTokens; split_first < end;
         split_first += kKvSplitTokens) {
        const int32_t split_end =
            end - split_first < kKvSplitTokens ? end : split_first + kKvSplitTokens;
        attend(cache_head, rows, split_first > low ? split_first : low, split_end, scratch.tile,
               scratch.kv_split);
        for (int64_t r = 0; r < rows.count; ++r) {
            merge_row(scratch.whole, r, scratch.kv_split, r, call.stride());
        }
    }
    const int64_t heads_per_kv = call.heads_per_kv();
    for (int64_t r = 0; r < rows.count; ++r) {
        finish_row(call, scratch.whole, r, first_row + r / heads_per_kv,
                   head * heads_per_kv + r % heads_per_kv);
    }
}

int64_t prefill_blocks(const Call& call, int64_t s) {
    const int64_t rows = call.batch.q_start[s + 1] - call.batch.q_start[s];
    if (rows <= 1) return 0;
    return ceil_div(rows, call.tokens_per_task());
}

void prefill(const Call& call, uint8_t* memory, int64_t max_threads) {
    const int64_t bytes = thread_bytes(call), heads = call.layer.num_kv_heads;
    for (int64_t s = 0; s < call.batch.num_sequences; ++s) {
        const int64_t rows = call.batch.q_start[s + 1] - call.batch.q_start[s];
        const int64_t blocks = prefill_blocks(call, s);
        parallel_for(blocks * heads, 1, [&](int64_t begin, int64_t end, int thread) {
            const ThreadScratch scratch(call, address(memory, thread * bytes));
            for (int64_t item = begin; item < end; ++item) {
                // The last block sees most keys. It is started first so that threads finish at
                // nearly the same time.
                const int64_t block = blocks - 1 - item / heads;
                const int64_t first = block * call.tokens_per_task();
                const int64_t left = rows - first;
                prefill_task(call, s, first,
                             left < call.tokens_per_task() ? left : call.tokens_per_task(),
                             item % heads, scratch);
            }
        }, max_threads);
    }
}

// ---- decoding ----

// Sequences that decode in one pass. Slots [first_slot[i], first_slot[i + 1]) belong to
// sequences[i].
struct DecodePass {
    int64_t count = 0;
    int64_t sequences[kPassSequences];
    int64_t first_slot[kPassSequences + 1] = {0};
};

int32_t first_kv_split(const Call& call, int64_t s) {
    return call.low(call.batch.past_len[s]) / kKvSplitTokens;
}
int64_t num_kv_splits(const Call& call, int64_t s) {
    return call.batch.past_len[s] / kKvSplitTokens + 1 - first_kv_split(call, s);
}

Partial slot(const Call& call, uint8_t* slots, int64_t index) {
    ScratchCutter cutter{address(slots, index * slot_bytes(call))};
    return take_partial(cutter, call.shape.num_heads, call.stride());
}

Partial rows_from(const Partial& partial, int64_t row, int stride) {
    return {partial.sums + row * stride, partial.totals + row * kLanes, partial.largest + row};
}

void decode_kv_splits(const Call& call, const DecodePass& pass, uint8_t* memory, uint8_t* slots,
                      int64_t max_threads) {
    const int64_t heads = call.layer.num_kv_heads, bytes = thread_bytes(call);
    parallel_for(pass.first_slot[pass.count] * heads, 1,
                 [&](int64_t begin, int64_t end, int thread) {
        const ThreadScratch scratch(call, address(memory, thread * bytes));
        for (int64_t item = begin; item < end; ++item) {
            const int64_t index = item / heads, head = item % heads;
            int64_t i = 0;
            while (index >= pass.first_slot[i + 1]) ++i;
            const int64_t s = pass.sequences[i];
            const int32_t position = call.batch.past_len[s];
            const int32_t row = call.batch.q_start[s];
            BiasRows bias;
            Rows rows = prepare_rows(call, row, position, 1, head, scratch);
            rows.bias = prepare_bias(call, s, row, 1, head, &bias);
            const int32_t split_first =
                (first_kv_split(call, s) + static_cast<int32_t>(index - pass.first_slot[i])) *
                kKvSplitTokens;
            const int32_t begin_token = split_first > rows.low[0] ? split_first : rows.low[0];
            const int32_t end_token = position + 1 - split_first < kKvSplitTokens
                                          ? position + 1
                                          : split_first + kKvSplitTokens;
            attend(call.head(s, head), rows, begin_token, end_token, scratch.tile,
                   rows_from(slot(call, slots, index), head * call.heads_per_kv(), call.stride()));
        }
    }, max_threads);
}

void merge_kv_splits(const Call& call, const DecodePass& pass, uint8_t* slots) {
    const int64_t heads = call.shape.num_heads;
    parallel_for(pass.count * heads, balanced_grain(pass.count * heads, call.heads_per_kv()),
                 [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t i = item / heads, head = item % heads;
            const Partial whole = slot(call, slots, pass.first_slot[i]);
            for (int64_t index = pass.first_slot[i] + 1; index < pass.first_slot[i + 1];
                 ++index) {
                merge_row(whole, head, slot(call, slots, index), head, call.stride());
            }
            finish_row(call, whole, head, call.batch.q_start[pass.sequences[i]], head);
        }
    });
}

// Number of slots that the sequence with most kv_splits needs.
int64_t min_slots(const Call& call) {
    int64_t max_slots = 0;
    for (int64_t s = 0; s < call.batch.num_sequences; ++s) {
        if (call.batch.q_start[s + 1] - call.batch.q_start[s] != 1) continue;
        max_slots = std::max(max_slots, num_kv_splits(call, s));
    }
    return max_slots;
}

void decode(const Call& call, uint8_t* memory, int64_t max_threads, uint8_t* slots,
            int64_t num_slots) {
    DecodePass pass;
    const auto flush = [&] {
        if (pass.count == 0) return;
        decode_kv_splits(call, pass, memory, slots, max_threads);
        merge_kv_splits(call, pass, slots);
        pass.count = 0;
    };
    for (int64_t s = 0; s < call.batch.num_sequences; ++s) {
        if (call.batch.q_start[s + 1] - call.batch.q_start[s] != 1) continue;
        const int64_t kv_splits = num_kv_splits(call, s);
        if (pass.count == kPassSequences || pass.first_slot[pass.count] + kv_splits > num_slots) {
            flush();
        }
        pass.sequences[pass.count] = s;
        pass.first_slot[pass.count + 1] = pass.first_slot[pass.count] + kv_splits;
        ++pass.count;
    }
    flush();
}

}  // namespace
}  // namespace exl

// Attends all rows of a batch over a layer's cache.
//
// layer, batch, shape: see cache_codec.h. key_bias: null if the layer has none. sinks: float32
// [num_heads], a logit that joins the softmax of a head's rows without a value, or null. q, out:
// float32 [rows, num_heads, head_dim], rows = batch->q_start[num_sequences]; scratch: uint8
// [scratch_bytes]. Returns 0, or 1 if the scratch is too small.
EXL_API int exl_attention(const ExlCacheLayer* layer, const ExlBatch* batch,
                          const ExlAttentionShape* shape, const ExlKeyBias* key_bias,
                          const float* sinks, const float* q, float* out, uint8_t* scratch,
                          int64_t scratch_bytes) {
    using namespace exl;
    const Call call{*layer, *batch, *shape, key_bias, sinks, q, out};
    const int64_t available_bytes = scratch_bytes - min_slots(call) * slot_bytes(call);
    if (available_bytes < thread_bytes(call)) return 1;
    const int64_t max_threads =
        std::min<int64_t>(num_threads(), available_bytes / thread_bytes(call));
    const int64_t threads_bytes = max_threads * thread_bytes(call);
    const int64_t num_slots = (scratch_bytes - threads_bytes) / slot_bytes(call);
    prefill(call, scratch, max_threads);
    decode(call, scratch, max_threads, scratch + threads_bytes, num_slots);
    return 0;
}
EXL_REPLAYED(attention)
