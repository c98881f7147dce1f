"""Key biases on CUDA: attention adds their part of the scores, which the cache does not hold.

Caches are drawn as they are stored, and held against the reference with the same bias; whole
models against themselves with a cache that loses nothing, and beside the CPU engine.
"""

from __future__ import annotations

import pytest
import torch
from test_cuda_attention import SHARED_LIMITS

from backends.operations.test_attention import DECODE_TOLERANCE, FLOAT_TOLERANCE, TOLERANCE
from exl_loader.backends import get_ops
from exl_loader.backends.cuda.attention import AttentionOps, decode_block, prefill_block
from exl_loader.cache.layout import MAX_BIAS_PAIRS, CacheType, KeyBias
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
from support.cuda_emulation.sanitized import run_sanitized, runtimes
from support.key_bias_cases import biased_qwen
from support.targets import TARGETS, emulated_launcher, target

SIZE = 100.0


@pytest.fixture(params=TARGETS)
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
    for s in range(batch.num_sequences):
        first, end = batch.q_start[s : s + 2].tolist()
        error = relative_error(actual[first:end], expected[first:end])
        assert error <= tolerance, (s, error)


@pytest.mark.parametrize(
    ("cache_type", "head_dim", "pairs"),
    [("q4", 64, 3), ("fp16", 128, 8), ("q8_q4", 80, 9), ("q6", 256, 2), ("q8", 128, 32),
     ("q4_fp16", 96, 1)],
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


def test_a_launch_serves_every_length_and_frequency():
    """As in a CUDA graph: the launch is prepared once, then only device memory changes."""
    shape, batch = shape_of(4, 2, 64), make_batch([1500, 900], [1, 1])
    layer, q = random_layer("q4", batch, shape), queries(batch, shape)
    give_bias(layer, batch, shape, 3)
    out, scratch = torch.empty_like(q), scratch_for(q, batch, shape)
    launches = []
    card = AttentionOps(emulated_launcher(), launches.append)
    card.attention(q, layer, batch, shape, out, scratch)
    (launch,) = launches
    for past in ([1500, 900], [3, 0], [1023, 1]):
        batch.past_len.copy_(torch.tensor(past))
        batch.inv_freq *= 0.7
        launch()
        assert relative_error(out, expected_of(q, layer, batch, shape)) <= DECODE_TOLERANCE


@pytest.mark.parametrize("shared_limit", SHARED_LIMITS)
@pytest.mark.parametrize("cache_type", ["fp16", "q4", "q8_fp16"])
def test_launches_fit_every_card(shared_limit, cache_type):
    kind = CacheType.parse(cache_type)
    for head_dim in range(16, 257, 16):
        for pairs in (1, 8, MAX_BIAS_PAIRS):
            decode = decode_block(head_dim, kind, shared_limit, pairs)
            prefill = prefill_block(head_dim, kind, shared_limit, 132, 8, 4096, pairs)
            for plan in (decode, prefill):
                assert plan.bias_begin < plan.shared_bytes <= shared_limit
                assert plan.bias_begin % 16 == 0
            without = prefill_block(head_dim, kind, shared_limit, 132, 8, 4096)
            assert without.bias_begin == without.shared_bytes and without.warps >= 2


@pytest.mark.parametrize("pairs", [1, MAX_BIAS_PAIRS])
def test_the_smallest_card_has_room(pairs):
    """64 KiB of shared memory: a block of a prompt has one warp at worst."""
    card = type(emulated_launcher())(shared_limit_bytes=SHARED_LIMITS[0], multiprocessors=1)
    batch = make_batch([100, 0], [1, 70])
    for cache_type, head_dim in (("fp16", 256), ("fp16", 128)):
        assert_like_reference(attention_target(card), cache_type, batch,
                              shape_of(2, 1, head_dim), pairs, TOLERANCE)


# ---- Whole models ------------------------------------------------------------------------------


def errors_of_types(folder, ops, device, cache_types, ids):
    """Return relative errors of logits against those of a float32 cache, and the caches' layers."""
    from support.model_builder import build_model, run_chunks

    exact, errors, layers = None, {}, []
    for cache_type in ("fp32", *cache_types):
        model, cache = build_model(folder, ops, device=device, cache_type=cache_type)
        # A prompt, then tokens one by one.
        logits = torch.cat([run_chunks(model, cache, ids, 44), run_chunks(model, cache, ids, 4)])
        exact = logits if exact is None else exact
        errors[cache_type] = relative_error(logits, exact)
        layers += cache.layers
    return errors, layers


def test_a_quantised_cache_is_as_good_as_on_the_cpu(tmp_path, monkeypatch):
    pytest.importorskip("support.hf_models")
    from support.emulated_cuda import DEVICE, emulated_ops, install

    ids, types = list(range(5, 225, 5)), ("q8", "q4")
    biased_qwen(tmp_path / "m", 80.0)
    card = emulated_ops()
    install(monkeypatch, card)
    errors, layers = errors_of_types(tmp_path / "m", card, DEVICE, types, ids)
    assert all(layer.key_bias.pairs.shape[1] >= 2 for layer in layers)
    for layer in layers:
        storages = {tensor.untyped_storage().data_ptr() for tensor in
                    (layer.key_bias.pairs, layer.key_bias.first, layer.key_bias.second)}
        # A view of the workspace, which is in the plan; no memory of its own.
        assert len(storages) == 1 and layer.key_bias.pairs.untyped_storage().nbytes() > 1 << 16
    on_cpu, _ = errors_of_types(tmp_path / "m", get_ops(), "cpu", types, ids)
    monkeypatch.setattr(AttentionOps, "adds_key_bias", False)
    inside, layers = errors_of_types(tmp_path / "m", card, DEVICE, types, ids)
    assert all(layer.key_bias is None for layer in layers)
    for cache_type in types:
        # Some codes differ in the last bit, and products of prompts are float16.
        assert errors[cache_type] <= 1.1 * on_cpu[cache_type] + 1e-3, cache_type
        assert inside[cache_type] >= 3 * errors[cache_type], cache_type


def test_memory_of_a_model_with_key_biases_is_what_was_planned(tmp_path, monkeypatch):
    pytest.importorskip("support.hf_models")
    import exl_loader
    from support.emulated_cuda import DEVICE, emulated_ops, install

    biased_qwen(tmp_path / "m", 80.0)
    install(monkeypatch, emulated_ops())
    texts, settings = {}, {"temperature": 0, "max_new_tokens": 5}
    for device in (DEVICE, "cpu"):
        options = dict(ctx_size=512, cache_type="q4", device=device, chunk_size=64)
        total = exl_loader.plan(tmp_path / "m", **options).total_bytes
        with exl_loader.load(tmp_path / "m", **options) as model:
            assert model.allocated_bytes() == total
            texts[device] = list(model.generate_ids(list(range(9, 60)), settings))
            # A second text with the same beginning reuses the keys of the first.
            again = model.generate_ids(list(range(9, 60)), settings)
            assert list(again) == texts[device] and again.stats.reused_tokens > 0
            assert model.allocated_bytes() == total
    assert texts[DEVICE] == texts["cpu"]


def test_each_of_two_cards_has_room_for_its_own_layers(tmp_path, monkeypatch):
    pytest.importorskip("support.hf_models")
    from test_cuda_stages import gpu_split

    import exl_loader
    from support.emulated_cuda import EmulatedCards

    biased_qwen(tmp_path / "m", 80.0)
    EmulatedCards(2).install(monkeypatch)
    ids = list(range(9, 60))
    options = dict(ctx_size=512, cache_type="q4", chunk_size=64)
    with exl_loader.load(tmp_path / "m", device="cuda:0", **options) as model:
        expected = model.prompt_logits(ids)
    split = gpu_split(tmp_path / "m", 1, cache_type="q4", chunk_size=64)
    planned = exl_loader.plan(tmp_path / "m", gpu_split=split, **options)
    assert [device.end_layer for device in planned.devices] == [1, 3]
    with exl_loader.load(tmp_path / "m", gpu_split=split, **options) as model:
        assert model.allocated_bytes() == planned.total_bytes
        assert torch.equal(model.prompt_logits(ids), expected)


@pytest.mark.exhaustive
@pytest.mark.skipif(not runtimes(), reason="needs gcc's sanitizers")
def test_under_sanitizers():
    chosen = "not sanitizers and not gpu and not shuffled and not model and not cpu"
    result = run_sanitized(__file__, "-k", chosen, "-m", "not slow")
    assert result.returncode == 0, result.stdout[-4000:]
