"""What requests of TabbyAPI ask of the engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from exl_loader import SamplingSettings
from extension.tabby.request import read

# The fields of a request that asks for nothing, as TabbyAPI fills them in.
NEUTRAL = {
    "max_tokens": None, "min_tokens": 0, "stop": [], "banned_strings": [], "banned_tokens": [],
    "allowed_tokens": [], "token_healing": False, "temperature": 1.0, "temperature_last": False,
    "smoothing_factor": 0.0, "top_k": 0, "top_p": 1.0, "top_a": 0.0, "min_p": 0.0, "tfs": 1.0,
    "typical": 1.0, "skew": 0.0, "xtc_probability": 0.0, "xtc_threshold": 0.1,
    "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
    "penalty_range": -1, "repetition_decay": 0, "dry_multiplier": 0.0, "dry_base": 0.0,
    "dry_allowed_length": 0, "dry_range": 0, "dry_sequence_breakers": [], "mirostat_mode": 0,
    "mirostat_tau": 1.5, "mirostat_eta": 0.3, "add_bos_token": None, "ban_eos_token": False,
    "logit_bias": None, "json_schema": None, "regex_pattern": None, "grammar_string": None,
    "max_temp": 1.0, "min_temp": 1.0, "temp_exponent": 1.0, "logprobs": 0, "top_logprobs": 0,
    "adaptive_target": 1.0, "adaptive_decay": 0.9, "loop_detect_window": 800,
}


# How TabbyAPI is to read answers where nothing is configured.
FORMATS = {
    "reasoning": False, "reasoning_start_token": "<think>", "reasoning_end_token": "</think>",
    "reasoning_budget_tokens": None, "reasoning_budget_message": None, "harmony": False,
    "muse_glimmer": False,
}


def asked(room=100, eos=(), lookup=0, trigger=None, formats=FORMATS, **fields):
    return read(
        SimpleNamespace(**NEUTRAL | fields), room, eos, lookup, trigger, SimpleNamespace(**formats))


def settings_of(**fields) -> SamplingSettings:
    return SamplingSettings.from_dict(asked(**fields).settings)


def test_a_request_that_asks_for_nothing_fills_the_context_and_samples_plainly():
    # Special tokens are shown, because TabbyAPI's parsers look for them.
    expected = SamplingSettings(
        max_new_tokens=100, skip_special_tokens=False, repetition_penalty_range=0,
        mirostat_tau=1.5, mirostat_eta=0.3, loop_detect_window=800)
    assert settings_of() == expected
    assert asked().notices == ()


@pytest.mark.parametrize(("field", "value", "setting", "expected"), [
    ("temperature", 0.0, "temperature", 0.0),
    ("temperature_last", True, "temperature_last", True),
    ("smoothing_factor", 0.3, "smoothing_factor", 0.3),
    ("top_k", 7, "top_k", 7),
    ("top_p", 0.5, "top_p", 0.5),
    ("top_a", 0.2, "top_a", 0.2),
    ("min_p", 0.1, "min_p", 0.1),
    ("tfs", 0.9, "tfs", 0.9),
    ("tfs", 0, "tfs", 1.0),
    ("typical", 0.8, "typical_p", 0.8),
    ("xtc_probability", 0.5, "xtc_probability", 0.5),
    ("xtc_threshold", 0.2, "xtc_threshold", 0.2),
    ("frequency_penalty", 0.4, "frequency_penalty", 0.4),
    ("presence_penalty", 0.4, "presence_penalty", 0.4),
    ("repetition_penalty", 1.2, "repetition_penalty", 1.2),
    ("mirostat_mode", 2, "mirostat_mode", 2),
    ("adaptive_target", 0.3, "adaptive_target", 0.3),
    ("adaptive_target", 1.0, "adaptive_target", 0.0),
    ("adaptive_decay", 0.5, "adaptive_decay", 0.5),
    ("banned_tokens", [3, 5], "custom_token_bans", (3, 5)),
    ("ban_eos_token", True, "ban_eos_token", True),
    ("logit_bias", {4: 2.0}, "logit_bias", ((4, 2.0),)),
    ("json_schema", {"type": "object"}, "json_schema", '{"type": "object"}'),
    ("json_schema", {"name": "x", "schema": {"type": "null"}}, "json_schema", '{"type": "null"}'),
    ("json_schema", {"name": "x"}, "json_schema", '{"name": "x"}'),
    ("grammar_string", 'root ::= "a"', "grammar_string", 'root ::= "a"'),
    ("regex_pattern", "a+", "regex_pattern", "a+"),
    ("allowed_tokens", [1, 7], "allowed_tokens", (1, 7)),
    ("min_tokens", 4, "min_new_tokens", 4),
    ("repetition_decay", 5, "repetition_decay", 5),
    ("skew", -0.5, "skew", -0.5),
    ("token_healing", True, "token_healing", True),
    ("max_tokens", 12, "max_new_tokens", 12),
    ("max_tokens", 0, "max_new_tokens", 100),
    ("max_tokens", 1000, "max_new_tokens", 100),
    ("penalty_range", 64, "repetition_penalty_range", 64),
    ("cfg_scale", 1.5, "guidance_scale", 1.5),
    ("negative_prompt", "no", "negative_prompt", "no"),
    ("logprobs", 1, "logprobs", 1),
])
def test_a_field_is_a_setting(field, value, setting, expected):
    assert getattr(settings_of(**{field: value}), setting) == expected


def test_logprobs_are_as_many_as_the_client_shows():
    assert settings_of(logprobs=1, top_logprobs=4).logprobs == 4


def test_a_dynamic_temperature_needs_rising_bounds():
    chosen = settings_of(min_temp=0.5, max_temp=2.0, temp_exponent=1.5)
    assert chosen.dynamic_temperature
    assert (chosen.dynatemp_low, chosen.dynatemp_high, chosen.dynatemp_exponent) == (0.5, 2, 1.5)
    assert not settings_of(min_temp=2.0, max_temp=0.5).dynamic_temperature


def test_penalties_over_no_tokens_are_none():
    chosen = settings_of(penalty_range=0, repetition_penalty=1.5, frequency_penalty=1.0)
    assert (chosen.repetition_penalty, chosen.frequency_penalty) == (1.0, 0.0)


def test_dry_takes_the_engines_defaults_where_nothing_is_set():
    default = SamplingSettings()
    chosen = settings_of(dry_multiplier=0.8)
    assert chosen.dry_multiplier == 0.8 and chosen.dry_base == default.dry_base
    assert chosen.dry_sequence_breakers == default.dry_sequence_breakers
    chosen = settings_of(dry_multiplier=0.8, dry_base=2.0, dry_allowed_length=3,
                         dry_sequence_breakers=["x"], dry_range=50)
    assert (chosen.dry_base, chosen.dry_allowed_length) == (2.0, 3)
    assert chosen.dry_sequence_breakers == ("x",)
    assert (chosen.dry_range, chosen.repetition_penalty_range) == (50, 0)
    # 0 is all tokens, whatever the range of the penalties is.
    assert settings_of(dry_multiplier=0.8, penalty_range=64).dry_range == 0


def test_stops_are_texts_and_ids_and_the_models_own():
    found = asked(stop=["\n", 5, "", "END", "\n"], eos=(2, 5, None))
    assert found.settings["stop_strings"] == ["\n", "END"] == list(found.stop_strings)
    assert found.settings["stop_token_ids"] == [5, 2]
    assert asked(stop=[5], eos=(2,), ban_eos_token=True).settings["stop_token_ids"] == [5]


def test_banned_strings_are_one_text_or_several():
    """An empty one, as clients send of an empty line, bans nothing."""
    assert settings_of(banned_strings="bad").banned_strings == ("bad",)
    assert settings_of(banned_strings=["bad", "", "worse"]).banned_strings == ("bad", "worse")
    assert settings_of(banned_strings=None).banned_strings == ()


@pytest.mark.parametrize("field", [
    {"json_schema": {"type": "null"}}, {"regex_pattern": "a"}, {"grammar_string": "x"}])
def test_a_grammar_begins_after_reasoning(field):
    assert settings_of(trigger="</think>", **field).grammar_trigger == "</think>"
    assert settings_of(**field).grammar_trigger == ""
    assert settings_of(trigger="</think>").grammar_trigger == ""


@pytest.mark.parametrize("field", [
    {"json_schema": {}}, {"json_schema": ""}, {"regex_pattern": ""}, {"grammar_string": ""}])
def test_an_empty_grammar_is_none(field):
    assert settings_of(trigger="</think>", **field) == settings_of()


def test_fields_that_a_version_lacks_ask_for_nothing():
    found = read(SimpleNamespace(), 10, (), 3, None, SimpleNamespace(**FORMATS))
    assert found.settings["prompt_lookup_num_tokens"] == 3


# Reasoning budgets

REASONING = FORMATS | {"reasoning": True}


def budget_of(formats=REASONING, trigger=None, message=None, reasoning=None, **fields):
    """The settings of a chat's reasoning, and what is reported."""
    found = asked(
        trigger=trigger, formats=formats, reasoning=reasoning, reasoning_budget_message=message,
        **{"reasoning_budget_tokens": None} | fields)
    settings = SamplingSettings.from_dict(found.settings)
    return (settings.reasoning_budget_tokens, settings.reasoning_end_text,
            settings.start_in_reasoning), found.notices


