"""What only CUDA has of attention with open pages: shapes, launches, kv_splits, graphs and scratch.

What every backend has in common is in operations/test_attention_open_pages.py. Whatever the rows of
a call must not read is NaN: the codes of their own page and of position 0, and open pages after the
last token.
"""

from __future__ import annotations

import random

import pytest
import torch

from backends.operations.test_attention import DECODE_TOLERANCE, FLOAT_TOLERANCE, TOLERANCE
from backends.operations.test_attention_key_bias import give_bias, queries
from exl_loader.backends.cuda import attention
from exl_loader.backends.cuda.attention import AttentionOps
from support.attention_cases import (
    attend,
    attention_target,
    expected_of,
    random_layer,
    relative_error,
    scratch_for,
    shape_of,
)
from support.cache_layers import make_batch, one_of, part, random_rows
from support.targets import TARGETS, emulated_launcher, target

# The bits of codes and of their open pages: 4 and 8, 3 and 8, 6 and 16, 8 and 16, and halves
# without one.
TYPES = ("q4", "q3", "q6", "q8", "q4_fp16", "fp16_q6", "q8_q4", "q6_q8")


@pytest.fixture(params=TARGETS)
def ops(request):
    return target(request.param, AttentionOps)


def assert_like_reference(ops, cache_type, batch, shape, tolerance=TOLERANCE, *, seed=7, pairs=0,
                          sinks=None):
    """Compare each sequence's rows with the reference, with a key bias of so many pairs."""
    layer = random_layer(cache_type, batch, shape, seed, has_open_pages=True)
    q = random_rows(batch.num_rows, shape.num_heads, shape.head_dim, seed)
    if pairs:
        q = queries(batch, shape)
        give_bias(layer, batch, shape, pairs)
    actual = attend(ops, q, layer, batch, shape, sinks)
    expected = expected_of(q, layer, batch, shape, sinks)
    assert expected.isfinite().all()
    for s in range(batch.num_sequences):
        first, end = batch.q_start[s : s + 2].tolist()
        error = relative_error(actual[first:end], expected[first:end])
        assert error <= tolerance, (s, error)


@pytest.mark.parametrize("cache_type", TYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 112, 128, 256])
def test_decoding_and_prompts_equal_the_reference(ops, cache_type, head_dim):
    """A token of a first page and of a new one, drafts, and prompts of and after a first page."""
    batch = make_batch([70, 512, 0, 300, 280], [1, 1, 50, 3, 40])
    assert_like_reference(ops, cache_type, batch, shape_of(4, 2, head_dim))


@pytest.mark.parametrize("cache_type", ["q4", "q3", "q6", "q8"])
@pytest.mark.parametrize("window", [0, 30, 301, 302, 520])
def test_windows_that_end_in_each_part_of_a_text(ops, cache_type, window):
    """In the open page, just after and at position 0, and in a page of codes."""
    batch = make_batch([301, 600, 300, 560], [1, 2, 40, 36])
    shape = shape_of(4, 2, 64, window=window, softcap=3.0)
    assert_like_reference(ops, cache_type, batch, shape)


@pytest.mark.parametrize("cache_type", ["q8", "q4", "q3", "fp16_q4"])
@pytest.mark.parametrize("head_dim", [8, 20, 72, 264])
def test_heads_without_tensor_cores(ops, cache_type, head_dim):
    batch = make_batch([40, 300, 290], [1, 2, 40])
    assert_like_reference(ops, cache_type, batch, shape_of(4, 2, head_dim, window=295),
                          FLOAT_TOLERANCE)


@pytest.mark.parametrize("heads", [(48, 1), (9, 3)])
def test_shared_key_value_heads(ops, heads):
    batch = make_batch([200, 600, 258], [1, 3, 34])
    assert_like_reference(ops, "q6", batch, shape_of(*heads, 64))


@pytest.mark.parametrize(("cache_type", "head_dim"), [("q4", 128), ("q8", 64), ("q6", 72)])
def test_key_biases_and_sinks(ops, cache_type, head_dim):
    batch = make_batch([300, 90, 260], [2, 1, 40])
    tolerance = TOLERANCE if head_dim != 72 else FLOAT_TOLERANCE
    shape = shape_of(4, 2, head_dim)
    assert_like_reference(ops, cache_type, batch, shape, tolerance, pairs=9)
    assert_like_reference(ops, cache_type, batch, shape, tolerance,
                          sinks=torch.tensor([1.0, -2.0, 4.0, 7.0]))


