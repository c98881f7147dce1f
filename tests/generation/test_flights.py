"""Passes in flight between machines: all machines are busy, and texts are those of one pass."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import exl_loader
from exl_loader.cache.layout import CacheLayer, CacheType
from exl_loader.cache.paging import PagedCache
from exl_loader.generation.draft_model import DraftModel
from exl_loader.generation.evaluations import ExclusiveUse, TextEvaluation
from exl_loader.generation.flight_scheduler import FlightScheduler
from exl_loader.generation.forward_model import LogitsRow
from exl_loader.generation.jobs import Job
from exl_loader.utils.errors import MachineLost, ModelUnloaded
from support.callers import Caller, check_pages
from support.fake_model import FakeModel
from support.full_drafts import draft_fully
from support.pipeline_model import PipelineModel, pipeline_engine
from support.stepped import read, start, texts_together

GREEDY = {"temperature": 0, "ban_eos_token": True}
VOCAB = 300


def script(text: list[int]) -> int:
    """Depends on the whole text, and does not repeat within a few hundred tokens."""
    return 3 + (len(text) * len(text) * 7 + text[0] + sum(text[-3:])) % 251


def engine_over(machines: int, **options: Any):
    """Build an engine as a model over so many machines has."""
    return pipeline_engine(script, VOCAB, **{
        "ctx_size": 2048, "pages": 40, "chunk_size": 128, "most_in_flight": 2 * machines,
        "decoding_in_flight": machines, **options,
    })


def finish(engine, *jobs: Job, until: Callable[[], object] = lambda: False) -> list[list[int]]:
    """Run steps until the jobs have ended, or `until` is true; return their ids."""
    scheduler = engine._generator._scheduler
    taken: list[list[int]] = [[] for _ in jobs]
    for _ in range(20_000):
        if all(job.finished for job in jobs) or until():
            return taken
        assert scheduler.step()
        for job, ids in zip(jobs, taken, strict=True):
            ids += [token_id for token_id, _ in read(job)]
    raise AssertionError("no end")


def written(prompt: list[int], count: int) -> list[int]:
    """Return what the script answers."""
    text = list(prompt)
    for _ in range(count):
        text.append(script(text))
    return text[len(prompt) :]


def check_cache(model: PipelineModel, cache: PagedCache) -> None:
    """What can be found by its content is in the pages of all machines."""
    assert not model.open
    while model.ring:
        model.ring.popleft()()
    for page, content in cache._index._contents.items():
        for storage in (model.first, model.others):
            assert storage.pages[page, : len(content.ids)].tolist() == content.ids.tolist()


# All machines are busy


@pytest.mark.parametrize("machines", [2, 3, 4])
def test_decoding_jobs_are_divided_among_as_many_passes_as_machines(machines):
    engine, model, cache = engine_over(machines)
    prompts = [[7 + i] * 20 for i in range(8)]
    jobs = [start(engine, prompt, GREEDY | {"max_new_tokens": 60}) for prompt in prompts]
    ids = finish(engine, *jobs, until=lambda: all(job.decoding for job in jobs))
    model.passes.clear()
    model.open_at_landing.clear()
    more = finish(engine, *jobs, until=lambda: any(job.finished for job in jobs))
    assert set(model.open_at_landing) == {machines}
    most = -(-8 // machines)
    assert all(most - 1 <= len(started.counts) <= most for started in model.passes[2 * machines :])
    rest = finish(engine, *jobs)
    assert [a + b + c for a, b, c in zip(ids, more, rest, strict=True)] == [
        written(prompt, 60) for prompt in prompts
    ]
    check_cache(model, cache)


def test_passes_are_as_large_as_before_when_jobs_end():
    """Three of a pass's four end; the others are divided anew, and both machines stay busy."""
    engine, model, _ = engine_over(2)
    jobs = [
        start(engine, [7 + i], GREEDY | {"max_new_tokens": 200 if i % 2 else 50})
        for i in range(8)
    ]
    finish(engine, *jobs, until=lambda: sum(job.finished for job in jobs) == 4)
    finish(engine, *jobs, until=lambda: jobs[1].stats.new_tokens > 60)
    model.passes.clear()
    model.open_at_landing.clear()
    finish(engine, *jobs, until=lambda: sum(job.finished for job in jobs) > 4)
    assert set(model.open_at_landing) == {2}
    assert {len(started.counts) for started in model.passes} == {2}


