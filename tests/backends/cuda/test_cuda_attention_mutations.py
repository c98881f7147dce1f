"""Kernels of attention and of cache writing with one wrong expression each: the comparisons
must notice."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os

import pytest
import torch

from backends.cuda.test_cuda_open_pages import assert_like_reference as with_open_pages
from backends.operations.test_attention import (
    DECODE_TOLERANCE,
    FLOAT_TOLERANCE,
    TOLERANCE,
    assert_like_reference,
)
from backends.operations.test_attention_key_bias import assert_like_reference as with_bias
from backends.operations.test_attention_open_pages import filled, tensors_of
from backends.operations.test_cache_writing import (
    REFERENCE,
    bytes_of,
    written,
    written_by_the_reference,
)
from exl_loader.backends.build.toolchain import find_compiler
from support.attention_cases import SOURCES, attention_target, shape_of
from support.cache_layers import make_batch, random_rows
from support.cuda_emulation.mutation import built_from
from support.exhaustive import some_of
from support.key_feedback_cases import moments, stored_feedback
from support.key_feedback_cases import written as written_with_feedback
from support.targets import emulated_launcher

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_compiler() is None, reason="needs g++ or clang++"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a mistake may crash: it runs in a fork"),
]

ORDERS = (("forward", 0), ("reverse", 0), ("shuffled", 5))

ATTENTION = [
    ("decode_products.cuh", "lane % 4 / 2), half = lane % 2", "lane % 4 / 2), half = 0"),
    ("decode_products.cuh", "const uint32_t selector = i % 2 ? 0x7362 : 0x5140;",
     "const uint32_t selector = i % 2 ? 0x5140 : 0x7362;"),
    ("decode_products.cuh", "const int tokens[4] = {token, token + 1, token + 8, token + 9};",
     "const int tokens[4] = {token, token + 1, token + 8, token + 10};"),
    ("decode_softmax.cuh", "row = 2 * t + j % 2, token = first_token + i * 16 + j / 2 * 8 + g;",
     "row = 2 * t + j % 2, token = first_token + i * 16 + j / 2 * 8 + t;"),
    ("decode_rows.cuh", "each == 1 ? end : (end + shift) / each) - first + 1;",
     "each == 1 ? end : (end + shift) / each) - first;"),
    ("decode_rows.cuh", "min(q_len, launch.rows - first_launch_row)", "q_len"),
    ("decode_loop.cuh", "if (end < kTile) clear_tokens<kBits>(tile, end, kTile);", ""),
    ("decode_products.cuh", "high[i] = low[i] = start;", "high[i] = low[i] = 0;"),
    ("decode_softmax.cuh", "other_factors[n] = exp2_fast(other - finite_base(largest[n]));",
     "other_factors[n] = 1.0f;"),
    ("decode_rows.cuh", "atomic_add(counter, 1) == arrivals - 1;",
     "atomic_add(counter, 1) == arrivals - 2;"),
    ("decode_loop.cuh", "warp_sync();  // what other lanes copied is visible", ""),
    ("decode_products.cuh", "block_sync();  // fragments are read by all", ""),
    ("prefill_tile.cuh", "lane % 16 * kStride + lane / 16 * 8;\n    const uint16_t* key",
     "lane % 16 * kStride;\n    const uint16_t* key"),
    ("prefill_tile.cuh", "+ j % 2;\n                if (!is_visible",
     "+ j / 2;\n                if (!is_visible"),
    ("attention_prefill.cu",
     "block_sync();  // packed values have arrived; keys are no longer read", "warp_sync();"),
    ("attention_prefill.cu", "block_sync();  // keys are unpacked; packed keys are no longer read",
     "warp_sync();"),
    ("attention.cuh", "sliding_window == 0 || position - token < sliding_window",
     "sliding_window == 0 || position - token <= sliding_window"),
    ("attention.cuh", "fmaf(call.sinks[head], kLog2E, -largest)", "call.sinks[head] - largest"),
    ("decode_rows.cuh", "const float whole = with_sink(call, head, largest, total);",
     "const float whole = total;"),
    ("decode_rows.cuh", "with_sink(call, head, largest, warp_sum(total))", "warp_sum(total)"),
    ("attention_prefill.cu", "rows.head(own), sums", "rows.head(first_row), sums"),
    ("attention_generic.cu", "total = with_sink(call, head, largest, total);", ""),
    ("attention.cuh", "token <= position &&", "token < position &&"),
    ("attention.cuh", "return first + count - 1 <= low &&", "return first + count - 2 <= low &&"),
    ("attention.cuh", "high - first < sliding_window);",
     "low - first <= sliding_window);"),
    ("cache_tile.cuh", "+ byte + high * 16;", "+ byte + high * 8;"),
    ("cache_tile.cuh", "return group * kGroup + byte + high * 8;",
     "return group * kGroup + byte + high * 4;"),
    ("cache_tile.cuh", "bits | bits >> 15", "bits | bits >> 16"),
    ("cache_rotate.cuh", "lane & step ? partner - x[i]", "lane & step ? x[i] - partner"),
    ("attention_generic.cu", "if (first > 0 && head_dim - first < 16) first -= kGroup;", ""),
    ("attention_generic.cu", "fmaf(waves[2 * i], wave.x,", "fmaf(waves[i], wave.x,"),
    ("key_bias.cuh", "(kTile / 8) * 8 + item % 32 / 4;", "(kTile / 8) * 8 + item % 8;"),
    ("key_bias.cuh", "fmaf(b, cosine, -(a * sine))", "fmaf(b, cosine, a * sine)"),
    ("key_bias.cuh", "const int source = step * kStepPairs +", "const int source ="),
    ("key_bias.cuh", "x.x - rounded.x, x.y - rounded.y", "0.0f, 0.0f"),
    ("key_bias.cuh", "memory.key_factors[index] = key_factor * inverse;",
     "memory.key_factors[index] = 1.0f;"),
    ("key_bias.cuh", "ScoreTransform(call.shape).factor * call.bias.rope_factor;",
     "ScoreTransform(call.shape).factor;"),
    ("key_bias.cuh", "bias.inv_freq[sequence * bias.half +", "bias.inv_freq["),
    ("decode_products.cuh", "waves[i * 64 + 32];", "waves[i * 64];"),
    ("prefill_tile.cuh", "{key_factors[0], key_factors[8]};",
     "{key_factors[0], key_factors[0]};"),
    ("decode_rows.cuh", "(end + shift) / each", "end / each"),
    ("decode_loop.cuh", "if (begin > 0) clear_tokens<kBits>(tile, 0, begin);", ""),
    ("decode_loop.cuh", "int begin = !kOpen && first == 0 && has_open_pages(call.layer) ? 1 : 0;",
     "int begin = 0;"),
    ("decode_loop.cuh", "end = ring.is_first_token(tile) ? 1 : kTile;", "end = kTile;"),
    ("decode_loop.cuh", "pass.high, own_page > 0 && pass.low == 0);", "pass.high, false);"),
    ("decode_softmax.cuh", "unit_factor(call.layer.v.bits) / unit_factor(v_bits)", "1.0f"),
    ("cache_tile.cuh", "for (int i = lane_id(); i < bytes.groups; i += 32) {",
     "for (int i = lane_id(); i < bytes.groups - 1; i += 32) {"),
    ("cache_tile.cuh", "apart = whole ? 16 : 8;", "apart = whole ? 16 : 4;"),
    ("cache_tile.cuh", "byte_perm(low, high, 0x5140), byte_perm(low, high, 0x7362)};",
     "byte_perm(low, high, 0x7362), byte_perm(low, high, 0x5140)};"),
    ("cache_tile.cuh", "low = load_word(codes, 8) >> half;", "low = load_word(codes, 8);"),
    ("cache_tile.cuh", "low = (pairs[4] | static_cast<uint32_t>(pairs[5]) << 16) >> half;",
     "low = (pairs[4] | static_cast<uint32_t>(pairs[4]) << 16) >> half;"),
    ("cache_tile.cuh", "static_cast<uint32_t>(pairs[2] >> 1) << 16;",
     "static_cast<uint32_t>(pairs[2]) << 16;"),
    ("attention_generic.cu", "const int high_width = bits == 3 ? 2 : 4,",
     "const int high_width = 4,"),
    ("prefill_tile.cuh", "case 6: expand_open_unit<6>(row, scales, head_dim, unit, pairs); break;",
     "case 6: expand_open_unit<8>(row, scales, head_dim, unit, pairs); break;"),
    ("attention_prefill.cu", "if (!kOpen && first == 0 && open.first.codes != nullptr) {",
     "if (!kOpen && first == 64 && open.first.codes != nullptr) {"),
    ("attention_prefill.cu", "low / kTile * kTile : low / kOpenTile * kOpenTile;",
     "low / kTile * kTile : low / kTile * kOpenTile;"),
    ("attention_generic.cu", "if (token == 0) {", "if (token == 1) {"),
    ("attention.cuh", "batch.open_pages[sequence] * num_kv_heads + kv_head) * kPageLen",
     "batch.open_pages[0] * num_kv_heads + kv_head) * kPageLen"),
]

WRITING = [
    ("cache_grid.cuh", "code = value > thresholds[code + step - 1]",
     "code = value > thresholds[code + step]"),
    ("cache_write.cu", "(lane_id() + field * bytes) & 31", "(lane_id() + field * 8) & 31"),
    ("cache_write.cu", "pack_plane<1, 0>(code, stored, pack_plane<2, 1>",
     "pack_plane<1, 1>(code, stored, pack_plane<2, 0>"),
    ("cache_write.cu", "candidate % kSigned >= kSearch.steps", "candidate % 2 == 1"),
    ("cache_write.cu", "error == trial.error && other < lane", "false"),
    ("cache_write.cu", "const int code = i < 16 ?", "const int code = i < 15 ?"),
    ("cache_write.cu", "block_sync();  // signs and codebooks are complete", ""),
    ("cache_write.cu", "for (int i = 0; i < kRefits; ++i)", "for (int i = 0; i < 0; ++i)"),
    ("cache_rotate.cuh", "first = i / step * (2 * step) + i % step",
     "first = i / step * step + i % step"),
    ("cache_rotate.cuh", "block_sync();  // the next step reads what other threads wrote", ""),
    ("cache_rotate.cuh", "kPageLen + position % kPageLen", "kPageLen + position % 255"),
    ("cache_write.cu", "31 - leading_zeros(largest & (0u - largest))", "leading_zeros(largest)"),
    ("cache_write.cu", "if (position == 0) write_open_token(",
     "if (position == 1) write_open_token("),
    ("cache_write.cu", "lane_id() < elements ? static_cast<uint8_t>(code) : uint8_t{0};",
     "static_cast<uint8_t>(code);"),
]


FEEDBACK = [
    ("key_feedback.cuh", "count += threshold_of(bits, table, code) <",
     "count += threshold_of(bits, 0, code) <"),
    ("key_feedback.cuh", "own = scale.table() ? second : first;", "own = first;"),
    ("key_feedback.cuh", "const int row = block * kFeedbackBlock + i;",
     "const int row = i;"),
    ("key_feedback.cuh", "const float error = rounding.error(target[group]);",
     "const float error = rounding.error(target[0]);"),
    ("key_feedback.cuh", "ballot(own.is_finite()) == 0xFFFFFFFFu ? feedback_steps(head_dim) : 0;",
     "feedback_steps(head_dim);"),
    ("key_feedback.cuh", "warp_sync();  // the stage's rows have arrived,", "//"),
    ("key_feedback.cuh", "stage * kFeedbackRows / kGroup * kGroup && column",
     "(stage + 2) * kFeedbackRows / kGroup * kGroup && column"),
    ("cache_write.cu", "block_sync();  // targets are complete", ""),
    ("cache_write.cu", "block_sync();  // scales are complete", ""),
    ("cache_write.cu", "feedback += static_cast<int64_t>(head) * head_dim * padded;", ""),
]


def check_attention(ops):
    """Compare a few calls that together execute every line of the kernels."""
    for cache_type in ("q4", "q3", "q6", "fp16_q8", "q8_fp16"):
        batch = make_batch([600, 0, 300], [1, 50, 3])
        assert_like_reference(ops, cache_type, batch, shape_of(4, 2, 80, window=290))
        assert_like_reference(ops, cache_type, batch, shape_of(4, 2, 128), seed=3)
    assert_like_reference(ops, "fp16", make_batch([600, 0], [1, 20]), shape_of(2, 1, 72),
                          FLOAT_TOLERANCE)
    many = make_batch([1100, 30], [1, 1])
    assert_like_reference(ops, "q4", many, shape_of(2, 1, 64), DECODE_TOLERANCE)
    sinks = torch.tensor([1.0, -2.0, 4.0, 7.0])
    for head_dim, tolerance in ((128, TOLERANCE), (72, FLOAT_TOLERANCE)):
        assert_like_reference(ops, "q8", make_batch([600, 0, 90], [1, 50, 3]),
                              shape_of(4, 2, head_dim), tolerance, sinks=sinks)
    biased = make_batch([300, 0, 90], [1, 50, 3])
    for cache_type, head_dim, tolerance in (("q4", 128, TOLERANCE), ("q3", 72, FLOAT_TOLERANCE)):
        with_bias(ops, cache_type, biased, shape_of(4, 2, head_dim), 9, tolerance)
    with_bias(ops, "q8", make_batch([300, 90], [1, 3]), shape_of(4, 2, 64), 9, DECODE_TOLERANCE)
    # A tile that a warp's first row sees in full, and its last row in part.
    assert_like_reference(ops, "q8", make_batch([130], [40]), shape_of(2, 1, 128, window=100))
    for cache_type, head_dim in (("q4", 80), ("q6", 128), ("q8_q4", 64)):
        with_open_pages(ops, cache_type, make_batch([300, 0, 513, 270], [1, 40, 3, 36]),
                        shape_of(4, 2, head_dim))
    with_open_pages(ops, "q4", make_batch([300], [2]), shape_of(2, 1, 72), FLOAT_TOLERANCE)
    # A window that begins in the open page, and kv_splits of two pages.
    with_open_pages(ops, "q8", make_batch([380, 370], [40, 2]), shape_of(2, 1, 64, window=32))
    with_open_pages(ops, "q4", make_batch([2900], [1]), shape_of(33, 33, 64), DECODE_TOLERANCE)
    # More drafts than fit one launch, after a prompt.
    assert_like_reference(ops, "q4", make_batch([40, 700, 300], [35, 20, 5]), shape_of(4, 2, 64))
    # A second row that sees one token more than the first.
    assert_like_reference(ops, "q8", make_batch([223], [2]), shape_of(2, 1, 128), DECODE_TOLERANCE)
    assert_like_reference(ops, "q8", make_batch([300, 111], [2, 40]),
                          shape_of(2, 1, 128, window=33))


def check_writing(ops):
    for head_dim in (80, 128, 72):
        for cache_type in ("q8", "q6", "q4", "q3", "fp16"):
            batch, k, v, theirs = written_by_the_reference(cache_type, head_dim, 30, 10)
            ours = written(ops, cache_type, k, v, batch)
            differ = (bytes_of(ours, "k_codes") != bytes_of(theirs, "k_codes")).any(dim=-1)
            assert differ.sum() <= 2
    for cache_type, head_dim in (("q4", 20), ("q6", 64)):
        ours, theirs = (list(tensors_of(filled(w, cache_type, [250, 0], [6, 9], 2, head_dim)[0]))
                        for w in (ops, REFERENCE))
        for a, b in zip(ours, theirs, strict=True):
            same = a.view(torch.uint8) == b.view(torch.uint8)
            assert same.float().mean() >= 0.94


def check_feedback(ops):
    for cache_type, head_dim in (("q4", 64), ("q3", 128), ("q6", 80), ("q4", 256), ("q3", 300)):
        batch, k = make_batch([0, 250], [12, 4]), random_rows(16, 2, head_dim, 1)
        feedback = stored_feedback(moments(2, head_dim))
        ours, theirs = (written_with_feedback(w, cache_type, k, batch, feedback)
                        for w in (ops, REFERENCE))
        differ = (bytes_of(ours, "k_codes") != bytes_of(theirs, "k_codes")).any(dim=-1)
        assert differ.sum() <= 2
    batch, k = make_batch([0], [2]), random_rows(2, 1, 96, 2)
    k[1, 0, 40] = torch.nan
    ours, plain = (written_with_feedback(ops, "q4", k, batch, feedback)
                   for feedback in (stored_feedback(moments(1, 96)), None))
    same = (ours.k_codes == plain.k_codes)[0, 0, :2].all(dim=-1)
    assert same.tolist() == [False, True]


def passes(launcher, check, orders=ORDERS) -> bool:
    """Run the comparisons in a process of their own, which a mistake may crash."""

    def run() -> None:
        faulthandler.disable()
        try:
            for order, seed in orders:
                launcher.set_order(order, seed)
                check(attention_target(launcher))
        except BaseException:
            os._exit(1)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode == 0


@pytest.mark.parametrize("change", some_of(ATTENTION, 20), ids=lambda change: change[1][:40])
def test_a_mistake_in_attention_is_noticed(tmp_path, change):
    assert not passes(built_from(tmp_path, SOURCES, change), check_attention)


@pytest.mark.parametrize("change", some_of(FEEDBACK, 8), ids=lambda change: change[1][:40])
def test_a_mistake_in_rounding_with_feedback_is_noticed(tmp_path, change):
    assert not passes(built_from(tmp_path, ("cache_write",), change), check_feedback)


@pytest.mark.parametrize("change", some_of(WRITING, 12), ids=lambda change: change[1][:40])
def test_a_mistake_in_writing_is_noticed(tmp_path, change):
    assert not passes(built_from(tmp_path, ("cache_write",), change), check_writing)


def test_without_a_mistake_nothing_is_noticed(tmp_path):
    """As the mistakes are built in one order, and in the others optimised, which runs faster."""
    launcher = built_from(tmp_path, SOURCES)
    for check in (check_attention, check_writing, check_feedback):
        assert passes(launcher, check, ORDERS[:1])
        assert passes(emulated_launcher(), check, ORDERS[1:])
