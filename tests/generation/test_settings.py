"""Settings of requests: every invalid value is refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from exl_loader.generation.settings import (
    NEUTRAL_VALUES,
    SAMPLER_PRIORITY,
    SamplingSettings,
)
from exl_loader.utils.errors import InvalidSettings

NAN, INF = float("nan"), float("inf")

WRONG = {
    "max_new_tokens": [0, -1, 1.5, "5", None, True, NAN],
    "do_sample": [0, "no", None],
    "temperature": [-0.1, NAN, INF, "hot", None],
    "dynamic_temperature": [1],
    "dynatemp_low": [-0.1, NAN],
    "dynatemp_high": [-0.1, None],
    "dynatemp_exponent": [-0.1, INF],
    "smoothing_factor": [-0.1, NAN],
    "smoothing_curve": [0.9, NAN],
    "temperature_last": [None],
    "top_k": [-1, 0.5, NAN, "all"],
    "top_p": [-0.1, 1.1, NAN, None],
    "min_p": [-0.1, 1.1, NAN],
    "typical_p": [-0.1, 1.1],
    "tfs": [-0.1, 1.1],
    "top_a": [-0.1, 1.1],
    "top_n_sigma": [-0.1, INF],
    "epsilon_cutoff": [-1, 10001],
    "eta_cutoff": [-1, 10001],
    "mirostat_mode": [-1, 1, 3, 0.5],
    "mirostat_tau": [-0.1, NAN, 1e38],
    "mirostat_eta": [-0.1, NAN, 1e38],
    "adaptive_target": [-0.1, 1.1],
    "adaptive_decay": [-0.1, 1],
    "xtc_threshold": [-0.1, 1.1],
    "xtc_probability": [-0.1, 1.1],
    "skew": [-101, 101, NAN, "up"],
    "dry_multiplier": [-0.1, NAN],
    "dry_base": [0.9, NAN],
    "dry_allowed_length": [-1, 0.5, 1 << 63],
    "dry_range": [-2, 0.5, None],
    "dry_sequence_breakers": ['"open', "word", [5], 5, {"a": 1}],
    "repetition_penalty": [0, -1, NAN, INF, 1e38, 1e-38],
    "presence_penalty": [NAN, INF, "much"],
    "frequency_penalty": [NAN, INF, None],
    "repetition_penalty_range": [-1, 2.5],
    "repetition_decay": [-1, 2.5, "slow"],
    "encoder_repetition_penalty": [0, -1, NAN, 1e38, 1e-38],
    "no_repeat_ngram_size": [-1, 0.5],
    "guidance_scale": ["1", None, NAN, 1e38, -1e38],
    "negative_prompt": [5, ["a"]],
    "grammar_string": [5, ["a"]],
    "json_schema": [5, "{", "[]", [1], {"a": {1}}],
    "sampler_priority": ["temprature", ["top_k", "top_q"], 5, [5]],
    "regex_pattern": [5, ["a"]],
    "grammar_trigger": [5, ["a"]],
    "token_healing": [1, "yes", None],
    "reasoning_budget_tokens": [-2, 0.5, None],
    "reasoning_budget_message": [5, ["a"]],
    "reasoning_start_token": [5, ["a"]],
    "reasoning_end_token": [5, ["a"]],
    "start_in_reasoning": ["maybe", True, 5, ["auto"]],
    "min_new_tokens": [-1, 0.5, None],
    "allowed_tokens": ["a", [-1], [1.5], [True], 1.5],
    "custom_token_bans": ["a", "1;2", "1.5", "-1", [-1], [1.5], [True], 1.5],
    "logit_bias": [5, "1", {"a": 1}, {"1": "much"}, {"1": NAN}, {-1: 1.0}, [(1,)], [5], {"": 1}],
    "prompt_lookup_num_tokens": [-1, 1.5, None],
    "banned_strings": ["", ["a", ""], ["a", 5], 5, {"a": 1}, "a" * 1001],
    "loop_detect_window": [-1, 0.5, "all"],
    "logprobs": [-1, 1.5, "many"],
    "seed": [-2, 1 << 64, 1.5, "x"],
    "ban_eos_token": [1, "yes", None],
    "skip_special_tokens": [0],
    "stop_strings": [[""], [5], 5, "", b"x"],
    "stop_token_ids": [["a"], [True], "abc"],
}


def test_every_setting_has_an_invalid_value():
    assert WRONG.keys() == {field.name for field in dataclasses.fields(SamplingSettings)}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_invalid_values_are_refused_by_name(name, value):
    with pytest.raises(InvalidSettings, match=name):
        SamplingSettings.from_dict({name: value})


def test_the_defaults_are_neutral():
    assert SamplingSettings.from_dict(None) == SamplingSettings.from_dict({}) == SamplingSettings()


# Preset values of the web UI (its modules/presets.py at v4.7.3).
WEBUI_DEFAULTS = {
    "temperature": 1, "dynatemp_low": 1, "dynatemp_high": 1, "dynatemp_exponent": 1,
    "smoothing_factor": 0, "smoothing_curve": 1, "top_p": 1, "top_k": 0, "min_p": 0,
    "top_n_sigma": 0, "typical_p": 1, "xtc_threshold": 0.1, "xtc_probability": 0,
    "epsilon_cutoff": 0, "eta_cutoff": 0, "tfs": 1, "top_a": 0, "adaptive_target": 0,
    "adaptive_decay": 0.9, "dry_multiplier": 0, "dry_allowed_length": 2, "dry_base": 1.75,
    "repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0,
    "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0,
    "repetition_penalty_range": 1024, "penalty_alpha": 0, "guidance_scale": 1,
    "mirostat_mode": 0, "mirostat_tau": 5, "mirostat_eta": 0.1, "do_sample": True,
    "dynamic_temperature": False, "temperature_last": False,
    "sampler_priority": "\n".join(SAMPLER_PRIORITY),
    "dry_sequence_breakers": '"\\n", ":", "\\"", "*"',
    "negative_prompt": "", "custom_token_bans": None, "grammar_string": "",
}


def test_the_defaults_are_the_web_uis():
    assert SamplingSettings.from_dict(WEBUI_DEFAULTS) == SamplingSettings()


@pytest.mark.parametrize("text", ['"\\n", ":", "abc"', '["\\n", ":", "abc"]', ["\n", ":", "abc"]])
def test_breakers_in_the_web_uis_notation(text):
    settings = SamplingSettings.from_dict({"dry_sequence_breakers": text})
    assert settings.dry_sequence_breakers == ("\n", ":", "abc")


@pytest.mark.parametrize("nothing", [None, "", [], "[]"])
def test_no_breakers(nothing):
    read = SamplingSettings.from_dict({"dry_sequence_breakers": nothing})
    assert read.dry_sequence_breakers == ()


@pytest.mark.parametrize("bans", ["5, 7,,12 ", [5, 7, 12], (5, 7, 12)])
def test_token_bans_in_the_web_uis_notation(bans):
    read = SamplingSettings.from_dict({"custom_token_bans": bans})
    assert read.custom_token_bans == (5, 7, 12)


@pytest.mark.parametrize(
    "biases", [{"7": 2, "5": -100}, {7: 2.0, 5: -100.0}, [(7, 2), (5, -100)], [[5, -100], ["7", 2]]]
)
def test_biases_in_an_apis_notation(biases):
    read = SamplingSettings.from_dict({"logit_bias": biases})
    assert read.logit_bias == ((5, -100.0), (7, 2.0))
    assert hash(read) == hash(SamplingSettings(logit_bias=biases))


@pytest.mark.parametrize(
    "order", ["top_k\ntop_p", "top_k, top_p,", ["top_k", "top_p"], "top_k,top_p,top_k"]
)
def test_priorities_in_the_web_uis_notation(order):
    read = SamplingSettings.from_dict({"sampler_priority": order})
    assert read.sampler_priority == ("top_k", "top_p")


@pytest.mark.parametrize("nothing", [None, "", [], " \n"])
def test_no_priorities_are_the_default_ones(nothing):
    read = SamplingSettings.from_dict({"sampler_priority": nothing})
    assert read.sampler_priority == SAMPLER_PRIORITY


def test_a_negative_prompt_is_text():
    assert SamplingSettings.from_dict({"negative_prompt": "bad"}).negative_prompt == "bad"
    assert SamplingSettings.from_dict({"negative_prompt": None}).negative_prompt == ""
    assert SamplingSettings(guidance_scale=1.5).guidance_scale == 1.5


def test_a_dict_from_a_web_form():
    read = SamplingSettings.from_dict(
        {"max_new_tokens": 20.0, "top_k": 5.0, "temperature": 1, "stop": "end",
         "stop_token_ids": [3], "seed": -1}
    )
    assert read == SamplingSettings(
        max_new_tokens=20, top_k=5, temperature=1, stop_strings=("end",), stop_token_ids=(3,)
    )
    assert SamplingSettings.from_dict({"stop_strings": None}).stop_strings == ()
    assert SamplingSettings.from_dict(read) is read


def test_unknown_names_are_refused_with_a_hint():
    with pytest.raises(InvalidSettings, match="Did you mean temperature"):
        SamplingSettings.from_dict({"temprature": 1})
    with pytest.raises(InvalidSettings, match="an unknown name"):
        SamplingSettings.from_dict({5: 1})
    with pytest.raises(InvalidSettings, match="SamplingSettings or a dict"):
        SamplingSettings.from_dict([1])


@pytest.mark.parametrize("name", sorted(NEUTRAL_VALUES))
def test_unsupported_samplers_must_be_off(name):
    known = {field.name for field in dataclasses.fields(SamplingSettings)}
    assert name not in known
    assert SamplingSettings.from_dict({name: NEUTRAL_VALUES[name]}) == SamplingSettings()
    with pytest.raises(InvalidSettings, match=f"setting {name}.*lacks.*Set {name} to"):
        SamplingSettings.from_dict({name: 0.77})
