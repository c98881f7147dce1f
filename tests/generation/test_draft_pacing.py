"""Drafts are as long as pays, by scripted times: no test depends on how fast anything runs."""

from __future__ import annotations

import random

import numpy as np
import pytest

from exl_loader.cache.layout import CacheLayer, CacheType, pages_for
from exl_loader.cache.paging import PagedCache
from exl_loader.generation.draft_model import DraftModel
from exl_loader.generation.draft_pacing import (
    LOOKUP_PRIOR,
    MODEL_PRIOR,
    READ_AT_ONCE,
    Acceptance,
    DraftPacing,
    Offer,
    PassSeconds,
)
from support import in_threads
from support.fake_model import FakeModel, fake_engine

MOST = 5


class Clock:
    """Seconds that pass only as told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Table:
    """A model's passes of scripted length, measured.

    Args:
        clock: goes on by `cost(rows)` in each pass.
    """

    def __init__(self, clock: Clock, cost) -> None:
        self.seconds = PassSeconds(clock)
        self.cost = cost
        self._clock = clock

    def run(self, rows: int) -> None:
        with self.seconds.measure(rows):
            self._clock.now += self.cost(rows)

    def read(self, rows: int) -> None:
        with self.seconds.measure_reading(rows):
            self._clock.now += self.cost(rows)


def by_row(share: float, first: float = 1.0):
    """A pass of one row takes `first` seconds, and each other row a share of it more."""
    return lambda rows: first * (1 + share * (rows - 1))


class Bench:
    """Texts that decode together, with scripted drafts.

    Args:
        passes, steps: cost by number of rows of the model and of the draft model; without
            `steps` the drafts are looked up.
        is_right: index of the text, index of the token -> whether a guess of it is right.
    """

    def __init__(self, is_right, passes, steps=None, texts: int = 1) -> None:
        self.clock = Clock()
        self.is_right = is_right
        self.passes = Table(self.clock, passes)
        self.steps = Table(self.clock, steps) if steps is not None else None
        self.pacing = DraftPacing(self.passes.seconds, self.steps and self.steps.seconds)
        prior = MODEL_PRIOR if steps is not None else LOOKUP_PRIOR
        self.acceptances = [Acceptance(prior) for _ in range(texts)]
        # A right token is 1 and a guess is of ones, so a wrong guess meets another token.
        self.texts = [[0] for _ in range(texts)]
        self.unread = [1] * texts

    def step(self) -> list[int]:
        """Run one pass; return the lengths of the drafts."""
        offers = []
        for acceptance, text, unread in zip(self.acceptances, self.texts, self.unread, strict=True):
            acceptance.settle(np.array(text, np.int64))
            offers.append(Offer(acceptance, MOST, 1, unread if self.steps else 0))
        counts = self.pacing.lengths(offers, len(offers), len(offers), 32)
        if self.steps is not None:
            for i, count in enumerate(counts):
                if count and self.unread[i] > READ_AT_ONCE:
                    self.steps.read(self.unread[i] - 1)
                    counts[i], self.unread[i] = 0, 0
            for position in range(max(counts)):
                asked = [i for i, count in enumerate(counts) if count > position]
                self.steps.run(len(asked) if position else sum(self.unread[i] for i in asked))
        for i, count in enumerate(counts):
            self.unread[i] = 1 if count else self.unread[i] + 1
            if count or self.steps is None:
                self.acceptances[i].add(len(self.texts[i]), [1] * (count if self.steps else MOST))
            if count:
                self.acceptances[i].probing = False
        self.passes.run(len(counts) + sum(counts))
        for i, count in enumerate(counts):
            for _ in range(count + 1):
                right = self.is_right(i, len(self.texts[i]))
                self.texts[i].append(1 if right else 2)
                if not right:
                    break
        return counts

    def run(self, passes: int) -> list[list[int]]:
        return [self.step() for _ in range(passes)]

    def rate(self, passes: int) -> float:
        """Return tokens a second of the next passes."""
        tokens, began = sum(map(len, self.texts)), self.clock.now
        self.run(passes)
        return (sum(map(len, self.texts)) - tokens) / (self.clock.now - began)


def always(text: int, index: int) -> bool:
    return True


def never(text: int, index: int) -> bool:
    return False


def chance(share: float, seed: int = 1):
    rng = random.Random(seed)
    return lambda text, index: rng.random() < share


@pytest.mark.parametrize("steps", [None, by_row(0.1, 0.1), by_row(0.0, 0.15)])
def test_a_draft_that_is_always_right_keeps_its_full_length(steps):
    bench = Bench(always, by_row(0.05), steps)
    counts = [count for (count,) in bench.run(100)]
    # The first passes measure a pass without drafts.
    assert counts[:2] == [0, 0]
    assert counts[6:] == [MOST] * 94


@pytest.mark.parametrize("steps", [None, by_row(0.1, 0.1)])
def test_a_draft_that_is_always_wrong_ends_within_few_passes(steps):
    bench = Bench(never, by_row(0.15), steps)
    counts = [count for (count,) in bench.run(60)]
    # What is looked up is compared with the text while the first passes are measured.
    assert sum(map(bool, counts[:10])) <= (0 if steps is None else 5)
    assert sum(map(bool, counts[10:])) <= (0 if steps is None else 3)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("row_share", [0.01, 0.15, 0.5])
@pytest.mark.parametrize("steps", [None, by_row(0.05, 0.05), by_row(0.3, 0.3)])
def test_tokens_a_second_are_near_the_best_fixed_length(share, row_share, steps):
    def fixed(length: int) -> float:
        expected = sum(share**i for i in range(length + 1))
        unread = 1 if share < 1 or not length else 2
        seconds = by_row(row_share)(1 + length)
        if steps is not None and length:
            seconds += steps(unread) + steps(1) * (length - 1)
        return expected / seconds

    bench = Bench(chance(share), by_row(row_share), steps)
    bench.run(50)
    best = max(map(fixed, range(MOST + 1)))
    # A draft model that costs a third of the model and is right six times of ten gains a tenth at
    # best, and would have to read too much to be tried again once it is off.
    assert bench.rate(2000) > (0.9 if steps is not None else 0.95) * best


def test_a_text_that_becomes_predictable_gains_again():
    for steps in (None, by_row(0.02, 0.05)):
        bench = Bench(never, by_row(0.15), steps)
        bench.run(300)
        bench.is_right = always
        bench.run(150)
        assert [count for (count,) in bench.run(50)] == [MOST] * 50


def test_guesses_that_only_try_again_cost_little():
    """The draft model's guesses are the expensive ones, because they need its steps."""
    for row_share, first in ((0.02, 0.05), (0.2, 0.2), (0.5, 0.9)):
        bench = Bench(never, by_row(row_share), by_row(0.01, first))
        bench.run(50)
        tokens, began = len(bench.texts[0]), bench.clock.now
        counts = [count for (count,) in bench.run(3000)]
        alone = len(bench.texts[0]) - tokens
        assert alone / (bench.clock.now - began) > 0.975
        assert 0 < sum(counts) and max(counts) == 1


