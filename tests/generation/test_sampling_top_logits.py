"""Sampling from top logits: the same tokens as from the whole row, or the row is copied."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_loader.backends.top_logits import (
    HEADER_WORDS,
    MOST_TAKEN,
    RESULT_WORDS,
    take_largest,
)
from exl_loader.generation.forward_model import LogitsRow, TopLogits
from exl_loader.generation.sampling import Sampler, TokenRoles
from exl_loader.generation.sampling.tail import Tail
from exl_loader.generation.settings import SAMPLER_PRIORITY, SamplingSettings
from exl_loader.model.top_logits_reader import read_result
from exl_loader.utils.errors import InvalidCheckpoint, InvalidSettings

HISTORY = np.array([5, 3, 5, 17, 250, 3, 5, 9000, 17, 5, 3, 5], np.int64)
MANY = 152_064


class CountedRow(LogitsRow):
    """A row of logits that counts in `copies` how often its values are copied."""

    def __init__(self, values, top_logits):
        self.copies = 0
        super().__init__(lambda: self._count(values), top_logits)

    def _count(self, values):
        self.copies += 1
        return values


def defined_top_logits(row, most=MOST_TAKEN, error=0.0) -> TopLogits | None:
    """Return the top logits of a finite row, with a relative `error` in the others' sum."""
    ids, weight_sum = take_largest(row, most)
    words = np.zeros(RESULT_WORDS, np.int32)
    words[:2] = 1, len(ids)
    words[2:HEADER_WORDS].view(np.float32)[:] = row.max(), weight_sum * (1 + error)
    words[HEADER_WORDS : HEADER_WORDS + len(ids)] = ids
    words[HEADER_WORDS + MOST_TAKEN :].view(np.float32)[: len(ids)] = row[ids]
    return read_result(words, len(row))


def peaked_row(seed, size=MANY, scale=2.5, peak=15.0):
    """Logits as of a trained model: a few tokens far above all others."""
    rng = np.random.default_rng(seed)
    row = (rng.normal(size=size) * scale).astype(np.float32)
    best = rng.integers(0, size, 40)
    row[best] += (peak + 4 - 0.3 * np.arange(40)).astype(np.float32)
    return row


def compare(row, options, roles=None, top_logits=None, draws=3):
    """Draw from a whole row and from its top logits; return how often the row was copied.

    The tokens, the candidates and the generators' states must be equal, or both must raise the
    same error.
    """
    roles = roles or {}
    roles = TokenRoles(vocab_size=len(row), **roles)
    if top_logits is None:
        top_logits = defined_top_logits(row)
    whole, partial = (Sampler(options, seed=7, roles=roles) for _ in range(2))
    copies = 0
    for _ in range(draws):
        counted = CountedRow(row, top_logits)
        try:
            expected_id = whole.sample(LogitsRow(row), HISTORY)
        except InvalidSettings:
            with pytest.raises(InvalidSettings):
                partial.sample(counted, HISTORY)
            return copies + counted.copies
        assert partial.sample(counted, HISTORY) == expected_id
        copies += counted.copies
    expected = whole.candidates(LogitsRow(row), HISTORY)
    actual = partial.candidates(counted, HISTORY)
    assert actual.tail is None and actual.is_sorted == expected.is_sorted or options.greedy
    if options.greedy:
        assert actual.ids[actual.logits.argmax()] == expected.ids[expected.logits.argmax()]
    else:
        assert np.array_equal(actual.ids, expected.ids)
        assert np.array_equal(actual.logits, expected.logits)
    assert whole._random.random() == partial._random.random()
    return copies


TYPICAL = {
    "greedy": {"temperature": 0},
    "web UI": {"temperature": 0.7, "top_p": 0.95, "top_k": 50},
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.9},
    "top_p, cool": {"temperature": 0.6, "top_p": 0.95},
    "top_p, hot": {"temperature": 1.2, "top_k": 100, "top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "min_p first": {"min_p": 0.05, "temperature": 1.5, "temperature_last": True},
    "penalties": {"repetition_penalty": 1.15, "presence_penalty": 0.5, "frequency_penalty": 0.2,
                  "top_p": 0.9, "min_p": 0.02},
    "penalties, greedy": {"repetition_penalty": 1.2, "do_sample": False},
    "dry, xtc": {"dry_multiplier": 0.8, "min_p": 0.02, "xtc_probability": 0.5},
    "typical of few": {"top_k": 200, "typical_p": 0.9, "tfs": 0.95, "smoothing_factor": 0.2,
                       "sampler_priority": ["top_k", "typical_p", "tfs", "quadratic_sampling"]},
    "top_a": {"top_a": 0.2},
    "epsilon": {"epsilon_cutoff": 9},
    "mirostat": {"mirostat_mode": 2, "mirostat_tau": 3},
    "adaptive": {"min_p": 0.05, "adaptive_target": 0.4},
    "skew": {"top_p": 0.9, "skew": 0.8},
}  # fmt: skip


