"""Samplers together: their order, their states, bans, the roles of tokens, and the cost."""

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
from support.counting import count
from support.fake_model import fake_engine


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


# States and decisions of samplers

def test_xtc_happens_as_often_as_asked():
    row = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    sampler = Sampler(SamplingSettings(xtc_probability=0.3, xtc_threshold=0.15), 5)
    happened = sum(len(sampler.candidates(LogitsRow(row), [])) == 2 for _ in range(4000))
    # Mean 1200, standard deviation 29.
    assert abs(happened - 1200) < 6 * 29
    spared = TokenRoles(spared_ids=frozenset({1}))
    always = SamplingSettings(xtc_probability=1, xtc_threshold=0.15)
    assert len(Sampler(always, 5, spared).candidates(LogitsRow(row), [])) == 4


def test_mirostat_keeps_the_surprise_near_its_target():
    rng = np.random.default_rng(11)
    for tau in (2.0, 4.0):
        sampler = Sampler(SamplingSettings(mirostat_mode=2, mirostat_tau=tau, mirostat_eta=0.1), 3)
        surprises = []
        for _ in range(600):
            row = (rng.standard_normal(500) * 2).astype(np.float32)
            share = final_share(sampler, row)
            surprises.append(-np.log2(share))
        assert np.mean(surprises[100:]) == pytest.approx(tau, abs=0.15)


def final_share(sampler: Sampler, row) -> float:
    """Draw a token; return its probability among the remaining candidates."""
    left = sampler.candidates(LogitsRow(row), [])
    token = sampler.sample(LogitsRow(row), [])
    return float(defined.softmax(left.logits)[left.ids == token][0])


def test_requests_have_separate_states():
    row = np.random.default_rng(12).standard_normal(400).astype(np.float32)
    settings = SamplingSettings(mirostat_mode=2, xtc_probability=0.5, xtc_threshold=0.01, seed=9)
    alone = [Sampler(settings).sample(LogitsRow(row), []) for _ in range(1)]
    one, two = Sampler(settings), Sampler(settings)
    together = [(one.sample(LogitsRow(row), []), two.sample(LogitsRow(row), [])) for _ in range(30)]
    assert together[0][0] == alone[0]
    assert all(first == second for first, second in together)


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


# Roles of tokens

def roles_of(options, tokenizer, eos_ids=(2,)) -> TokenRoles:
    return TokenRoles.from_request(
        SamplingSettings(**options), tokenizer, vocab_size=300, eos_ids=eos_ids, prompt_ids=[7]
    )


def test_roles_are_looked_up_in_the_tokenizer(byte_tokenizer):
    def ids(text: str) -> set[int]:
        return set(byte_tokenizer.encode(text, add_bos=False))

    roles = roles_of({"dry_multiplier": 1}, byte_tokenizer)
    assert roles.breaker_ids == ids("\n") | ids(":") | ids('"') | ids("*")
    roles = roles_of({"dry_multiplier": 1, "dry_sequence_breakers": '"one;"'}, byte_tokenizer)
    assert roles.breaker_ids == ids(";")
    assert roles_of({"xtc_probability": 0.5}, byte_tokenizer).spared_ids == ids("\n") | {2}
    assert roles_of({"xtc_probability": 0.5}, None).spared_ids == {2}
    assert roles_of({}, byte_tokenizer).banned_ids == ()
    roles = roles_of({"custom_token_bans": "9,4", "ban_eos_token": True}, byte_tokenizer)
    assert roles.banned_ids == (2, 4, 9)


def test_breakers_are_tokens_inside_a_text(spm_tokenizer):
    """SentencePiece has tokens for the beginning of a word, which include a space."""
    def last(text: str) -> list[int]:
        return spm_tokenizer.encode(text, add_bos=False)[-1:]

    letter = next(c for c in "tabcdeho" if last(c) != last("a" + c))
    options = {"dry_multiplier": 1, "dry_sequence_breakers": [letter]}
    assert roles_of(options, spm_tokenizer).breaker_ids == set(last("a" + letter))


def test_breakers_need_a_tokenizer():
    assert roles_of({}, None).breaker_ids == frozenset()
    assert roles_of({"dry_multiplier": 1, "dry_sequence_breakers": []}, None).breaker_ids == set()
    with pytest.raises(InvalidSettings, match="dry_sequence_breakers.*no tokenizer"):
        roles_of({"dry_multiplier": 1}, None)


# Cost

COMMON = (
    {}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
    {"temperature": 0.7, "top_p": 0.95}, {"temperature": 1.2, "min_p": 0.05},
    {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1, "dry_multiplier": 0.8,
     "dry_sequence_breakers": []},
    {"typical_p": 0.9}, {"top_a": 0.2}, {"eta_cutoff": 3}, {"mirostat_mode": 2},
    {"xtc_probability": 1, "xtc_threshold": 0.1},
    {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1},
)


@pytest.mark.parametrize("scale", [4, 0.5, 0])
@pytest.mark.parametrize("options", COMMON)
def test_no_common_setting_sorts_the_vocabulary(options, scale):
    rng = np.random.default_rng()
    row = (rng.standard_normal(152_064) * scale).astype(np.float32)
    history = rng.integers(0, 152_064, 4000)
    sampler = Sampler(SamplingSettings(**options), 1)
    sampler.sample(LogitsRow(row), history)
    counts = count(lambda: sampler.sample(LogitsRow(row), history))
    assert counts.sorted_elements < len(row) / 16
    # A loop over tokens in Python would be a thousand times more.
    assert counts.calls < 1000


# In the engine

def test_bans_and_biases_reach_a_generation():
    engine, _, _ = fake_engine(lambda text: text[-1] + 1)
    plain = {"max_new_tokens": 3, "temperature": 0}
    assert list(engine.generate_ids([5], plain)) == [6, 7, 8]
    banned = {**plain, "custom_token_bans": "6,0"}
    assert list(engine.generate_ids([5], banned))[0] == 1
    assert list(engine.generate_ids([5], {**plain, "logit_bias": {"9": 20}})) == [9, 9, 9]


@pytest.mark.parametrize(
    ("options", "name"),
    [({"custom_token_bans": [300]}, "custom_token_bans"),
     ({"logit_bias": {"300": 1}}, "logit_bias")],
)
def test_ids_outside_the_vocabulary_are_refused(options, name):
    engine, _, _ = fake_engine(lambda text: 1)
    with pytest.raises(InvalidSettings, match=f"{name}.*0 to 299.*300"):
        engine.generate_ids([5], options)


def test_the_same_seed_and_settings_give_the_same_ids():
    engine, _, _ = fake_engine(lambda text: text[-1] % 7 + 1)
    options = {
        "temperature": 3, "top_p": 0.95, "mirostat_mode": 2, "mirostat_tau": 4,
        "xtc_probability": 0.5, "xtc_threshold": 0.001, "dry_multiplier": 1,
        "dry_sequence_breakers": [], "frequency_penalty": 0.5, "max_new_tokens": 60,
        "ban_eos_token": True,
    }
    first = engine.generate_ids([5, 6], options)
    ids = list(first)
    assert len(ids) == 60 and len(set(ids)) > 10
    assert list(engine.generate_ids([5, 6], {**options, "seed": first.seed})) == ids
    assert list(engine.generate_ids([5, 6], {**options, "seed": first.seed + 1})) != ids
