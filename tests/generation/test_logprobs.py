"""Log probabilities of generated and of prompt tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exl_loader
from exl_loader.generation.logprobs import token_logprobs
from exl_loader.utils.errors import InvalidSettings
from support.fake_model import fake_engine


@settings(max_examples=60)
@given(st.integers(1, 400), st.integers(0, 500), st.integers(0, 10_000), st.booleans())
def test_logprobs_are_the_log_softmax(vocab_size, count, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab_size, generator=generator) * 20
    logits = logits.round() if ties else logits
    token_id = seed % vocab_size
    expected = logits.double().log_softmax(dim=0)
    result = token_logprobs(logits.numpy(), token_id, count)
    assert result.token_id == token_id
    assert math.isclose(result.logprob, expected[token_id], rel_tol=1e-9, abs_tol=1e-9)
    order = sorted(range(vocab_size), key=lambda i: (-float(logits[i]), i))[:count]
    assert [i for i, _ in result.top] == order
    assert np.allclose([p for _, p in result.top], expected[order], atol=1e-9)


def test_logprobs_are_returned_only_on_request():
    engine, _, _ = fake_engine(lambda text: text[-1] + 1)
    generation = engine.generate_ids([5], {"temperature": 0, "max_new_tokens": 3, "logprobs": 2})
    assert list(generation) == [6, 7, 8]
    total = 10 + math.log(1 + 299 * math.exp(-10))
    for token_id, found in zip([6, 7, 8], generation.logprobs, strict=True):
        assert found.token_id == token_id
        assert found.logprob == pytest.approx(10 - total)
        assert found.top == (
            (token_id, pytest.approx(10 - total)), (0, pytest.approx(-total)),
        )
    generation = engine.generate_ids([5], {"temperature": 0, "max_new_tokens": 3})
    assert list(generation) == [6, 7, 8] and generation.logprobs == []


def test_an_end_token_has_no_logprobs():
    engine, _, _ = fake_engine(lambda text: 0 if len(text) == 3 else 9)
    generation = engine.generate_ids([5], {"temperature": 0, "logprobs": 1})
    assert list(generation) == [9, 9]
    assert [found.token_id for found in generation.logprobs] == [9, 9]


def test_samplers_and_bans_do_not_change_logprobs():
    engine, _, _ = fake_engine(lambda text: 7)
    options = {"temperature": 5.0, "custom_token_bans": [7], "logprobs": 1, "max_new_tokens": 4}
    generation = engine.generate_ids([5], options)
    ids = list(generation)
    assert 7 not in ids
    for token_id, found in zip(ids, generation.logprobs, strict=True):
        assert found.token_id == token_id and found.top[0][0] == 7
        assert found.logprob == pytest.approx(found.top[0][1] - 10)


def test_prompt_logprobs_are_computed_in_chunks():
    engine, model, cache = fake_engine(lambda text: text[-1] + 1)
    found = engine.prompt_logprobs([1, 2, 3, 9, *range(20, 40)], 1)
    assert model.calls == [[8], [8], [8]]
    assert found[0] is None and len(found) == 24
    total = 10 + math.log(1 + 299 * math.exp(-10))
    assert found[1].logprob == pytest.approx(10 - total)
    assert found[3].logprob == pytest.approx(-total) and found[3].token_id == 9
    assert found[3].top == ((4, pytest.approx(10 - total)),)
    assert cache.num_free_pages == cache.num_pages
    assert engine.prompt_logprobs([5]) == [None]
    for wrong in (-1, "3"):
        with pytest.raises(InvalidSettings, match="count"):
            engine.prompt_logprobs([1], wrong)
    with pytest.raises(InvalidSettings, match="logprobs"):
        engine.generate_ids([1], {"logprobs": -1})


def test_prompt_and_generated_logprobs_agree(tiny_model_dir):
    with exl_loader.load(tiny_model_dir, ctx_size=512) as model:
        prompt = list(range(40, 80))
        generation = model.generate_ids(
            prompt, {"max_new_tokens": 30, "seed": 1, "logprobs": 3, "ban_eos_token": True}
        )
        answer = list(generation)
        assert len(answer) == 30
        expected = generation.logprobs
        assert model.prompt_logprobs(prompt + answer, 3)[40:] == expected
        logits = model.prompt_logits(prompt + answer)[:, : model.tokenizer.vocab_size]
    rows = logits[39:-1].double().log_softmax(dim=1)
    for row, found in zip(rows, expected, strict=True):
        assert found.logprob == pytest.approx(float(row[found.token_id]))
