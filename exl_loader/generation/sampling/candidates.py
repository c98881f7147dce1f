"""The tokens that may still be drawn, and what every sampler needs to know about them.

A vocabulary has up to 256k tokens and a step takes a few milliseconds, so nothing sorts all of
it: what needs an order first selects the tokens that can matter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .rest import SUM_SLACK, Rest, Undecided
from .selection import largest_places
from .values import BLOCK, Floats, Ids, Mask, Places, total, weights

_HALF = np.float32(0.5)

# Copies of fewer candidates stay in memory that the process has already.
_MANY = 16_384


@dataclass(frozen=True, eq=False)
class Candidates:
    """Tokens that may still be drawn. No function changes its arrays.

    Args:
        ids: int64 [n]; rising where not `is_sorted`.
        logits: float32 [n]; -inf for impossible tokens.
        num_tokens: how many tokens the vocabulary has, those that were filtered out included.
        is_sorted: logits fall, equal ones by rising id.
        rest: others of which less is known; then all that are likelier than its bound are
            here, sorted, and what depends on the others raises `Undecided`. The first sampler
            that leaves tokens out leaves all of these out, or raises.
    """

    ids: Ids
    logits: Floats
    num_tokens: int
    is_sorted: bool = False
    rest: Rest | None = None

    @classmethod
    def of_row(cls, row: Floats) -> Candidates:
        """All tokens of a row of logits, float32 [vocab_size]."""
        return cls(_all_ids(len(row)), row, len(row))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, places: Places) -> Candidates:
        """Keep the candidates at these places, which stand in their present order."""
        return replace(self, ids=self.ids.take(places), logits=self.logits.take(places))

    def keep(self, mask: Mask) -> Candidates:
        """Keep the candidates that a mask, bool [n], names.

        Where most of many stay, the others become impossible instead of being left out: copying a
        vocabulary's ids takes fresh pages, which cost more than all the rest of a sampler.

        Of a rest nothing stays (`settle` comes before).
        """
        if self.rest is not None:
            return self.take(np.flatnonzero(mask)).without_rest()
        few = len(self) < _MANY or 2 * np.count_nonzero(mask) < len(self)
        if few or self.is_sorted:
            return self.take(np.flatnonzero(mask))
        # Infinity for those that stay and minus infinity for the others, without a branch.
        bounds = np.subtract(mask, _HALF)
        bounds *= np.float32(np.inf)
        return replace(self, logits=np.minimum(self.logits, bounds, out=bounds))

    def head(self, count: int) -> Candidates:
        """Keep the first candidates."""
        return replace(self, ids=self.ids[:count], logits=self.logits[:count])

    def keep_from(self, floor: float, highest: float | None = None) -> Candidates:
        """Keep the logits that reach `floor`, and the largest in any case.

        Args:
            highest: given where the floor is somewhere from `floor` to this.

        Raises:
            Undecided: it matters where, or some of the rest may reach it.
        """
        largest = self.logits.max()
        bound = min(np.float32(floor), largest)
        self.settle(bound)
        mask = self.logits >= bound
        if highest is not None and highest > floor:
            other = self.logits >= min(np.float32(highest), largest)
            if np.count_nonzero(other) != np.count_nonzero(mask):
                raise Undecided
        return self.keep(mask)

    def without_rest(self) -> Candidates:
        """These alone, as samplers would leave them of a whole row: with rising ids."""
        return self if self.rest is None else replace(self, rest=None).by_id()

    def settle(self, least: np.float32) -> None:
        """Check that nothing of the rest has a logit of `least` or more.

        Raises:
            Undecided: some may.
        """
        if self.rest is not None and not least > self.rest.bound:
            raise Undecided

    def totals(self, weight: Floats) -> tuple[float, float]:
        """Sum `weights` of these and of the rest: between which numbers it lies."""
        known = total(weight)
        if self.rest is None:
            return known, known
        low, high = self.rest.weight_range(float(self.logits.max()))
        return (known + low) * (1 - SUM_SLACK), (known + high) * (1 + SUM_SLACK)

    def by_id(self) -> Candidates:
        """The same with rising ids."""
        if not self.is_sorted:
            return self
        return replace(self.take(np.argsort(self.ids)), is_sorted=False)

    def locate(self, ids: Ids) -> tuple[Places, Mask]:
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

    def places_of(self, ids: Iterable[int]) -> Places:
        """Places of a few tokens, of those that are there."""
        wanted = np.fromiter(ids, np.int64)
        if self.is_sorted:
            return np.flatnonzero(np.isin(self.ids, wanted))
        return self.locate(wanted)[0]

    def with_logits(self, places: Places, values: Floats) -> Candidates:
        """Change the logits at these places of candidates that are not sorted."""
        assert not self.is_sorted
        logits = self.logits.copy()
        logits[places] = values
        return replace(self, logits=logits)


    def find(self, ids: Ids) -> tuple[Places, Places]:
        """Find the candidates, in whatever order, that are among many tokens.

        Returns:
            Their places, rising, and for each a place in `ids` where it stands.
        """
        if len(ids) and ids.max() >= self.num_tokens:
            ids = np.minimum(ids, self.num_tokens)
        # Places by token: what nothing was written to says something, and is found out below.
        place_of = np.empty(self.num_tokens + 1, np.uint32)
        place_of[ids] = np.arange(len(ids), dtype=np.uint32)
        at = np.minimum(place_of[self.ids], np.uint32(len(ids) - 1))
        places = np.flatnonzero(ids[at] == self.ids)
        return places, at[places]

    def reordered(self, logits: Floats) -> Candidates:
        """The same tokens with other logits, float32 [n], sorted."""
        order = np.argsort(-logits, kind="stable")
        falling = logits[order]
        if np.any(falling[1:] == falling[:-1]):
            order = np.lexsort((self.ids, -logits))
        return replace(self, ids=self.ids[order], logits=logits[order], is_sorted=True)


@functools.lru_cache(maxsize=8)
def _all_ids(count: int) -> Ids:
    ids = np.arange(count)
    ids.flags.writeable = False
    return ids


def log_totals(candidates: Candidates) -> tuple[float, float]:
    """`log_total` of these and of the rest: between which numbers it lies."""
    low, high = candidates.totals(weights(candidates.logits))
    return math.log(low), math.log(high)


def largest(candidates: Candidates, count: int) -> Candidates:
    """The `count` largest logits, of equal ones those with the lowest ids; sorted.

    Raises:
        Undecided: some of the rest may be among them.
    """
    if candidates.is_sorted:
        found = candidates.head(count)
    else:
        found = replace(
            candidates.take(largest_places(candidates.logits, count)), is_sorted=True
        )
    candidates.settle(found.logits[-1])
    return replace(found, rest=None)


def draw(candidates: Candidates, uniform: float) -> int:
    """Take the token at which the summed probability passes `uniform`, in [0, 1)."""
    weight = weights(candidates.logits)
    if len(weight) < BLOCK:
        place, _ = _pass(np.cumsum(weight, dtype=np.float64), uniform * float(weight.sum()))
        return int(candidates.ids[place])
    # Summed by blocks first: a running sum of a whole vocabulary would take a millisecond.
    whole = len(weight) // BLOCK * BLOCK
    blocks = weight[:whole].reshape(-1, BLOCK).sum(axis=1)
    reached = np.cumsum(np.append(blocks, weight[whole:].sum()), dtype=np.float64)
    block, rest = _pass(reached, uniform * reached[-1])
    first = block * BLOCK
    place, _ = _pass(np.cumsum(weight[first : first + BLOCK], dtype=np.float64), rest)
    return int(candidates.ids[first + place])


def _pass(reached: npt.NDArray[np.float64], target: float) -> tuple[int, float]:
    """Find where a running sum passes the target, and what of the target is left there."""
    # Rounding may lift the target to the whole sum: then the last place that adds to it.
    last = int(np.searchsorted(reached, reached[-1], side="left"))
    place = min(int(np.searchsorted(reached, target, side="right")), last)
    return place, target - float(reached[place - 1]) if place else target
