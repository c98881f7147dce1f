"""Key biases on CUDA: launches, and whole models beside the CPU engine.

What every backend's attention has in common is in operations/test_attention_key_bias.py.
"""

from __future__ import annotations

import pytest
import torch
from test_cuda_attention import SHARED_LIMITS

from backends.operations import test_attention_key_bias
from backends.operations.test_attention import DECODE_TOLERANCE, TOLERANCE
from backends.operations.test_attention_key_bias import assert_like_reference, give_bias, queries
from exl_loader.backends import get_ops
from exl_loader.backends.cuda.attention import AttentionOps, decode_block, prefill_block
from exl_loader.cache.layout import MAX_BIAS_PAIRS, CacheType
from support.attention_cases import (
    attention_target,
    expected_of,
    random_layer,
    relative_error,
    scratch_for,
    shape_of,
)
from support.cache_layers import make_batch
from support.cuda_emulation.sanitized import compiles_all, run_sanitized, runtimes
from support.key_bias_cases import biased_qwen
from support.targets import emulated_launcher


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
    assert [device.end_layer for device in planned.devices if device.has_layers] == [1, 3]
    with exl_loader.load(tmp_path / "m", gpu_split=split, **options) as model:
        assert model.allocated_bytes() == planned.total_bytes
        assert torch.equal(model.prompt_logits(ids), expected)


@pytest.mark.exhaustive
@pytest.mark.skipif(not runtimes(), reason="needs gcc's sanitizers")
@compiles_all
def test_under_sanitizers():
    left_out = ("sanitizers", "gpu", "shuffled", "model", "native", "cpu")
    result = run_sanitized(
        __file__, test_attention_key_bias.__file__, "-k",
        " and ".join(f"not {word}" for word in left_out), "-m", "not slow",
    )
    assert result.returncode == 0, result.stdout[-4000:]
