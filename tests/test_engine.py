"""The loaded model on real weights: reference models and small random models."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import exl_loader
from exl_loader.utils.errors import ExlLoaderError, ModelUnloaded, PromptTooLong

FIXTURES = ("llama-mid", "llama-low")
SETTINGS = {"temperature": 0.9, "top_k": 30, "seed": 11, "max_new_tokens": 24,
            "ban_eos_token": True}


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    """A small random Llama on the compiled kernels."""
    with exl_loader.load(tiny_model_dir, ctx_size=2048) as loaded:
        yield loaded


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", FIXTURES)
def test_reference_operations_agree_with_the_reference_logits(name, fixtures_dir, monkeypatch):
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    expected = load_file(fixtures_dir / f"{name}.reference.safetensors")
    # A float16 cache would change logits by more than the tolerance.
    with exl_loader.load(fixtures_dir / name, ctx_size=256, cache_type="fp32") as model:
        logits = model.prompt_logits(expected["input_ids"].tolist())
    assert logits.dtype == torch.float32
    assert relative_error(logits, expected["logits"]) <= 1e-4


@pytest.mark.parametrize("name", FIXTURES)
def test_greedy_ids_agree_with_the_reference_up_to_the_first_near_tie(name, fixtures_dir):
    expected = load_file(fixtures_dir / f"{name}.reference.safetensors")
    ids = expected["greedy_ids"].tolist()
    prompt, answer = ids[:16], ids[16:]
    with exl_loader.load(fixtures_dir / name, ctx_size=256) as model:
        logits = model.prompt_logits(ids)[15:-1]
        settings = {"temperature": 0, "max_new_tokens": len(answer), "ban_eos_token": True}
        actual = list(model.generate_ids(prompt, settings))
    assert len(actual) == len(answer)
    differ = [i for i, (a, b) in enumerate(zip(actual, answer, strict=True)) if a != b]
    if differ:
        # The kernels' error, 2e-2 of the logits' size, may exchange tokens with nearly equal
        # logits. After that the texts differ.
        row = logits[differ[0]]
        assert (row[actual[differ[0]]] - row[answer[differ[0]]]).abs() < 0.1 * row.std()


def test_prompt_logits_agree_with_generation(model):
    """The greedy tokens have the largest logits of an evaluation of the whole text."""
    prompt = model.encode("The quick brown fox")
    greedy = {"temperature": 0, "max_new_tokens": 40, "ban_eos_token": True}
    answer = list(model.generate_ids(prompt, greedy))
    logits = model.prompt_logits([*prompt, *answer])[len(prompt) - 1 : -1]
    for eos_id in model.eos_token_ids:
        logits[:, eos_id] = -torch.inf
    logits = logits[:, : model.tokenizer.vocab_size]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert (logits.max(dim=1).values - chosen).max() < 1e-3 * logits[logits > -1e30].std()


def test_the_same_seed_gives_the_same_text(model):
    texts = ["".join(model.generate("Once", SETTINGS)) for _ in range(3)]
    assert len(set(texts)) == 1 and texts[0]
    assert "".join(model.generate("Once", SETTINGS | {"seed": 12})) != texts[0]
    random = model.generate("Once", SETTINGS | {"seed": -1})
    text = "".join(random)
    assert "".join(model.generate("Once", SETTINGS | {"seed": random.seed})) == text


def test_text_and_ids_of_a_generation_agree(model):
    ids = list(model.generate_ids("Once", SETTINGS))
    generation = model.generate("Once", SETTINGS)
    assert "".join(generation) == model.decode(ids)
    assert generation.token_ids == ids


def test_two_full_contexts_use_exactly_the_reserved_memory(tiny_model_dir):
    with exl_loader.load(tiny_model_dir, ctx_size=512, cache_type="q4") as model:
        total = model.reservation.total_bytes
        assert model.allocated_bytes() == total
        for _ in range(2):
            generation = model.generate_ids([5] * 400, {"max_new_tokens": 500,
                                                        "ban_eos_token": True})
            assert len(list(generation)) == 112
            assert generation.finish_reason == "context"
            assert model.allocated_bytes() == total
        with pytest.raises(PromptTooLong):
            model.generate_ids([5] * 512)
    assert model.allocated_bytes() == 0
    with pytest.raises(ModelUnloaded):
        model.generate("hi")


def test_errors_have_one_line(model):
    for wrong in ({"temperature": -1}, {"nonsense": 5}, {"stop_strings": [""]}):
        with pytest.raises(ExlLoaderError) as caught:
            model.generate("hi", wrong)
        assert "\n" not in str(caught.value)