@pytest.mark.parametrize("name", TYPICAL)
def test_typical_settings_do_not_need_the_row(name):
    copies = sum(
        compare(peaked_row(seed), SamplingSettings(**TYPICAL[name]),
                  {"banned_ids": (2,)} if seed % 2 else None)
        for seed in range(4)
    )
    assert copies == 0


NEEDY = {
    "no filter": {"temperature": 0.8},
    "dynamic temperature": {"dynamic_temperature": True, "dynatemp_high": 2.0, "top_k": 40},
    "sigma": {"top_n_sigma": 1.0},
    "typical": {"typical_p": 0.9},
    "rewarded repetition": {"repetition_penalty": 0.9, "top_k": 10},
    "rewarded presence": {"presence_penalty": -0.5, "top_k": 10},
    "bias": {"logit_bias": [(7, 1.0)], "top_k": 10},
    "n-grams": {"no_repeat_ngram_size": 2, "top_k": 10},
    "k beyond": {"top_k": 2000},
}


@pytest.mark.parametrize("name", NEEDY)
def test_other_settings_copy_the_row(name):
    assert compare(peaked_row(1), SamplingSettings(**NEEDY[name]), draws=2) == 2


def test_a_flat_distribution_copies_the_row():
    row = (np.random.default_rng(3).normal(size=20_000) * 0.3).astype(np.float32)
    assert compare(row, SamplingSettings(top_p=0.9), draws=1) == 1
    assert compare(row, SamplingSettings(temperature=0), draws=1) == 0
    assert compare(np.zeros(5000, np.float32), SamplingSettings(temperature=0), draws=1) == 1


def test_a_constraint_copies_the_row():
    class Constraint:
        allowed_ids, complete, forced_id = np.array([4, 9]), False, None

        def accept(self, token_id):
            assert token_id in (4, 9)

    row = peaked_row(2)
    counted = CountedRow(row, defined_top_logits(row))
    roles = TokenRoles(vocab_size=len(row))
    constraint = Constraint()
    sampler = Sampler(SamplingSettings(top_k=5), 1, roles, constraint)
    sampler.sample(counted, HISTORY)
    assert counted.copies == 1
    # One that allows all tokens, as before a grammar's trigger, needs no row, and a forced token
    # needs no logits at all.
    constraint.allowed_ids = None
    constraint.accept = lambda token_id: None
    counted = CountedRow(row, defined_top_logits(row))
    sampler.sample(counted, HISTORY)
    assert counted.copies == 0
    constraint.forced_id = 7
    forgotten = CountedRow(row, None)
    assert sampler.sample(forgotten, HISTORY) == 7 and forgotten.copies == 0


def test_bans_of_all_top_logits_copy_the_row():
    row = peaked_row(4, size=3000)
    top_logits = defined_top_logits(row, most=20)
    banned = {"banned_ids": tuple(top_logits.ids.tolist())}
    for options in ({"top_k": 3}, {"top_p": 0.9}, {"temperature": 0}):
        assert compare(row, SamplingSettings(**options), banned, top_logits, draws=1) == 1
    everything = {"banned_ids": tuple(range(3000))}
    compare(row, SamplingSettings(top_k=3), everything, top_logits)


def test_another_vocabulary_size_copies_the_row():
    """The top logits may contain padding, and the sum counts too many tokens."""
    row = peaked_row(5)
    counted = CountedRow(row, defined_top_logits(row))
    sampler = Sampler(SamplingSettings(top_k=3), 1, TokenRoles(vocab_size=len(row) - 400))
    assert sampler.sample(counted, HISTORY) < len(row) - 400
    assert counted.copies == 1


def test_damaged_logits_are_an_error():
    row = peaked_row(6, size=3000)
    row[17] = np.nan
    sampler = Sampler(SamplingSettings(top_k=3), 1, TokenRoles(vocab_size=3000))
    with pytest.raises(InvalidCheckpoint, match="NaN"):
        sampler.sample(CountedRow(row, None), HISTORY)


