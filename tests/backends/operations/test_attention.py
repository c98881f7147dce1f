"""Attention against the reference: decoding, drafts and prompts, of every cache type."""

from __future__ import annotations

import pytest
import torch

from exl_loader.backends.cuda.attention import DECODE_ROWS, AttentionOps
from exl_loader.backends.cuda.launcher import COUNTER_BYTES
from support.attention_cases import (
    attend,
    expected_of,
    filled_layer,
    random_layer,
    relative_error,
    scratch_for,
    shape_of,
)
from support.cache_layers import make_batch, one_of, part, random_rows
from support.exhaustive import some_of
from support.targets import ALL_CPUS, TARGETS, sizes, target

pytestmark = pytest.mark.usefixtures("two_threads")

# On CUDA weights and values are float16 in a product: at most 2^-12 each, root mean square 2^-13.
# In prompts keys and queries are float16 too, and scores of the rows used here reach 20.
TOLERANCE = 2e-3
# Decoding keeps keys exact.
DECODE_TOLERANCE = 8e-4
# On a CPU, and for heads and caches without tensor cores, a score's error is that of a float32
# sum of head_dim products, some 2^-24 * |q| * |k| * scale (about 100 with the rows used here),
# and passes into its weight as it is.
FLOAT_TOLERANCE = 2e-5

TYPES = ("fp16", "q8", "q6", "q4", "q3")
MIXED = ("q8_q4", "fp16_q6", "q4_fp16", "q6_q8", "q8_q3")
NATIVE = ["native"]


@pytest.fixture(params=[*NATIVE, *TARGETS])
def ops(request):
    return target(request.param, AttentionOps, threads=2)


def layer_for(ops, cache_type, batch, shape, seed=0):
    """Return a layer that holds the batch's keys and values, which a CPU has time to write.

    Those are of seed 0: the seed that queries have would make the same channel large in both.
    """
    if ops.kind == "cpu":
        return filled_layer(ops, cache_type, batch, shape)
    return random_layer(cache_type, batch, shape, seed)


def assert_close(ops, actual, expected, batch, tolerance):
    """Compare the rows of each sequence on CUDA, and each head of each row on a CPU."""
    assert expected.isfinite().all()
    if ops.kind == "cpu":
        worst = ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
        assert worst <= FLOAT_TOLERANCE, worst
        return
    for s in range(batch.num_sequences):
        first, end = batch.q_start[s : s + 2].tolist()
        error = relative_error(actual[first:end], expected[first:end])
        assert error <= tolerance, (s, error)


def assert_like_reference(ops, cache_type, batch, shape, tolerance=TOLERANCE, seed=7, sinks=None):
    """Compare with the reference, within CUDA's `tolerance` or the CPU's."""
    layer = layer_for(ops, cache_type, batch, shape, seed)
    q = random_rows(batch.num_rows, shape.num_heads, shape.head_dim, seed)
    actual = attend(ops, q, layer, batch, shape, sinks)
    expected = expected_of(q, layer, batch, shape, sinks)
    assert_close(ops, actual, expected, batch, tolerance)


@pytest.mark.parametrize("cache_type", [*TYPES, *MIXED])
@sizes("head_dim", cpus=ALL_CPUS, cpu=[64, 80, 128], cuda=[16, 64, 80, 96, 128, 256])
def test_attention_equals_the_reference(ops, cache_type, head_dim):
    """Decoding, drafts and a prompt in one call."""
    prompt = {"cpu": 90, "cuda": 50}[ops.kind]
    batch = make_batch([70, 0, 300, 250], [1, prompt, 3, 9])
    assert_like_reference(ops, cache_type, batch, shape_of(4, 2, head_dim))


@pytest.mark.parametrize("cache_type", [*TYPES, "q4_q8", "fp32", "fp32_q4"])
@sizes("head_dim", cpus=NATIVE, cpu=[8, 20, 48, 72, 96, 112, 192, 256], cuda=[8, 20, 72, 264])
def test_heads_of_any_length(ops, cache_type, head_dim):
    """On CUDA those that tensor cores cannot multiply."""
    batch = make_batch([40, 0, 130], [1, 40, 2])
    shape = shape_of(4, 2, head_dim, window=60, softcap=3.0)
    assert_like_reference(ops, cache_type, batch, shape, FLOAT_TOLERANCE)


@sizes("head_dim", cpus=ALL_CPUS, cpu=[64, 80, 128], cuda=[16, 64, 128])
def test_float32_caches_are_for_verification(ops, head_dim):
    batch = make_batch([300, 0], [1, 40])
    assert_like_reference(ops, "fp32", batch, shape_of(4, 2, head_dim), FLOAT_TOLERANCE)


@sizes("heads", cpus=NATIVE, cpu=[(4, 4), (8, 1), (6, 2), (9, 3), (71, 1)],
       cuda=[(4, 4), (4, 1), (8, 1), (9, 3), (71, 1)])
def test_shared_key_value_heads(ops, heads):
    prompt = {"cpu": 150, "cuda": 30}[ops.kind]
    batch = make_batch([200, 0, 600], [1, prompt, 2])
    assert_like_reference(ops, "q4", batch, shape_of(*heads, 64))


# Query heads of one key/value head: StarCoder's and Falcon 7B's, with every size of heads in use.
MULTI_QUERY = [(heads, head_dim) for head_dim in (128, 64, 80, 96, 192, 256) for heads in (48, 71)]


