"""Curves and filters, compared with transformers' warpers or with formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

import support.samplers_defined as defined
from exl_loader.generation.sampling import Candidates, curves, filters
from exl_loader.generation.sampling.candidates import largest
from support.samplers_defined import distribution, random_row

VOCAB = 152_064


def warp(warper, row) -> np.ndarray:
    """Apply a warper of transformers to a row in float64."""
    scores = torch.tensor(np.asarray(row, np.float64))[None]
    return warper(torch.zeros(1, 1, dtype=torch.long), scores)[0].numpy()


# Sampler -> (function, definition, arguments from weak to strong).
CASES = {
    "temperature": (curves.apply_temperature, lambda row, t: np.float64(row) / t, [0.3, 1.0, 2.5]),
    "dynamic_temperature": (
        lambda c, v: curves.apply_dynamic_temperature(c, *v),
        lambda row, v: defined.dynamic_temperature(row, *v),
        [(0.5, 2.0, 1.0), (0.1, 1.5, 0.5), (2.0, 0.5, 3.0)],
    ),
    "smoothing": (
        lambda c, v: curves.smooth(c, *v), lambda row, v: defined.smooth(row, *v),
        [(0.2, 1.0), (1.5, 2.3), (0.3, 3.0), (0.05, 7.0)],
    ),
    "top_k": (
        filters.keep_top_k, lambda row, k: warp(hf.TopKLogitsWarper(k), row), [1, 5, 40, 10**6],
    ),
    "top_p": (
        filters.keep_top_p, lambda row, p: warp(hf.TopPLogitsWarper(p), row), [0.001, 0.5, 0.97],
    ),
    "min_p": (
        filters.keep_min_p, lambda row, p: warp(hf.MinPLogitsWarper(p), row), [0.001, 0.05, 0.9],
    ),
    "typical_p": (
        filters.keep_typical, lambda row, p: warp(hf.TypicalLogitsWarper(p), row),
        [0.05, 0.5, 0.97],
    ),
    "epsilon": (
        filters.keep_epsilon, lambda row, e: warp(hf.EpsilonLogitsWarper(e), row),
        [0.0003, 0.01, 0.9],
    ),
    "eta": (
        filters.keep_eta, lambda row, e: warp(hf.EtaLogitsWarper(e), row), [0.0003, 0.05, 0.9],
    ),
    "top_a": (filters.keep_top_a, defined.top_a, [0.01, 0.2, 1.0]),
    "top_n_sigma": (filters.keep_top_n_sigma, defined.top_n_sigma, [0.2, 1.0, 3.0]),
    "tfs": (filters.keep_tail_free, defined.tail_free, [0.0, 0.3, 0.95]),
    "xtc": (
        lambda c, t: filters.exclude_top_choices(c, t, frozenset()),
        defined.exclude_top_choices, [0.0, 0.01, 0.1, 0.5],
    ),
}
PAIRS = [(name, value) for name, (_, _, values) in CASES.items() for value in values]


def check(name: str, value, row: np.ndarray, given: Candidates | None = None) -> None:
    sampler, definition, _ = CASES[name]
    before = row.copy()
    actual = sampler(given or Candidates.from_row(row), value)
    expected = defined.softmax(definition(row, value))
    np.testing.assert_allclose(distribution(actual, len(row)), expected, rtol=2e-4, atol=1e-30)
    assert (row == before).all()
    falling = -actual.logits if actual.is_sorted else np.zeros(len(actual))
    assert (np.lexsort((actual.ids, falling)) == np.arange(len(actual))).all()


@pytest.mark.parametrize("scale", [0.3, 2.0, 12.0])
@pytest.mark.parametrize(("name", "value"), PAIRS)
def test_random_logits(name, value, scale):
    for seed in (1, 2, int(np.random.default_rng().integers(1 << 32))):
        check(name, value, random_row(seed, 500, scale))


@pytest.mark.parametrize(("name", "value"), PAIRS)
def test_sorted_and_impossible_candidates(name, value):
    """Few candidates, sorted, and some of them impossible."""
    row = random_row(5, 500, 2.0)
    row[np.argsort(-row)[[0, 3, 7]]] = -np.inf
    check(name, value, row)
    kept = largest(Candidates.from_row(row), 60)
    rest = np.full_like(row, -np.inf)
    rest[kept.ids] = row[kept.ids]
    check(name, value, rest, kept)


@pytest.mark.parametrize("name", CASES)
def test_the_only_possible_token_is_kept(name):
    row = np.full(50, -np.inf, np.float32)
    row[7] = 3
    for value in CASES[name][2]:
        actual = CASES[name][0](Candidates.from_row(row), value)
        assert distribution(actual, 50)[7] == 1
        alone = actual.take(np.flatnonzero(actual.ids == 7))
        assert distribution(CASES[name][0](alone, value), 50)[7] == 1


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"top_k", "top_p", "tfs", "xtc"}))
def test_equal_logits_are_treated_alike(name):
    """Except samplers that keep a number of tokens, which keep the lowest ids (below)."""
    row = np.repeat(random_row(6, 40, 2.0), 3)
    for value in CASES[name][2]:
        check(name, value, row)


def test_of_equal_logits_the_lowest_ids_are_kept():
    flat = Candidates.from_row(np.zeros(1000, np.float32))
    assert filters.keep_top_k(flat, 3).ids.tolist() == [0, 1, 2]
    assert filters.keep_top_p(flat, 0.0025).ids.tolist() == [0, 1, 2]
    assert filters.keep_tail_free(flat, 0.5).ids.tolist() == list(range(1000))
    assert filters.exclude_top_choices(flat, 0.0001, frozenset()).ids.tolist() == [999]


@pytest.mark.parametrize("name", CASES)
def test_extreme_logits(name):
    row = np.array([-3e38, 0, 1e4, 2.9e38, 3e38, -1e-38], np.float32)
    for value in CASES[name][2]:
        with np.errstate(over="ignore"):
            actual = distribution(CASES[name][0](Candidates.from_row(row), value), 6)
        assert np.isfinite(actual).all() and actual.sum() == pytest.approx(1)


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", 40), ("top_p", 0.9), ("min_p", 0.05), ("typical_p", 0.9), ("tfs", 0.9),
     ("top_a", 0.2), ("epsilon", 0.0003), ("eta", 0.001), ("dynamic_temperature", (0.5, 2.0, 1.0))],
)
def test_a_whole_vocabulary(name, value, scale):
    """Selections that avoid a full sort, and sums over many small numbers."""
    row = random_row(8, VOCAB, scale)
    expected = defined.softmax(CASES[name][1](row, value))
    actual = distribution(CASES[name][0](Candidates.from_row(row), value), VOCAB)
    # Only a token at the limit may depend on rounding.
    assert np.abs(actual - expected).sum() < 1e-4


@pytest.mark.parametrize(("name", "value"), PAIRS)
def test_impossible_tokens_count_as_removed_ones(name, value):
    """A filter that keeps most of a vocabulary makes the other tokens impossible."""
    before = filters.keep_min_p(Candidates.from_row(random_row(9, 20_000, 0.5)), 0.05)
    assert len(before) == 20_000 and np.isneginf(before.logits).any()
    compressed = before.take(np.flatnonzero(before.logits > -np.inf))
    actual, expected = (CASES[name][0](given, value) for given in (before, compressed))
    np.testing.assert_allclose(
        distribution(actual, 20_000), distribution(expected, 20_000), rtol=1e-5)


def test_xtc_spares_line_breaks_and_end_tokens():
    row = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    kept = {
        spared: filters.exclude_top_choices(
            Candidates.from_row(row), 0.15, frozenset({spared})).ids.tolist()
        for spared in range(5)
    }
    assert kept == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3], 2: [2, 3], 3: [2, 3], 4: [2, 3]}
