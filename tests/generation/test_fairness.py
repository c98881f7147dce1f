"""Requests are fair: between two tokens of a decoding text at most one chunk of rows runs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

import exl_loader
from exl_loader.cache.layout import CacheLayer, CacheType
from exl_loader.cache.paging import PagedCache
from exl_loader.generation.draft_model import DraftModel
from exl_loader.generation.draft_pacing import READ_AT_ONCE
from exl_loader.generation.evaluations import TextEvaluation
from exl_loader.generation.jobs import Job
from support.fake_model import FakeModel, fake_engine
from support.full_drafts import draft_fully

CHUNK, BATCH, VOCAB = 64, 6, 300
DRAFT_MAX = 3
LONG = 16_000


def script(text: list[int]) -> int:
    return 3 + (len(text) * 7 + text[-1]) % 251


@dataclass
class Bench:
    """A scripted model whose scheduler the test steps, and the rows of each pass.

    Args:
        drafted: with a draft model, whose rows count as well.
        pages: number of pages of the cache.
    """

    drafted: bool
    pages: int
    rows: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine, model, self.cache = fake_engine(
            script, VOCAB, ctx_size=20_000, pages=self.pages, chunk_size=CHUNK,
            max_batch_size=BATCH, logits_rows=32,
        )
        self.scheduler = self.engine._generator._scheduler
        model.config.bos_token_id = 1
        model.read = lambda sequence: [1, sequence.past_len % 250]
        self._count(model)
        if self.drafted:
            draft = FakeModel(
                script, VOCAB, self.pages, chunk_size=CHUNK, max_batch_size=BATCH, logits_rows=32)
            draft.read = model.read
            self._count(draft)
            layer = CacheLayer(draft.stored, None, draft.stored, None, CacheType(32, 32))
            cache = PagedCache([layer], self.pages)
            self.scheduler.drafts.draft_model = DraftModel(draft, cache, DRAFT_MAX, VOCAB)
            draft_fully(self.engine)

    def _count(self, model: FakeModel) -> None:
        model.before_call = lambda: self.rows.append(sum(model.calls[-1]))

    def start(self, prompt, negative_len: int = 0, **options) -> Job:
        settings = exl_loader.SamplingSettings.from_dict(
            {"temperature": 0, "ban_eos_token": True} | options)
        job = self.engine._requests.job(prompt, settings, None, False)
        if job.negative is not None:
            job.negative.max_tokens += negative_len - len(job.negative.ids)
            job.negative.ids[:] = [4] * negative_len
        job.add_waiter()
        self.scheduler.accept(job)
        return job

    def evaluate(self, ids, last: bool) -> TextEvaluation:
        evaluation = TextEvaluation(ids, len(ids), last, lambda index, rows: None)
        evaluation.add_waiter()
        self.scheduler.accept(evaluation)
        return evaluation

    def step(self, requests) -> bool:
        done = self.scheduler.step()
        for request in requests:
            if isinstance(request, Job):
                request.output.clear()
            if not request.finished and not request._waiters:
                request.add_waiter()
        return done


# Rows of the passes between two tokens besides a chunk: the decoding pass with its drafts, and
# the draft model's steps before it, the first of which reads a few tokens of each text.
MOST_BESIDE = 32 + BATCH * (READ_AT_ONCE + DRAFT_MAX - 1)


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("seed", [0, 1, None])
def test_at_most_one_chunk_runs_between_two_tokens(seed, drafted):
    """Long prompts, evaluations, guidance, lost pages and cancelled requests at random."""
    rng = random.Random(seed)
    bench = Bench(drafted, rng.choice([20, 40, 80]))
    requests: list[Job | TextEvaluation] = []
    counts: dict[Job, int] = {}
    since: dict[Job, list[int]] = {}
    gaps = 0
    for _ in range(1500):
        if rng.random() < 0.03 and sum(not request.finished for request in requests) < 9:
            length = rng.choice([1, 20, 300, 2000, min(LONG, 200 * bench.pages)])
            prompt = [rng.randint(3, 250)] * length
            kind = rng.randrange(5)
            if kind == 0:
                requests.append(bench.evaluate(prompt, rng.random() < 0.5))
            else:
                options = {"max_new_tokens": rng.choice([5, 100, 400])}
                if kind == 1 and length <= 300:
                    options |= {"guidance_scale": 1.5, "negative_len": length}
                requests.append(bench.start(prompt, **options))
        for request in requests:
            if rng.random() < 0.0005:
                request.cancelled = True
        before = len(bench.rows)
        bench.step(requests)
        rows = bench.rows[before:]
        assert sum(count > MOST_BESIDE for count in rows) <= 1
        for job in list(since):
            if job.finished or job not in bench.scheduler.active:
                since.pop(job)
        for job in bench.scheduler.active:
            if not (job.decoding and job.prefilled):
                # Its text is read, perhaps again after it gave its pages back.
                since.pop(job, None)
                continue
            new = job.stats.new_tokens
            if job in since:
                since[job] += rows
                if new > counts[job]:
                    assert sum(since[job]) <= CHUNK + MOST_BESIDE
                    gaps += 1
                    since[job] = []
            else:
                since[job] = []
            counts[job] = new
    assert gaps > 500


def test_a_short_request_is_answered_while_long_ones_are_read():
    """Prompts take turns, so the short one waits for one chunk of each before it."""
    bench = Bench(False, 300)
    long = [bench.start([7 + i] * LONG, max_new_tokens=10) for i in range(3)]
    for _ in range(5):
        bench.step(long)
    short = bench.start([5] * 40, max_new_tokens=10)
    steps = 0
    while not short.finished:
        bench.step([*long, short])
        steps += 1
    assert steps <= 4 + 10
    assert not any(job.decoding for job in long)


def test_nothing_starves_behind_a_prompt_that_waits_for_pages():
    """The long one waits for the text before it, and those that come later wait behind it."""
    bench = Bench(False, 70)
    first = bench.start([7] * 5000, max_new_tokens=200)
    while not first.decoding:
        bench.step([first])
    long = bench.start([8] * LONG, max_new_tokens=5)
    late: list[Job] = []
    order: list[Job] = []
    for step in range(4000):
        if step % 40 == 0 and len(late) < 20:
            late.append(bench.start([9] * 10, max_new_tokens=30))
        requests = [first, long, *late]
        bench.step(requests)
        order += [job for job in requests if job.decoding and job not in order]
        if all(job.finished for job in requests):
            break
    assert all(job.finish_reason == "length" for job in (first, long, *late))
    # The first of the late ones begins while the long prompt is read, which began before it.
    assert order[0] is first and long.stats.preemptions == 0


@pytest.mark.parametrize("last", [False, True])
def test_a_long_evaluation_holds_up_a_stream_by_one_chunk_a_token(last):
    bench = Bench(False, 80)
    stream = bench.start([7], max_new_tokens=2000)
    while not stream.decoding:
        bench.step([stream])
    evaluation = bench.evaluate([9] * LONG, last)
    while not evaluation.finished:
        before, tokens = len(bench.rows), stream.stats.new_tokens
        bench.step([stream, evaluation])
        if not stream.finished:
            assert stream.stats.new_tokens == tokens + 1
        assert len(bench.rows) - before <= 2 and max(bench.rows[before:]) <= CHUNK
    assert evaluation.error is None


def test_the_draft_model_reads_a_long_prompt_in_turns_with_other_prompts():
    """While it reads, the text goes on without drafts; after that with them."""
    bench = Bench(True, 140)
    first = bench.start([7] * LONG, max_new_tokens=600)
    while not first.decoding:
        bench.step([first])
    long = bench.start([8] * 8000, max_new_tokens=5)
    while not long.decoding:
        before, tokens = len(bench.rows), first.stats.new_tokens
        bench.step([first, long])
        rows = bench.rows[before:]
        assert sum(count > MOST_BESIDE for count in rows) <= 1
        assert first.finished or first.stats.new_tokens > tokens
    while not first.finished:
        bench.step([first, long])
    assert first.stats.accepted_tokens > 0