@pytest.mark.parametrize("geometry", some_of(MULTI_QUERY, 3), ids=str)
def test_many_query_heads_of_one_key_value_head(ops, geometry):
    """A token after a whole page, a prompt and a draft."""
    heads, head_dim = geometry
    batch = make_batch([260, 0, 90], [1, 34, 3])
    for cache_type in ("fp16", "q4"):
        assert_like_reference(ops, cache_type, batch, shape_of(heads, 1, head_dim))
    # Falcon 40B has 16 query heads a key/value head.
    assert_like_reference(ops, "q8", batch, shape_of(32, 2, head_dim, window=60))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@sizes("window", cpus=ALL_CPUS, cpu=[1, 63, 64, 200, 700], cuda=[1, 31, 200, 700])
def test_sliding_windows_and_soft_caps(ops, window, softcap):
    prompt = {"cpu": 120, "cuda": 80}[ops.kind]
    batch = make_batch([1100, 500, 255], [1, prompt, 4])
    shape = shape_of(4, 2, 64, softcap=softcap, window=window)
    assert_like_reference(ops, "q8", batch, shape)


@sizes("total", cpus=NATIVE,
       cpu=[1, 15, 16, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1025],
       cuda=[1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 511, 512, 513, 1025])
def test_lengths_around_tiles_pages_and_kv_splits(ops, total):
    batch = make_batch([total - 1], [1])
    assert_like_reference(ops, "q4", batch, shape_of(4, 2, 64), DECODE_TOLERANCE)
    if total > DECODE_ROWS:
        rows = min(total, 40)
        assert_like_reference(ops, "q4", make_batch([total - rows], [rows]), shape_of(2, 1, 128))


def test_random_batches(ops):
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    print("seed", generator.initial_seed())
    count, most = {"cpu": (6, 900), "cuda": (4, 700)}[ops.kind]
    for _ in range(count):
        draw = torch.randint(0, most, (4,), generator=generator).tolist()
        q_lens = [1 + n % 40 if n % 2 else 1 for n in draw]
        batch = make_batch(draw, q_lens, seed=draw[0])
        shape = shape_of(6, 3, 32 * (1 + draw[0] % 4), window=[0, 150][draw[1] % 2])
        assert_like_reference(ops, TYPES[draw[2] % 4], batch, shape)


@pytest.mark.parametrize(("cache_type", "head_dim"), [("fp16", 64), ("q8", 80), ("q4", 128)])
@sizes("window", cpus=ALL_CPUS, cpu=[0], cuda=[0, 300])
def test_a_row_has_the_same_bits_alone_and_among_others(ops, cache_type, head_dim, window):
    shape = shape_of(6, 2, head_dim, window=window)
    batch = make_batch([600, 0, 1300, 37, 500], [1, 45, 1, 20, 5])
    layer = layer_for(ops, cache_type, batch, shape)
    q = random_rows(batch.num_rows, 6, head_dim, 3)
    together = attend(ops, q, layer, batch, shape)
    for s in range(batch.num_sequences):
        first, end = batch.q_start[s : s + 2].tolist()
        alone = attend(ops, q[first:end].contiguous(), layer, one_of(batch, s), shape)
        assert torch.equal(alone, together[first:end])


@sizes("cache_type", cpus=ALL_CPUS, cpu=["fp16", "q4"], cuda=["q4"])
@pytest.mark.parametrize("window", [0, 100])
def test_chunks_of_a_prompt_agree_bit_for_bit(ops, cache_type, window):
    """On a CPU single tokens as well."""
    shape = shape_of(4, 2, 96, window=window)
    if ops.kind == "cpu":
        total, chunks = 570, [(0, 100), (100, 400), (500, 70)]
        chunks += [(token, 1) for token in range(505, total, 9)]
    else:
        total, chunks = 330, [(0, 100), (100, 150), (250, 80)]
    batch = make_batch([0], [total])
    layer = layer_for(ops, cache_type, batch, shape)
    q = random_rows(total, 4, 96, 11)
    at_once = attend(ops, q, layer, batch, shape)
    for past, rows in chunks:
        chunk = attend(ops, q[past : past + rows], layer, part(batch, [past], [rows]), shape)
        assert torch.equal(chunk, at_once[past : past + rows])


def test_scratch_that_is_too_small_is_noticed(ops):
    shape = shape_of(4, 2, 64)
    batch = make_batch([700], [2])
    layer = layer_for(ops, "q4", batch, shape)
    q = random_rows(2, 4, 64, 0)
    nbytes = {"cpu": 64, "cuda": COUNTER_BYTES + 1000}[ops.kind]
    scratch = scratch_for(q, batch, shape)[:nbytes].clone()
    with pytest.raises(AssertionError, match="scratch"):
        ops.attention(q, layer, batch, shape, torch.empty_like(q), scratch)


def test_one_overwhelming_key_takes_all_the_weight(ops):
    shape = shape_of(2, 2, 64, scale=1.0)
    for batch in (make_batch([700], [1]), make_batch([650], [51])):
        layer = layer_for(ops, "q8", batch, shape)
        q = random_rows(batch.num_rows, 2, 64, 3) * 1e4
        actual, expected = attend(ops, q, layer, batch, shape), expected_of(q, layer, batch, shape)
        assert relative_error(actual[-1], expected[-1]) <= TOLERANCE


def test_a_fault_shows(ops):
    shape = shape_of(2, 1, 64)
    for rows in (1, 40):
        batch = make_batch([100], [rows])
        for name in ("k_scales", "v_scales"):
            layer = layer_for(ops, "q4", batch, shape)
            getattr(layer, name)[int(batch.page_table[0, 0]), 0, 40] = torch.nan
            assert attend(ops, random_rows(rows, 2, 64, 1), layer, batch, shape).isnan().any()
