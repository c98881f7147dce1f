"""Samplers with a state: mirostat and adaptive-p."""

from __future__ import annotations

import math

import numpy as np
import pytest

import support.samplers_defined as defined
from exl_loader.generation.forward_model import LogitsRow
from exl_loader.generation.sampling import Candidates, Sampler
from exl_loader.generation.sampling.candidates import largest
from exl_loader.generation.sampling.feedback import AdaptiveP, Mirostat
from exl_loader.generation.settings import SamplingSettings
from support.samplers_defined import distribution


def test_mirostat_follows_its_formulas():
    rng = np.random.default_rng(int(np.random.default_rng().integers(1 << 32)))
    tau, eta = 3.0, 0.2
    mirostat, mu = Mirostat(tau, eta), 2 * tau
    for _ in range(50):
        row = (rng.standard_normal(300) * 3).astype(np.float32)
        kept = mirostat.apply(Candidates.from_row(row))
        expected = defined.softmax(defined.mirostat_kept(row, mu))
        np.testing.assert_allclose(distribution(kept, 300), expected, rtol=1e-4, atol=1e-30)
        token = int(rng.choice(300, p=expected))
        mirostat.observe(token)
        mu -= eta * (-math.log2(expected[token]) - tau)
        assert mirostat.mu == pytest.approx(mu, rel=1e-5)
        mu = mirostat.mu


@pytest.mark.parametrize(("target", "decay"), [(0.5, 0.9), (0.05, 0.0), (1.0, 0.99)])
def test_adaptive_p_follows_its_formulas(target, decay):
    rng = np.random.default_rng(int(np.random.default_rng().integers(1 << 32)))
    sampler = AdaptiveP(target, decay)
    drawn = [target / (1 - decay), 1 / (1 - decay)]
    for _ in range(40):
        row = (rng.standard_normal(200) * 4).astype(np.float32)
        row[rng.integers(200, size=30)] = -np.inf
        p = defined.softmax(row)
        distance = np.abs(p - np.clip(2 * target - drawn[0] / drawn[1], 0, 1)) / 0.3
        bent = np.where(row > -np.inf, 5 - 10 * distance**2 / (1 + distance), -np.inf)
        given = largest(Candidates.from_row(row), 200)
        actual = sampler.apply(given)
        assert not actual.is_sorted and (np.diff(actual.ids) > 0).all()
        expected = defined.softmax(bent)
        np.testing.assert_allclose(distribution(actual, 200), expected, rtol=1e-4, atol=1e-30)
        token = int(rng.choice(200, p=expected))
        sampler.observe(token)
        drawn = [p[token] + decay * drawn[0], 1 + decay * drawn[1]]


def test_mirostat_keeps_the_surprise_near_its_target():
    rng = np.random.default_rng(11)
    for tau in (2.0, 4.0):
        sampler = Sampler(SamplingSettings(mirostat_mode=2, mirostat_tau=tau, mirostat_eta=0.1), 3)
        surprises = []
        for _ in range(600):
            row = (rng.standard_normal(500) * 2).astype(np.float32)
            share = final_share(sampler, row)
            surprises.append(-np.log2(share))
        assert np.mean(surprises[100:]) == pytest.approx(tau, abs=0.15)


def final_share(sampler: Sampler, row) -> float:
    """Draw a token; return its probability among the remaining candidates."""
    left = sampler.candidates(LogitsRow(row), [])
    token = sampler.sample(LogitsRow(row), [])
    return float(defined.softmax(left.logits)[left.ids == token][0])


def test_requests_have_separate_states():
    row = np.random.default_rng(12).standard_normal(400).astype(np.float32)
    settings = SamplingSettings(mirostat_mode=2, xtc_probability=0.5, xtc_threshold=0.01, seed=9)
    alone = [Sampler(settings).sample(LogitsRow(row), []) for _ in range(1)]
    one, two = Sampler(settings), Sampler(settings)
    together = [(one.sample(LogitsRow(row), []), two.sample(LogitsRow(row), [])) for _ in range(30)]
    assert together[0][0] == alone[0]
    assert all(first == second for first, second in together)
