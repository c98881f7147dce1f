"""Definitions of the samplers by their published formulas, in float64.

Every sampler takes logits [n] (-inf is impossible) and returns the new ones.
"""

from __future__ import annotations

import math

import numpy as np

INF = math.inf


def distribution(candidates, size) -> np.ndarray:
    """Return the probability of every token of a vocabulary."""
    probabilities = np.zeros(size)
    probabilities[candidates.ids] = softmax(candidates.logits)
    return probabilities


def random_row(seed, size, scale) -> np.ndarray:
    """Make logits, float32 [size]."""
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def softmax(logits) -> np.ndarray:
    row = np.asarray(logits, np.float64)
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def entropy(probabilities) -> float:
    return -math.fsum(p * math.log(p) for p in probabilities if p > 0)


def dynamic_temperature(logits, low, high, exponent):
    possible = sum(x > -INF for x in logits)
    largest = math.log(possible) if possible > 1 else 1e-10
    share = max(entropy(softmax(logits)), 1e-10) / largest
    return np.asarray(logits, np.float64) / (low + (high - low) * share**exponent)


def smooth(logits, factor, curve):
    row = np.asarray(logits, np.float64)
    k, s = (3 - curve) / 2, (curve - 1) / 2
    bent = row.copy()
    for i, x in enumerate(row):
        if x > -INF:
            d = x - row.max()
            bent[i] = -(k * factor * d**2) + s * factor * d**3 + row.max()
    return bent


def _only(logits, kept):
    row = np.full(len(logits), -INF)
    for i in kept:
        row[i] = logits[i]
    return row


def top_a(logits, a):
    p = softmax(logits)
    floor = a * p.max() ** 2
    return _only(logits, [i for i in range(len(p)) if p[i] >= floor])


def top_n_sigma(logits, n):
    possible = [float(x) for x in logits if x > -INF]
    mean = math.fsum(possible) / len(possible)
    spread = math.fsum((x - mean) ** 2 for x in possible)
    sigma = math.sqrt(spread / (len(possible) - 1)) if len(possible) > 1 else 0
    return _only(logits, [i for i, x in enumerate(logits) if x >= max(possible) - n * sigma])


def tail_free(logits, z):
    """Over the whole vocabulary; impossible tokens have probability 0."""
    p = softmax(logits)
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))
    q = p[ranked]
    curvature = [abs((q[i + 2] - q[i + 1]) - (q[i + 1] - q[i])) for i in range(len(q) - 2)]
    whole = math.fsum(curvature)
    if whole == 0:
        return _only(logits, range(len(p)))
    kept, reached = ranked[:1], 0.0
    for i, part in enumerate(curvature):
        reached += part / whole
        if reached <= z:
            kept.append(ranked[i + 1])
    return _only(logits, kept)


def mirostat_kept(logits, mu):
    p = softmax(logits)
    best = int(np.argmax(p))
    return _only(
        logits, [i for i in range(len(p)) if i == best or (p[i] > 0 and -math.log2(p[i]) <= mu)]
    )


def exclude_top_choices(logits, threshold, spared=()):
    p = softmax(logits)
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))
    above = [i for i in ranked if p[i] >= threshold and p[i] > 0]
    if set(above[:-1]) & set(spared):
        return np.asarray(logits, np.float64)
    return _only(logits, [i for i in ranked if i not in above[:-1]])


def dry_amounts(ids, multiplier, base, allowed_length, breakers=()) -> dict[int, float]:
    """Return the penalty of each token, from the longest match of the text's end before it."""
    ids = list(ids)
    longest: dict[int, int] = {}
    for index in range(1, len(ids)):
        length = 0
        while (
            length < min(50, index)
            and ids[index - 1 - length] == ids[-1 - length]
            and ids[-1 - length] not in breakers
        ):
            length += 1
        if length > 0 and ids[index] not in breakers:
            longest[ids[index]] = max(length, longest.get(ids[index], 0))
    return {
        token: multiplier * base ** (length - allowed_length)
        for token, length in longest.items()
        if length >= allowed_length
    }
