"""Computes sums, entropy and the largest values of a row of logits, without sorting all of it."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]

# Values are summed and compared in blocks of this many before single ones are looked at.
BLOCK = 64

# exp of anything lower is 0 in float32. An impossible token's -inf is raised to this where it
# is multiplied by its probability, because 0 times infinity is NaN.
_LOWEST = np.float32(-200)

# `fewest_reaching` sorts this many keys first. They suffice in nearly every step, because the
# probability of a trained model is mostly concentrated on a few tokens.
_FIRST_COUNT = 256

# If they do not suffice, keys are sorted into bins until at most _FEW keys are left, which are
# then sorted. Keys that are more than _BIN_SPAN below the largest one, where probabilities are
# below 1e-13 of the likeliest token's, share the last bin.
_FEW = 1024
_NUM_BINS = 4096
_BIN_SPAN = 30.0
_CHUNK = 32_768
_TINY = 1e-30


def weights(logits: Floats) -> Floats:
    """Compute exp(logit - max(logits)): probabilities up to a common factor."""
    shifted = logits - logits.max()
    return np.exp(shifted, out=shifted)


def total(values: Floats) -> float:
    """Compute the sum in double precision."""
    return float(values.sum(dtype=np.float64))


def log_total(logits: Floats) -> float:
    """Compute ln(sum of `weights`), which is -ln of the likeliest token's probability."""
    return math.log(total(weights(logits)))


def measures(logits: Floats) -> tuple[Floats, float, float]:
    """Compute `weights`, `log_total`, and the entropy of the distribution in nats."""
    shifted = logits - logits.max()
    if shifted.min() < _LOWEST:
        np.maximum(shifted, _LOWEST, out=shifted)
    weight = np.exp(shifted)
    whole = total(weight)
    surprise = -total(np.multiply(weight, shifted, out=shifted)) / whole
    return weight, math.log(whole), math.log(whole) + surprise


def index_reaching(values: Floats, target: float, beyond: bool = False) -> int:
    """Find the index at which the running sum of values reaches a target.

    Values are summed by blocks first, because a running sum of a whole vocabulary takes about a
    millisecond.

    Args:
        values: float32 [n], 0 or more.
        beyond: find the index at which the sum is larger than the target.

    Returns:
        The index; n if the sum of all values does not reach the target.
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


def largest_indices(keys: Floats, count: int) -> Indices:
    """Return the indices of the `count` largest keys, falling; equal keys keep their order."""
    if count >= len(keys):
        return np.argsort(-keys, kind="stable")
    floor = _floor(keys, count)
    indices = np.flatnonzero(keys > floor)
    indices = indices[np.argsort(-keys[indices], kind="stable")[:count]]
    if len(indices) < count:
        # A whole vocabulary may be equal to the floor; equal keys need no sorting.
        indices = np.append(indices, np.flatnonzero(keys == floor)[: count - len(indices)])
    return indices


def largest_values(values: Floats, count: int) -> Floats:
    """Return the `count` largest values, falling."""
    if count < len(values):
        values = values[values >= _floor(values, count)]
    return np.sort(values)[::-1][:count]


def fewest_reaching(keys: Floats, weight: Floats, target: float) -> tuple[np.float32, int]:
    """Find the fewest largest keys whose weights sum to `target` or more.

    Args:
        keys: float32 [n]; equal keys are taken in any order.
        weight: float32 [n].

    Returns:
        The smallest of these keys, and their number: at least one; n if all weights together
        are less than the target.
    """
    first_count = min(_FIRST_COUNT, len(keys))
    if first_count == len(keys) or first_count * float(weight.max()) >= target:
        indices = largest_indices(keys, first_count)
        reached = np.cumsum(weight[indices], dtype=np.float64)
        if first_count == len(keys) or reached[-1] >= target:
            last = min(int(np.searchsorted(reached, target, side="left")), first_count - 1)
            return keys[indices[last]], last + 1
    keys, weight, num_before, target = _narrowed(keys, weight, target)
    if len(keys) <= _FEW:
        # The order of equal keys does not matter: the result is a key and a count.
        order = np.argsort(-keys)
        keys, weight = keys[order], weight[order]
    last = min(index_reaching(weight, target), len(keys) - 1)
    return keys[last], num_before + last + 1


def counts_reaching(falling: Floats, *targets: float) -> list[int]:
    """Count the first weights of `falling` that sum to each target or more.

    Returns:
        For each target at least 1 and at most n.
    """
    reached = np.cumsum(falling, dtype=np.float64)
    counts: list[int] = np.searchsorted(reached, targets, side="left").tolist()
    return [min(count + 1, len(falling)) for count in counts]


def at_least(keys: Floats, floor: np.float32, count: int) -> Mask:
    """Mark `count` keys that reach the floor, bool [n]; of keys equal to it the first ones."""
    mask = keys >= floor
    surplus = np.count_nonzero(mask) - count
    if surplus > 0:
        mask[np.flatnonzero(keys == floor)[-surplus:]] = False
    return mask


def _narrowed(
    keys: Floats, weight: Floats, target: float
) -> tuple[Floats, Floats, int, float]:
    """Remove keys until `_FEW` or only equal keys are left, among them the last one to keep.

    Returns:
        The remaining keys in their order, their weights, the number of larger keys, and the
        target minus the weights of those.
    """
    num_before = 0
    while len(keys) > _FEW and (most := keys.max()) > (least := keys.min()):
        bins, masses = _binned(keys, weight, least, most)
        sums = np.cumsum(masses)
        last = int(np.searchsorted(sums, target, side="left"))
        if last == _NUM_BINS:
            last = int(bins.max())
        target -= float(sums[last - 1]) if last else 0.0
        num_before += int(np.count_nonzero(bins < last))
        indices = np.flatnonzero(bins == last)
        keys, weight = keys[indices], weight[indices]
    return keys, weight, num_before, target


def _binned(
    keys: Floats, weight: Floats, least: np.float32, most: np.float32
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float64]]:
    """Return the bin of each key (`most` is in bin 0, `least` in another) and each bin's weight."""
    # A difference of Python floats cannot overflow; for an impossible token it is infinite.
    span = min(float(most) - float(least), _BIN_SPAN)
    scale = np.float32((_NUM_BINS - 1) / max(span, _TINY))
    with np.errstate(over="ignore"):
        distance = most - keys
    np.minimum(distance, np.float32(span), out=distance)
    bins = np.multiply(distance, scale, out=distance).astype(np.int16)
    masses = np.zeros(_NUM_BINS)
    # In chunks, so that the wide types that bincount computes with stay in the CPU's caches.
    for first in range(0, len(keys), _CHUNK):
        part = slice(first, first + _CHUNK)
        masses += np.bincount(bins[part], weight[part], _NUM_BINS)
    return bins, masses


def _floor(keys: Floats, count: int) -> np.float32:
    """Return a bound that at least `count` keys reach, and few more.

    The maxima of n blocks are n keys. So the smallest of the `count` largest maxima is such a
    bound, and selecting among maxima is much faster than among all keys.
    """
    num_blocks = len(keys) // BLOCK
    if count > num_blocks:
        return np.partition(keys, len(keys) - count)[len(keys) - count]
    maxima = keys[: num_blocks * BLOCK].reshape(BLOCK, num_blocks).max(axis=0)
    return np.partition(maxima, num_blocks - count)[num_blocks - count]
