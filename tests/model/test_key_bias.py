"""Large key biases: taken out of the projection, added by attention, never in the cache."""

from __future__ import annotations

import pytest
import torch

from exl_loader.backends import get_ops
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.cache.layout import MAX_BIAS_PAIRS
from exl_loader.model.parts.key_bias import KEPT_SHARE, remove_from, split_bias
from support import hf_models
from support import model_builder as builder
from support.key_bias_cases import Case, biased_qwen, qwen_bias, relative

REFERENCE = ReferenceOps()


@pytest.fixture(scope="module")
def ops():
    found = get_ops()
    if found.name == "reference":
        pytest.skip("no C++ compiler")
    return found


def test_the_fewest_pairs_are_taken_that_leave_little():
    bias = torch.full((2, 16), 0.1)
    bias[0, 3], bias[0, 11], bias[0, 6], bias[1, 13] = 5.0, -4.0, 3.0, 7.0
    taken = split_bias(bias, torch.tensor([16.0, 16.0]), 8)
    assert taken.pairs[0].tolist() == [3, 6] and taken.pairs[1, 0] == 5
    assert taken.first[0].tolist() == pytest.approx([5.0, 3.0])
    assert taken.second[0].tolist() == pytest.approx([-4.0, 0.1])
    assert taken.first[1].tolist() == pytest.approx([0.1, 0]) and taken.second[1, 1] == 0
    remove_from(bias, taken)
    assert (bias.abs() <= 0.1 + 1e-6).all() and bias[0, 3] == bias[1, 13] == 0


@pytest.mark.parametrize("seed", range(5))
def test_what_stays_is_within_its_share(seed):
    bias = qwen_bias(3, 96, 40, seed=seed, count=7)
    mean_squares = torch.tensor([50.0, 100.0, 400.0])
    taken = split_bias(bias, mean_squares, 40)
    rest = bias.clone()
    remove_from(rest, taken)
    assert torch.equal(rest[:, 80:], bias[:, 80:])
    left = rest[:, :80].square().sum(dim=1)
    assert (left <= KEPT_SHARE * mean_squares).all()
    # With its smallest pair back, it would be too much.
    counts = (taken.first.abs() + taken.second.abs() > 0).sum(dim=1) - 1
    head = torch.arange(3)
    back = taken.first[head, counts].square() + taken.second[head, counts].square()
    assert (left + back > KEPT_SHARE * mean_squares).all()


def test_small_biases_stay_and_there_is_room_for_so_many():
    assert split_bias(torch.full((1, 64), 0.1), torch.tensor([64.0]), 32) is None
    bias = torch.full((1, 256), 9.0)
    taken = split_bias(bias, torch.tensor([1.0]), 128)
    assert taken.pairs.shape == (1, MAX_BIAS_PAIRS)
    remove_from(bias, taken)
    assert int((bias == 0).sum()) == 2 * MAX_BIAS_PAIRS


CASES = [
    dict(past=[700, 0], new=[1, 90]),
    dict(past=[1300], new=[1], heads=6, kv_heads=3, head_dim=128),
    dict(past=[0, 510], new=[150, 3], head_dim=80, half=32, factor=1.3),
    dict(past=[600, 70], new=[40, 1], window=200, softcap=30.0),
    dict(past=[5, 1024], new=[1, 1], heads=71, kv_heads=1, head_dim=64, theta=1e4),
]


@pytest.mark.parametrize("arguments", CASES)
def test_scores_are_those_of_keys_with_the_bias(arguments):
    case = Case(**arguments)
    expected = case.attend(REFERENCE, "fp32")
    assert relative(case.attend(REFERENCE, "fp32", taken_out=True), expected) <= 2e-5


@pytest.mark.parametrize("cache_type", ["q8", "q6", "q4", "q3"])
@pytest.mark.parametrize("size", [50.0, 150.0])
def test_biases_cost_no_accuracy(ops, cache_type, size):
    sizes = dict(heads=14, kv_heads=2, head_dim=128)
    plain, biased = (Case([1000], [60], size=s, **sizes) for s in (0, size))
    loss = relative(plain.attend(ops, cache_type), plain.attend(ops, "fp32"))
    exact = biased.attend(ops, "fp32")
    taken_out = relative(biased.attend(ops, cache_type, taken_out=True), exact)
    inside = relative(biased.attend(ops, cache_type), exact)
    assert taken_out <= 1.05 * loss
    assert inside >= 3 * taken_out


@pytest.mark.parametrize("kind", ["reference", "compiled"])
def test_a_model_with_large_key_biases(tmp_path, ops, kind):
    chosen = ops if kind == "compiled" else REFERENCE
    errors = {}
    ids = list(range(5, 300, 3))
    for size in (0.0, 80.0):
        folder = tmp_path / str(size)
        expected = hf_models.expected_logits(biased_qwen(folder, size), ids)
        for cache_type in ("fp32", "q4"):
            model, cache = builder.build_model(folder, chosen, cache_type=cache_type)
            logits = builder.run_chunks(model, cache, ids, 40)
            errors[size, cache_type] = hf_models.relative_error(logits, expected)
            if size:
                assert all(layer.key_bias.pairs.shape[1] >= 2 for layer in cache.layers)
    assert errors[80.0, "fp32"] <= 2e-4
    assert errors[80.0, "q4"] <= 1.5 * errors[0.0, "q4"] + 1e-3


def test_models_over_several_caches_take_the_bias_out_once(tmp_path, ops):
    biased_qwen(tmp_path / "m", 50.0)
    ids = list(range(9, 200, 4))
    model, cache = builder.build_model(tmp_path / "m", ops, sequences=2)
    before = builder.run_chunks(model, cache, ids, 20)
    other_cache = builder.build_model(tmp_path / "m", ops)[1]
    other = model.with_cache(other_cache)
    assert torch.equal(builder.run_chunks(other, other_cache, ids, 20), before)
    assert torch.equal(builder.run_chunks(model, cache, ids, 20), before)


def test_operations_that_cannot_add_a_bias_keep_it_in_the_projection(tmp_path, monkeypatch):
    monkeypatch.setattr(ReferenceOps, "adds_key_bias", False)
    ids = list(range(9, 90))
    expected = hf_models.expected_logits(biased_qwen(tmp_path / "m", 50.0), ids)
    model, cache = builder.build_model(tmp_path / "m", REFERENCE)
    assert hf_models.relative_error(builder.run_chunks(model, cache, ids, 20), expected) <= 2e-4
    assert all(layer.key_bias is None for layer in cache.layers)
