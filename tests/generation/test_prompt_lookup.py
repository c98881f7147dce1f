"""Prompt lookup: the same text in fewer passes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import exl_loader
from exl_loader.generation.drafts import look_up
from support import in_threads
from support.fake_model import fake_engine
from support.full_drafts import draft_fully


@settings(max_examples=300)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 6))
def test_guesses_followed_the_same_ids_before(history, count):
    found = look_up(np.array(history, np.int64), count)
    for size in (4, 3, 2):
        ends = [
            i for i in range(size, len(history)) if history[i - size : i] == history[-size:]
        ]
        if ends:
            followed = history[ends[-1] :]
            assert found == (followed * count)[:count]
            return
    assert found == []


def cycle(text: list[int]) -> int:
    """Repeats forty tokens, with an occasional error."""
    return 3 + (len(text) % 40) + (100 if len(text) % 57 == 0 else 0)


def texts(script, prompts, options, **sizes):
    """Return the texts with and without lookup, and the number of their passes."""
    results = []
    for count in (0, 5):
        engine, model, cache = fake_engine(script, 300, ctx_size=1024, **sizes)
        draft_fully(engine)
        request = {"temperature": 0, "prompt_lookup_num_tokens": count} | options
        generations = [engine.generate_ids(prompt, request) for prompt in prompts]
        streams = [list(generation) for generation in generations]
        reasons = [generation.finish_reason for generation in generations]
        assert cache.num_free_pages == cache.num_pages
        accepted = sum(generation.stats.accepted_tokens for generation in generations)
        results.append((streams, reasons, len(model.calls), accepted))
    return results


@pytest.mark.parametrize("options", [
    {"max_new_tokens": 200}, {"max_new_tokens": 43}, {"max_new_tokens": 5000},
    {"max_new_tokens": 300, "stop_token_ids": [139]}, {"ban_eos_token": True},
    {"temperature": 1.5, "seed": 4, "max_new_tokens": 100}, {"logprobs": 2},
])
def test_the_text_is_the_same_in_fewer_passes(options):
    plain, looked_up = texts(cycle, [[5, 6]], options)
    assert looked_up[:2] == plain[:2]
    assert plain[3] == 0
    if options.get("max_new_tokens", 512) > 100:
        assert looked_up[2] < plain[2] * 0.6
        assert looked_up[2] + looked_up[3] == plain[2]


def test_an_end_token_in_a_draft_ends_the_text():
    def script(text):
        return 0 if len(text) == 103 else 3 + len(text) % 20

    plain, looked_up = texts(script, [[5, 6]], {})
    assert looked_up[:2] == plain[:2] and plain[1] == ["eos"]
    assert len(plain[0][0]) == 101


def test_rejected_tokens_are_not_reused():
    """A repeated text reuses the tokens of the text and not those of a rejected draft."""
    engine, model, _ = fake_engine(cycle, 300, ctx_size=1024)
    draft_fully(engine)
    options = {"temperature": 0, "prompt_lookup_num_tokens": 5, "max_new_tokens": 150}
    answer = list(engine.generate_ids([5, 6], options))
    model.calls.clear()
    again = engine.generate_ids([5, 6, *answer, 7, 8], options)
    assert len(list(again)) == 150
    assert again.stats.reused_tokens == 2 + 149


def test_requests_share_the_rows_of_a_pass():
    engine, model, _ = fake_engine(cycle, 300, ctx_size=1024, logits_rows=8)
    draft_fully(engine)
    options = {"temperature": 0, "prompt_lookup_num_tokens": 7, "max_new_tokens": 120}
    generations = [engine.generate_ids([i], options) for i in (5, 6, 7)]
    streams = [list(ids) for ids in zip(*generations, strict=True)]
    assert len(streams) == 120 and len({tuple(map(int, s)) for s in streams}) > 1
    assert max(sum(call) for call in model.calls) == 8


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_on_the_compiled_kernels_the_text_is_the_same(tiny_model_dir, temperature):
    """Alone and in a batch, with accepted and with rejected tokens."""
    phrase = [40, 50, 60, 70, 80, 90, 45, 55]
    prompts = [phrase * 10 + [i] + phrase[: 2 + i] for i in range(4)]
    options = {"temperature": temperature, "top_k": 2, "seed": 5, "max_new_tokens": 120,
               "ban_eos_token": True, "repetition_penalty": 0.8}
    with exl_loader.load(tiny_model_dir, ctx_size=2048, cache_type="q8") as model:
        plain = [list(model.generate_ids(prompt, options)) for prompt in prompts]
        draft_fully(model)
        lookup = options | {"prompt_lookup_num_tokens": 6}
        accepted = 0
        for prompt, text in zip(prompts, plain, strict=True):
            generation = model.generate_ids(prompt, lookup)
            assert list(generation) == text
            accepted += generation.stats.accepted_tokens
        assert accepted > 20
        together = in_threads(lambda prompt: list(model.generate_ids(prompt, lookup)), prompts)
        assert together == plain
