"""What configurations of TabbyAPI ask of the engine."""

from __future__ import annotations

import pytest

import exl_loader
from exl_loader import InvalidSettings, LoadOptions
from extension.tabby import options
from extension.tabby.options import choose

# What TabbyAPI passes on where its configuration has no more than a model's name.
DEFAULTS = {
    "model_dir": "models", "cache_mode": "FP16", "tensor_parallel": False, "gpu_split_auto": True,
    "tensor_parallel_backend": "native", "autosplit_reserve": [96], "gpu_split": [],
    "cpu_moe_offload_layers": 0, "rope_scale": 1.0, "chunk_size": 2048, "output_chunking": True,
    "vision": False, "reasoning": False,
    "draft_model": {"draft_model_dir": "models", "draft_mode": "model", "draft_gpu_split": []},
}


def test_the_defaults_take_the_context_that_fits_and_report_nothing(tiny_model_dir):
    choice = choose(tiny_model_dir, DEFAULTS)
    assert choice.load == {
        "ctx_size": "auto", "cache_type": "fp16", "chunk_size": 2048, "compress_pos_emb": 1.0,
        "alpha_value": 1.0,
    }
    assert choice.notices == () and not choice.is_length_chosen
    assert exl_loader.plan(tiny_model_dir, **choice.for_plan()).fits


@pytest.mark.parametrize(("mode", "expected"), [
    ("FP16", "fp16"), ("fp16", "fp16"), ("Q8", "q8"), ("Q6", "q6"), ("Q4", "q4"), ("Q3", "q3"),
    ("8,8", "q8"), ("8,4", "q8_q4"), ("6, 4", "q6_q4"), ("FP8", "q8"), ("3,3", "q3"),
])
def test_cache_modes(mode, expected):
    assert options.cache_type("cache_mode", mode) == expected
    LoadOptions(cache_type=expected).check()


@pytest.mark.parametrize("mode", ["5,5", "8,7", "2,2", "Q5", "9,9", "8", "", "8,8,8"])
def test_cache_modes_that_the_engine_lacks_are_refused_with_those_that_it_has(mode):
    with pytest.raises(InvalidSettings, match="cache_mode: expected FP16, Q8, Q6, Q4, Q3"):
        options.cache_type("cache_mode", mode)


def test_lengths(tiny_model_dir):
    own = exl_loader.plan(tiny_model_dir).own_length

    def lengths(**values):
        choice = choose(tiny_model_dir, values)
        return choice.load["ctx_size"], choice.load.get("cache_size"), choice.is_length_chosen

    assert lengths() == ("auto", None, False)
    assert lengths(max_seq_len=512) == (512, None, True)
    assert lengths(max_seq_len=256, cache_size=1024) == (256, 1024, True)
    # A cache of many requests does not stretch the length of one.
    assert lengths(cache_size=own * 4) == (own, own * 4, True)
    choice = choose(tiny_model_dir, {"max_seq_len": 1024, "cache_size": 512})
    assert (choice.load["ctx_size"], choice.load["cache_size"]) == (512, 512)
    assert "max_seq_len: 1,024 tokens do not fit into a cache_size of 512" in choice.notices[0]


def test_rope_is_stretched_to_a_longer_length_unless_it_is_configured(tiny_model_dir):
    own = exl_loader.plan(tiny_model_dir).own_length
    twice = {"max_seq_len": 2 * own}
    (line,) = choose(tiny_model_dir, twice).notices
    assert line.startswith("rope_alpha: 2.63") and f"{own:,} tokens" in line
    assert choose(tiny_model_dir, twice | {"rope_alpha": "auto"}).load["alpha_value"] == (
        options.automatic_alpha(own, 2 * own))
    chosen = choose(tiny_model_dir, twice | {"rope_alpha": 1.5})
    assert chosen.load["alpha_value"] == 1.5 and chosen.notices == ()
    scaled = choose(tiny_model_dir, twice | {"rope_scale": 2.0})
    assert scaled.load["alpha_value"] == 1.0 and scaled.load["compress_pos_emb"] == 2.0


def test_alpha_is_1_up_to_the_own_length_and_then_rises():
    assert [options.automatic_alpha(1000, length) for length in (1, 999, 1000)] == [1, 1, 1]
    rising = [options.automatic_alpha(1000, length) for length in range(1001, 8000, 500)]
    assert rising == sorted(rising) and rising[0] == 1 and rising[-1] > 20


def test_options_without_effect_are_reported_by_name(tiny_model_dir):
    asked = {
        "tensor_parallel": True, "autosplit_reserve": [96, 512], "cpu_moe_offload_layers": 3,
        "vision": True,
    }
    notices = choose(tiny_model_dir, DEFAULTS | asked).notices
    assert [line.split(":")[0] for line in notices] == list(asked)
    assert all("does nothing here" in line for line in notices)


def test_devices_and_batches(tiny_model_dir):
    chosen = choose(tiny_model_dir, {
        "gpu_split": [20.5, 24], "chunk_size": 512, "max_batch_size": 4}).load
    assert chosen["gpu_split"] == "20.5,24"
    assert choose(tiny_model_dir, {"gpu_split": "20,24;16"}).load["gpu_split"] == "20,24;16"
    assert (chosen["chunk_size"], chosen["max_batch_size"]) == (512, 4)


def test_options_of_the_engine_are_passed_on(tiny_model_dir):
    own = {"device": "cpu", "memory_limit": "1GiB", "cache_window": 0, "max_lora_bytes": "1MiB",
           "embedding_device": "cpu", "machines": "tcp://192.0.2.1:29500"}
    chosen = choose(tiny_model_dir, DEFAULTS | own).load
    assert chosen.items() >= own.items()
    assert set(options.ENGINE_OPTIONS) <= set(LoadOptions.names("load"))


def test_draft_models(tiny_model_dir):
    draft = {"draft_model_dir": "drafts", "draft_model_name": "small", "draft_num_tokens": 6}
    choice = choose(tiny_model_dir, {"draft_model": draft, "cache_mode": "Q8"})
    assert choice.load["model_draft"].replace("\\", "/") == "drafts/small"
    assert choice.load["draft_max"] == 6 and choice.lookup_tokens == 0 and not choice.notices
    disabled = choose(tiny_model_dir, {"draft_model": draft | {"draft_mode": "disabled"}})
    assert "model_draft" not in disabled.load
    odd = draft | {"draft_cache_mode": "FP16", "draft_rope_alpha": 2.0, "dynamic_draft": True}
    notices = choose(tiny_model_dir, {"draft_model": odd, "cache_mode": "Q4"}).notices
    assert [line.split(":")[0] for line in notices] == [
        "draft_cache_mode", "draft_rope_alpha"]


def test_ngram_drafts_are_prompt_lookup(tiny_model_dir):
    def lookup(**draft):
        return choose(tiny_model_dir, {"draft_model": {"draft_mode": "ngram", **draft}})

    assert lookup().lookup_tokens == options.LOOKUP_TOKENS and not lookup().notices
    assert lookup(draft_num_tokens=7, ngram_match_min=2).lookup_tokens == 7
    assert "ngram_match_min: 3 does nothing" in lookup(ngram_match_min=3).notices[0]
    with pytest.raises(InvalidSettings, match="draft_mode.*'mtp'"):
        choose(tiny_model_dir, {"draft_model": {"draft_mode": "mtp"}})
