"""Open pages in use: the same bits however a text comes into the cache, and what is reused."""

from __future__ import annotations

import random

import pytest
import torch

import exl_loader
from exl_loader.backends import get_ops
from exl_loader.cache.layout import PAGE_LEN
from exl_loader.generation.evaluations import TextEvaluation
from exl_loader.utils.errors import CacheFull, InvalidSettings
from support.model_builder import build_model

GREEDY = {"temperature": 0, "ban_eos_token": True}


def last_row(model, cache, text):
    """Return the logits after a text that shares nothing with another one, in whole pages."""
    sequence = cache.acquire(len(text))
    row = None
    while sequence.past_len < len(text):
        chunk = text[sequence.past_len : sequence.past_len + min(PAGE_LEN, model.chunk_size)]
        row = model.forward([(sequence, chunk)]).clone()
    cache.release(sequence)
    return row[0]


def some_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, 250) for _ in range(count)]


@pytest.mark.parametrize("cache_type", ["q8", "q4_q6", "fp16_q4", "q3"])
@pytest.mark.parametrize("seed", [0, None])
def test_logits_do_not_depend_on_how_a_text_came_into_the_cache(tiny_model_dir, cache_type, seed):
    """Texts that share beginnings, in chunks of any length, in batches, with tokens taken back."""
    rng = random.Random(seed)
    options = {"cache_type": cache_type, "ctx_size": 1024, "chunk_size": 400}
    model, cache = build_model(tiny_model_dir, get_ops("cpu"), sequences=3, **options)
    alone, alone_cache = build_model(tiny_model_dir, get_ops("cpu"), **options)
    known = [some_ids(rng, 900)]
    reused = 0
    for _ in range(6):
        texts = []
        for _ in range(rng.randint(1, 3)):
            base = rng.choice(known)
            kept = base[: rng.choice([0, 1, 3, 255, 256, 257, 512, 600, len(base)])]
            texts.append((kept + some_ids(rng, rng.randint(2, 300)))[:1000])
        running = {i: cache.acquire(len(text) + 20, text) for i, text in enumerate(texts)}
        reused += sum(sequence.past_len for sequence in running.values())
        rows = {}
        while running:
            entries, ends = [], {}
            for i, sequence in running.items():
                count = min(rng.choice([1, 2, 30, 100, 130]), len(texts[i]) - sequence.past_len)
                entries.append((sequence, texts[i][sequence.past_len :][:count]))
                ends[i] = sequence.past_len + count
            found = model.forward(entries)
            for row, (i, sequence) in zip(found.clone(), list(running.items()), strict=True):
                assert sequence.past_len == ends[i]
                if rng.random() < 0.3:
                    # A draft whose tokens are all wrong.
                    count = min(4, PAGE_LEN - sequence.past_len % PAGE_LEN)
                    model.forward([(sequence, some_ids(rng, count))], "none")
                    sequence.past_len -= count
                if rng.random() < 0.7:
                    cache.commit(sequence, texts[i])
                if ends[i] == len(texts[i]):
                    rows[i] = row
                    cache.commit(sequence, texts[i])
                    cache.release(running.pop(i))
        for i, text in enumerate(texts):
            alone_cache.forget()
            assert torch.equal(rows[i], last_row(alone, alone_cache, text)), (i, len(text))
        known += texts
    assert reused > 0


def test_all_logits_of_a_chunk_over_several_pages(tiny_model_dir):
    options = {"cache_type": "q4", "ctx_size": 1024, "chunk_size": 600, "logits_rows": 600}
    model, cache = build_model(tiny_model_dir, get_ops("cpu"), sequences=2, **options)
    rng = random.Random(5)
    first, second = some_ids(rng, 500), some_ids(rng, 100)
    sequences = [cache.acquire(600), cache.acquire(600)]
    together = model.forward(list(zip(sequences, (first, second), strict=True)), "all").clone()
    for sequence in sequences:
        cache.release(sequence)
    rows = []
    for text in (first, second):
        sequence = cache.acquire(600)
        rows += [model.forward([(sequence, [i])]).clone() for i in text]
        cache.release(sequence)
    assert torch.equal(together, torch.cat(rows))


def test_a_first_token_that_no_open_page_has_is_computed_again(tiny_model_dir):
    options = {"cache_type": "q4", "ctx_size": 1024, "chunk_size": 256}
    model, cache = build_model(tiny_model_dir, get_ops("cpu"), **options)
    rng = random.Random(6)
    text, other = some_ids(rng, 600), some_ids(rng, 100)
    assert text[0] != other[0]

    def run(ids, reused):
        sequence = cache.acquire(len(ids), ids)
        assert sequence.past_len == reused
        row = None
        while sequence.past_len < len(ids):
            row = model.forward([(sequence, ids[sequence.past_len :][:256])]).clone()
            cache.commit(sequence, ids)
        cache.release(sequence)
        return row

    before = run(text, 0)
    run(other, 0)
    again = cache.acquire(len(text), text)
    assert again.past_len == 512 and again.missing_first == text[0]
    cache.release(again)
    assert torch.equal(run(text, 512), before)


