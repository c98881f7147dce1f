"""Finds the largest of many values without putting all of them in order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .values import BLOCK, Floats, Mask, Places, reached_at

# Where the number of tokens that matter is unknown, so many are ordered first: enough for
# nearly every step of a model that knows what it says.
_FIRST_COUNT = 256

# Else that many are ordered in the end, and keys are told apart by so many bins before. Keys
# further from the largest than the span, where probabilities are below 1e-13 of the likeliest
# one's, share the last bin.
_FEW = 1024
_NUM_BINS = 4096
_BIN_SPAN = 30.0
_CHUNK = 32_768
_TINY = 1e-30


def largest_places(keys: Floats, count: int) -> Places:
    """Places of the `count` largest keys, falling, equal ones in their order."""
    if count >= len(keys):
        return np.argsort(-keys, kind="stable")
    floor = _floor(keys, count)
    places = np.flatnonzero(keys > floor)
    places = places[np.argsort(-keys[places], kind="stable")[:count]]
    if len(places) < count:
        # As many as a vocabulary may equal it, and need no order.
        places = np.append(places, np.flatnonzero(keys == floor)[: count - len(places)])
    return places


def largest_values(values: Floats, count: int) -> Floats:
    """The `count` largest values, falling."""
    if count < len(values):
        values = values[values >= _floor(values, count)]
    return np.sort(values)[::-1][:count]


def fewest(keys: Floats, weight: Floats, target: float) -> tuple[np.float32, int]:
    """Find the fewest largest keys whose weights sum to `target` or more.

    Args:
        keys: float32 [n]; equal ones count in any order.
        weight: float32 [n].

    Returns:
        The least of these keys, and how many they are: at least one, and all where the weights
        sum to less than the target.
    """
    first_count = min(_FIRST_COUNT, len(keys))
    if first_count == len(keys) or first_count * float(weight.max()) >= target:
        places = largest_places(keys, first_count)
        reached = np.cumsum(weight[places], dtype=np.float64)
        if first_count == len(keys) or reached[-1] >= target:
            last = min(int(np.searchsorted(reached, target, side="left")), first_count - 1)
            return keys[places[last]], last + 1
    keys, weight, num_before, target = _narrowed(keys, weight, target)
    if len(keys) <= _FEW:
        # Equal ones in any order: it is a key that is found, and how many are before it.
        order = np.argsort(-keys)
        keys, weight = keys[order], weight[order]
    last = min(reached_at(weight, target), len(keys) - 1)
    return keys[last], num_before + last + 1


def counts_reaching(falling: Floats, *targets: float) -> list[int]:
    """How many weights, the first ones of `falling`, sum to each target or more; as `fewest`."""
    reached = np.cumsum(falling, dtype=np.float64)
    counts: list[int] = np.searchsorted(reached, targets, side="left").tolist()
    return [min(count + 1, len(falling)) for count in counts]


def at_least(keys: Floats, floor: np.float32, count: int) -> Mask:
    """Which `count` keys reach the floor, of those that equal it the first; bool [n]."""
    mask = keys >= floor
    surplus = np.count_nonzero(mask) - count
    if surplus > 0:
        mask[np.flatnonzero(keys == floor)[-surplus:]] = False
    return mask


def _narrowed(
    keys: Floats, weight: Floats, target: float
) -> tuple[Floats, Floats, int, float]:
    """Leave keys out until `_FEW` are left or equal ones, among which is the last that is kept.

    Returns:
        Those, in their order, and their weights; how many larger ones there are, and what of the
        target is left for these.
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
        places = np.flatnonzero(bins == last)
        keys, weight = keys[places], weight[places]
    return keys, weight, num_before, target


def _binned(
    keys: Floats, weight: Floats, least: np.float32, most: np.float32
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float64]]:
    """The bin of each key, `most` in bin 0 and `least` in another; the weight in each."""
    # A difference of Python floats: it cannot overflow, and an impossible token's is infinite.
    span = min(float(most) - float(least), _BIN_SPAN)
    scale = np.float32((_NUM_BINS - 1) / max(span, _TINY))
    with np.errstate(over="ignore"):
        distance = most - keys
    np.minimum(distance, np.float32(span), out=distance)
    bins = np.multiply(distance, scale, out=distance).astype(np.int16)
    masses = np.zeros(_NUM_BINS)
    # In chunks, so that the wide types that bincount computes with stay in the caches.
    for first in range(0, len(keys), _CHUNK):
        part = slice(first, first + _CHUNK)
        masses += np.bincount(bins[part], weight[part], _NUM_BINS)
    return bins, masses


def _floor(keys: Floats, count: int) -> np.float32:
    """A bound that at least `count` keys reach, and not many more.

    The maxima of `count` blocks are `count` keys, so the smallest of the largest `count`
    maxima is such a bound; selecting among the maxima is far cheaper than among all.
    """
    num_blocks = len(keys) // BLOCK
    if count > num_blocks:
        return np.partition(keys, len(keys) - count)[len(keys) - count]
    maxima = keys[: num_blocks * BLOCK].reshape(BLOCK, num_blocks).max(axis=0)
    return np.partition(maxima, num_blocks - count)[num_blocks - count]