def test_many_texts_make_drafts_shorter():
    """Four rows cost what one does; beyond that each takes as long again."""
    def passes(rows: int) -> float:
        return 1.0 if rows <= 4 else 1.0 + 0.25 * (rows - 4)

    lengths = {}
    for texts in (1, 2, 4, 8):
        bench = Bench(chance(0.7), passes, texts=texts)
        bench.run(100)
        lengths[texts] = sum(map(sum, bench.run(400))) / 400 / texts
    assert lengths[1] > 2.5 and lengths[2] < lengths[1]
    assert lengths[8] < 0.5


def test_the_rows_go_to_the_text_whose_guesses_are_right():
    bench = Bench(lambda text, index: text == 0, by_row(0.2), texts=2)
    bench.run(50)
    assert bench.run(20) == [[MOST, 0]] * 20


def test_passes_that_become_dearer_shorten_drafts_and_cheaper_ones_lengthen_them():
    bench = Bench(chance(0.5), by_row(0.02))
    bench.run(100)
    assert sum(map(sum, bench.run(100))) > 200
    bench.passes.cost = by_row(1.0)
    bench.run(400)
    assert sum(map(sum, bench.run(100))) < 20
    bench.passes.cost = by_row(0.02)
    bench.run(400)
    assert sum(map(sum, bench.run(100))) > 200


