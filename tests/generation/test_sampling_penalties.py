"""Penalties and bans, compared with transformers' processors or with definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

import support.samplers_defined as defined
from exl_loader.generation.sampling import Candidates, penalties
from exl_loader.generation.sampling.penalties import (
    MAX_REPEAT,
    Past,
    earlier_matches,
    longest_repeats,
)

VOCAB = 200


def process(processor, row, history) -> np.ndarray:
    """Apply a processor of transformers to a row in float64."""
    scores = torch.tensor(np.asarray(row, np.float64))[None]
    ids = torch.tensor(np.asarray(history, np.int64))[None]
    return processor(ids, scores)[0].numpy()


@pytest.fixture(params=["fixed", "fixed too", "fresh"])
def drawn(request) -> tuple[np.ndarray, np.ndarray]:
    """A row of logits, one of them impossible, and a history with repeats."""
    rng = np.random.default_rng(len(request.param) if request.param != "fresh" else None)
    row = (rng.standard_normal(VOCAB) * 4).astype(np.float32)
    row[13] = -np.inf
    return row, rng.integers(0, 40, 300)


def check(actual: Candidates, expected: np.ndarray) -> None:
    """Compare the logits of the candidates."""
    np.testing.assert_allclose(actual.logits, expected[actual.ids], rtol=1e-5, atol=1e-5)


def some_of(row: np.ndarray) -> Candidates:
    """Return the likelier half of the tokens, sorted; some penalised tokens are missing."""
    indices = np.argsort(-row, kind="stable")[: len(row) // 2]
    return Candidates(indices, row[indices], len(row), is_sorted=True)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition(drawn, penalty):
    row, history = drawn
    expected = process(hf.RepetitionPenaltyLogitsProcessor(penalty), row, history)
    for candidates in (Candidates.from_row(row), some_of(row)):
        check(penalties.penalize_repetition(candidates, history, penalty), expected)


@pytest.mark.parametrize("penalty", [0.8, 1.5])
def test_encoder_repetition(drawn, penalty):
    row, prompt = drawn
    processor = hf.EncoderRepetitionPenaltyLogitsProcessor(penalty, torch.tensor(prompt)[None])
    expected = process(processor, row, [1, 2, 3])
    for candidates in (Candidates.from_row(row), some_of(row)):
        check(penalties.reward_encoder_tokens(candidates, np.unique(prompt), penalty), expected)


@pytest.mark.parametrize("penalty", [-0.7, 0.4, 2.0])
@pytest.mark.parametrize("penalty_range", [0, 1, 64, 1000])
def test_presence_and_frequency(drawn, penalty, penalty_range):
    row, history = drawn
    counts = np.bincount(history[-penalty_range:] if penalty_range else history, minlength=VOCAB)
    for candidates in (Candidates.from_row(row), some_of(row)):
        past = Past(history, penalty_range)
        check(penalties.penalize_presence(candidates, past, penalty), row - penalty * (counts > 0))
        check(penalties.penalize_frequency(candidates, past, penalty), row - penalty * counts)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 301])
def test_no_repeated_ngrams(drawn, size):
    row, history = drawn
    history = history % 4
    expected = process(hf.NoRepeatNGramLogitsProcessor(size), row, history)
    for candidates in (Candidates.from_row(row), some_of(row)):
        check(penalties.ban_repeated_ngrams(candidates, history, size), expected)


def test_biases_and_bans(drawn):
    row, _ = drawn
    expected = process(hf.SequenceBiasLogitsProcessor([[[3], 2.5], [[70], -9.0]]), row, [1])
    biases = ((3, 2.5), (70, -9.0), (VOCAB + 5, 1.0))
    check(penalties.add_bias(Candidates.from_row(row), biases), expected)
    expected = process(hf.SuppressTokensLogitsProcessor([0, 9]), row, [1])
    check(penalties.ban(Candidates.from_row(row), (0, 9, VOCAB + 5)), expected)


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 20_000])
def test_counts_of_short_and_long_histories(length):
    history = np.random.default_rng(length).integers(0, 5000, length)
    ids, counts = Past(history, 0).counts
    assert ids.tolist() == sorted(set(history.tolist()))
    assert (counts == [np.count_nonzero(history == i) for i in ids]).all()


def test_padding_in_the_history_is_ignored(drawn):
    """A prompt may contain ids beyond the sampled vocabulary."""
    row, history = drawn
    padded = np.concatenate([history, [VOCAB, VOCAB + 9]])
    candidates = Candidates.from_row(row)
    without = penalties.penalize_frequency(candidates, Past(history, 0), 1.0)
    check(penalties.penalize_frequency(candidates, Past(padded, 0), 1.0), without.logits)
    dried = penalties.penalize_repeats(
        candidates, np.array([VOCAB, VOCAB, VOCAB]), 1.0, 2.0, 1, np.empty(0, np.int64))
    check(dried, row)


def test_penalties_never_make_a_token_impossible():
    row = np.zeros(4, np.float32)
    past = Past(np.array([0, 0, 1, 2, 3]), 0)
    for penalised in (
        penalties.penalize_frequency(Candidates.from_row(row), past, 1e300),
        penalties.add_bias(Candidates.from_row(row), [(0, -1e300)]),
        penalties.penalize_repeats(
            Candidates.from_row(row), np.zeros(60, np.int64), 5, 1e9, 1, np.empty(0, np.int64)),
    ):
        assert np.isfinite(penalised.logits).all()
        assert penalised.logits[0] < -1e29


# DRY

def penalised(ids, **options) -> dict[int, float]:
    """Return what DRY subtracts from each token, without zeros."""
    row = np.zeros(VOCAB, np.float32)
    breakers = np.array(sorted(options.pop("breakers", ())), np.int64)
    values = {"multiplier": 0.8, "base": 1.75, "allowed_length": 2, **options}
    actual = penalties.penalize_repeats(
        Candidates.from_row(row), np.asarray(ids, np.int64), *values.values(), breakers)
    return {int(i): -float(actual.logits[i]) for i in np.flatnonzero(actual.logits)}


def test_dry_by_hand():
    # "1 2 3" occurred before 4, "2 3" before 5, "3" before 6.
    ids = [1, 2, 3, 4, 9, 2, 3, 5, 8, 3, 6, 1, 2, 3]
    assert penalised(ids) == pytest.approx({4: 0.8 * 1.75, 5: 0.8})
    assert penalised(ids, allowed_length=1) == pytest.approx(
        {4: 0.8 * 1.75**2, 5: 0.8 * 1.75, 6: 0.8})
    assert penalised(ids, breakers={1}) == pytest.approx({4: 0.8, 5: 0.8})
    assert penalised(ids, breakers={4}) == pytest.approx({5: 0.8})
    assert penalised(ids, breakers={3}) == {}
    assert penalised([5]) == penalised([]) == {}


def test_dry_counts_long_repeats_as_fifty():
    ids = [7] * 120
    assert penalised(ids, base=1.01)[7] == pytest.approx(0.8 * 1.01 ** (MAX_REPEAT - 2))


@settings(max_examples=200)
@given(
    ids=st.lists(st.integers(0, 4), max_size=120),
    allowed_length=st.integers(0, 6),
    breakers=st.sets(st.integers(0, 4), max_size=2),
)
def test_dry_agrees_with_the_definition(ids, allowed_length, breakers):
    expected = defined.dry_amounts(ids, 0.8, 1.2, allowed_length, breakers)
    actual = penalised(ids, base=1.2, allowed_length=allowed_length, breakers=breakers)
    assert actual == pytest.approx(expected, rel=1e-5)


@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, 2), max_size=30), length=st.integers(0, 5))
def test_earlier_matches(ids, length):
    end = ids[len(ids) - length :]
    expected = [i for i in range(length, len(ids)) if ids[i - length : i] == end]
    assert earlier_matches(np.array(ids, np.int64), length).tolist() == expected


def test_the_cost_of_repeats_is_linear_in_the_text(monkeypatch):
    """The number of reads grows with the length of the text and not with its square."""
    class Counted(np.ndarray):
        reads = 0

        def __getitem__(self, key):
            part = super().__getitem__(key)
            Counted.reads += np.size(part)
            return part

    def reads(ids) -> int:
        Counted.reads = 0
        longest_repeats(ids.view(Counted), np.empty(0, np.int64))
        return Counted.reads

    rng = np.random.default_rng(4)
    text = rng.integers(0, 1000, 64_000)
    assert reads(text) < 2 * len(text)
    # The worst case: one repeated token, limited by the longest repeat.
    assert reads(np.zeros(16_000, np.int64)) < (MAX_REPEAT + 6) * 16_000
