"""Samplers together: their order, bans, and greedy settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

import support.samplers_defined as defined
from exl_loader.generation.forward_model import LogitsRow
from exl_loader.generation.sampling import SAMPLERS, Sampler, TokenRoles
from exl_loader.generation.sampling.pipeline import chosen_samplers
from exl_loader.generation.settings import SAMPLER_PRIORITY, SamplingSettings
from exl_loader.utils.errors import InvalidSettings


def final_distribution(row, options, history=(), roles=None) -> dict[int, float]:
    left = Sampler(SamplingSettings(**options), 1, roles).candidates(LogitsRow(row), history)
    share = defined.softmax(left.logits)
    return {int(i): float(p) for i, p in zip(left.ids, share, strict=True) if p > 0}


def test_samplers_are_listed_in_the_default_order():
    # These two always run last.
    names = [name for name in SAMPLER_PRIORITY if name not in ("mirostat", "adaptive_p")]
    assert [sampler.name for sampler in SAMPLERS] == names


def test_samplers_run_in_the_order_of_the_priority():
    row = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    options = {"temperature": 0.25, "top_p": 0.75}
    assert final_distribution(row, {**options, "sampler_priority": "temperature\ntop_p"}) == {0: 1}
    late = final_distribution(row, {**options, "sampler_priority": "top_p, temperature"})
    assert late == pytest.approx({0: 625 / 706, 1: 81 / 706})
    # Samplers that are not named run first.
    assert final_distribution(row, {**options, "sampler_priority": ["top_p"]}) == {0: 1}
    assert final_distribution(row, {**options, "sampler_priority": ["temperature"]}) == late
    assert final_distribution(row, {**options, "temperature_last": True}) == late


def test_temperature_last_moves_temperatures_and_smoothing():
    settings = SamplingSettings(
        temperature_last=True, temperature=2, dynamic_temperature=True, smoothing_factor=1,
        min_p=0.1, no_repeat_ngram_size=2, sampler_priority="quadratic_sampling,min_p",
    )
    assert [sampler.name for sampler in chosen_samplers(settings)] == [
        "no_repeat_ngram", "min_p", "temperature", "dynamic_temperature", "quadratic_sampling",
    ]


def test_samplers_that_are_off_do_not_run():
    assert chosen_samplers(SamplingSettings()) == ()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_all_samplers_at_once(seed):
    """Compared with the definitions, applied in the default order."""
    rng = np.random.default_rng(seed)
    row = (rng.standard_normal(400) * 3).astype(np.float32)
    history = rng.integers(0, 400, 80)
    actual = final_distribution(row, {
        "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2,
        "repetition_penalty_range": 50, "top_n_sigma": 2.5, "temperature": 1.5,
        "dynamic_temperature": True, "dynatemp_low": 0.7, "dynatemp_high": 1.3,
        "smoothing_factor": 0.1, "smoothing_curve": 1.5, "top_k": 60, "top_p": 0.98,
        "typical_p": 0.97, "epsilon_cutoff": 10, "eta_cutoff": 20, "tfs": 0.99, "top_a": 0.05,
        "min_p": 0.01, "encoder_repetition_penalty": 1.1,
    }, history, TokenRoles(prompt_ids=range(50)))
    scores = torch.tensor(row.astype(np.float64))[None]
    recent, counts = np.unique(history[-50:], return_counts=True)
    scores = hf.RepetitionPenaltyLogitsProcessor(1.2)(torch.tensor(recent)[None], scores)
    expected = scores[0].numpy()
    expected[recent] -= 0.3 + 0.2 * counts
    expected = defined.smooth(defined.dynamic_temperature(
        defined.top_n_sigma(expected, 2.5) / 1.5, 0.7, 1.3, 1), 0.1, 1.5)
    scores = torch.tensor(expected)[None]
    for warper in (hf.TopKLogitsWarper(60), hf.TopPLogitsWarper(0.98),
                   hf.TypicalLogitsWarper(0.97), hf.EpsilonLogitsWarper(0.001),
                   hf.EtaLogitsWarper(0.002)):
        scores = warper(torch.zeros(1, 1), scores)
    expected = defined.top_a(defined.tail_free(scores[0].numpy(), 0.99), 0.05)
    scores = hf.MinPLogitsWarper(0.01)(torch.zeros(1, 1), torch.tensor(expected)[None])
    prompt = torch.arange(50)[None]
    scores = hf.EncoderRepetitionPenaltyLogitsProcessor(1.1, prompt)(torch.zeros(1, 1), scores)
    share = defined.softmax(scores[0].numpy())
    assert len(actual) > 5
    assert actual == pytest.approx({int(i): share[i] for i in np.flatnonzero(share)}, rel=1e-3)



def test_xtc_happens_as_often_as_asked():
    row = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    sampler = Sampler(SamplingSettings(xtc_probability=0.3, xtc_threshold=0.15), 5)
    happened = sum(len(sampler.candidates(LogitsRow(row), [])) == 2 for _ in range(4000))
    # Mean 1200, standard deviation 29.
    assert abs(happened - 1200) < 6 * 29
    spared = TokenRoles(spared_ids=frozenset({1}))
    always = SamplingSettings(xtc_probability=1, xtc_threshold=0.15)
    assert len(Sampler(always, 5, spared).candidates(LogitsRow(row), [])) == 4


def test_a_late_ban_leaves_at_least_one_token():
    """The filters keep only a token that repeats an n-gram, and it is still not drawn."""
    row = np.array([1, 9, 2, 0], np.float32)
    history = [0, 1, 0]
    for options in ({"top_k": 1}, {"top_p": 0.5}, {"temperature": 0}, {"min_p": 0.9}):
        kept = final_distribution(row, {**options, "no_repeat_ngram_size": 2}, history)
        assert 1 not in kept and max(kept, key=lambda i: kept[i]) == 2


def test_penalties_apply_to_greedy_settings():
    row = np.array([5, 4.9, 0], np.float32)
    for options in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.2},
                    {"frequency_penalty": 0.2}, {"no_repeat_ngram_size": 1},
                    {"dry_multiplier": 1, "dry_allowed_length": 1},
                    {"logit_bias": {0: -1}}):
        for way in ({"temperature": 0}, {"do_sample": False}, {"top_k": 1}):
            sampler = Sampler(SamplingSettings(**options, **way), 1)
            assert sampler.sample(LogitsRow(row), [0, 0]) == 1
    reward = {"encoder_repetition_penalty": 1.1, "do_sample": False}
    sampler = Sampler(SamplingSettings(**reward), 1, TokenRoles(prompt_ids=[1]))
    assert sampler.sample(LogitsRow(row), []) == 1


def test_filters_do_not_apply_to_greedy_settings():
    row = np.array([1, 5, 4.9], np.float32)
    for options in ({"xtc_probability": 1}, {"typical_p": 0.01}, {"mirostat_mode": 2},
                    {"adaptive_target": 0.01}, {"smoothing_factor": 1, "smoothing_curve": 9}):
        for way in ({"temperature": 0}, {"do_sample": False}):
            assert Sampler(SamplingSettings(**options, **way), 1).sample(LogitsRow(row), []) == 1


def test_bans_of_all_tokens_are_an_error():
    row = LogitsRow(np.zeros(3, np.float32))
    with pytest.raises(InvalidSettings, match="token bans.*Ban fewer tokens"):
        Sampler(SamplingSettings(), 1, TokenRoles(banned_ids=(0, 1, 2))).sample(row, [])
    with pytest.raises(InvalidSettings, match="token bans.*no_repeat_ngram_size"):
        Sampler(SamplingSettings(no_repeat_ngram_size=1, top_k=2), 1).sample(row, [0, 1, 2])


def test_the_first_token_of_an_empty_history():
    row = np.zeros(10, np.float32)
    options = {"repetition_penalty": 1.5, "frequency_penalty": 1, "dry_multiplier": 1,
               "no_repeat_ngram_size": 2, "presence_penalty": 1}
    assert len(final_distribution(row, options)) == 10
