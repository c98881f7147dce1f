"""The mean of keys: found by the sample, not stored, made up for by attention."""

from __future__ import annotations

import pytest
import torch

from exl_loader.backends import get_ops
from exl_loader.backends.cpu_access import InPlaceAccess
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.cache.layout import MAX_BIAS_PAIRS, KeyBias
from exl_loader.model.key_mean import LEAST_SHARE, MEAN_PAIRS, KeySums, store_mean
from exl_loader.model.parts.attention import Attention
from support import hf_models
from support import model_builder as builder
from support.cache_layers import make_layer
from support.key_bias_cases import biased_qwen
from support.tiny import write_tiny_model

CPU = InPlaceAccess()
IDS = list(range(5, 300, 3))


@pytest.fixture(params=["reference", "compiled"])
def ops(request):
    found = ReferenceOps() if request.param == "reference" else get_ops()
    if request.param == "compiled" and found.name == "reference":
        pytest.skip("no C++ compiler")
    return found


def sums_of(keys: torch.Tensor, *steps: int) -> KeySums:
    sums, first = KeySums(*keys.shape[1:]), 0
    for step in steps or (len(keys),):
        sums.add(keys[first : first + step])
        first += step
    return sums


def constant_sums(mean: torch.Tensor) -> KeySums:
    """Sums over a text whose keys are all `mean`."""
    return sums_of(mean.expand(4, -1, -1))


def empty_layer(kv_heads: int, head_dim: int):
    layer = make_layer("fp32", 1, kv_heads, head_dim)
    layer.key_mean = torch.zeros(kv_heads, head_dim)
    layer.key_mean_room = torch.zeros(3, kv_heads * MAX_BIAS_PAIRS, dtype=torch.int32)
    return layer


def dense(bias: KeyBias, head_dim: int) -> torch.Tensor:
    result = torch.zeros(len(bias.pairs), head_dim)
    for head, pairs in enumerate(bias.pairs.tolist()):
        for i, pair in enumerate(pairs):
            result[head, pair] += bias.first[head, i]
            result[head, pair + bias.half] += bias.second[head, i]
    return result


@pytest.mark.parametrize("steps", [(40,), (1, 39), (7, 7, 26), (1,) * 40])
def test_the_first_key_does_not_count_and_steps_do_not_matter(steps):
    keys = torch.randn(40, 2, 16)
    keys[0] = 1e6
    sums, rest = sums_of(keys, *steps), keys[1:].double()
    assert torch.equal(sums.mean(), sums_of(keys).mean())
    assert torch.allclose(sums.mean(), rest.mean(dim=0), atol=1e-12)
    assert torch.allclose(sums.mean_squares(), rest.square().sum(dim=2).mean(dim=0))


def test_one_key_has_no_mean():
    layer = empty_layer(2, 16)
    store_mean(layer, sums_of(torch.randn(1, 2, 16)), 8, CPU)
    assert layer.key_bias is None and not layer.key_mean.any()


def test_the_largest_pairs_are_taken_and_small_ones_stay():
    mean = torch.full((2, 40), 0.01)
    mean[0, 3], mean[0, 19], mean[0, 7], mean[1, 9] = 5.0, -4.0, 3.0, 2.0
    mean[:, 32:] = 9.0  # not turned
    layer = empty_layer(2, 40)
    sums = constant_sums(mean)
    # Elements that are not turned are large and count in the mean square.
    sums._squares /= 50
    store_mean(layer, sums, 16, CPU)
    assert {i for i in range(40) if layer.key_mean[0, i]} == {3, 19, 7, 23}
    assert {i for i in range(40) if layer.key_mean[1, i]} == {9, 25}
    taken = layer.key_mean != 0
    assert torch.allclose(layer.key_mean[taken], mean[taken], rtol=2**-8)
    assert torch.equal(dense(layer.key_bias, 40), layer.key_mean)
    assert layer.key_bias.pairs.shape == (2, 2) and layer.key_bias.half == 16
    assert layer.key_bias.first.data_ptr() == layer.key_mean_room[1].data_ptr()


