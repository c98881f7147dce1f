"""What is computed of a row of logits, or of a part of it, as a whole."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Places = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]

# A row is looked at in blocks of so many tokens before single ones.
BLOCK = 64

# exp of anything below is 0 in float32; an impossible token's -inf is lifted to this where
# it would be multiplied by its probability.
_LOWEST = np.float32(-200)


def weights(logits: Floats) -> Floats:
    """Probabilities up to a common factor, the likeliest at 1."""
    shifted = logits - logits.max()
    return np.exp(shifted, out=shifted)


def total(values: Floats) -> float:
    """Sum in double precision."""
    return float(values.sum(dtype=np.float64))


def log_total(logits: Floats) -> float:
    """Logarithm of the sum of `weights`: minus the likeliest token's log probability."""
    return math.log(total(weights(logits)))


def measures(logits: Floats) -> tuple[Floats, float, float]:
    """`weights`, `log_total`, and the entropy of the distribution in nats."""
    shifted = logits - logits.max()
    if shifted.min() < _LOWEST:
        np.maximum(shifted, _LOWEST, out=shifted)
    weight = np.exp(shifted)
    whole = total(weight)
    surprise = -total(np.multiply(weight, shifted, out=shifted)) / whole
    return weight, math.log(whole), math.log(whole) + surprise


def reached_at(values: Floats, target: float, beyond: bool = False) -> int:
    """The place at which the running sum of values, 0 or more, reaches a target, or passes it.

    Summed by blocks first: a running sum of a whole vocabulary would take a millisecond.

    Returns:
        As many as there are values where it never does.
    """
    side: Literal["left", "right"] = "right" if beyond else "left"
    whole = len(values) // BLOCK * BLOCK
    blocks = values[:whole].reshape(-1, BLOCK).sum(axis=1, dtype=np.float64)
    reached = np.cumsum(np.append(blocks, values[whole:].sum(dtype=np.float64)))
    block = int(np.searchsorted(reached, target, side))
    if block == len(reached):
        return len(values)
    first = block * BLOCK
    inner = np.cumsum(values[first : first + BLOCK], dtype=np.float64)
    before = float(reached[block - 1]) if block else 0.0
    return first + int(np.searchsorted(inner, target - before, side))