@pytest.mark.parametrize("window", [0, 100, 520])
@pytest.mark.parametrize("most", [1, 2, 3, 64])
def test_drafts_give_the_bits_of_single_tokens(ops, monkeypatch, window, most):
    """Also where kv_splits have several pages, and a sliding window changes their number."""
    monkeypatch.setattr(attention, "most_kv_splits", lambda kv_heads: most)
    seed = random.SystemRandom().randrange(1000)
    shape = shape_of(6, 2, 64, window=window)
    for past, rows in ((508, 4), (517, 9), (768, 20), (1026, 32), (1290, 5)):
        batch = make_batch([past], [rows])
        layer = random_layer("q4", batch, shape, seed, has_open_pages=True)
        q = random_rows(rows, 6, 64, seed)
        drafts = attend(ops, q, layer, batch, shape)
        assert relative_error(drafts, expected_of(q, layer, batch, shape)) <= DECODE_TOLERANCE
        for row in range(0, rows, 1 + rows // 4):
            single = part(batch, [past + row], [1])
            alone = attend(ops, q[row : row + 1], layer, single, shape)
            assert torch.equal(alone[0], drafts[row]), (past, row, seed)


@pytest.mark.parametrize("cache_type", ["q4", "q6"])
def test_a_prompts_rows_do_not_depend_on_its_chunk(ops, cache_type):
    """Alone, beside others, and with fewer rows before and after them."""
    seed = random.SystemRandom().randrange(1000)
    shape = shape_of(4, 2, 64)
    batch = make_batch([260, 700, 0], [100, 2, 40])
    layer = random_layer(cache_type, batch, shape, seed, has_open_pages=True)
    q = random_rows(batch.num_rows, 4, 64, seed)
    together = attend(ops, q, layer, batch, shape)[:100]
    assert torch.equal(attend(ops, q[:100], layer, one_of(batch, 0), shape), together)
    chunk = one_of(part(batch, [285, 700, 0], [50, 2, 40]), 0)
    assert torch.equal(attend(ops, q[25:75], layer, chunk, shape), together[25:75]), seed


@pytest.mark.parametrize("shared_limit", [64 << 10, 99 << 10, 227 << 10])
@pytest.mark.parametrize(("cache_type", "head_dim"),
                         [("q8", 256), ("q6", 240), ("q6", 128), ("q4", 256), ("q4", 64)])
def test_every_launch_that_a_card_may_choose(shared_limit, cache_type, head_dim):
    """Rings of open pages of 1, 2 and 4 slots, and fewer warps than a block has."""
    card = type(emulated_launcher())(shared_limit_bytes=shared_limit)
    batch = make_batch([500, 768], [2, 40])
    assert_like_reference(attention_target(card), cache_type, batch, shape_of(2, 1, head_dim))


def test_a_launch_serves_every_length_and_every_open_page():
    """As in a CUDA graph: the launch is prepared once, then only the batch's integers change."""
    launcher = emulated_launcher()
    shape = shape_of(4, 2, 64)
    batch = make_batch([1500, 900], [1, 1])
    q, out = random_rows(2, 4, 64, 1), torch.empty(2, 4, 64)
    layer = random_layer("q4", batch, shape, has_open_pages=True)
    scratch = scratch_for(q, batch, shape)
    launches = []
    AttentionOps(launcher, launches.append).attention(q, layer, batch, shape, out, scratch)
    (launch,) = launches
    for opened in (layer.k_open, layer.v_open):
        for stored in (opened.tokens, opened.first):
            stored.scales.copy_(torch.randn(stored.scales.shape))
    for scales in (layer.k_scales, layer.v_scales):
        scales.nan_to_num_(0.5)
    for past, pages in (([1500, 900], [1, 0]), ([3, 0], [0, 1]), ([255, 256], [1, 0]),
                        ([1023, 1], [0, 1])):
        batch.past_len.copy_(torch.tensor(past))
        batch.open_pages.copy_(torch.tensor(pages))
        launch()
        assert relative_error(out, expected_of(q, layer, batch, shape)) <= DECODE_TOLERANCE


def test_a_layer_without_open_pages_ignores_those_of_the_batch(ops):
    shape = shape_of(4, 2, 64)
    batch = make_batch([300, 600], [1, 40])
    layer = random_layer("q4", batch, shape)
    q = random_rows(batch.num_rows, 4, 64, 5)
    with_pages = attend(ops, q, layer, batch, shape)
    batch.open_pages = None
    assert torch.equal(attend(ops, q, layer, batch, shape), with_pages)
