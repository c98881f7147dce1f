"""cache_size, the tokens that all texts share, apart from ctx_size, the reach of one."""

from __future__ import annotations

import json

import pytest

import exl_loader
from exl_loader.cache.layout import PAGE_LEN
from exl_loader.commands import cli
from exl_loader.memory.reservation.text import refusal, render
from exl_loader.utils.errors import InvalidSettings, PromptTooLong
from extension.panel.gauge import gauge_html
from support import in_threads
from support.sparse import LLAMA_2_7B, write_sparse_exl2
from support.tiny import write_tiny_model

GREEDY = {"temperature": 0, "ban_eos_token": True}


@pytest.fixture(scope="module")
def draft_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("draft") / "model", seed=9, hidden_size=32,
                            num_hidden_layers=1, intermediate_size=64)


@pytest.mark.parametrize("cache_type", ["fp16", "q4"])
@pytest.mark.parametrize("drafted", [False, True])
def test_the_plan_with_a_cache_size_equals_what_is_allocated(
    tiny_model_dir, draft_dir, cache_type, drafted
):
    options = {"ctx_size": 512, "cache_type": cache_type, "max_batch_size": 2}
    if drafted:
        options["model_draft"] = draft_dir
    one = exl_loader.plan(tiny_model_dir, **options)
    four = exl_loader.plan(tiny_model_dir, cache_size=2000, **options)
    assert (one.cache_size, four.cache_size) == (512, 2048)
    assert four.cache_bytes == 4 * one.cache_bytes
    assert four.total_bytes - one.total_bytes == 3 * one.cache_bytes
    assert four.ctx_size == one.ctx_size == 512
    with exl_loader.load(tiny_model_dir, cache_size=2000, **options) as model:
        assert model.allocated_bytes() == four.total_bytes
        cache = model._generator._scheduler.cache
        assert cache.num_pages == 8
        if drafted:
            assert model._generator._scheduler.drafts.draft_model._cache.num_pages == 8


def test_a_draft_with_its_own_context_has_a_cache_of_that_size(tiny_model_dir, draft_dir):
    options = {"ctx_size": 512, "model_draft": draft_dir, "ctx_size_draft": 300,
               "max_batch_size": 2}
    one = exl_loader.plan(tiny_model_dir, **options)
    four = exl_loader.plan(tiny_model_dir, cache_size=2048, **options)
    own = exl_loader.plan(tiny_model_dir, ctx_size=512, max_batch_size=2)
    assert four.cache_bytes - one.cache_bytes == 3 * own.cache_bytes
    with exl_loader.load(tiny_model_dir, cache_size=2048, **options) as model:
        assert model.allocated_bytes() == four.total_bytes


def test_each_text_reaches_ctx_size_and_all_together_cache_size(tiny_model_dir):
    options = {"ctx_size": 512, "cache_size": 1024, "max_batch_size": 2}
    prompts = [[5, 6, 7], [8, 9]]
    settings = GREEDY | {"max_new_tokens": 5000}
    with exl_loader.load(tiny_model_dir, ctx_size=512) as model:
        expected = [list(model.generate_ids(prompt, settings)) for prompt in prompts]
    with exl_loader.load(tiny_model_dir, **options) as model:
        generations = [model.generate_ids(prompt, settings) for prompt in prompts]
        assert in_threads(list, generations) == expected
        assert [generation.finish_reason for generation in generations] == ["context"] * 2
        assert [generation.stats.preemptions for generation in generations] == [0, 0]
        assert [len(ids) for ids in expected] == [509, 510]
        with pytest.raises(PromptTooLong, match="ctx_size of 512"):
            model.generate_ids([5] * 600)


@pytest.mark.parametrize(("options", "expected"), [
    ({"ctx_size": 1024, "cache_size": 1023}, None),
    ({"ctx_size": 1000, "cache_size": 768}, "at least 1024"),
    ({"cache_size": -1}, "from 0"), ({"cache_size": 2.5}, "integer"),
    ({"cache_size": "4096"}, "integer"), ({"cache_size": True}, "integer"),
])
def test_a_cache_smaller_than_a_text_is_refused_by_name(tiny_model_dir, options, expected):
    if expected is None:
        # Both are four pages.
        assert exl_loader.plan(tiny_model_dir, **options).cache_size == 1024
        return
    with pytest.raises(InvalidSettings, match=f"cache_size: expected.*{expected}"):
        exl_loader.plan(tiny_model_dir, **options)


@pytest.mark.parametrize("ctx_size", [None, "auto"])
def test_a_context_that_nobody_named_is_at_most_the_cache(tmp_path, ctx_size):
    folder = write_sparse_exl2(tmp_path / "m", max_position_embeddings=4096)
    options = {"device": "cuda:0", "vram": "40GiB", "ctx_size": ctx_size}
    assert exl_loader.plan(folder, **options).ctx_size == 4096
    assert exl_loader.plan(folder, cache_size=0, **options).cache_size == 4096
    small = exl_loader.plan(folder, cache_size=700, **options)
    assert small.ctx_size == small.cache_size == 768
    large = exl_loader.plan(folder, cache_size=1 << 14, **options)
    assert (large.ctx_size, large.cache_size) == (4096, 1 << 14)


def test_a_larger_quantised_cache_runs_more_texts_at_once(tmp_path):
    folder = write_sparse_exl2(tmp_path / "m")
    options = {"device": "cuda:0", "vram": "40GiB", "ctx_size": 8192, "cache_type": "q4"}
    assert exl_loader.plan(folder, **options).max_batch_size == 2
    assert exl_loader.plan(folder, cache_size=4 * 8192, **options).max_batch_size == 4


def test_the_largest_context_is_that_of_a_cache_that_fits(tmp_path):
    folder = write_sparse_exl2(tmp_path / "m", **LLAMA_2_7B)
    options = {"device": "cuda:0", "vram": "8GiB", "ctx_size": 4096}
    found = exl_loader.plan(folder, cache_size=16384, cache_type="q4", **options)
    assert found.fits and found.largest_ctx_size["q4"] == 16384
    assert found.largest_ctx_size["fp16"] == 0
    assert not exl_loader.plan(folder, cache_size=16384, cache_type="fp16", **options).fits
    found = exl_loader.plan(folder, cache_size=1 << 30, cache_type="q4", **options)
    assert not found.fits
    text = str(refusal(found))
    assert "cache q4 of 1,073,741,824 tokens does not fit" in text
    assert "A smaller cache_size takes less memory." in text


def test_table_and_gauge_name_a_cache_of_more_than_a_text(tmp_path):
    folder = write_sparse_exl2(tmp_path / "m")
    options = {"device": "cuda:0", "vram": "8GiB", "ctx_size": 1000, "cache_type": "q4"}
    found = exl_loader.plan(folder, cache_size=3000, **options)
    assert "1,000 tokens of context, cache q4 of 3,072 tokens" in render(found)
    assert "cache of 3,072 tokens" in gauge_html(found)
    assert found.to_dict()["cache_size"] == 3072
    plain = exl_loader.plan(folder, **options)
    assert plain.cache_size == 4 * PAGE_LEN
    assert "of 1,024 tokens" not in render(plain) + gauge_html(plain)


def test_the_command_line_has_the_options(tiny_model_dir, capsys):
    arguments = ["plan", str(tiny_model_dir), "--ctx-size", "512", "--cache-size", "1024",
                 "--max-batch-size", "3", "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ctx_size"], found["cache_size"], found["max_batch_size"]) == (512, 1024, 3)
