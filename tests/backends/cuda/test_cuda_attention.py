"""Attention on CUDA against the reference: decoding, prompts, and heads of any length.

The kernels' own code runs, on the CPU by emulation and on a card where there is one. Caches
hold NaN after every sequence's last token.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from backends.operations import test_cache_writing
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
from support.cache_layers import make_batch, one_of, part, random_rows
from support.cuda_attention_cases import (
    attend,
    attention_target,
    expected_of,
    random_layer,
    relative_error,
    scratch_for,
    shape_of,
)
from support.cuda_emulation.sanitized import run_sanitized, runtimes
from support.targets import TARGETS, emulated_launcher, target

# Weights and values are float16 in a product: at most 2^-12 each, root mean square 2^-13. In
# prompts keys and queries are float16 too, and scores of the rows used here reach 20.
TOLERANCE = 2e-3
# Decoding keeps keys exact.
DECODE_TOLERANCE = 8e-4
FLOAT_TOLERANCE = 2e-5

TYPES = ("fp16", "q8", "q6", "q4")
MIXED = ("q8_q4", "fp16_q6", "q4_fp16", "q6_q8")
# Shared memory of a block: compute capability 7.5, 8.6, 8.0, 9.0.
SHARED_LIMITS = (64 << 10, 99 << 10, 163 << 10, 227 << 10)


@pytest.fixture(params=TARGETS)
def ops(request):
    return target(request.param, AttentionOps)


@pytest.fixture
def emulated():
    return target("shuffled", AttentionOps)


def assert_like_reference(ops, cache_type, batch, shape, tolerance=TOLERANCE, seed=7):
    layer = random_layer(cache_type, batch, shape, seed)
    q = random_rows(batch.num_rows, shape.num_heads, shape.head_dim, seed)
    actual, expected = attend(ops, q, layer, batch, shape), expected_of(q, layer, batch, shape)
    assert expected.isfinite().all()
    for s in range(batch.num_sequences):
        first, end = batch.q_start[s : s + 2].tolist()
        error = relative_error(actual[first:end], expected[first:end])
        assert error <= tolerance, (s, error)


@pytest.mark.parametrize("cache_type", [*TYPES, *MIXED])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_attention_equals_the_reference(ops, cache_type, head_dim):
    """Decoding, drafts and a prompt in one call."""
    batch = make_batch([70, 0, 300, 250], [1, 50, 3, 9])
    assert_like_reference(ops, cache_type, batch, shape_of(4, 2, head_dim))


@pytest.mark.parametrize("cache_type", [*TYPES, *MIXED])
@pytest.mark.parametrize("head_dim", [64, 112, 128, 256])
def test_decoding_keeps_keys_exact(ops, cache_type, head_dim):
    batch = make_batch([400, 90], [1, 2])
    assert_like_reference(ops, cache_type, batch, shape_of(4, 2, head_dim), DECODE_TOLERANCE)


@pytest.mark.parametrize("cache_type", [*TYPES, "q4_q8", "fp32", "fp32_q4"])
@pytest.mark.parametrize("head_dim", [8, 20, 72, 264])
def test_heads_without_tensor_cores(ops, cache_type, head_dim):
    batch = make_batch([40, 0, 130], [1, 40, 2])
    shape = shape_of(4, 2, head_dim, window=60, softcap=3.0)
    assert_like_reference(ops, cache_type, batch, shape, FLOAT_TOLERANCE)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_float32_caches_are_for_verification(ops, head_dim):
    batch = make_batch([300, 0], [1, 40])
    assert_like_reference(ops, "fp32", batch, shape_of(4, 2, head_dim), FLOAT_TOLERANCE)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (8, 1), (9, 3), (71, 1)])
def test_shared_key_value_heads(ops, heads, kv_heads):
    batch = make_batch([200, 0, 600], [1, 30, 2])
    assert_like_reference(ops, "q4", batch, shape_of(heads, kv_heads, 64))


@pytest.mark.parametrize("window", [1, 31, 200, 700])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_sliding_windows_and_soft_caps(ops, window, softcap):
    batch = make_batch([1100, 500, 255], [1, 80, 4])
    shape = shape_of(4, 2, 64, softcap=softcap, window=window)
    assert_like_reference(ops, "q8", batch, shape)


@pytest.mark.parametrize("total", [1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 511, 512, 513, 1025])
def test_lengths_around_tiles_pages_and_kv_splits(ops, total):
    batch = make_batch([total - 1], [1])
    assert_like_reference(ops, "q4", batch, shape_of(4, 2, 64), DECODE_TOLERANCE)
    if total > attention.DECODE_ROWS:
        rows = min(total, 40)
        assert_like_reference(ops, "q4", make_batch([total - rows], [rows]), shape_of(2, 1, 128))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 31, 32, 33, 40])
def test_numbers_of_rows_around_the_smallest_prompt(ops, rows):
    batch = make_batch([100, 7], [rows, 1])
    assert_like_reference(ops, "q6", batch, shape_of(6, 2, 64))


def test_random_batches(ops):
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    print("seed", generator.initial_seed())
    for _ in range(4):
        draw = torch.randint(0, 700, (4,), generator=generator).tolist()
        q_lens = [1 + n % 40 if n % 2 else 1 for n in draw]
        batch = make_batch(draw, q_lens, seed=draw[0])
        shape = shape_of(6, 3, 32 * (1 + draw[0] % 4), window=[0, 150][draw[1] % 2])
        assert_like_reference(ops, TYPES[draw[2] % 4], batch, shape)


@pytest.mark.parametrize(("cache_type", "head_dim"), [("fp16", 64), ("q8", 80), ("q4", 128)])
@pytest.mark.parametrize("window", [0, 300])
def test_a_row_has_the_same_bits_alone_and_among_others(ops, cache_type, head_dim, window):
    shape = shape_of(6, 2, head_dim, window=window)
    batch = make_batch([600, 0, 1300, 37, 500], [1, 45, 1, 20, 5])
    layer = random_layer(cache_type, batch, shape)
    q = random_rows(batch.num_rows, 6, head_dim, 3)
    together = attend(ops, q, layer, batch, shape)
    for s in range(batch.num_sequences):
        first, end = batch.q_start[s : s + 2].tolist()
        alone = attend(ops, q[first:end].contiguous(), layer, one_of(batch, s), shape)
        assert torch.equal(alone, together[first:end])


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


@pytest.mark.parametrize("window", [0, 100])
def test_chunks_of_a_prompt_agree_bit_for_bit(ops, window):
    shape = shape_of(4, 2, 96, window=window)
    batch = make_batch([0], [330])
    layer = random_layer("q4", batch, shape)
    q = random_rows(330, 4, 96, 11)
    at_once = attend(ops, q, layer, batch, shape)
    for past, rows in [(0, 100), (100, 150), (250, 80)]:
        chunk = attend(ops, q[past : past + rows], layer, part(batch, [past], [rows]), shape)
        assert torch.equal(chunk, at_once[past : past + rows])


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


def test_scratch_that_is_too_small_is_noticed(ops):
    shape = shape_of(4, 2, 64)
    batch = make_batch([700], [2])
    layer = random_layer("q4", batch, shape)
    q = random_rows(2, 4, 64, 0)
    scratch = scratch_for(q, batch, shape)[: COUNTER_BYTES + 1000].clone()
    with pytest.raises(AssertionError, match="scratch"):
        ops.attention(q, layer, batch, shape, torch.empty_like(q), scratch)


def test_one_overwhelming_key_takes_all_the_weight(ops):
    shape = shape_of(2, 2, 64, scale=1.0)
    for batch in (make_batch([700], [1]), make_batch([650], [51])):
        layer = random_layer("q8", batch, shape)
        q = random_rows(batch.num_rows, 2, 64, 3) * 1e4
        actual, expected = attend(ops, q, layer, batch, shape), expected_of(q, layer, batch, shape)
        assert relative_error(actual[-1], expected[-1]) <= TOLERANCE


@pytest.mark.parametrize("magnitude", [1e-3, 1e3])
def test_magnitudes_of_queries_and_keys(ops, magnitude):
    """Scores stay the same. Plain float16 would overflow on one side or underflow on the other."""
    shape = shape_of(4, 2, 128)
    for batch in (make_batch([300], [2]), make_batch([300], [40])):
        layer = random_layer("q4", batch, shape, magnitude=magnitude)
        q = random_rows(batch.num_rows, 4, 128, 3) / magnitude
        actual, expected = attend(ops, q, layer, batch, shape), expected_of(q, layer, batch, shape)
        assert relative_error(actual, expected) <= TOLERANCE


def test_a_fault_shows(ops):
    shape = shape_of(2, 1, 64)
    for rows in (1, 40):
        batch = make_batch([100], [rows])
        for name in ("k_scales", "v_scales"):
            layer = random_layer("q4", batch, shape)
            getattr(layer, name)[int(batch.page_table[0, 0]), 0, 40] = torch.nan
            assert attend(ops, random_rows(rows, 2, 64, 1), layer, batch, shape).isnan().any()


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
    assert ctypes.sizeof(attention.AttentionStruct) == 208
    assert ctypes.sizeof(attention.DecodeStruct) == 48


@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_more_sequences_than_counters_take_several_launches(ops, monkeypatch, sequences):
    """The bits are those of one launch with counters for all sequences. One is a prompt."""
    shape = shape_of(6, 2, 64, window=520)
    batch = make_batch([700, 300, 1100, 20, 513, 2], [2, 1, 3, 40, 1, 2])
    layer = random_layer("q4", batch, shape)
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
@pytest.mark.parametrize(
    ("files", "chosen"),
    [([__file__], "not sanitizers and not gpu and not shuffled"),
     ([test_cache_writing.__file__], "forward")],
    ids=["attention", "cache writing"],
)
def test_under_sanitizers(files, chosen):
    result = run_sanitized(*files, "-k", chosen, "-m", "not slow")
    assert result.returncode == 0, result.stdout[-4000:]
