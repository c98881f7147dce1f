"""Saved settings of the web UI that name our loaders, updated for today's page."""

from __future__ import annotations

import copy

import pytest

from extension.panel.panel import ModelChoice
from extension.webui.options import RETIRED, with_current_values


@pytest.mark.parametrize(
    ("saved", "shown"),
    [({"cache_4bit": True}, ("q4", False, True)),
     ({"cache_4bit": True, "cache_8bit": True, "alpha_value": 2}, ("q8", True, False)),
     ({"cache_8bit": True, "cache_type": "q4_0"}, ("q4_0", False, True)),
     ({"cache_type": "Q6", "cache_4bit": True}, ("Q6", False, False)),
     ({"cache_type": None, "cache_4bit": False}, ("fp16", False, False)),
     ({"max_seq_len": "2048", "alpha_value": None, "compress_pos_emb": "4"}, None)])
def test_saved_toggles_match_the_cache_type_and_numbers_are_numbers(saved, shown):
    entry = {"loader": "ExLlamav2_HF", **saved}
    once = dict(with_current_values({"a$": entry})["a$"])
    values = tuple(once.get(name) for name in ("cache_type", "cache_8bit", "cache_4bit"))
    assert values == (shown or (None,) * 3), "options that the file does not name are left out"
    before = ModelChoice.from_values({"ctx_size": saved.get("max_seq_len"), **saved})
    after = ModelChoice.from_values(once)
    assert after == before, "the load is the same"
    assert all(isinstance(once[n], (int, float)) for n in once if n in ("ctx_size", "alpha_value"))
    assert with_current_values({"a$": once})["a$"] == once


@pytest.mark.parametrize("loader", RETIRED)
def test_the_folder_decides_for_models_saved_with_a_retired_loader(loader):
    """Today's web UI fails with a KeyError if a saved setting names an unknown loader."""
    entry = {"loader": loader, "max_seq_len": 4096, "compress_pos_emb": 2, "wbits": 4}
    expected = {"max_seq_len": 4096, "ctx_size": 4096, "compress_pos_emb": 2.0, "wbits": 4}
    assert with_current_values({"a$": entry}) == {"a$": expected}


@pytest.mark.parametrize("config", [
    {"a$": {"loader": "another plugin's", "max_seq_len": 1, "cache_8bit": True}},
    {"a$": {"cache_4bit": True}}, {"a$": None}, {"a$": []}, {}, None, []])
def test_settings_of_other_loaders_are_unchanged(config):
    assert with_current_values(copy.deepcopy(config)) == config
