"""Key biases: attention adds their part of the scores, which the cache does not hold.

Caches are drawn as they are stored, and compared with the reference with the same bias.
"""

from __future__ import annotations

import pytest
import torch

from backends.operations.test_attention import DECODE_TOLERANCE, FLOAT_TOLERANCE, TOLERANCE
from exl_loader.backends.cuda.attention import AttentionOps
from exl_loader.cache.layout import KeyBias
from support.attention_cases import attend, expected_of, random_layer, relative_error, shape_of
from support.cache_layers import make_batch, one_of, part, random_rows
from support.targets import TARGETS, target

pytestmark = pytest.mark.usefixtures("two_threads")

SIZE = 100.0
# On a CPU scores are a hundred times those of test_attention, and float32 rounds them.
CPU_TOLERANCE = 1e-4


@pytest.fixture(params=["native", *TARGETS])
def ops(request):
    return target(request.param, AttentionOps)


def give_bias(layer, batch, shape, pairs, *, half=None, factor=1.2, seed=0):
    """Give a layer a bias of `pairs` pairs a head, and each sequence frequencies of its own.

    Pairs that hardly turn would add the same to all scores, so they are none of the slow half.
    """
    generator = torch.Generator().manual_seed(seed)
    half, heads = half or shape.head_dim // 2, shape.num_kv_heads
    chosen = torch.stack([torch.randperm(half // 2, generator=generator)[:pairs]
                          for _ in range(heads)]).int()
    first, second = torch.randn(2, heads, pairs, generator=generator) * SIZE
    layer.key_bias = KeyBias(chosen, first.contiguous(), second.contiguous(), half)
    steps = torch.arange(half) / half
    batch.inv_freq = torch.stack(
        [1e4 ** -(steps * (1 - 0.1 * s)) for s in range(batch.num_sequences)]
    ).float()
    batch.rope_factor = factor


def queries(batch, shape, seed=0):
    """Return queries for which a bias counts as much as the rest of a key."""
    return random_rows(batch.num_rows, shape.num_heads, shape.head_dim, seed) * 0.1


def assert_like_reference(ops, cache_type, batch, shape, pairs, tolerance, **options):
    layer = random_layer(cache_type, batch, shape, 7)
    q = queries(batch, shape)
    plain = expected_of(q, layer, batch, shape)
    give_bias(layer, batch, shape, pairs, **options)
    actual, expected = attend(ops, q, layer, batch, shape), expected_of(q, layer, batch, shape)
    assert expected.isfinite().all() and relative_error(plain, expected) > 0.1
    tolerance = CPU_TOLERANCE if ops.kind == "cpu" else tolerance
    for s in range(batch.num_sequences):
        first, end = batch.q_start[s : s + 2].tolist()
        error = relative_error(actual[first:end], expected[first:end])
        assert error <= tolerance, (s, error)


@pytest.mark.parametrize(
    ("cache_type", "head_dim", "pairs"),
    [("q4", 64, 3), ("q3", 128, 5), ("fp16", 128, 8), ("q8_q4", 80, 9), ("q6", 256, 2),
     ("q8", 128, 32), ("q4_fp16", 96, 1)],
)
def test_attention_equals_the_reference(ops, cache_type, head_dim, pairs):
    """Decoding, drafts and a prompt in one call."""
    batch = make_batch([70, 0, 300], [1, 50, 3])
    assert_like_reference(ops, cache_type, batch, shape_of(4, 2, head_dim), pairs, TOLERANCE)


@pytest.mark.parametrize(("cache_type", "head_dim"), [("q4", 64), ("q8", 112), ("fp16", 128)])
def test_decoding_keeps_scores_exact(ops, cache_type, head_dim):
    batch = make_batch([400, 90], [1, 2])
    assert_like_reference(ops, cache_type, batch, shape_of(6, 2, head_dim), 5, DECODE_TOLERANCE)


@pytest.mark.parametrize(("cache_type", "head_dim"), [("fp32", 64), ("q4", 72), ("fp16", 264)])
def test_heads_without_tensor_cores(ops, cache_type, head_dim):
    batch = make_batch([40, 0, 130], [1, 20, 2])
    shape = shape_of(4, 2, head_dim, window=60, softcap=3.0)
    assert_like_reference(ops, cache_type, batch, shape, 3, FLOAT_TOLERANCE)


@pytest.mark.parametrize(("window", "softcap"), [(31, 0.0), (200, 5.0), (0, 20.0)])
def test_sliding_windows_and_soft_caps(ops, window, softcap):
    batch = make_batch([1100, 500], [1, 40])
    shape = shape_of(4, 2, 64, softcap=softcap, window=window)
    assert_like_reference(ops, "q8", batch, shape, 4, TOLERANCE)


def test_part_of_the_head_is_rotated(ops):
    batch = make_batch([300, 20], [2, 40])
    assert_like_reference(ops, "q4", batch, shape_of(4, 2, 128), 6, TOLERANCE, half=16)


def test_far_positions_have_exact_angles(ops):
    batch = make_batch([130_000, 99_900], [1, 40])
    shape = shape_of(2, 1, 64, window=90)
    assert_like_reference(ops, "q4", batch, shape, 4, TOLERANCE)


def test_heads_with_fewer_pairs_are_padded_with_zeros(ops):
    batch, shape = make_batch([200, 3], [1, 40]), shape_of(4, 2, 64)
    layer, q = random_layer("q4", batch, shape, 7), queries(batch, shape)
    give_bias(layer, batch, shape, 5)
    for tensor in (layer.key_bias.pairs, layer.key_bias.first, layer.key_bias.second):
        tensor[1, 2:] = 0
    actual, expected = attend(ops, q, layer, batch, shape), expected_of(q, layer, batch, shape)
    assert relative_error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("magnitude", [0.0, 1e-4, 1e3])
def test_magnitudes_of_queries(ops, magnitude):
    """Scores of one magnitude, and scores of which one dominates."""
    shape = shape_of(2, 1, 64)
    for batch in (make_batch([300], [1]), make_batch([300], [40])):
        layer = random_layer("q8", batch, shape, 7)
        give_bias(layer, batch, shape, 3)
        q = queries(batch, shape) * magnitude
        actual, expected = attend(ops, q, layer, batch, shape), expected_of(q, layer, batch, shape)
        # Float32 rounds scores of 1e5, which may decide the largest key.
        assert actual.isfinite().all()
        if magnitude < 1:
            assert relative_error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize(("cache_type", "head_dim"), [("q4", 64), ("fp16", 80)])
def test_a_row_has_the_same_bits_alone_and_among_others(ops, cache_type, head_dim):
    shape = shape_of(6, 2, head_dim, window=300)
    batch = make_batch([600, 0, 37, 500], [1, 45, 20, 5])
    layer, q = random_layer(cache_type, batch, shape), queries(batch, shape, 3)
    give_bias(layer, batch, shape, 3)
    together = attend(ops, q, layer, batch, shape)
    for s in range(batch.num_sequences):
        first, end = batch.q_start[s : s + 2].tolist()
        single = one_of(batch, s)
        single.inv_freq = batch.inv_freq[s : s + 1].contiguous()
        single.rope_factor = batch.rope_factor
        alone = attend(ops, q[first:end].contiguous(), layer, single, shape)
        assert torch.equal(alone, together[first:end])


def test_drafts_and_chunks_give_the_bits_of_all_at_once(ops):
    shape = shape_of(4, 2, 64)
    for past, rows, cuts in ((508, 8, (1, 3, 4)), (0, 120, (40, 35, 45))):
        batch = make_batch([past], [rows])
        layer, q = random_layer("q4", batch, shape), queries(batch, shape)
        give_bias(layer, batch, shape, 3)
        at_once, first = attend(ops, q, layer, batch, shape), 0
        for count in cuts:
            piece = part(batch, [past + first], [count])
            piece.inv_freq, piece.rope_factor = batch.inv_freq, batch.rope_factor
            rows_of = q[first : first + count]
            assert torch.equal(attend(ops, rows_of, layer, piece, shape),
                               at_once[first : first + count])
            first += count