def test_a_budget_is_the_requests_or_else_the_configurations():
    assert budget_of()[0][0] == -1
    assert budget_of(reasoning_budget_tokens=7)[0] == (7, "</think>", "never")
    assert budget_of(reasoning_budget_tokens=0, trigger="</think>")[0] == (
        0, "</think>", "always")
    tokens = SimpleNamespace(max_tokens=9)
    assert budget_of(reasoning=tokens)[0][0] == 9
    assert budget_of(reasoning=tokens, reasoning_budget_tokens=5)[0][0] == 5
    configured = REASONING | {"reasoning_budget_tokens": 3, "reasoning_budget_message": "Stop."}
    assert budget_of(configured)[0] == (3, "Stop.</think>", "never")
    assert budget_of(configured, message="", reasoning_budget_tokens=4)[0] == (
        4, "</think>", "never")
    # A negative number stands for the next source, and completions have no budget at all.
    assert budget_of(configured, reasoning_budget_tokens=-1)[0][0] == 3
    assert "reasoning_budget_tokens" not in asked(formats=configured).settings


def test_a_budget_ends_the_reasoning_as_its_format_does():
    own_tags = REASONING | {"reasoning_start_token": "<a>", "reasoning_end_token": "<b>"}
    assert budget_of(own_tags, reasoning_budget_tokens=1)[0][1] == "<b>"
    harmony = FORMATS | {"harmony": True}
    assert budget_of(harmony, reasoning_budget_tokens=1, message="Stop.")[0][1] == (
        "Stop.<|end|><|start|>assistant<|channel|>final<|message|>")
    glimmer = FORMATS | {"muse_glimmer": True}
    assert budget_of(glimmer, reasoning_budget_tokens=1)[0][1] == (
        "<|eom|><|start|>assistant to=user<|message|>")
    found, notices = budget_of(FORMATS, reasoning_budget_tokens=1)
    assert found[0] == -1 and "no reasoning is configured" in notices[0]


def test_a_budget_beside_a_grammar_needs_a_reasoning_before_it():
    """TabbyAPI says that it ignores the budget then."""
    grammar = {"regex_pattern": "a", "reasoning_budget_tokens": 5}
    assert budget_of(**grammar)[0][0] == -1
    assert budget_of(**grammar, trigger="</think>")[0][0] == 5