def test_one_request_runs_as_on_one_machine():
    passes = []
    for most in (1, 4):
        engine, model, _ = engine_over(2, most_in_flight=most, decoding_in_flight=min(most, 2))
        job = start(engine, [7], GREEDY | {"max_new_tokens": 50})
        assert finish(engine, job) == [written([7], 50)]
        assert set(model.open_at_landing) <= {1}
        passes.append([(started.counts, started.logits) for started in model.passes])
    assert passes[0] == passes[1]


@pytest.mark.parametrize("has_open_pages", [False, True])
@pytest.mark.parametrize("machines", [2, 3])
def test_chunks_of_a_prompt_do_not_wait_for_those_before(machines, has_open_pages):
    engine, model, cache = engine_over(machines, has_open_pages=has_open_pages)
    job = start(engine, [7] * 1900, GREEDY | {"max_new_tokens": 5})
    assert finish(engine, job) == [written([7] * 1900, 5)]
    chunks = sum(sum(started.counts) > 1 for started in model.passes)
    assert chunks == 15
    # One for each machine, and one that travels. At the end fewer are left.
    assert model.open_at_landing[: chunks - machines] == [machines + 1] * (chunks - machines)
    check_cache(model, cache)


@pytest.mark.parametrize("machines", [2, 3, 4])
def test_decoding_goes_on_between_chunks_in_flight(machines):
    """Machines have chunks and decoding passes in turn; no text waits for more chunks than that."""
    engine, model, _ = engine_over(machines, pages=80, ctx_size=20_000, max_batch_size=10)
    streams = [start(engine, [7 + i], GREEDY | {"max_new_tokens": 5000}) for i in range(4)]
    finish(engine, *streams, until=lambda: all(job.decoding for job in streams))
    long = [start(engine, [80 + i] * 6000, GREEDY | {"max_new_tokens": 5}) for i in range(2)]
    model.passes.clear()
    model.open_at_landing.clear()
    finish(engine, *streams, *long, until=lambda: any(job.decoding for job in long))
    chunks = 0
    of_streams = {job.sequence: 0 for job in streams}
    for started in model.passes:
        if started.sequences[0] not in of_streams:
            chunks += 1
            continue
        for sequence in started.sequences:
            assert chunks - of_streams[sequence] <= max(1, machines - 1)
            of_streams[sequence] = chunks
    assert chunks > 80
    open_ones = model.open_at_landing[machines:]
    assert min(open_ones) >= machines and max(open_ones) > machines


def test_a_short_prompt_does_not_wait_for_a_long_one():
    engine, model, _ = engine_over(2, ctx_size=8000)
    long = start(engine, [7] * 7000, GREEDY | {"max_new_tokens": 5})
    finish(engine, long, until=lambda: len(model.passes) == 5)
    short = start(engine, [9] * 20, GREEDY | {"max_new_tokens": 5})
    model.passes.clear()
    finish(engine, long, short, until=lambda: short.finished)
    assert len(model.passes) < 20 and not long.decoding


