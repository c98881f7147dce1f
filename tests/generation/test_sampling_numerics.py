"""Sums, entropy and largest values of rows, and the cost of common settings."""

from __future__ import annotations

import math

import numpy as np
import pytest

import support.samplers_defined as defined
from exl_loader.generation.forward_model import LogitsRow
from exl_loader.generation.sampling import Sampler
from exl_loader.generation.sampling.numerics import fewest_reaching, measures
from exl_loader.generation.settings import SamplingSettings
from support.counting import count
from support.samplers_defined import random_row


@pytest.mark.parametrize("kind", ["distinct", "few values", "two values", "equal", "falling"])
def test_the_fewest_keys_that_reach_a_sum(kind):
    """For many distributions of keys, with ties, impossible tokens and sums out of reach."""
    rng = np.random.default_rng()
    size = int(rng.integers(5000, 30_000))
    keys = {
        "distinct": rng.standard_normal(size), "few values": rng.integers(0, 40, size),
        "two values": rng.random(size) < 0.01, "equal": np.zeros(size),
        # In order, so that the first keys are not representative.
        "falling": -np.geomspace(1e-3, 80, size),
    }[kind].astype(np.float32)
    if kind != "equal":
        keys[rng.integers(0, size, 50)] = -np.inf
    weight = np.exp(keys - keys.max())
    order = np.argsort(-keys, kind="stable")
    reached = np.cumsum(weight[order], dtype=np.float64)
    for share in (0.001, 0.3, 0.77, 0.9999, 2.0):
        target = share * reached[-1]
        index = min(int(np.searchsorted(reached, target)), size - 1)
        assert fewest_reaching(keys, weight, target) == (keys[order[index]], index + 1)


def test_measures():
    for scale in (0.1, 1, 30):
        row = random_row(9, 1000, scale)
        weight, log_whole, entropy = measures(row)
        p = defined.softmax(row)
        np.testing.assert_allclose(weight / math.exp(log_whole), p, rtol=1e-5, atol=1e-30)
        assert entropy == pytest.approx(defined.entropy(p), rel=1e-5, abs=1e-9)
    assert measures(np.array([5, -np.inf], np.float32))[1:] == (0, 0)
    assert measures(np.zeros(8, np.float32))[2] == pytest.approx(math.log(8))


COMMON = (
    {}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
    {"temperature": 0.7, "top_p": 0.95}, {"temperature": 1.2, "min_p": 0.05},
    {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1, "dry_multiplier": 0.8,
     "dry_sequence_breakers": []},
    {"typical_p": 0.9}, {"top_a": 0.2}, {"eta_cutoff": 3}, {"mirostat_mode": 2},
    {"xtc_probability": 1, "xtc_threshold": 0.1},
    {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1},
)


@pytest.mark.parametrize("scale", [4, 0.5, 0])
@pytest.mark.parametrize("options", COMMON)
def test_no_common_setting_sorts_the_vocabulary(options, scale):
    rng = np.random.default_rng()
    row = (rng.standard_normal(152_064) * scale).astype(np.float32)
    history = rng.integers(0, 152_064, 4000)
    sampler = Sampler(SamplingSettings(**options), 1)
    sampler.sample(LogitsRow(row), history)
    counts = count(lambda: sampler.sample(LogitsRow(row), history))
    assert counts.sorted_elements < len(row) / 16
    # A loop over tokens in Python would be a thousand times more.
    assert counts.calls < 1000
