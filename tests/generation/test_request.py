"""Requests: prompts as text or ids, and bad ones, which raise a typed error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import exl_loader
from exl_loader.utils.errors import InvalidSettings, InvalidTokenizer, PromptTooLong
from support.builds import Recorder
from support.fake_model import count_up, fake_engine
from support.tiny import write_tiny_model

GREEDY = {"temperature": 0, "max_new_tokens": 20}
CTX = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("bad") / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXL_LOADER_REFERENCE", "1")
        loaded = exl_loader.load(folder, ctx_size=CTX)
    yield loaded
    loaded.unload()


def test_a_prompt_is_prefilled_in_chunks_and_reports_progress():
    engine, model, _ = fake_engine(count_up)
    progress = Recorder()
    generation = engine.generate_ids(range(1, 41), {"temperature": 0, "max_new_tokens": 3},
                                     progress=progress)
    assert list(generation) == [41, 42, 43]
    assert model.calls == [[16], [16], [8], [1], [1]]
    assert progress.calls == [
        ("start", "prompt", 40, "tokens"), *(("advance", "prompt", n) for n in (16, 16, 8)),
        ("finish", "prompt"),
    ]
    assert generation.stats.prompt_tokens == 40 and generation.stats.new_tokens == 3
    assert generation.stats.prompt_tokens_per_s > 0 and generation.stats.tokens_per_s > 0


def test_prompt_logits_are_chunked_and_complete():
    engine, model, cache = fake_engine(count_up)
    logits = engine.prompt_logits(range(1, 22))
    assert logits.shape == (21, 300)
    assert logits.argmax(dim=1).tolist() == list(range(2, 23))
    assert model.calls == [[8], [8], [5]]
    assert cache.num_free_pages == cache.num_pages


def test_text_prompts_get_one_bos_token(byte_tokenizer):
    engine, _, _ = fake_engine(count_up, 300, byte_tokenizer)
    assert engine.generate("hi", GREEDY).prompt_ids == byte_tokenizer.encode("hi")
    assert engine.generate("hi", GREEDY).prompt_ids[0] == byte_tokenizer.bos_token_id
    assert engine.generate("<s>hi", GREEDY).prompt_ids == byte_tokenizer.encode("hi")
    assert engine.generate("", GREEDY).prompt_ids == [byte_tokenizer.bos_token_id]


def test_invalid_prompts_are_refused(byte_tokenizer):
    engine, _, cache = fake_engine(count_up, 300, byte_tokenizer)
    with pytest.raises(InvalidSettings, match="at least one token"):
        engine.generate_ids([])
    with pytest.raises(InvalidSettings, match="expected 0 to 299, found 5 to 300"):
        engine.generate_ids([5, 300])
    with pytest.raises(InvalidSettings, match="token ids"):
        engine.generate_ids([-1])
    with pytest.raises(InvalidSettings, match="text or token ids"):
        engine.generate_ids([None])
    with pytest.raises(InvalidSettings, match="stop_token_ids"):
        engine.generate_ids([5], {"stop_token_ids": [300]})
    with pytest.raises(PromptTooLong, match="at most 255 tokens and a new one.*found 256"):
        engine.generate_ids([5] * 256)
    with pytest.raises(PromptTooLong, match="found 257 tokens"):
        engine.prompt_logits([5] * 257)
    assert len(engine.prompt_logits([5] * 256)) == 256
    with pytest.raises(InvalidSettings, match="temperature"):
        engine.generate("hi", {"temperature": float("nan")})
    assert cache.num_free_pages == cache.num_pages


def test_without_a_tokenizer_only_ids_can_be_used():
    engine, _, _ = fake_engine(count_up)
    assert list(engine.generate_ids([5], GREEDY | {"max_new_tokens": 2})) == [6, 7]
    assert not engine.has_tokenizer
    for needs_text in (
        lambda: engine.generate([5]),
        lambda: engine.generate_ids("hi"),
        lambda: engine.generate_ids([5], {"stop_strings": ["x"]}),
        lambda: engine.encode("hi"),
        lambda: engine.decode([5]),
        lambda: engine.apply_chat_template([{"role": "user", "content": "hi"}]),
    ):
        with pytest.raises(InvalidTokenizer, match="Copy the tokenizer files"):
            needs_text()


def test_an_empty_prompt(model):
    with pytest.raises(InvalidSettings, match="prompt"):
        model.prompt_logits([])
    # Generation begins with the model's BOS token instead.
    assert len(list(model.generate_ids([], {"max_new_tokens": 2, "ban_eos_token": True}))) == 2


NO_TOKENS = [["x"], ["5"], [None], [1.5], [[1, 2]], b"ab", None, 5]


@pytest.mark.parametrize("ids", [*NO_TOKENS, [-1], [288], [1, 10**30]])
def test_values_that_are_not_token_ids_are_refused(model, ids):
    for call in (model.prompt_logits, model.generate_ids, model.generate):
        with pytest.raises(InvalidSettings):
            list(call(ids))


@pytest.mark.parametrize("ids", [*NO_TOKENS, "ab"])
def test_values_that_are_not_token_ids_cannot_be_decoded(model, ids):
    with pytest.raises(InvalidSettings, match="ids: expected token ids"):
        model.decode(ids)


def test_integers_of_other_libraries_are_token_ids(model):
    numpy_ids, torch_ids = np.array([1, 2]), torch.tensor([1, 2])
    assert torch.equal(model.prompt_logits(numpy_ids), model.prompt_logits(torch_ids))
    assert model.decode(numpy_ids) == model.decode(torch_ids) == model.decode([1, 2])
