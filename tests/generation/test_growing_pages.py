"""Pages are taken as texts grow: every text is the one it is alone, and no page is lost."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import pytest

import exl_loader
from exl_loader.cache.layout import PAGE_LEN, CacheLayer, CacheType, pages_for
from exl_loader.cache.paging import PagedCache
from exl_loader.generation.draft_model import DraftModel
from exl_loader.generation.evaluations import TextEvaluation
from exl_loader.generation.jobs import Job
from exl_loader.utils.errors import CacheFull
from support import in_threads
from support.callers import Caller, check_pages
from support.emulated_cuda import EmulatedCards
from support.fake_model import FakeModel, fake_engine
from support.full_drafts import draft_fully
from support.stepped import read, start, texts_together
from support.tiny import write_tiny_model

GREEDY = {"temperature": 0, "ban_eos_token": True}
VOCAB = 300


def script(text: list[int]) -> int:
    """Depends on the whole text, and does not repeat within a few hundred tokens."""
    return 3 + (len(text) * len(text) * 7 + text[0] + text[-1]) % 251


def ends_after_200(text: list[int]) -> int:
    return 0 if len(text) > 200 else 5


# What is admitted, and who gives pages back


def test_open_ended_requests_share_a_cache_that_one_could_fill():
    engine, model, cache = fake_engine(
        ends_after_200, VOCAB, ctx_size=2048, max_batch_size=4, chunk_size=128
    )
    options = {"temperature": 0, "max_new_tokens": 5000}
    jobs = [start(engine, [7 + i], options) for i in range(4)]
    assert [len(ids) for ids in finish(engine, *jobs)] == [200] * 4
    assert max(map(len, model.calls)) == 4
    assert [job.stats.preemptions for job in jobs] == [0] * 4
    assert cache.num_free_pages == cache.num_pages == 8


def finish(engine, *jobs: Job, until=lambda: False) -> list[list[int]]:
    """Run steps until the jobs have ended, or `until` is true; return their ids."""
    scheduler = engine._generator._scheduler
    taken: list[list[int]] = [[] for _ in jobs]
    for _ in range(5000):
        if all(job.finished for job in jobs) or until():
            return taken
        assert scheduler.step()
        for job, ids in zip(jobs, taken, strict=True):
            ids += [token_id for token_id, _ in read(job)]
    raise AssertionError("no end")


def test_a_request_is_admitted_with_its_prompt_and_takes_pages_as_it_grows():
    engine, _, cache = fake_engine(script, VOCAB, ctx_size=2048, chunk_size=128)
    job = start(engine, [7] * 300, GREEDY | {"max_new_tokens": 5000})
    held = []

    def hold() -> bool:
        if job.sequence is not None:
            held.append(len(job.sequence.pages))
            assert held[-1] == cache.num_pages - cache.num_free_pages
            assert held[-1] == max(pages_for(len(job.history) - 1), 2)
        return False

    (ids,) = finish(engine, job, until=hold)
    assert len(ids) == 2048 - 300
    assert sorted(set(held)) == list(range(2, 9)) and held == sorted(held)


def test_a_short_answer_takes_no_page_more():
    engine, _, cache = fake_engine(script, VOCAB, ctx_size=2048, chunk_size=128)
    start(engine, [7] * 100, GREEDY | {"max_new_tokens": 100})
    engine._generator._scheduler.step()
    assert cache.num_pages - cache.num_free_pages == 1


def test_the_youngest_gives_its_pages_back_and_the_oldest_never_does():
    options = GREEDY | {"max_new_tokens": 700}
    engine, _, cache = fake_engine(script, VOCAB, ctx_size=1024, chunk_size=128, pages=4)
    prompts = [[7], [8], [9]]
    jobs = [start(engine, prompt, options) for prompt in prompts]
    ended: list[Job] = []

    def note() -> bool:
        ended.extend(job for job in jobs if job.finished and job not in ended)
        return False

    assert finish(engine, *jobs, until=note) == [alone(prompt, options) for prompt in prompts]
    note()
    assert ended == jobs
    preemptions = [job.stats.preemptions for job in jobs]
    assert preemptions[0] == 0 and preemptions[1] == 1
    assert [job.stats.reused_tokens for job in jobs] == [0, 0, 0]
    assert cache.num_free_pages == 4


def test_a_text_that_gave_its_pages_back_reuses_those_that_are_left():
    """The older text took one of its pages. Only the tokens of that one are computed again."""
    engine, model, _ = fake_engine(script, VOCAB, ctx_size=1024, chunk_size=300, pages=6)
    old = start(engine, [7] * 500, GREEDY | {"max_new_tokens": 500})
    finish(engine, old, until=lambda: old.decoding)
    young = start(engine, [9] * 300, GREEDY | {"max_new_tokens": 400})
    ids = finish(engine, young, old, until=lambda: young.stats.preemptions)[0]
    assert young.stats.preemptions
    finish(engine, old)
    model.calls.clear()
    num_new = young.stats.new_tokens
    ids += finish(engine, young)[0]
    assert ids == alone([9] * 300, GREEDY | {"max_new_tokens": 400})
    again = sum(map(sum, model.calls)) - (400 - num_new)
    assert 0 < again <= PAGE_LEN


def test_a_request_that_could_exceed_the_whole_cache_is_refused():
    engine, _, cache = fake_engine(script, VOCAB, ctx_size=1024, pages=3)
    with pytest.raises(CacheFull, match="text of 1024 tokens.*at most 3 pages.*Ask for fewer"):
        list(engine.generate_ids([7], GREEDY | {"max_new_tokens": 2000}))
    assert len(list(engine.generate_ids([7], GREEDY | {"max_new_tokens": 700}))) == 700
    assert cache.num_free_pages == 3


def test_a_growing_text_waits_for_the_pages_of_an_evaluation():
    """The only text keeps its own pages, because its beginning would be computed again."""
    engine, _, cache = fake_engine(script, VOCAB, ctx_size=1536, pages=6, chunk_size=1)
    job = start(engine, [7] * 250, GREEDY | {"max_new_tokens": 1200})
    finish(engine, job, until=lambda: job.stats.new_tokens == 400)
    evaluation = evaluate(engine, [5] * 510)
    steps = []
    finish(engine, job, until=lambda: steps.append(job.stats.new_tokens) or evaluation.finished)
    assert steps[-1] == steps[-20] == 1024 - 250 + 1, "it waited for a page"
    finish(engine, job)
    assert job.stats.preemptions == 0 and job.finish_reason == "length"
    assert evaluation.error is None
    assert cache.num_free_pages == 6


def test_an_evaluation_waits_for_pages_in_turn_with_requests():
    """The text before it keeps its pages, and the request behind it does not overtake it."""
    engine, _, cache = fake_engine(script, VOCAB, ctx_size=1024, pages=4, chunk_size=64)
    scheduler = engine._generator._scheduler
    first = start(engine, [7] * 600, GREEDY | {"max_new_tokens": 300})
    finish(engine, first, until=lambda: first.decoding)
    evaluation = evaluate(engine, [5] * 1000)
    last = start(engine, [9], GREEDY | {"max_new_tokens": 20})
    finish(engine, first, last, until=lambda: first.finished)
    assert not last.decoding
    assert list(scheduler.waiting) == [evaluation, last]
    finish(engine, last, until=lambda: evaluation.finished)
    assert evaluation.error is None and not last.decoding
    finish(engine, last)
    assert last.stats.new_tokens == 20 and first.stats.preemptions == 0
    assert cache.num_free_pages == 4


@pytest.mark.parametrize("started", [False, True])
def test_an_evaluation_can_be_cancelled(started):
    engine, _, cache = fake_engine(script, VOCAB, ctx_size=1024, pages=5, chunk_size=8)
    job = start(engine, [7] * 600, GREEDY | {"max_new_tokens": 300})
    finish(engine, job, until=lambda: job.decoding)
    evaluation = evaluate(engine, [5] * (200 if started else 1000))
    finish(engine, job, until=lambda: job.stats.new_tokens > 5)
    assert (evaluation.sequence is not None) == started
    evaluation.cancelled = True
    finish(engine, job, until=lambda: evaluation.finished)
    assert not job.finished and evaluation.error is None and evaluation.sequence is None
    finish(engine, job)
    assert cache.num_free_pages == 5


def test_an_evaluation_that_exceeds_the_cache_is_refused_at_once():
    engine, _, _ = fake_engine(script, VOCAB, ctx_size=1024, pages=3, chunk_size=64)
    job = start(engine, [7] * 600, GREEDY | {"max_new_tokens": 100})
    evaluation = evaluate(engine, [5] * 1000)
    assert evaluation.finished
    with pytest.raises(CacheFull, match="text of 1000 tokens.*at most 3 pages.*found 4"):
        raise evaluation.error
    finish(engine, job)


def test_many_evaluations_beside_chats_all_end():
    """Each caller waits in its own thread, as the web UI and the API do."""
    engine, _, cache = fake_engine(script, VOCAB, ctx_size=1024, pages=5, chunk_size=64)

    def ask(i: int):
        if i % 2:
            return engine.prompt_logits([5 + i] * (300 * i % 1000 + 1)).argmax(dim=1).tolist()
        return list(engine.generate_ids([7 + i], GREEDY | {"max_new_tokens": 500}))

    answers = in_threads(ask, range(12))
    for i, answer in enumerate(answers):
        if i % 2:
            prompt = [5 + i] * (300 * i % 1000 + 1)
            assert answer == [script(prompt[: n + 1]) for n in range(len(prompt))]
        else:
            assert answer == alone([7 + i], GREEDY | {"max_new_tokens": 500})
    assert cache.num_free_pages == 5


def evaluate(engine, ids: list[int]) -> TextEvaluation:
    """Give an evaluation to the scheduler."""
    evaluation = TextEvaluation(ids, len(ids), False, lambda index, rows: None)
    evaluation.add_waiter()
    engine._generator._scheduler.accept(evaluation)
    return evaluation


def test_progress_reports_a_prompt_once():
    """A text gives its pages back while its prompt is read."""
    engine, _, _ = fake_engine(script, VOCAB, ctx_size=4096, pages=13, chunk_size=4)
    scheduler, counts = engine._generator._scheduler, []

    class Progress:
        def start(self, stage, total, unit):
            counts.append(("start", total))

        def advance(self, stage, count):
            counts.append(("advance", count))

        def finish(self, stage):
            counts.append(("finish", 0))

    old = start(engine, [7] * 250, GREEDY | {"max_new_tokens": 1200})
    finish(engine, old, until=lambda: old.decoding)
    settings = exl_loader.SamplingSettings.from_dict(GREEDY | {"max_new_tokens": 260})
    young = engine._requests.job([9] * 2400, settings, Progress(), False)
    young.add_waiter()
    scheduler.accept(young)
    finish(engine, young, old, until=lambda: young.stats.preemptions)
    assert 0 < sum(count for name, count in counts if name == "advance") < 2400
    finish(engine, young, old)
    assert counts[0] == ("start", 2400) and counts[-1] == ("finish", 0)
    assert [name for name, _ in counts[1:-1]] == ["advance"] * (len(counts) - 2)
    assert sum(count for _, count in counts[1:-1]) == 2400


# Random requests


def alone(prompt: list[int], options: dict) -> list[int]:
    """Return the text of a request that has the cache to itself."""
    return list(_alone(tuple(prompt), tuple(sorted(options.items()))))


@lru_cache(maxsize=64)
def _alone(prompt: tuple[int, ...], options: tuple[tuple[str, Any], ...]) -> list[int]:
    """Generate once for tests with the same requests, such as those with and without a draft."""
    engine, model, _ = fake_engine(script, VOCAB, ctx_size=1024, pages=8, chunk_size=256)
    model.config.bos_token_id = 1
    return list(engine.generate_ids(list(prompt), dict(options)))


def random_caller(rng: random.Random, bases: list[list[int]]) -> Caller:
    base = rng.choice(bases)
    prompt = base[: rng.choice([1, 5, 250, 256, 257, rng.randint(1, len(base))])]
    new_tokens = rng.choice([1, 300, 600, 900, 5000])
    options: dict = {"max_new_tokens": min(new_tokens, 1024 - len(prompt))}
    options |= rng.choice([
        {"temperature": 0, "ban_eos_token": True}, {"temperature": 0, "ban_eos_token": True},
        {"temperature": 1.2, "seed": rng.randrange(100)},
        {"temperature": 0, "ban_eos_token": True, "prompt_lookup_num_tokens": 3},
        {"temperature": 1.0, "seed": 4, "mirostat_mode": 2},
        {"temperature": 0, "ban_eos_token": True, "guidance_scale": 1.5,
         "negative_prompt": None, "max_new_tokens": min(new_tokens, 200)},
    ])
    leaves_after = rng.choice([10**6] * 4 + [rng.randint(1, 500)])
    return Caller(rng.randrange(600), prompt, options, rng.choice([1, 1, 0.3]), leaves_after)


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2, None])
def test_random_requests_over_a_small_cache(seed, drafted):
    """Arrivals, lengths, readers and cancellations at random; evaluations between them."""
    rng = random.Random(seed)
    bases = [[rng.randint(3, 250) for _ in range(600)] for _ in range(3)]
    pages = rng.randint(6, 9)
    engine, model, cache = fake_engine(
        script, VOCAB, ctx_size=1024, pages=pages, chunk_size=200, max_batch_size=6
    )
    model.config.bos_token_id = 1
    scheduler = engine._generator._scheduler
    draft_fully(engine)
    if drafted:
        draft = FakeModel(
            lambda text: script(text) if len(text) % 5 else 299, VOCAB, 3, chunk_size=200
        )
        layer = CacheLayer(draft.stored, None, draft.stored, None, CacheType(32, 32))
        scheduler.drafts.draft_model = DraftModel(draft, PagedCache([layer], 3), 4, VOCAB)
    callers = [random_caller(rng, bases) for _ in range(14)]
    expected = [alone(caller.prompt, caller.options) for caller in callers]
    evaluations: list[TextEvaluation] = []
    step = 0
    while any(caller.job is None or not caller.job.finished for caller in callers):
        assert step < 60_000, "no end"
        for caller in callers:
            if caller.job is None and caller.arrives <= step:
                caller.job = start(engine, caller.prompt, caller.options)
        if rng.random() < 0.003:
            evaluations.append(evaluate(engine, bases[0][: rng.randint(1, 400)]))
        for evaluation in scheduler.waiting:
            if isinstance(evaluation, TextEvaluation) and rng.random() < 0.001:
                evaluation.cancelled = True
        for evaluation in evaluations:
            if not evaluation.finished and not evaluation._waiters:
                evaluation.add_waiter()
        running = [
            job for job in (*scheduler.active, *scheduler.waiting)
            if isinstance(job, Job) and not job.cancelled
        ]
        oldest = min(running, key=lambda job: job.arrival, default=None)
        before = oldest.stats.preemptions if oldest is not None else 0
        scheduler.step()
        check_pages(scheduler)
        if oldest is not None:
            assert oldest.stats.preemptions == before, "the oldest gave its pages back"
        for caller in callers:
            if caller.job is not None and rng.random() < caller.reads:
                caller.taken += [token_id for token_id, _ in read(caller.job)]
                if len(caller.taken) >= caller.leaves_after:
                    caller.job.cancelled = True
        step += 1
    while scheduler.evaluations or scheduler.waiting:
        scheduler.step()
    for caller, ids in zip(callers, expected, strict=True):
        assert caller.job is not None and caller.job.error is None
        caller.taken += [token_id for token_id, _ in read(caller.job)]
        whole = not caller.job.cancelled or caller.job.finish_reason != "cancelled"
        assert caller.taken == (ids if whole else ids[: len(caller.taken)])
    for evaluation in evaluations:
        assert evaluation.error is None and evaluation.sequence is None
    jobs = [caller.job for caller in callers if caller.job is not None]
    # A text takes a page for every 256 tokens, and each time at most one job loses its pages.
    most = sum(job.num_sequences * pages_for(len(job.history)) for job in jobs)
    most += 2 * len(evaluations)
    preemptions = sum(job.stats.preemptions for job in jobs)
    assert preemptions <= most and (preemptions > 0 or seed is None)
    assert cache.num_free_pages == pages
    if drafted:
        assert scheduler.drafts.draft_model._cache.num_free_pages == 3
        assert any(job.stats.accepted_tokens for job in jobs)


# On the compiled kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("growing") / "model")


@pytest.fixture(scope="module")
def draft_dir(tmp_path_factory):
    return write_tiny_model(
        tmp_path_factory.mktemp("growing_draft") / "model", seed=9, hidden_size=32,
        num_hidden_layers=1, intermediate_size=64,
    )


SETTINGS = [
    {"temperature": 0}, {"temperature": 0.8, "seed": 3, "logprobs": 2},
    {"temperature": 1.1, "seed": 4, "dry_multiplier": 0.8}, {"mirostat_mode": 2, "seed": 5},
    {"temperature": 0, "guidance_scale": 1.4, "negative_prompt": "no " * 20,
     "max_new_tokens": 300},
    {"temperature": 0.7, "seed": 6, "grammar_string": 'root ::= ("a" | "b" | "yes ")+'},
    {"temperature": 0.9, "seed": 7, "repetition_penalty": 1.2, "prompt_lookup_num_tokens": 3},
]


@pytest.mark.parametrize("cache_type", ["fp16", "q4"])
@pytest.mark.parametrize("drafted", [False, True])
def test_on_the_compiled_kernels_texts_that_lose_their_pages_are_the_same(
    folder, draft_dir, cache_type, drafted
):
    options = {"ctx_size": 1280, "cache_type": cache_type, "max_batch_size": 4, "chunk_size": 128}
    if drafted:
        options["model_draft"] = draft_dir
    rng = random.Random(11)
    requests = []
    for i, settings in enumerate(SETTINGS):
        prompt = [rng.randint(3, 250) for _ in range(rng.choice([3, 30, 60]))]
        chosen = {"max_new_tokens": 550 - len(prompt) + i, "ban_eos_token": True} | settings
        requests.append((prompt, chosen))

    with draft_fully(exl_loader.load(folder, **options)) as model:
        whole = []
        for prompt, chosen in requests:
            model.prompt_logits([5] * 1280)
            generation = model.generate(prompt, chosen)
            whole.append(("".join(generation), generation.token_ids, generation.logprobs))
    with draft_fully(exl_loader.load(folder, **options)) as model:
        texts, jobs = texts_together(model, requests)
        together = [
            (text, job.history[len(job.prompt_ids) :].tolist(), job.logprobs)
            for text, job in zip(texts, jobs, strict=True)
        ]
        assert together == whole
        assert sum(job.stats.preemptions for job in jobs) > 0
        cache = model._generator._scheduler.cache
        assert cache.num_free_pages == cache.num_pages == 5
        assert model.allocated_bytes() == model.reservation.total_bytes
        del cache


# On several devices


@pytest.mark.parametrize("device, cache_type", [("cuda:0,cuda:1", "fp16"), ("cpu,cuda:0", "q4")])
def test_on_two_devices_texts_that_lose_their_pages_are_the_same(
    folder, monkeypatch, device, cache_type
):
    """Each device has its part of every page, so pages are taken and lost on both at once.

    A card's attention has another kernel for more than 32 rows of a text, whose last bits differ,
    so an answer is evaluated again in passes of 32 rows.
    """
    cards = EmulatedCards(2)
    cards.install(monkeypatch)
    first = device.split(",")[0]
    options = {"ctx_size": 512, "cache_size": 2048, "cache_type": cache_type, "chunk_size": 128,
               "max_batch_size": 5}
    alone = exl_loader.plan(folder, device=first, **options).devices[0].total_bytes
    options |= {"device": device, "gpu_split": [(alone - 1) / 2**30, 1]}
    rng = random.Random(3)
    requests = [
        ([rng.randint(3, 250) for _ in range(250 + i)],
         GREEDY | {"max_new_tokens": 45, "logprobs": 1, "temperature": i % 2, "seed": i})
        for i in range(5)
    ]

    # Alone in a cache of their own, because a prompt that a cache holds in part is not evaluated in
    # the same passes.
    with exl_loader.load(folder, **options) as model:
        whole = []
        for prompt, chosen in requests:
            generation = model.generate_ids(prompt, chosen)
            whole.append((list(generation), generation.logprobs))
    with exl_loader.load(folder, **options) as model:
        layers = [(used.device, used.end_layer - used.first_layer)
                  for used in model.reservation.devices]
        assert [count for _, count in layers if count] == [1, 1]
        jobs = [start(model, *request) for request in requests]
        texts = finish(model, *jobs)
        assert list(zip(texts, [job.logprobs for job in jobs], strict=True)) == whole
        assert sum(job.stats.preemptions for job in jobs) > 0
        cache = model._generator._scheduler.cache
        assert cache.num_free_pages == cache.num_pages == 8
        assert model.allocated_bytes() == model.reservation.total_bytes
        del cache


@pytest.mark.parametrize("decode_rows", [32, 128])
def test_an_answer_is_evaluated_again_in_passes_that_have_the_bits_of_its_decoding(decode_rows):
    engine, model, _ = fake_engine(
        script, VOCAB, ctx_size=1024, pages=4, chunk_size=128, decode_rows=decode_rows)
    model.config.bos_token_id = 1
    passes, forward = [], model.forward

    def watched(entries, logits="last"):
        passes.extend((sequence.past_len, len(ids)) for sequence, ids in entries)
        return forward(entries, logits)

    model.forward = watched
    options = {"temperature": 0, "ban_eos_token": True, "max_new_tokens": 500}
    prompts = [[token] * 240 for token in (3, 5, 9)]
    jobs = [start(engine, prompt, options) for prompt in prompts]
    assert finish(engine, *jobs) == [alone(prompt, options) for prompt in prompts]
    assert sum(job.stats.preemptions for job in jobs) > 0
    of_answers = [count for first, count in passes if first >= 240]
    assert max(of_answers) == decode_rows
    across = [first for first, count in passes if first < 240 < first + count]
    assert not across or decode_rows == model.chunk_size
