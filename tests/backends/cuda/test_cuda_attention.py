"""What only CUDA has of attention: exact decoding, drafts, kv splits, launches and scratch.

What every backend's attention has in common is in operations/test_attention.py. Caches hold NaN
after every sequence's last token.
"""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from backends.operations import test_attention, test_cache_writing
from backends.operations.test_attention import (
    DECODE_TOLERANCE,
    MIXED,
    TOLERANCE,
    TYPES,
    assert_like_reference,
)
from exl_loader.backends.cuda import attention
from exl_loader.backends.cuda.attention import (
    AttentionOps,
    decode_block,
    is_generic,
    prefill_block,
)
from exl_loader.backends.cuda.launcher import COUNTER_BYTES
from exl_loader.cache.layout import PAGE_LEN, CacheType
from exl_loader.checkpoint.config import MAX_HEADS
from support.attention_cases import (
    attend,
    attention_target,
    expected_of,
    random_layer,
    relative_error,
    scratch_for,
    shape_of,
)
from support.cache_layers import make_batch, part, random_rows
from support.cuda_emulation.sanitized import compiles_all, run_sanitized, runtimes
from support.targets import TARGETS, emulated_launcher, target

# Shared memory of a block: compute capability 7.5, 8.6, 8.0, 9.0.
SHARED_LIMITS = (64 << 10, 99 << 10, 163 << 10, 227 << 10)


@pytest.fixture(params=TARGETS)
def ops(request):
    return target(request.param, AttentionOps)


@pytest.fixture
def emulated():
    return target("shuffled", AttentionOps)


@pytest.mark.parametrize("cache_type", [*TYPES, *MIXED])
@pytest.mark.parametrize("head_dim", [64, 112, 128, 256])
def test_decoding_keeps_keys_exact(ops, cache_type, head_dim):
    batch = make_batch([400, 90], [1, 2])
    assert_like_reference(ops, cache_type, batch, shape_of(4, 2, head_dim), DECODE_TOLERANCE)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 31, 32, 33, 40])
def test_numbers_of_rows_around_the_smallest_prompt(ops, rows):
    batch = make_batch([100, 7], [rows, 1])
    assert_like_reference(ops, "q6", batch, shape_of(6, 2, 64))