def test_at_most_so_many_pairs_and_only_of_a_share():
    layer = empty_layer(1, 64)
    store_mean(layer, constant_sums(torch.ones(1, 64)), 32, CPU)
    assert int((layer.key_mean != 0).sum()) == 2 * MEAN_PAIRS and LEAST_SHARE < 1 / 32
    spread = torch.zeros(300, 1, 64)
    spread[1:, 0, 5] = (-1.0) ** torch.arange(299) + 0.9 * LEAST_SHARE**0.5
    layer = empty_layer(1, 64)
    store_mean(layer, sums_of(spread), 32, CPU)
    assert layer.key_bias is None and not layer.key_mean.any()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_keys_that_are_not_finite_are_stored_whole(value):
    mean = torch.ones(2, 16)
    mean[1, 3] = value
    layer = empty_layer(2, 16)
    store_mean(layer, constant_sums(mean), 8, CPU)
    assert layer.key_bias is None and not layer.key_mean.any()


@pytest.mark.parametrize("count", [1, 3, MAX_BIAS_PAIRS - 1, MAX_BIAS_PAIRS])
def test_a_bias_that_was_taken_out_of_the_projection_stays(count):
    head_dim, half = 128, 64
    pairs = torch.stack([torch.arange(count), torch.arange(count) + 8]).int()
    first, second = torch.randn(2, 2, count)
    layer = empty_layer(2, head_dim)
    layer.key_bias = KeyBias(pairs, first, second, half)
    before = dense(layer.key_bias, head_dim)
    mean = torch.randn(2, head_dim) + 2
    store_mean(layer, constant_sums(mean), half, CPU)
    assert layer.key_bias.pairs.shape[1] <= MAX_BIAS_PAIRS
    assert torch.equal(dense(layer.key_bias, head_dim), before + layer.key_mean)
    assert torch.equal(layer.key_mean, layer.key_mean.bfloat16().float())
    found = int((layer.key_mean != 0).any(dim=0).sum())
    assert (found > 0) == (count < MAX_BIAS_PAIRS)


# Norms of keys, biases, elements that are not turned, two RoPEs, pairs side by side, no RoPE.
MODELS = ["llama", "qwen2", "qwen3", "stablelm", "phi", "gemma3", "cohere", "gpt2"]


@pytest.mark.parametrize("name", MODELS)
def test_scores_do_not_depend_on_the_mean(tmp_path, name, ops):
    """A mean as large as the keys, in an exact cache."""
    hf = hf_models.make_model(name, 11, tmp_path / "m")
    expected = hf_models.expected_logits(hf, IDS)
    model, cache = builder.build_model(tmp_path / "m", ops)
    count = 0
    for part, layer in zip(model._parts.layers, cache.layers, strict=True):
        attention = part.attention
        if attention.may_add_bias:
            heads, head_dim = attention.shape.num_kv_heads, attention.shape.head_dim
            layer.key_mean = torch.zeros(heads, head_dim)
            layer.key_mean_room = torch.zeros(3, heads * MAX_BIAS_PAIRS, dtype=torch.int32)
            store_mean(layer, constant_sums(torch.randn(heads, head_dim)), attention.rope.pairs,
                       CPU)
            count += layer.key_bias is not None
    assert (count > 0) == (name not in ("cohere", "gpt2"))
    assert count < len(cache.layers) or name != "gemma3"
    logits = builder.run_chunks(model, cache, IDS, 40)
    bound = 1e-4 if ops.name == "reference" else 2e-2
    assert hf_models.logits_error(model, logits, expected) <= bound


