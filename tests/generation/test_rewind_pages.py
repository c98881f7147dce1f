"""Texts that go back over a cache that they share: each is what it is alone; no page is lost."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

import exl_loader
from exl_loader.cache.layout import PAGE_LEN, CacheLayer, CacheType
from exl_loader.cache.paging import PagedCache
from exl_loader.generation.draft_model import DraftModel
from exl_loader.generation.rewind import Rewind
from support import in_threads
from support.banned_defined import VOCAB, define, invented, letters_of
from support.fake_model import FakeModel, fake_engine, settle
from support.stepped import texts_together
from support.tiny import write_tiny_model

GREEDY = {"temperature": 0, "ban_eos_token": True}

# "." is never banned, so that there is always a way on.
LETTERS = "ab-."


def check_index(model: FakeModel, cache: PagedCache) -> None:
    """What can be found by its content is in the pages, which hold ids in place of keys."""
    for page, content in cache._index._contents.items():
        stored = model.stored[page].flatten()[: len(content.ids)]
        assert stored.tolist() == content.ids.tolist()


def words(rng: random.Random) -> list[str]:
    return ["".join(rng.choices("ab-", k=rng.randint(2, 6))) for _ in range(rng.randint(1, 4))]


@pytest.mark.parametrize("pages", [4, 5, 20])
@pytest.mark.parametrize("seed", [0, 1, None])
def test_random_texts_over_a_small_cache(byte_tokenizer, seed, pages):
    """Texts with common beginnings, greedy and random ones, some with lookup or guidance."""
    rng = random.Random(seed)
    logits = invented(letters_of(byte_tokenizer, LETTERS), rng.randrange(1000))
    base = rng.choices(letters_of(byte_tokenizer, LETTERS), k=600)
    requests = []
    for i in range(5):
        prompt = base[: rng.choice([1, 200, 250, 254, 255, 256, 257, 500])]
        options = {"banned_strings": words(rng), "max_new_tokens": rng.randint(10, 300)} | GREEDY
        options |= rng.choice([
            {}, {}, {"prompt_lookup_num_tokens": 4}, {"temperature": 1.0, "seed": i},
            {"guidance_scale": 1.5, "max_new_tokens": 50},
        ])
        requests.append((prompt, options))

    def engine(pages, **sizes):
        engine, model, cache = fake_engine(
            logits, VOCAB, byte_tokenizer, 1024, pages=pages, chunk_size=128, **sizes)
        model.config.bos_token_id = base[0]
        return engine, model, cache

    expected = []
    for prompt, options in requests:
        alone, _, _ = engine(20)
        expected.append("".join(alone.generate(prompt, options)))
        if options["temperature"] == 0 and "guidance_scale" not in options:
            defined = define(byte_tokenizer, lambda ids: logits([*prompt, *ids]),  # noqa: B023
                             options["banned_strings"], options["max_new_tokens"], ())
            assert expected[-1] == byte_tokenizer.decode(defined.ids)
    together, model, cache = engine(pages)
    generations = [together.generate(*request) for request in requests]
    assert in_threads("".join, generations) == expected
    settle(together)
    assert cache.num_free_pages == pages
    check_index(model, cache)


def test_pages_are_taken_from_texts_that_hold_tokens_back(byte_tokenizer):
    """Almost all of the text may be the beginning of the banned string, once it is."""
    a, dash = letters_of(byte_tokenizer, "a-")

    def logits(text: list[int]) -> torch.Tensor:
        row = torch.full((VOCAB,), -40.0)
        row[a], row[dash] = 5.0, 9.0 if len(text) in {*range(0, 600, 45), 274} - {270} else 0.0
        return row

    banned = ["a" * 47]
    options = GREEDY | {"banned_strings": banned, "max_new_tokens": 300}
    prompts = [[5 + i] * 20 for i in range(4)]
    expected = define(byte_tokenizer, lambda ids: logits([*prompts[0], *ids]), banned, 300, ())
    assert expected.num_lost > 40
    engine, model, cache = fake_engine(logits, VOCAB, byte_tokenizer, 1024, pages=5)
    texts, jobs = texts_together(engine, [(prompt, options) for prompt in prompts])
    assert texts == [byte_tokenizer.decode(expected.ids)] * 4
    assert sum(job.stats.preemptions for job in jobs)
    assert cache.num_free_pages == 5
    check_index(model, cache)


@pytest.mark.parametrize("guess", ["the same", "another"])
def test_a_draft_model_follows_a_text_that_goes_back(byte_tokenizer, guess):
    logits = invented(letters_of(byte_tokenizer, LETTERS), 3)
    banned = ["aba", "bb", "--a"]
    expected = define(byte_tokenizer, lambda ids: logits([5, *ids]), banned, 400, ())
    assert expected.num_lost > 20
    engine, model, cache = fake_engine(
        logits, VOCAB, byte_tokenizer, 1024, chunk_size=64, logits_rows=16)
    draft = FakeModel(
        logits if guess == "the same" else invented(letters_of(byte_tokenizer, LETTERS), 4),
        VOCAB, 4, chunk_size=64)
    layer = CacheLayer(draft.stored, None, draft.stored, None, CacheType(32, 32))
    drafts_cache = PagedCache([layer], 4)
    drafts = engine._generator._scheduler.drafts
    drafts.draft_model = DraftModel(draft, drafts_cache, 4, VOCAB)
    generation = engine.generate([5], GREEDY | {"max_new_tokens": 400, "banned_strings": banned})
    assert "".join(generation) == byte_tokenizer.decode(expected.ids)
    settle(engine)
    for one, its_model in ((cache, model), (drafts_cache, draft)):
        assert one.num_free_pages == 4
        check_index(its_model, one)
    if guess == "the same":
        assert generation.stats.accepted_tokens > 100
    assert generation.stats.accepted_tokens <= generation.stats.new_tokens == 400


# ---- On the compiled kernels ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("rewind") / "model")


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("draft") / "model", seed=1)


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("cache_type", ["fp16", "q8", "q4", "q8_q4"])
def test_every_cache_type_gives_the_text_of_the_definition(
    folder, draft_folder, cache_type, drafted, monkeypatch
):
    """Texts that go back over the end of a page, with others beside them, and alone."""
    cuts = []
    cut = PagedCache.cut

    def spy(self, sequence, num_tokens):
        cuts.append((len(sequence.keys) - 1) * PAGE_LEN > num_tokens)
        cut(self, sequence, num_tokens)

    monkeypatch.setattr(PagedCache, "cut", spy)
    options = {"cache_type": cache_type, "ctx_size": 1024, "max_batch_size": 4, "chunk_size": 128}
    if drafted:
        options["model_draft"] = draft_folder
    rng = random.Random(cache_type)
    with exl_loader.load(folder, **options) as model:
        letters = letters_of(model.tokenizer, "abcdefghijklmnopqrstuvwxyz ")
        follow = partial(define, model.tokenizer, may_follow=lambda ids: letters)
        requests, expected = [], []
        for prompt_len in (250, 253, 255, 500):
            prompt = rng.choices(letters, k=prompt_len)
            chosen = GREEDY | {"allowed_tokens": letters, "max_new_tokens": 40}

            def logits(ids, prompt=prompt):
                return model.next_logits([*prompt, *ids], 1024)[: model.tokenizer.vocab_size]

            # Banned is what the model would write over the end of a page, and before it.
            plain = model.tokenizer.decode(follow(logits, [], 40, ()).ids)
            last = PAGE_LEN - prompt_len % PAGE_LEN
            banned = [plain[max(0, last - 4) : last + 4]]
            chosen["banned_strings"] = banned + [plain[1:3], plain[-5:]] * (prompt_len == 253)
            defined = follow(logits, chosen["banned_strings"], 40, ())
            assert defined.num_excluded
            requests.append((prompt, chosen))
            expected.append(model.tokenizer.decode(defined.ids))
        for request, text in zip(requests, expected, strict=True):
            assert "".join(model.generate(*request)) == text
        lookup = {"prompt_lookup_num_tokens": 3}
        generations = [model.generate(prompt, chosen | lookup) for prompt, chosen in requests]
        assert in_threads("".join, generations) == expected
        # Without what the cache holds of them.
        model.prompt_logits([5] * 1024)
        generations = [model.generate(*request) for request in requests]
        assert in_threads("".join, generations) == expected
        assert any(cuts), "no text went back over the end of a page"
        cache = model._generator._scheduler.cache
        assert cache.num_free_pages == cache.num_pages
        assert model.allocated_bytes() == model.reservation.total_bytes
        del cache


def test_requests_without_banned_strings_have_no_part_of_it(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(Rewind, "__init__", None)
    engine, _, _ = fake_engine(lambda text: 7, VOCAB, tokenizer=byte_tokenizer)
    generation = engine.generate([5], GREEDY | {"max_new_tokens": 3})
    list(generation)
    assert generation._job.rewind is None
