"""How a generation ends: at limits and end tokens, by its caller, or by an error."""

from __future__ import annotations

import _thread
import gc
import threading

import pytest

from exl_loader.utils.errors import InvalidCheckpoint
from support.fake_model import count_up, endless, fake_engine, settle, spell

GREEDY = {"temperature": 0, "max_new_tokens": 20}
LONG = {"temperature": 0, "max_new_tokens": 200}


def test_max_new_tokens_and_the_context_end_a_text():
    engine, model, _ = fake_engine(count_up, 600)
    generation = engine.generate_ids([5, 6, 7], {"temperature": 0, "max_new_tokens": 4})
    assert list(generation) == [8, 9, 10, 11]
    assert generation.finish_reason == "length"
    prompt = list(range(10, 262))
    generation = engine.generate_ids(prompt, {"temperature": 0})
    assert list(generation) == [262, 263, 264, 265]
    assert generation.finish_reason == "context"
    # The last token is not stored in the cache, so the prompt may leave room for one token.
    generation = engine.generate_ids([5] * 255, {"temperature": 0})
    assert (list(generation), generation.finish_reason) == ([6], "context")


def test_the_end_token_is_not_yielded_and_can_be_banned():
    engine, _, _ = fake_engine(lambda text: 0 if len(text) == 3 else 9)
    generation = engine.generate_ids([5], GREEDY)
    assert (list(generation), generation.finish_reason) == ([9, 9], "eos")
    assert generation.stats.new_tokens == 3
    banned = engine.generate_ids([5], GREEDY | {"ban_eos_token": True})
    assert len(list(banned)) == 20 and banned.finish_reason == "length"


def test_a_tokenizers_end_token_counts_as_well(byte_tokenizer):
    engine, _, _ = fake_engine(count_up, 300, byte_tokenizer)
    assert engine.eos_token_ids == (0, 2)


def test_padding_of_the_vocabulary_is_never_sampled(byte_tokenizer):
    """Ids that the tokenizer does not know are padding."""
    known = byte_tokenizer.vocab_size
    engine, _, _ = fake_engine(lambda text: known + 3, known + 10, byte_tokenizer)
    assert max(engine.generate_ids([5], {"max_new_tokens": 50, "ban_eos_token": True})) < known


def test_closing_releases_the_pages():
    engine, _, cache = fake_engine(endless)
    generation = engine.generate_ids([5], LONG)
    assert cache.num_free_pages == 1, "no page is acquired before the first token is requested"
    next(generation)
    assert cache.num_free_pages == 0
    generation.close()
    assert cache.num_free_pages == 1
    assert list(generation) == [] and generation.finish_reason == "cancelled"
    with engine.generate_ids([5], LONG) as generation:
        next(generation)
    assert cache.num_free_pages == 1


def test_dropping_releases_the_pages():
    engine, _, cache = fake_engine(endless)
    for _ in engine.generate_ids([5], LONG):
        break
    gc.collect()
    settle(engine)
    assert cache.num_free_pages == 1


def test_stop_ends_the_text_after_the_shown_tokens(byte_tokenizer):
    engine, _, cache = fake_engine(spell(byte_tokenizer, "abc" * 50), 300, byte_tokenizer)
    generation = engine.generate([5], LONG)
    text = next(generation)
    generation.stop()
    text += "".join(generation)
    assert text == "a"
    assert generation.finish_reason == "cancelled"
    assert cache.num_free_pages == 1


@pytest.mark.parametrize("whole_model", [True, False])
def test_stop_from_another_thread(whole_model):
    engine, model, cache = fake_engine(endless)
    generation = engine.generate_ids([5], LONG)
    started = threading.Event()
    model.before_call = lambda: started.set() if len(model.calls) > 5 else None

    def stop():
        started.wait(300)
        (engine if whole_model else generation).stop()

    stopper = threading.Thread(target=stop)
    stopper.start()
    model_calls_before_stop = 0
    for _ in generation:
        if started.is_set():
            stopper.join(300)
            model_calls_before_stop = model_calls_before_stop or len(model.calls)
    assert generation.finish_reason == "cancelled"
    assert len(model.calls) == model_calls_before_stop
    assert cache.num_free_pages == 1


def test_stop_during_the_prompt():
    engine, model, cache = fake_engine(endless)
    generation = engine.generate_ids([5] * 100, LONG)
    model.before_call = lambda: engine.stop() if len(model.calls) == 2 else None
    assert list(generation) == []
    assert model.calls == [[16], [16]]
    assert cache.num_free_pages == 1


@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_an_error_of_the_model_releases_the_pages(fail_at):
    engine, model, cache = fake_engine(endless)
    model.fail_at = fail_at
    with pytest.raises(RuntimeError, match="injected"):
        list(engine.generate_ids([5] * 20, LONG))
    assert cache.num_free_pages == 1
    with pytest.raises(RuntimeError, match="injected"):
        engine.prompt_logits([5])
    assert cache.num_free_pages == 1
    model.fail_at = None
    assert len(list(engine.generate_ids([5], GREEDY))) == 20


def test_an_interrupt_ends_the_generation_and_not_the_model():
    engine, model, cache = fake_engine(endless)
    model.before_call = lambda: _thread.interrupt_main() if len(model.calls) == 4 else None
    generation = engine.generate_ids([5], LONG)
    with pytest.raises(KeyboardInterrupt):
        list(generation)
    settle(engine)
    assert cache.num_free_pages == 1 and generation.finish_reason == "cancelled"
    assert len(list(generation)) <= 1, "more than the running step computed"
    assert len(list(engine.generate_ids([5], GREEDY))) == 20


def test_damaged_logits_end_the_generation():
    engine, model, cache = fake_engine(endless)
    whole_row = model._row
    model._row = lambda text: whole_row(text) * (float("nan") if len(text) > 3 else 1)
    with pytest.raises(InvalidCheckpoint):
        list(engine.generate_ids([5], LONG))
    assert cache.num_free_pages == 1