def shifted_llama(folder):
    """Save a random Llama whose keys have a mean in two channels of each head, without a bias."""
    hf = hf_models.make_model("llama", 5, folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        table = hf.model.embed_tokens.weight
        common = torch.randn(table.shape[1], generator=generator)
        table += 3 * table.std() * common
        for layer in hf.model.layers:
            attention = layer.self_attn
            # As in trained models, queries are small where keys have a large mean.
            for channel, other in ((3, 35), (62, 30)):
                keys = attention.k_proj.weight.view(-1, 64, len(common))
                keys[:, channel] += 2 * common / common.norm()
                queries = attention.q_proj.weight.view(-1, 64, len(common))
                queries[:, [channel, other]] *= 0.02
    hf.save_pretrained(folder)
    return hf


@pytest.mark.parametrize("cache_type", ["q6_fp16", "q4_fp16", "q3_fp16"])
def test_keys_with_a_mean_are_stored_better_without_it(tmp_path, monkeypatch, cache_type, ops):
    shifted_llama(tmp_path / "m")
    options = {"ctx_size": 600, "cache_type": cache_type}
    ids = [3 + i * 37 % 250 for i in range(560)]
    exact = builder.run_chunks(*builder.build_model(tmp_path / "m", ops, ctx_size=600), ids, 64)
    errors = []
    for stored_whole in (False, True):
        if stored_whole:
            monkeypatch.setattr(Attention, "may_add_bias", False)
        model, cache = builder.build_model(tmp_path / "m", ops, **options)
        for layer in cache.layers:
            assert (layer.key_bias is None) == (layer.key_mean is None) == stored_whole
        logits = builder.run_chunks(model, cache, ids, 64)
        errors.append(hf_models.relative_error(logits, exact))
    assert errors[0] < 0.8 * errors[1]


def test_a_bias_of_the_projection_and_a_mean_together(tmp_path, ops):
    expected = hf_models.expected_logits(biased_qwen(tmp_path / "m", 80.0), IDS)
    model, cache = builder.build_model(tmp_path / "m", ops, cache_type="q6")
    logits = builder.run_chunks(model, cache, IDS, 40)
    assert hf_models.relative_error(logits, expected) <= 2e-2
    assert all(layer.key_bias is not None for layer in cache.layers)


@pytest.mark.parametrize("options", [
    {"chunk_size": 7}, {"chunk_size": 1}, {"chunk_size": 64}, {"sequences": 3},
    {"device": builder.split(1, 2)}, {},
])
def test_the_same_mean_however_a_model_is_loaded(tmp_path, options, ops):
    shifted_llama(tmp_path / "m")
    _, cache = builder.build_model(tmp_path / "m", ops, cache_type="q4")
    _, again = builder.build_model(tmp_path / "m", ops, cache_type="q4", **options)
    for layer, other in zip(cache.layers, again.layers, strict=True):
        assert torch.equal(layer.key_mean, other.key_mean) and layer.key_mean.any()
        assert torch.equal(layer.key_mean_room, other.key_mean_room)


def test_caches_of_one_model_have_their_own_means(tmp_path):
    """A model over an fp16 cache computes the same before and after one over a q4 cache is made."""
    ops = ReferenceOps()
    shifted_llama(tmp_path / "m")
    model, cache = builder.build_model(tmp_path / "m", ops, cache_type="fp16")
    before = builder.run_chunks(model, cache, IDS, 20)
    other_cache = builder.build_model(tmp_path / "m", ops, cache_type="q4")[1]
    other = model.with_cache(other_cache)
    assert other_cache.layers[0].key_mean.any() and cache.layers[0].key_mean is None
    builder.run_chunks(other, other_cache, IDS, 20)
    assert torch.equal(builder.run_chunks(model, cache, IDS, 20), before)


@pytest.mark.parametrize("cache_type", ["fp16", "q8", "q8_q4"])
def test_keys_of_8_bits_and_more_are_stored_whole(tmp_path, cache_type):
    folder = write_tiny_model(tmp_path / "m")
    _, cache = builder.build_model(folder, ReferenceOps(), cache_type=cache_type)
    assert all(layer.key_mean is layer.key_bias is None for layer in cache.layers)