def test_a_pass_that_took_long_once_changes_little():
    bench = Bench(chance(0.8), by_row(0.05))
    bench.run(100)
    bench.passes.cost = lambda rows: 8.0
    bench.run(1)
    bench.passes.cost = by_row(0.05)
    assert sum(map(sum, bench.run(20))) >= 40


def test_times_between_measured_ones_are_interpolated_and_old_ones_forgotten():
    clock = Clock()
    table = Table(clock, by_row(0.2))
    assert table.seconds.estimate(3) == 0
    for rows in (1, 1, 5, 5):
        table.run(rows)
    assert table.seconds.is_known(5) and not table.seconds.is_known(3)
    assert table.seconds.estimate(3) == pytest.approx(1.4)
    assert table.seconds.estimate(7) == pytest.approx(2.2)
    for _ in range(300):
        table.run(5)
    assert not table.seconds.is_known(1)
    assert table.seconds.estimate(1) == pytest.approx(1.8 / 1.4)
    table.run(1)
    assert table.seconds.is_known(1), "only the first pass of all is not counted"


def test_a_guess_counts_once_the_text_shows_how_much_is_right():
    acceptance = Acceptance(0.5)
    acceptance.add(2, [7, 8, 9])
    acceptance.add(2, [1, 1, 1])
    acceptance.settle(np.array([5, 6]))
    acceptance.settle(np.array([5, 6, 7]))
    assert acceptance.chances(1) == [0.5]
    before = 0.5
    acceptance.settle(np.array([5, 6, 7, 8, 1]))
    first, second, third = acceptance.chances(3)
    assert first > before and second / first > before and third / second < before
    acceptance.add(5, [2])
    # The text was shortened behind the guess, which is then not counted.
    acceptance.settle(np.array([5, 6]))
    assert acceptance.chances(3) == [first, second, third]


# Through the scheduler


def script(text: list[int]) -> int:
    return 3 + (len(text) * len(text) * 7 + text[0]) % 251


def paced_engine(guess, passes, steps=None, script=script, **sizes):
    """Build a scripted model whose passes take scripted times; with `steps`, a draft model."""
    engine, model, cache = fake_engine(script, 300, ctx_size=1024, **sizes)
    drafts = engine._generator._scheduler.drafts
    clock = Clock()

    def timed(model: FakeModel, cost) -> None:
        def before_call() -> None:
            clock.now += cost(sum(model.calls[-1]))

        model.before_call = before_call

    timed(model, passes)
    drafts.passes = PassSeconds(clock)
    if steps is not None:
        draft = FakeModel(guess, 300, pages_for(1024), **sizes)
        timed(draft, steps)
        layer = CacheLayer(draft.stored, None, draft.stored, None, CacheType(32, 32))
        drafts.draft_model = DraftModel(draft, PagedCache([layer], len(draft.stored)), MOST, 300)
        drafts.draft_model.seconds = PassSeconds(clock)
    drafts.pacing = DraftPacing(
        drafts.passes, drafts.draft_model.seconds if drafts.draft_model else None
    )
    return engine, model, cache


GREEDY = {"temperature": 0, "ban_eos_token": True, "max_new_tokens": 400}


def wrong(text: list[int]) -> int:
    return 299