def test_an_evaluation_runs_when_no_pass_is_in_flight():
    """The model asserts that. Decoding goes on between its chunks."""
    engine, model, cache = engine_over(2)
    jobs = [start(engine, [7 + i], GREEDY | {"max_new_tokens": 100}) for i in range(4)]
    finish(engine, *jobs, until=lambda: all(job.decoding for job in jobs))
    found: dict[int, int] = {}
    ids = [5 + i % 90 for i in range(300)]
    evaluation = evaluate(engine, ids, found)
    before = [job.stats.new_tokens for job in jobs]
    finish(engine, *jobs, until=lambda: evaluation.finished)
    # Chunks of as many ids as rows of logits.
    steps = -(-300 // model.logits_rows)
    assert all(
        steps - 2 <= job.stats.new_tokens - count <= steps + 2
        for job, count in zip(jobs, before, strict=True)
    )
    assert found == {i: script(ids[: i + 1]) for i in range(300)}
    finish(engine, *jobs)
    assert list(engine.run_alone(lambda model, cache: iter([len(model.open)]))) == [0]
    assert cache.num_free_pages == 40


def evaluate(engine, ids: list[int], found: dict[int, int], last: bool = False) -> TextEvaluation:
    """Give an evaluation to the scheduler; it fills in the likeliest id after each token."""

    def receive(first, rows) -> None:
        found.update(enumerate(rows.argmax(dim=1).tolist(), first))

    evaluation = TextEvaluation(ids, len(ids), last, receive)
    evaluation.add_waiter()
    engine._generator._scheduler.accept(evaluation)
    return evaluation


def test_an_exclusive_use_waits_for_the_passes_in_flight_and_others_for_it():
    engine, model, _ = engine_over(2)
    jobs = [start(engine, [7 + i], GREEDY | {"max_new_tokens": 50}) for i in range(4)]
    ids = finish(engine, *jobs, until=lambda: len(model.open) == 2)
    use = ExclusiveUse(lambda model, cache: iter([len(model.open), len(model.open)]))
    engine._generator._scheduler.accept(use)
    for _ in range(3):
        use.add_waiter()
        more = finish(engine, *jobs, until=lambda: use.is_ready)
        ids = [before + after for before, after in zip(ids, more, strict=True)]
        if not use.finished:
            assert use.output.popleft() == 0
    assert use.finished and use.error is None
    more = finish(engine, *jobs)
    assert [before + after for before, after in zip(ids, more, strict=True)] == [
        written([7 + i], 50) for i in range(4)
    ]


def test_no_pass_stays_in_flight_when_nobody_waits():
    engine, model, _ = engine_over(2)
    jobs = [start(engine, [7 + i], GREEDY | {"max_new_tokens": 100}) for i in range(4)]
    finish(engine, *jobs, until=lambda: all(job.decoding for job in jobs))
    scheduler = engine._generator._scheduler
    while scheduler.step():
        pass
    assert not model.open
    assert all(job.output and not job.finished for job in jobs)
    # At most so many tokens ahead of their callers.
    assert max(len(job.output) for job in jobs) <= 16


# Errors


class Injected(Exception):
    pass


def failing_at(*numbers: int) -> Callable[[int], Injected | None]:
    return lambda number: Injected() if number in numbers else None


@pytest.mark.parametrize("where", ["fails_at_start", "fails_in_flight"])
def test_jobs_of_a_failed_decoding_pass_run_again_each_in_its_own(where):
    engine, model, cache = engine_over(2)
    jobs = [start(engine, [7 + i], GREEDY | {"max_new_tokens": 40}) for i in range(8)]
    setattr(model, where, failing_at(40, 47, 56))
    ids = finish(engine, *jobs)
    assert ids == [written([7 + i], 40) for i in range(8)]
    assert sum(len(started.counts) == 1 for started in model.passes[36:70]) >= 10
    check_cache(model, cache)


@pytest.mark.parametrize("where", ["fails_at_start", "fails_in_flight"])
def test_a_job_that_fails_alone_ends_with_its_error(where):
    engine, model, cache = engine_over(2)
    jobs = [start(engine, [7 + i], GREEDY | {"max_new_tokens": 40}) for i in range(4)]
    finish(engine, *jobs, until=lambda: all(job.decoding for job in jobs))
    bad = jobs[2].sequence
    if where == "fails_in_flight":
        model.fails_in_flight = lambda number: (
            Injected() if bad in model.passes[number - 1].sequences else None)
    else:
        start_rows = model.start_rows

        def refusing(entries, logits="last"):
            if any(sequence is bad for sequence, _ in entries):
                raise Injected
            return start_rows(entries, logits)

        model.start_rows = refusing  # type: ignore[method-assign]
    finish(engine, *jobs)
    assert [type(job.error) for job in jobs] == [type(None)] * 2 + [Injected, type(None)]
    for i in (0, 1, 3):
        assert jobs[i].history[1:].tolist() == written([7 + i], 40)
    assert cache.num_free_pages == 40
    check_cache(model, cache)


@pytest.mark.parametrize("has_open_pages", [False, True])
def test_pages_that_a_failed_chunk_did_not_write_are_not_reused(has_open_pages):
    """Others have found them while the chunk was in flight; they start again, without an error."""
    engine, model, cache = engine_over(2, has_open_pages=has_open_pages)
    stream = start(engine, [3], GREEDY | {"max_new_tokens": 60})
    finish(engine, stream, until=lambda: stream.stats.new_tokens == 10)
    first = start(engine, [7] * 700, GREEDY | {"max_new_tokens": 20})
    finish(engine, stream, until=lambda: first.sequence is not None)
    of_first = first.sequence

    def chunks() -> list[int]:
        return [i for i, started in enumerate(model.passes, 1) if of_first in started.sequences]

    model.fails_in_flight = lambda number: Injected() if chunks()[1:2] == [number] else None
    # The other machines are slow, so that the error comes late.
    model._rng.randrange = lambda stop: 0  # type: ignore[method-assign]
    finish(engine, stream, until=lambda: len(chunks()) == 2)
    second = start(engine, [7] * 680 + [9] * 10, GREEDY | {"max_new_tokens": 20})
    found: dict[int, int] = {}
    evaluation = evaluate(engine, [7] * 600, found, last=True)
    jobs = [stream, first, second]
    finish(engine, *jobs, until=lambda: first.finished)
    assert second.stats.reused_tokens > 0
    assert list(engine._generator._scheduler.waiting) == [stream, second, evaluation]
    finish(engine, *jobs, until=lambda: second.finished and evaluation.finished)
    finish(engine, *jobs)
    assert isinstance(first.error, Injected)
    assert stream.error is second.error is evaluation.error is None
    assert stream.history[1:].tolist() == written([3], 60)
    assert second.history[690:].tolist() == written([7] * 680 + [9] * 10, 20)
    assert found == {599: script([7] * 600)}
    check_cache(model, cache)
    again = start(engine, [7] * 700, GREEDY | {"max_new_tokens": 20})
    assert finish(engine, again) == [written([7] * 700, 20)]


def test_the_pages_of_a_cancelled_job_are_not_reused_if_its_pass_fails():
    engine, model, cache = engine_over(2)
    jobs = [start(engine, [7 + i] * 300, GREEDY | {"max_new_tokens": 60}) for i in range(4)]
    finish(engine, *jobs, until=lambda: all(job.stats.new_tokens > 10 for job in jobs))
    model._rng.randrange = lambda stop: 0  # type: ignore[method-assign]
    finish(engine, *jobs, until=lambda: len(model.open) == 2)
    cancelled = next(
        job for job in jobs if job.sequence in model.passes[-1].sequences
    )
    text = cancelled.history.tolist()
    model.fails_in_flight = failing_at(model.num_started)
    cancelled.cancelled = True
    again = start(engine, text, GREEDY | {"max_new_tokens": 20})
    others = [job for job in jobs if job is not cancelled]
    ids = finish(engine, again, *others)
    assert ids[0] == written(text, 20)
    assert all(job.error is None and job.stats.new_tokens == 60 for job in others)
    check_cache(model, cache)


@pytest.mark.parametrize("where", ["start", "flight", "copy"])
def test_a_lost_machine_ends_every_request_with_an_error_of_its_own(where):
    engine, model, cache = engine_over(2)
    scheduler = engine._generator._scheduler
    jobs: list[Any] = [start(engine, [7] * 40 + [20 + i], GREEDY | {"max_new_tokens": 100})
                       for i in range(7)]
    finish(engine, *jobs, until=lambda: all(job.decoding for job in jobs))
    jobs.append(evaluate(engine, [5] * 400, {}))
    finish(engine, *jobs[:7], until=lambda: len(model.open) == (1 if where == "start" else 2))
    if where == "copy":
        # Its beginning is copied from the page of another.
        jobs.append(start(engine, [7] * 40 + [90], GREEDY))
    model.lost = True
    assert scheduler.step()
    assert all(job.finished for job in jobs)
    errors = [job.error for job in jobs]
    assert all(isinstance(error, MachineLost) for error in errors)
    assert len({id(error) for error in errors}) == len(jobs)
    assert {str(error) for error in errors} == {"machine 1: gone. Start it again"}
    assert not scheduler.flights and not scheduler.active and not scheduler.evaluations
    assert cache.num_free_pages == 40
    late = start(engine, [7] * 40 + [99], GREEDY)
    assert scheduler.step()
    assert isinstance(late.error, MachineLost)
    assert not scheduler.step()


def answers(engine, prompts: list[list[int]], options: dict[str, Any]) -> list[Any]:
    """Read texts in a thread each; return ids, or the error that ended them."""
    found: list[Any] = [None] * len(prompts)

    def caller(i: int) -> None:
        try:
            found[i] = list(engine.generate_ids(prompts[i], options))
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return found


def test_callers_in_threads_get_their_texts_or_the_error():
    engine, model, cache = engine_over(2)
    prompts = [[7 + i] * (1 + 90 * i) for i in range(8)]
    options = GREEDY | {"max_new_tokens": 40}
    assert answers(engine, prompts, options) == [written(prompt, 40) for prompt in prompts]
    model.fails_at_start = lambda number: setattr(model, "lost", number > 300)  # type: ignore
    found = answers(engine, prompts, options | {"max_new_tokens": 1000})
    assert [type(error) for error in found] == [MachineLost] * 8
    engine.unload()
    with pytest.raises(ModelUnloaded):
        engine.generate_ids([7])


def test_unload_waits_for_the_passes_in_flight():
    engine, model, _ = engine_over(2)
    started = threading.Event()

    def unload() -> None:
        started.wait(300)
        engine.unload()

    thread = threading.Thread(target=unload)
    thread.start()
    model.fails_at_start = lambda number: started.set() if number > 50 else None
    found = answers(engine, [[7 + i] for i in range(4)], GREEDY | {"max_new_tokens": 1900})
    thread.join(300)
    assert [type(error) for error in found] == [ModelUnloaded] * 4
    assert not model.open and model.open_at_landing


# Random requests


def random_caller(rng: random.Random, bases: list[list[int]]) -> Caller:
    base = rng.choice(bases)
    prompt = base[: rng.choice([1, 5, 250, 256, 257, rng.randint(1, len(base))])]
    new_tokens = rng.choice([1, 40, 300])
    options: dict = {"max_new_tokens": new_tokens} | rng.choice([
        GREEDY, GREEDY, {"temperature": 1.5, "seed": rng.randrange(100), "logprobs": 2},
        {"temperature": 1.2, "seed": rng.randrange(100), "repetition_penalty": 1.3},
        GREEDY | {"prompt_lookup_num_tokens": 3}, {"mirostat_mode": 2, "seed": 4},
        GREEDY | {"guidance_scale": 1.5, "negative_prompt": None},
        {"temperature": 1.5, "seed": 3, "guidance_scale": 1.5, "negative_prompt": "no",
         "banned_strings": ["a", "bc"]},
        {"temperature": 1.5, "seed": 5, "banned_strings": ["a", "b", "cd", "xyz"]},
        {"temperature": 1.5, "seed": 6, "banned_strings": ["e"], "prompt_lookup_num_tokens": 4},
        {"temperature": 1.5, "seed": 7, "stop_strings": ["q", "zz"]},
        {"temperature": 1.5, "seed": 8, "grammar_string": 'root ::= ("a" | "b" | "yes ")+'},
    ])
    leaves_after = rng.choice([10**6] * 4 + [rng.randint(1, 200)])
    return Caller(rng.randrange(300), prompt, options, rng.choice([1, 1, 0.3]), leaves_after)


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2, None])
def test_random_requests_have_the_texts_of_one_pass_at_a_time(byte_tokenizer, seed, failing):
    """Arrivals, settings, readers, cancellations, evaluations, lost pages and errors at random."""
    rng = random.Random(seed)
    machines, has_open_pages = rng.choice([2, 3]), rng.random() < 0.5
    options = {
        "tokenizer": byte_tokenizer, "ctx_size": 1024, "chunk_size": 100, "max_batch_size": 6,
        "decode_rows": rng.choice([8, 100]),
    }
    bases = [[rng.randint(3, 250) for _ in range(600)] for _ in range(3)]
    callers = [random_caller(rng, bases) for _ in range(14)]
    alone, alone_model, _ = engine_over(
        1, pages=8, most_in_flight=1, decoding_in_flight=1, **options)
    expected = [finish(alone, start(alone, c.prompt, c.options))[0] for c in callers]
    assert not alone_model.open_at_landing
    pages = rng.randint(6, 9)
    engine, model, cache = engine_over(
        machines, pages=pages, has_open_pages=has_open_pages, **options)
    model._rng = random.Random(rng.random())
    draft_fully(engine)
    scheduler = engine._generator._scheduler
    draft = FakeModel(lambda text: script(text) if len(text) % 5 else 299, VOCAB, 3, chunk_size=200)
    layer = CacheLayer(draft.stored, None, draft.stored, None, CacheType(32, 32))
    if rng.random() < 0.5:
        scheduler.drafts.draft_model = DraftModel(draft, PagedCache([layer], 3), 4, VOCAB)
    if failing:
        model.fails_at_start = model.fails_in_flight = (
            lambda number: Injected() if rng.random() < 0.01 else None)
    evaluations: list[tuple[list[int], dict[int, int], TextEvaluation]] = []
    step = 0
    while any(caller.job is None or not caller.job.finished for caller in callers):
        assert step < 60_000, "no end"
        for caller in callers:
            if caller.job is None and caller.arrives <= step:
                caller.job = start(engine, caller.prompt, caller.options)
        if rng.random() < 0.01:
            ids, found = rng.choice(bases)[: rng.randint(1, 500)], {}
            evaluation = evaluate(engine, ids, found, rng.random() < 0.5)
            evaluations.append((ids, found, evaluation))
        for _, _, evaluation in evaluations:
            if not evaluation.finished and not evaluation._waiters:
                evaluation.add_waiter()
        if scheduler.evaluations and rng.random() < 0.002:
            scheduler.evaluations[0].cancelled = True
        scheduler.step()
        check_pages(scheduler)
        for caller in callers:
            if caller.job is not None and rng.random() < caller.reads:
                caller.taken += [token_id for token_id, _ in read(caller.job)]
                if len(caller.taken) >= caller.leaves_after:
                    caller.job.cancelled = True
        step += 1
    while scheduler.evaluations or scheduler.waiting or scheduler.flights:
        scheduler.step()
    failed = 0
    for caller, ids in zip(callers, expected, strict=True):
        assert caller.job is not None
        caller.taken += [token_id for token_id, _ in read(caller.job)]
        if failing and isinstance(caller.job.error, Injected):
            failed += 1
        else:
            assert caller.job.error is None
        whole = caller.job.finish_reason not in ("cancelled", "failed")
        assert caller.taken == (ids if whole else ids[: len(caller.taken)])
    for ids, found, evaluation in evaluations:
        assert evaluation.sequence is None
        assert evaluation.error is None or failing
        assert found.items() <= {i: script(ids[: i + 1]) for i in range(len(ids))}.items()
    assert failed < len(callers)
    assert cache.num_free_pages == pages
    assert draft.stored.shape[0] == 3
    check_cache(model, cache)