def test_as_many_texts_as_open_pages(tiny_model_dir):
    _, cache = build_model(
        tiny_model_dir, get_ops("cpu"), cache_type="q4", sequences=2, ctx_size=512
    )
    held = [cache.acquire(10), cache.acquire(10)]
    with pytest.raises(CacheFull, match="no open page"):
        cache.acquire(10)
    assert cache.num_free_pages == 2
    cache.release(held.pop())
    held.append(cache.acquire(10))
    for sequence in held:
        cache.release(sequence)


@pytest.mark.parametrize("cache_type", ["fp16", "q4"])
def test_an_answer_of_some_pages_is_generated_again_without_its_prompt(
    tiny_model_dir, cache_type
):
    """The prompt's last page stays in its open page as long as no other text needs it."""
    prompt = some_ids(random.Random(7), 300)
    options = {"ctx_size": 2048, "cache_type": cache_type, "max_batch_size": 4}
    with exl_loader.load(tiny_model_dir, **options) as model:
        texts, reused = [], []
        for _ in range(2):
            generation = model.generate_ids(prompt, GREEDY | {"max_new_tokens": 600})
            texts.append(list(generation))
            reused.append(generation.stats.reused_tokens)
        assert reused == [0, 299] and texts[0] == texts[1]
        chat = [*prompt, *texts[0], 5, 6, 7]
        generation = model.generate_ids(chat, GREEDY | {"max_new_tokens": 5})
        list(generation)
        assert generation.stats.reused_tokens == 899


def test_a_cache_without_a_window(tiny_model_dir):
    """It takes less memory, and gives other logits."""
    options = {"ctx_size": 1024, "cache_type": "q4", "max_batch_size": 2}
    ids = some_ids(random.Random(8), 600)
    found, sizes = [], []
    for window in (0, 256):
        planned = exl_loader.plan(tiny_model_dir, cache_window=window, **options)
        with exl_loader.load(tiny_model_dir, cache_window=window, **options) as model:
            assert model.allocated_bytes() == planned.total_bytes
            found.append(model.prompt_logits(ids))
        sizes.append(planned.total_bytes)
        assert planned.cache_window == window
        opened = sum(device.open_page_bytes for device in planned.devices)
        assert (opened > 0) == (window > 0)
    assert sizes[0] + opened == sizes[1]
    assert not torch.equal(*found)
    # In the first page every token is in its open page.
    with exl_loader.load(tiny_model_dir, ctx_size=1024, cache_type="fp32") as model:
        exact = model.prompt_logits(ids)
    in_first, later = (
        [((rows - exact)[part].norm() / exact[part].norm()).item() for rows in found]
        for part in (slice(0, PAGE_LEN), slice(PAGE_LEN, None))
    )
    assert in_first[1] < in_first[0] / 5
    # A random model attends to near tokens no more than to others.
    assert later[1] < later[0] * 0.9
    with pytest.raises(InvalidSettings, match="cache_window"):
        exl_loader.plan(tiny_model_dir, cache_window=100)


def test_a_text_that_is_evaluated_gives_no_other_text_a_page_that_it_has_left(tiny_model_dir):
    """Between two steps of an evaluation another text may begin with the same tokens."""
    options = {"cache_type": "q4", "ctx_size": 1024, "chunk_size": 128}
    model, cache = build_model(tiny_model_dir, get_ops("cpu"), sequences=2, **options)
    rng = random.Random(9)
    base = some_ids(rng, 300)
    sequence = cache.acquire(len(base))
    while sequence.past_len < len(base):
        model.forward([(sequence, base[sequence.past_len :][:128])], "none")
        cache.commit(sequence, base)
    cache.release(sequence)
    longer, other = base[:290] + some_ids(rng, 500), base[:290] + some_ids(rng, 20)
    evaluation = TextEvaluation(longer, len(longer), True, lambda index, rows: None)
    evaluation.start(model, cache)
    for _ in range(3):
        evaluation.advance()
    begun = cache.acquire(len(other), other)
    found = model.forward([(begun, other[begun.past_len :])]).clone()
    cache.release(begun)
    evaluation.finish()
    cache.forget()
    assert torch.equal(found[0], last_row(model, cache, other))
