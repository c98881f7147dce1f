"""Classifier-free guidance: a prompt and a negative prompt, each with its own pages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

import exl_loader
from exl_loader.generation.sampling import guide
from exl_loader.utils.errors import CacheFull, InsufficientMemory, InvalidSettings, PromptTooLong
from support import in_threads
from support.fake_model import fake_engine
from support.tiny import write_tiny_model

OPTIONS = {"temperature": 0, "ban_eos_token": True, "max_new_tokens": 30}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("guided") / "model")
    with exl_loader.load(folder, ctx_size=4096, cache_type="fp16") as loaded:
        yield loaded


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1.0, 1.5, 3.0])
def test_guide_agrees_with_transformers(scale):
    rng = np.random.default_rng(3)
    row, negative = (rng.standard_normal((2, 200)) * 5).astype(np.float32)

    class Model:
        def __call__(self, *_, **__):
            return type("Out", (dict,), {"logits": torch.tensor(negative)[None, None]})()

    processor = hf.UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, Model())
    scores = torch.tensor(row.astype(np.float64))[None]
    expected = processor(torch.tensor([[1, 2]]), scores)[0].numpy()
    before = row.copy()
    np.testing.assert_allclose(guide(row, negative, scale), expected, rtol=1e-4, atol=1e-4)
    assert (row == before).all()


def guided_by_definition(model, prompt: list[int], negative: list[int], scale: float,
                         count: int) -> list[int]:
    """Compute greedy ids from full evaluations: n + scale (p - n) of log probabilities."""
    answer: list[int] = []
    vocab_size = model.tokenizer.vocab_size
    for _ in range(count):
        p, n = (
            model.prompt_logits([*text, *answer])[-1].double().log_softmax(dim=0)
            for text in (prompt, negative)
        )
        row = n + scale * (p - n)
        row[list(model.eos_token_ids)] = -torch.inf
        answer.append(int(row[:vocab_size].argmax()))
    return answer


@pytest.mark.parametrize(("scale", "negative"), [(1.5, "bad text"), (3.0, "x" * 300), (0.5, "")])
def test_the_text_agrees_with_the_definition(model, scale, negative):
    prompt = model.encode("Once upon a time there was")
    options = OPTIONS | {"guidance_scale": scale, "negative_prompt": negative}
    negative_ids = model.encode(negative) if negative else [model.config.bos_token_id]
    generation = model.generate_ids(prompt, options)
    answer = list(generation)
    assert answer == guided_by_definition(model, prompt, negative_ids, scale, 30)
    assert answer != list(model.generate_ids(prompt, OPTIONS))
    cache = model._generator._scheduler.cache
    assert cache.num_free_pages == cache.num_pages
    lookup = options | {"prompt_lookup_num_tokens": 4}
    assert list(model.generate_ids(prompt, lookup)) == answer
    assert model.allocated_bytes() == model.reservation.total_bytes


def test_guided_and_plain_texts_in_one_batch(model):
    requests = [
        ([40 + i] * (100 + 90 * i), {"temperature": 0.8, "seed": i, "max_new_tokens": 25,
                                     "guidance_scale": 1.0 + 0.5 * (i % 3),
                                     "negative_prompt": "no " * 50, "ban_eos_token": True})
        for i in range(6)
    ]
    alone = [list(model.generate_ids(*request)) for request in requests]
    model.prompt_logits([5] * 4096)
    assert in_threads(lambda request: list(model.generate_ids(*request)), requests) == alone


def test_both_texts_have_their_own_pages_and_rows():
    engine, model, cache = fake_engine(lambda text: 7, ctx_size=1024, max_batch_size=3)
    model.config.bos_token_id = 1
    options = {"temperature": 0, "max_new_tokens": 40, "guidance_scale": 2}
    guided, plain = engine.generate_ids([5] * 300, options), engine.generate_ids([6], OPTIONS)
    next(guided)
    assert cache.num_free_pages == 4 - 3
    other = engine.generate_ids([8], options)
    assert len(list(plain)) == 30, "the third row of the batch"
    assert len(list(guided)) == 39
    assert len(list(other)) == 40
    assert cache.num_free_pages == 4
    guided = engine.generate_ids([5] * 300, options)
    next(guided)
    guided.close()
    assert cache.num_free_pages == 4
    assert guided.stats.reused_tokens >= 256, "the first page was used last"


def test_guidance_without_room_or_prompt_is_refused(model):
    engine, _, cache = fake_engine(lambda text: 7, ctx_size=512, max_batch_size=1)
    with pytest.raises(InvalidSettings, match="guidance_scale.*max_batch_size of 2"):
        engine.generate_ids([5], {"guidance_scale": 2})
    engine, fake, cache = fake_engine(lambda text: 7, ctx_size=512)
    with pytest.raises(InvalidSettings, match="at least one token"):
        engine.generate_ids([5], {"guidance_scale": 2})
    fake.config.bos_token_id = 1
    with pytest.raises(CacheFull):
        list(engine.generate_ids([5] * 300, {"guidance_scale": 2, "max_new_tokens": 10}))
    assert cache.num_free_pages == 2
    with pytest.raises(PromptTooLong, match="negative_prompt"):
        model.generate_ids([5], {"guidance_scale": 2, "negative_prompt": "x" * 5000})


def test_the_context_limits_the_longer_of_both_texts():
    engine, fake, cache = fake_engine(lambda text: 7, ctx_size=512, pages=4)
    fake.config.bos_token_id = 1
    generation = engine.generate_ids([5] * 500, {"guidance_scale": 2, "ban_eos_token": True})
    assert len(list(generation)) == 12 and generation.finish_reason == "context"


def test_an_error_of_a_guided_text_ends_only_that_text(monkeypatch):
    """Another text was in the same pass, and it continues."""
    engine, _, cache = fake_engine(lambda text: text[-1] + 1, pages=4)
    engine.config.bos_token_id = 5
    plain = engine.generate_ids([50], OPTIONS)
    guided = engine.generate_ids([10], OPTIONS | {"guidance_scale": 2})
    assert next(plain) == 51
    assert next(guided) == 11

    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr("exl_loader.generation.scheduler.guide", refuse)
    assert list(plain) == list(range(52, 81))
    with pytest.raises(InsufficientMemory):
        list(guided)
    assert guided.finish_reason == "failed"
    assert cache.num_free_pages == cache.num_pages