@pytest.mark.parametrize("window", [0, 100, 520])
@pytest.mark.parametrize("most", [1, 2, 64])
def test_drafts_give_the_bits_of_single_tokens(ops, monkeypatch, window, most):
    """Also if the rows of one call are cut differently: after token 512 a kv_split has two pages
    instead of one, if two kv_splits are allowed."""
    monkeypatch.setattr(attention, "most_kv_splits", lambda kv_heads: most)
    shape = shape_of(6, 2, 64, window=window)
    for past, rows in ((508, 8), (510, 3), (765, 20), (1010, 32)):
        batch = make_batch([past], [rows])
        layer = random_layer("q4", batch, shape, seed=past)
        q = random_rows(rows, 6, 64, past)
        drafts = attend(ops, q, layer, batch, shape)
        assert relative_error(drafts, expected_of(q, layer, batch, shape)) <= DECODE_TOLERANCE
        for row in range(0, rows, 1 + rows // 8):
            single = part(batch, [past + row], [1])
            alone = attend(ops, q[row : row + 1], layer, single, shape)
            assert torch.equal(alone[0], drafts[row]), (past, row)


def test_a_launch_serves_every_length():
    """As in a CUDA graph: the launch is prepared once, then only the batch's integers change."""
    launcher = emulated_launcher()
    shape = shape_of(4, 2, 64)
    batch = make_batch([1500, 900], [1, 1])
    layer = random_layer("q4", batch, shape)
    q, out = random_rows(2, 4, 64, 1), torch.empty(2, 4, 64)
    scratch = scratch_for(q, batch, shape)
    launches = []
    AttentionOps(launcher, launches.append).attention(q, layer, batch, shape, out, scratch)
    (launch,) = launches
    for past in ([1500, 900], [3, 0], [255, 256], [1023, 1]):
        batch.past_len.copy_(torch.tensor(past))
        launch()
        assert relative_error(out, expected_of(q, layer, batch, shape)) <= DECODE_TOLERANCE


def test_more_rows_than_scratch_holds_take_several_launches(ops):
    """Drafts of many sequences, some of which continue in the next launch."""
    shape = shape_of(4, 2, 64)
    batch = make_batch([700, 300, 1100, 20, 513, 2, 800, 600, 256], [5, 7, 3, 40, 5, 1, 9, 5, 2])
    assert_like_reference(ops, "q4", batch, shape)
    drafts = make_batch([700, 300], [20, 31])
    assert_like_reference(ops, "q8", drafts, shape, DECODE_TOLERANCE)


@pytest.mark.parametrize("magnitude", [1e-3, 1e3])
def test_magnitudes_of_queries_and_keys(ops, magnitude):
    """Scores stay the same. Plain float16 would overflow on one side or underflow on the other."""
    shape = shape_of(4, 2, 128)
    for batch in (make_batch([300], [2]), make_batch([300], [40])):
        layer = random_layer("q4", batch, shape, magnitude=magnitude)
        q = random_rows(batch.num_rows, 4, 128, 3) / magnitude
        actual, expected = attend(ops, q, layer, batch, shape), expected_of(q, layer, batch, shape)
        assert relative_error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("shared_limit", SHARED_LIMITS)
@pytest.mark.parametrize("cache_type", [*TYPES, *MIXED])
def test_launches_fit_every_card(shared_limit, cache_type):
    kind = CacheType.parse(cache_type)
    for head_dim in range(16, 257, 16):
        assert not is_generic(head_dim, kind)
        decode = decode_block(head_dim, kind, shared_limit)
        assert decode.shared_bytes <= shared_limit and decode.units in (1, 2, 4)
        assert decode.warps == 8 or shared_limit == SHARED_LIMITS[0]
        prefill = prefill_block(head_dim, kind, shared_limit, 132, 8, 4096)
        assert prefill.shared_bytes <= shared_limit and prefill.rows == 16 * prefill.warps


@pytest.mark.parametrize("shared_limit", SHARED_LIMITS)
@pytest.mark.parametrize("cache_type", [kind for kind in [*TYPES, *MIXED] if kind != "fp16"])
def test_open_pages_change_no_number_of_warps_or_blocks(shared_limit, cache_type):
    kind = CacheType.parse(cache_type)
    for head_dim, pairs in itertools.product(range(16, 257, 16), (0, 32)):
        without = decode_block(head_dim, kind, shared_limit, pairs)
        decode = decode_block(head_dim, kind, shared_limit, pairs, has_open_pages=True)
        assert (decode.kernel, decode.warps) == (without.kernel, without.warps)
        assert decode.units == without.units and decode.open_units in (1, 2, 4)
        assert 1 <= decode.open_warps <= decode.warps and decode.shared_bytes <= shared_limit
        if head_dim in (64, 128):  # the kernels of which a multiprocessor can hold two blocks
            fits = [2 * block.shared_bytes <= shared_limit for block in (without, decode)]
            assert fits[0] == fits[1]
        without, prefill = (
            prefill_block(head_dim, kind, shared_limit, 132, 8, 4096, pairs, is_open)
            for is_open in (False, True)
        )
        assert (prefill.kernel, prefill.warps) == (without.kernel, without.warps)
        assert prefill.shared_bytes <= shared_limit


@pytest.mark.parametrize("shared_limit", SHARED_LIMITS)
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_every_launch_that_a_card_may_choose(shared_limit, multiprocessors):
    """Rings of 1, 2 and 4 slots, blocks of 4 and 8 warps, prompts of 2, 4 and 8."""
    launcher = emulated_launcher()
    card = type(launcher)(shared_limit_bytes=shared_limit, multiprocessors=multiprocessors)
    ops = attention_target(card)
    batch = make_batch([600, 0], [2, 150])
    for cache_type, head_dim in (("fp16", 256), ("fp16", 128), ("q8", 256), ("q4", 64)):
        assert_like_reference(ops, cache_type, batch, shape_of(2, 1, head_dim))


@pytest.mark.parametrize("kv_heads", [1, 2, 8, 32, 71])
@pytest.mark.parametrize("window", [0, 4096])
def test_scratch_bytes(kv_heads, window):
    shape = shape_of(4 * kv_heads, kv_heads, 128, window=window)
    for ctx_size in (1, 256, 257, 4096, 131072):
        pages = -(-ctx_size // PAGE_LEN)
        slots = attention.kv_split_slots(kv_heads, window, pages)
        assert slots <= pages and slots <= attention.most_kv_splits(kv_heads) + 2
        need = attention.attention_scratch_bytes(256, 4, ctx_size, shape) - COUNTER_BYTES
        assert need >= attention.HELD_ROWS * attention._row_bytes(shape, slots)
        assert need == 0 if pages == 1 else need > 0


def test_structs_are_as_long_as_the_kernels():
    """The emulation refuses a launch whose arguments differ in size; this test names them."""
    assert ctypes.sizeof(attention.AttentionStruct) == 328
    assert ctypes.sizeof(attention.DecodeStruct) == 56


@pytest.mark.parametrize(
    ("sequences", "has_open_pages"), [(1, False), (2, False), (5, False), (1, True), (3, True)]
)
def test_more_sequences_than_counters_take_several_launches(
    ops, monkeypatch, sequences, has_open_pages
):
    """The bits are those of one launch with counters for all sequences. One is a prompt."""
    shape = shape_of(6, 2, 64, window=520)
    batch = make_batch([700, 300, 1100, 20, 513, 2], [2, 1, 3, 40, 1, 2])
    layer = random_layer("q4", batch, shape, has_open_pages=has_open_pages)
    q = random_rows(batch.num_rows, 6, 64, 5)
    at_once = attend(ops, q, layer, batch, shape)
    groups = -(-32 * 3 // 8)  # of the most rows that a sequence may have here
    monkeypatch.setattr(attention, "_MOST_COUNTERS", sequences * groups * 2)
    assert torch.equal(attend(ops, q, layer, batch, shape), at_once)


def test_the_widest_heads_leave_counters_for_a_sequence():
    """For 32 draft rows and the most query heads that a model may have, in groups of 8 rows."""
    assert -(-32 * MAX_HEADS // 8) <= COUNTER_BYTES // 4


@pytest.mark.slow
@pytest.mark.skipif(not runtimes(), reason="needs gcc's sanitizers")
@compiles_all
@pytest.mark.parametrize(
    ("files", "chosen"),
    [([__file__], "not sanitizers and not gpu and not shuffled"),
     ([test_attention.__file__, test_cache_writing.__file__], "forward")],
    ids=["of CUDA alone", "of every backend"],
)
def test_under_sanitizers(files, chosen):
    result = run_sanitized(*files, "-k", chosen, "-m", "not slow")
    assert result.returncode == 0, result.stdout[-4000:]