# Multiples of an eighth: ties everywhere, also where the known tokens end.
ROWS = st.one_of(
    st.lists(st.integers(-60, 60), min_size=30, max_size=400).map(
        lambda values: np.array(values, np.float32) / 8
    ),
    st.builds(
        lambda seed, scale: (np.random.default_rng(seed).standard_t(3, 600) * scale).astype("f4"),
        st.integers(0, 10**6), st.floats(0.1, 10),
    ),
    st.builds(lambda seed, peak: peaked_row(seed, 2000, 1.0, peak), st.integers(0, 10**6),
              st.floats(-5, 20)),
)  # fmt: skip
# Settings for which top logits may suffice, and others, which always need the row if they run
# before a filter.
SUFFICING = st.fixed_dictionaries({"sampler_priority": st.one_of(
    st.just([]), st.permutations(SAMPLER_PRIORITY),
)}, optional={
    "temperature": st.one_of(st.just(0.0), st.floats(0.05, 2)),
    "temperature_last": st.booleans(),
    "top_k": st.integers(1, 60),
    "top_p": st.floats(0.05, 0.99),
    "min_p": st.floats(0.001, 0.5),
    "top_a": st.floats(0.01, 0.9),
    "epsilon_cutoff": st.floats(0.1, 300),
    "repetition_penalty": st.floats(1, 1.5),
    "presence_penalty": st.floats(0, 2),
    "frequency_penalty": st.floats(0, 1),
    "dry_multiplier": st.floats(0.1, 2),
    "mirostat_mode": st.just(2),
    "mirostat_tau": st.floats(0.5, 6),
    "logit_bias": st.lists(st.tuples(st.integers(0, 29), st.floats(-3, 0)), max_size=2),
    "skew": st.floats(-3, 3),
})  # fmt: skip
OTHERS = st.fixed_dictionaries({}, optional={
    "typical_p": st.floats(0.2, 0.95),
    "tfs": st.floats(0.3, 0.99),
    "repetition_penalty": st.floats(0.9, 1.5),
    "presence_penalty": st.floats(-0.2, 2),
    "encoder_repetition_penalty": st.floats(0.9, 1.2),
    "xtc_probability": st.floats(0.1, 1),
    "adaptive_target": st.floats(0.1, 0.9),
    "no_repeat_ngram_size": st.integers(2, 3),
    "logit_bias": st.lists(st.tuples(st.integers(0, 29), st.floats(-3, 0.5)), max_size=2),
})
OPTIONS = st.builds(lambda a, b: a | b, SUFFICING, st.one_of(st.just({}), st.just({}), OTHERS))


@settings(max_examples=400)
@given(row=ROWS, options=OPTIONS, most=st.integers(20, 250), error=st.floats(-1e-5, 1e-5),
       banned=st.lists(st.integers(0, 29), max_size=3))
def test_any_settings_give_the_tokens_of_the_whole_row(row, options, most, error, banned):
    top_logits = defined_top_logits(row, most, error)
    if top_logits is not None:
        compare(row, SamplingSettings(**options), {"banned_ids": tuple(banned)}, top_logits)


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 300), nudge=st.integers(-2, 2),
       temperature=st.sampled_from([0.5, 1.0, 1.3]), error=st.floats(-1e-5, 1e-5))
def test_a_top_p_next_to_a_running_sum_gives_the_tokens_of_the_whole_row(
    seed, count, nudge, temperature, error
):
    """top_p is exactly the sum of the largest probabilities, or one of the next floats."""
    row = (np.random.default_rng(seed).normal(size=2500) * 3).astype(np.float32)
    scaled = row / np.float32(temperature)
    weight = np.sort(np.exp(scaled - scaled.max()).astype(np.float64))[::-1]
    top_p = float(weight[:count].sum() / weight.sum())
    for _ in range(abs(nudge)):
        top_p = math.nextafter(top_p, math.copysign(2, nudge))
    if 0 < top_p < 1:
        options = SamplingSettings(top_p=top_p, temperature=temperature)
        compare(row, options, None, defined_top_logits(row, error=error), draws=1)


@settings(max_examples=200)
@given(logits=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=40),
       temperatures=st.lists(st.floats(0.02, 20), max_size=2), falls=st.integers(0, 5))
def test_the_sum_over_the_tail_is_in_its_interval(logits, temperatures, falls):
    others = np.array(logits, np.float32)
    largest = float(others.max()) + 1.0
    weight_sum = float(np.exp(others - np.float32(largest)).sum(dtype=np.float32))
    tail = Tail.from_weight_sum(len(others), others.max(), largest, weight_sum)
    for temperature in temperatures:
        divisor = np.float32(temperature)
        others, largest = others / divisor, largest / float(divisor)
        tail = tail.divided(divisor, largest)
    falls = min(falls, len(others))
    others[:falls] -= 5.0
    tail = tail.lowered(falls)
    assert others.max() <= tail.bound and tail.count == len(others)
    low, high = tail.weight_range(largest)
    exact = math.fsum(math.exp(float(x) - largest) for x in others)
    assert low * (1 - 1e-12) - 1e-38 <= exact <= high * (1 + 1e-12)


def test_argmax_of_a_smaller_vocabulary():
    values = peaked_row(8, size=4000)
    counted = CountedRow(values, defined_top_logits(values))
    best = int(values.argmax())
    assert LogitsRow(values).argmax(4000) == counted.argmax(4000) == best
    assert counted.argmax(best) == values[:best].argmax() and counted.copies == 0
    smallest = int(counted.top_logits.ids.min())
    assert counted.argmax(smallest) == values[:smallest].argmax() and counted.copies == 1


def test_a_row_is_copied_once():
    counted = CountedRow(np.arange(5, dtype=np.float32), None)
    assert counted.copies == 0
    assert counted.values.tolist() == counted.values.tolist() == [0, 1, 2, 3, 4]
    assert counted.copies == 1
