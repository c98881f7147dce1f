"""Unloading a model, errors that a caller keeps, and memory that runs out."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from exl_loader.utils.errors import InsufficientMemory, ModelUnloaded
from support import wait_for
from support.fake_model import endless, fake_engine

GREEDY = {"temperature": 0, "max_new_tokens": 20}
LONG = {"temperature": 0, "max_new_tokens": 200}


def test_unload_is_final_and_can_be_repeated(byte_tokenizer):
    engine, model, cache = fake_engine(endless, 300, byte_tokenizer)
    running = engine.generate_ids([5], LONG)
    next(running)
    ready = engine.generate_ids([5], LONG)
    assert engine.allocated_bytes() == 1000
    engine.unload()
    engine.unload()
    assert engine.allocated_bytes() == 0
    assert cache.num_free_pages == 1
    for use in (
        lambda: list(running), lambda: list(ready), lambda: engine.generate_ids([5]),
        lambda: engine.generate("hi"), lambda: engine.prompt_logits([5]),
    ):
        with pytest.raises(ModelUnloaded):
            use()


def test_unload_waits_for_the_running_step():
    engine, model, _ = fake_engine(endless)
    inside, go_on = threading.Event(), threading.Event()

    def pause():
        inside.set()
        assert go_on.wait(300)

    model.before_call = pause
    failures = []

    def work():
        try:
            list(engine.generate_ids([5], LONG))
        except ModelUnloaded as error:
            failures.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    inside.wait(300)
    unloader = threading.Thread(target=engine.unload)
    unloader.start()
    unloader.join(0.05)
    assert unloader.is_alive()
    go_on.set()
    unloader.join(300)
    worker.join(300)
    assert len(failures) == 1 and not unloader.is_alive()


def test_unloading_or_dropping_frees_the_model():
    engine, model, cache = fake_engine(endless)
    watched = weakref.ref(model)
    with engine:
        list(engine.generate_ids([5], GREEDY))
    del model
    assert watched() is None
    engine, model, cache = fake_engine(endless)
    watched_engine, watched = weakref.ref(engine), weakref.ref(model)
    list(engine.generate_ids([5], GREEDY))
    del engine, model
    assert watched_engine() is None
    # The model's thread may still be between its last step and its sleep.
    wait_for(lambda: watched() is None)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("ask", ["generate_ids", "prompt_logits"])
def test_an_error_that_a_caller_keeps_does_not_keep_the_model(kind, ask):
    engine, model, cache = fake_engine(endless)
    model.fail_at, model.error = 2, kind("injected")
    with pytest.raises(kind) as kept:
        list(getattr(engine, ask)([5] * 40))
    watched = weakref.ref(model), weakref.ref(cache)
    del model, cache
    engine.unload()
    gc.collect()
    assert [reference() for reference in watched] == [None, None]
    assert "_forward" in [entry.name for entry in kept.traceback]


def test_out_of_memory_in_a_step_is_a_typed_error():
    engine, model, cache = fake_engine(endless)
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8")):
        model.fail_at, model.error = len(model.calls) + 3, error
        generation = engine.generate_ids([5], LONG)
        with pytest.raises(InsufficientMemory, match="memory.*step.*refused"):
            list(generation)
        assert generation.finish_reason == "failed" and len(generation.token_ids) == 3
    model.fail_at = None
    job = engine.generate_ids([5], GREEDY)
    model._row = raise_memory_error
    with pytest.raises(InsufficientMemory, match="memory"):
        list(job)
    with pytest.raises(InsufficientMemory, match="memory"):
        engine.prompt_logits([5])
    assert cache.num_free_pages == cache.num_pages


def raise_memory_error(text):
    raise MemoryError


@pytest.mark.parametrize("how", ["not free", "refused"])
def test_logits_that_do_not_fit_are_refused_before_a_pass(how, machine, monkeypatch):
    engine, model, _ = fake_engine(endless)
    nbytes = 4 * 20 * 300
    machine(free_bytes=nbytes - (how == "not free"))
    if how == "refused":
        message = "[enforce fail] DefaultCPUAllocator: can't allocate memory"
        monkeypatch.setattr(torch, "empty", lambda *shape: raise_runtime_error(message))
    with pytest.raises(InsufficientMemory, match=f"20 tokens: expected {nbytes} bytes"):
        engine.prompt_logits([5] * 20)
    assert not model.calls
    monkeypatch.undo()
    assert len(engine.prompt_logits([5] * 20)) == 20


def raise_runtime_error(message):
    raise RuntimeError(message)