# Draft pacing


def test_passes_in_flight_are_measured_without_their_waiting(monkeypatch):
    """Two passes of 5 s on the slower machine land 10 s after their starts, one each 5 s."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    engine, model, _ = engine_over(2)
    jobs = [start(engine, [7 + i], GREEDY | {"max_new_tokens": 60}) for i in range(8)]
    finish(engine, *jobs, until=lambda: all(job.decoding for job in jobs))
    before = model.new_rows

    def slow(texts):
        clock[0] += 5
        return before(texts)

    model.new_rows = slow
    finish(engine, *jobs)
    drafts = engine._generator._scheduler.drafts
    assert drafts._pacing(2).passes.estimate(4) == pytest.approx(5, rel=0.01)
    assert not drafts.passes.is_known(4)


# On the compiled kernels


class Withheld:
    """A pass that has run, and whose rows are kept back until they are waited for."""

    def __init__(self, model: Any, rows: list[LogitsRow]) -> None:
        self._model = model
        self._rows = [LogitsRow(row.values.copy()) for row in rows]

    def rows(self) -> list[LogitsRow]:
        assert self._model.open.pop(0) is self
        self._model.open_at_landing.append(len(self._model.open) + 1)
        return self._rows


def put_in_flight(model: Any) -> Any:
    """Let a `LoadedModel` on one machine have passes in flight as one on two machines."""
    scheduler = model._generator._scheduler
    inner = scheduler.model
    inner.most_in_flight, inner.decoding_in_flight = 4, 2
    inner.open, inner.open_at_landing = [], []
    forward_rows, forward = inner.forward_rows, inner.forward

    def start_rows(entries, logits="last"):
        assert len(inner.open) < 4
        inner.open.append(Withheld(inner, forward_rows(entries, logits)))
        return inner.open[-1]

    def alone(run):
        def checked(*arguments):
            assert not inner.open
            return run(*arguments)

        return checked

    inner.start_rows = start_rows
    inner.forward_rows, inner.forward = alone(forward_rows), forward
    model._generator._scheduler = FlightScheduler(inner, scheduler.cache, None)
    return model


SETTINGS = [
    {"temperature": 0}, {"temperature": 0.8, "seed": 3, "logprobs": 2},
    {"temperature": 1.1, "seed": 4, "dry_multiplier": 0.8}, {"mirostat_mode": 2, "seed": 5},
    {"temperature": 0, "guidance_scale": 1.4, "negative_prompt": "no " * 20},
    {"temperature": 0.7, "seed": 6, "grammar_string": 'root ::= ("a" | "b" | "yes ")+'},
    {"temperature": 0.9, "seed": 7, "repetition_penalty": 1.2, "prompt_lookup_num_tokens": 3},
    {"temperature": 1.0, "seed": 8, "banned_strings": ["e", "th"], "logprobs": 1},
]


@pytest.mark.parametrize("cache_type", ["fp16", "q4"])
def test_on_the_compiled_kernels_texts_in_flight_are_the_same(tiny_model_dir, cache_type):
    options = {"ctx_size": 768, "cache_size": 1280, "cache_type": cache_type,
               "max_batch_size": 6, "chunk_size": 128}
    rng = random.Random(11)
    base = [rng.randint(3, 250) for _ in range(300)]
    requests = []
    for settings in SETTINGS:
        prompt = base[: rng.choice([3, 100, 290])] + [rng.randint(3, 250)]
        requests.append((prompt, {"max_new_tokens": 60, "ban_eos_token": True} | settings))
    with draft_fully(exl_loader.load(tiny_model_dir, **options)) as model:
        whole = []
        for prompt, chosen in requests:
            model.prompt_logits([5] * 768)
            generation = model.generate(prompt, chosen)
            whole.append(("".join(generation), generation.token_ids, generation.logprobs))
    with draft_fully(put_in_flight(exl_loader.load(tiny_model_dir, **options))) as model:
        texts, jobs = texts_together(model, requests)
        together = [
            (text, job.history[len(job.prompt_ids) :].tolist(), job.logprobs)
            for text, job in zip(texts, jobs, strict=True)
        ]
        assert together == whole
        inner = model._generator._scheduler.model
        assert np.mean(np.array(inner.open_at_landing) >= 2) > 0.5
        cache = model._generator._scheduler.cache
        assert cache.num_free_pages == cache.num_pages
        del cache, inner