def test_a_wrong_draft_model_is_switched_off_and_the_statistics_say_so():
    engine, model, _ = paced_engine(wrong, by_row(0.1), by_row(0.1, 0.2))
    generation = engine.generate_ids([7, 8], GREEDY)
    assert list(generation) == plain([7, 8], GREEDY)
    stats = generation.stats
    assert stats.accepted_tokens == 0
    assert 0 < stats.drafted_tokens < 40
    assert 370 < stats.skipped_drafts < 400
    assert stats.draft_summary == (
        f"0 of {stats.drafted_tokens} drafted tokens right, "
        f"no draft in {stats.skipped_drafts} passes that are faster without"
    )
    assert len(model.calls) == 400


def test_without_drafts_there_is_nothing_to_say_of_them():
    engine, _, _ = fake_engine(script, 300)
    generation = engine.generate_ids([7, 8], GREEDY)
    assert list(generation) and generation.stats.draft_summary == ""


def test_a_right_draft_model_stays_on():
    engine, model, _ = paced_engine(script, by_row(0.1), by_row(0.1, 0.2))
    generation = engine.generate_ids([7, 8], GREEDY)
    assert list(generation) == plain([7, 8], GREEDY)
    assert generation.stats.accepted_tokens > 300
    assert generation.stats.skipped_drafts < 10
    assert len(model.calls) < 90


def repeats(text: list[int]) -> int:
    return 3 + len(text) % 40


def test_the_two_sources_are_judged_apart():
    """What is looked up is always right after the first round, and the draft model never."""
    engine, model, _ = paced_engine(wrong, by_row(0.1), by_row(0.1, 0.2), script=repeats)
    options = GREEDY | {"prompt_lookup_num_tokens": MOST}
    generation = engine.generate_ids([7, 8], options)
    assert list(generation) == plain([7, 8], GREEDY, repeats)
    assert generation.stats.accepted_tokens > 200
    # The other way round: what is looked up is always wrong.
    def deceptive(text: list[int]) -> int:
        return 3 + (len(text) // 3 if len(text) % 3 == 2 else len(text) % 3)

    engine, _, _ = paced_engine(deceptive, by_row(0.1), by_row(0.1, 0.2), script=deceptive)
    generation = engine.generate_ids([7, 8], options)
    assert list(generation) == plain([7, 8], GREEDY, deceptive)
    assert generation.stats.accepted_tokens > 300
    assert generation.stats.accepted_tokens > 0.9 * generation.stats.drafted_tokens


def plain(prompt, options, script=script) -> list[int]:
    return list(fake_engine(script, 300, ctx_size=1024)[0].generate_ids(prompt, options))


@pytest.mark.parametrize("seed", [0, 1, None])
def test_texts_are_the_same_whatever_passes_take(seed):
    rng = random.Random(seed)

    def guess(text: list[int]) -> int:
        return script(text) if (len(text) // 37 + text[0]) % 2 else 299

    def cost(rows: int) -> float:
        return rng.expovariate(1.0) * rng.choice([1, 1, rows])

    engine, _, _ = paced_engine(guess, cost, lambda rows: 0.2 * cost(rows), chunk_size=64)
    prompts = [[7 + i, *[9] * rng.randrange(200)] for i in range(6)]
    options = GREEDY | {"prompt_lookup_num_tokens": 3}
    generations = [engine.generate_ids(prompt, options) for prompt in prompts]
    lists = in_threads(list, generations)
    assert lists == [plain(prompt, GREEDY) for prompt in prompts]


def test_a_text_whose_drafts_were_off_is_read_again_in_passes_of_its_own():
    """The draft model lacks what was written in the meantime, and reads it in a chunk."""
    def turns_right(text: list[int]) -> int:
        return script(text) if len(text) > 200 else 299

    engine, model, _ = paced_engine(turns_right, by_row(0.1), by_row(0.001, 0.2), chunk_size=64)
    draft = engine._generator._scheduler.drafts.draft_model._model
    generation = engine.generate_ids([7, 8], GREEDY | {"max_new_tokens": 900})
    assert list(generation) == plain([7, 8], GREEDY | {"max_new_tokens": 900})
    assert generation.stats.accepted_tokens > 300
    assert max(sum(call) for call in draft.calls) > READ_AT_ONCE
