"""The tokens that may still be drawn, and what every sampler needs to know about them.

A vocabulary has up to 256k tokens and a step takes a few milliseconds, so nothing sorts all of
it: what needs an order first selects the tokens that can matter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Places = npt.NDArray[np.intp]

# Where the number of tokens that matter is unknown, so many are ordered first, then so many
# times more.
_FIRST_COUNT = 256
_COUNT_GROWTH = 8

# A row is looked at in blocks of so many tokens before single ones.
_BLOCK = 64

# exp of anything below is 0 in float32; an impossible token's -inf is lifted to this where
# it would be multiplied by its probability.
_LOWEST = np.float32(-200)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Tokens that may still be drawn. No function changes its arrays.

    Args:
        ids: int64 [n]; rising where not `is_sorted`.
        logits: float32 [n]; -inf for impossible tokens.
        num_tokens: how many tokens the vocabulary has, those that were filtered out included.
        is_sorted: logits fall, equal ones by rising id.
    """

    ids: Ids
    logits: Floats
    num_tokens: int
    is_sorted: bool = False

    @classmethod
    def of_row(cls, row: Floats) -> Candidates:
        """All tokens of a row of logits, float32 [vocab_size]."""
        return cls(_all_ids(len(row)), row, len(row))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, places: Places) -> Candidates:
        """Keep the candidates at these places, which stand in their present order."""
        return replace(self, ids=self.ids[places], logits=self.logits[places])

    def head(self, count: int) -> Candidates:
        """Keep the first candidates."""
        return replace(self, ids=self.ids[:count], logits=self.logits[:count])

    def keep_from(self, floor: float) -> Candidates:
        """Keep the logits that reach `floor`, and the largest in any case."""
        bound = min(np.float32(floor), self.logits.max())
        return self.take(np.flatnonzero(self.logits >= bound))

    def by_id(self) -> Candidates:
        """The same with rising ids."""
        if not self.is_sorted:
            return self
        return replace(self.take(np.argsort(self.ids)), is_sorted=False)

    def locate(self, ids: Ids) -> tuple[Places, npt.NDArray[np.bool_]]:
        """Find tokens among candidates that are not sorted.

        Returns:
            The places of those that are there, and bool [len(ids)] which those are.
        """
        assert not self.is_sorted
        if len(self) == self.num_tokens:
            found = (ids >= 0) & (ids < self.num_tokens)
            return ids[found], found
        places = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        found = self.ids[places] == ids
        return places[found], found

    def with_logits(self, places: Places, values: Floats) -> Candidates:
        """Change the logits at these places of candidates that are not sorted."""
        assert not self.is_sorted
        logits = self.logits.copy()
        logits[places] = values
        return replace(self, logits=logits)


@functools.lru_cache(maxsize=8)
def _all_ids(count: int) -> Ids:
    ids = np.arange(count)
    ids.flags.writeable = False
    return ids


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


def entropy(logits: Floats) -> float:
    """Entropy of the distribution, in nats."""
    shifted = np.maximum(logits - logits.max(), _LOWEST)
    weight = np.exp(shifted)
    whole = total(weight)
    return max(0.0, math.log(whole) - total(np.multiply(weight, shifted, out=shifted)) / whole)


def largest_places(keys: Floats, count: int) -> Places:
    """Places of the `count` largest keys, falling, equal ones in their order."""
    if count >= len(keys):
        return np.argsort(-keys, kind="stable")
    places = np.flatnonzero(keys >= _floor(keys, count))
    return places[np.argsort(-keys[places], kind="stable")[:count]]


def largest(candidates: Candidates, count: int) -> Candidates:
    """The `count` largest logits, of equal ones those with the lowest ids; sorted."""
    if candidates.is_sorted:
        return candidates.head(count)
    return replace(candidates.take(largest_places(candidates.logits, count)), is_sorted=True)


def growing_counts(limit: int, first: int = _FIRST_COUNT) -> Iterator[int]:
    """How many tokens to order, until they are enough: the last count is `limit`."""
    count = first
    while count < limit:
        yield count
        count *= _COUNT_GROWTH
    yield limit


def _floor(keys: Floats, count: int) -> np.float32:
    """A bound that at least `count` keys reach, and not many more.

    The maxima of `count` blocks are `count` keys, so the smallest of the largest `count`
    maxima is such a bound; selecting among the maxima is far cheaper than among all.
    """
    num_blocks = len(keys) // _BLOCK
    if count > num_blocks:
        return np.partition(keys, len(keys) - count)[len(keys) - count]
    maxima = keys[: num_blocks * _BLOCK].reshape(_BLOCK, num_blocks).max(axis=0)
    return np.partition(maxima, num_blocks - count)[num_blocks - count]


def draw(candidates: Candidates, uniform: float) -> int:
    """Take the token at which the summed probability passes `uniform`, in [0, 1)."""
    weight = weights(candidates.logits)
    # Summed by blocks first: a running sum of a whole vocabulary would take a millisecond.
    whole = len(weight) // _BLOCK * _BLOCK
    blocks = weight[:whole].reshape(-1, _BLOCK).sum(axis=1)
    reached = np.cumsum(np.append(blocks, weight[whole:].sum()), dtype=np.float64)
    block, rest = _pass(reached, uniform * reached[-1])
    first = block * _BLOCK
    place, _ = _pass(np.cumsum(weight[first : first + _BLOCK], dtype=np.float64), rest)
    return int(candidates.ids[first + place])


def _pass(reached: npt.NDArray[np.float64], target: float) -> tuple[int, float]:
    """Find where a running sum passes the target, and what of the target is left there."""
    # Rounding may lift the target to the whole sum: then the last place that adds to it.
    last = int(np.searchsorted(reached, reached[-1], side="left"))
    place = min(int(np.searchsorted(reached, target, side="right")), last)
    return place, target - float(reached[place - 1]) if place else target
