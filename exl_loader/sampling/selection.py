"""Finds the largest of many values without putting all of them in order."""

from __future__ import annotations

import numpy as np

from .values import BLOCK, Floats, Mask, Places, reached_at, total

# Where the number of tokens that matter is unknown, so many are ordered first: enough for
# nearly every step of a model that knows what it says.
_FIRST_COUNT = 256

# Else that many are ordered in the end, and of more about so many are looked at, to guess where
# among all of them a sum is reached. The guess is off by about 16, half the square root; four times
# that to either side are taken, and an eighth of the tokens is left.
_FEW = 1024
_SAMPLE = 1024
_MARGIN = 64


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
        first = weight[places]
        if first_count == len(keys) or total(first) >= target:
            last = min(reached_at(first, target), first_count - 1)
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
    num_before, halve = 0, False
    while len(keys) > _FEW:
        least, most = _guess(keys, weight, target, halve)
        above = keys > most
        sum_above = total(np.multiply(weight, above))
        if sum_above >= target:
            places = np.flatnonzero(above)
        else:
            reaches = keys >= least
            places = np.flatnonzero(reaches ^ above)
            sum_between = total(weight[places])
            num_before += int(np.count_nonzero(above))
            target -= sum_above
            if sum_between < target and not reaches.all():
                num_before += len(places)
                target -= sum_between
                places = np.flatnonzero(~reaches)
            elif least == most:
                return keys[places], weight[places], num_before, target
        # Where most are equal or the guess is bad, a single key tells all others apart.
        halve = 2 * len(places) > len(keys)
        keys, weight = keys[places], weight[places]
    return keys, weight, num_before, target


def _guess(
    keys: Floats, weight: Floats, target: float, halve: bool
) -> tuple[np.float32, np.float32]:
    """Two keys, between which the sum of the largest ones' weights may reach the target.

    Args:
        halve: return twice the same key in the middle of all instead.
    """
    step = -(-len(keys) // _SAMPLE)
    sample, share = keys[::step], weight[::step]
    order = np.argsort(-sample)
    if halve:
        ends = np.full(2, len(order) // 2)
    else:
        # As a share of the sample's own sum: it may hold none of a few heavy ones.
        whole = float(weight.sum())
        place = reached_at(share[order], target / whole * total(share)) if whole > 0 else 0
        ends = np.clip((place + _MARGIN, place - _MARGIN), 0, len(order) - 1)
    least, most = sample[order[ends]]
    return least, most


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
