"""Bad prompts and settings: a typed error that says what is wrong, and a model that goes on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import exl_loader
from exl_loader.utils.errors import InvalidSettings, InvalidTokenizer, PromptTooLong
from support.tiny import write_tiny_model

CTX = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("bad") / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXL_LOADER_REFERENCE", "1")
        loaded = exl_loader.load(folder, ctx_size=CTX)
    yield loaded
    loaded.unload()


def test_a_prompt_longer_than_the_context(model):
    for call in (model.prompt_logits, model.generate_ids, model.generate):
        with pytest.raises(PromptTooLong, match=f"{CTX}.*{CTX + 1} tokens"):
            list(call([5] * (CTX + 1)))
    assert model.prompt_logits([5] * CTX).shape[0] == CTX


def test_an_empty_prompt(model):
    with pytest.raises(InvalidSettings, match="prompt"):
        model.prompt_logits([])
    # Generation begins with the model's BOS token instead.
    assert len(list(model.generate_ids([], {"max_new_tokens": 2, "ban_eos_token": True}))) == 2


NO_TOKENS = [["x"], ["5"], [None], [1.5], [[1, 2]], b"ab", None, 5]


@pytest.mark.parametrize("ids", [*NO_TOKENS, [-1], [288], [1, 10**30]])
def test_what_is_no_token(model, ids):
    for call in (model.prompt_logits, model.generate_ids, model.generate):
        with pytest.raises(InvalidSettings):
            list(call(ids))


@pytest.mark.parametrize("ids", [*NO_TOKENS, "ab"])
def test_what_cannot_be_decoded(model, ids):
    with pytest.raises(InvalidSettings, match="ids: expected token ids"):
        model.decode(ids)


def test_integers_of_other_libraries_are_token_ids(model):
    numpy_ids, torch_ids = np.array([1, 2]), torch.tensor([1, 2])
    assert torch.equal(model.prompt_logits(numpy_ids), model.prompt_logits(torch_ids))
    assert model.decode(numpy_ids) == model.decode(torch_ids) == model.decode([1, 2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("max_new_tokens", -1),
        ("max_new_tokens", 1.5),
    ],
)
def test_invalid_sampler_values(model, name, value):
    allocated = model.allocated_bytes()
    with pytest.raises(InvalidSettings, match=name):
        list(model.generate_ids([1, 2], {name: value}))
    assert model.allocated_bytes() == allocated
    assert model.prompt_logits([1, 2]).isfinite().all()


def test_a_missing_tokenizer(tiny_model, monkeypatch):
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    folder = tiny_model()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with exl_loader.load(folder, ctx_size=CTX) as model:
        for call in (model.encode, lambda text: model.decode([1]), model.generate):
            with pytest.raises(InvalidTokenizer, match="tokenizer"):
                list(call("text"))
