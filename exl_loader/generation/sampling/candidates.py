"""The tokens that may still be drawn, and the draw.

A vocabulary has up to 256,000 tokens and a step takes a few milliseconds, so nothing sorts all
of it: a sampler that needs an order first selects the tokens that can matter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..forward_model import TopLogits
from .numerics import (
    BLOCK,
    Floats,
    Ids,
    Indices,
    Mask,
    fewest_reaching,
    largest_indices,
    total,
    weights,
)
from .tail import Tail, require_same

_HALF = np.float32(0.5)

# Copies of fewer candidates fit into memory that the process already has.
_MANY = 16_384


@dataclass(frozen=True, eq=False)
class Candidates:
    """Tokens that may still be drawn. No function changes its arrays.

    Args:
        ids: int64 [n]; rising unless `is_sorted`.
        logits: float32 [n]; -inf for impossible tokens.
        num_tokens: size of the vocabulary, tokens that were filtered out included.
        is_sorted: logits fall, equal ones by rising id.
        tail: the other tokens of a row of which only the top logits are known. Then the
            candidates are sorted, all tokens with larger logits than the tail's bound are among
            them, and whatever needs more raises `Undecided`. The first sampler that removes
            tokens removes the whole tail, or raises.
    """

    ids: Ids
    logits: Floats
    num_tokens: int
    is_sorted: bool = False
    tail: Tail | None = None

    @classmethod
    def from_row(cls, row: Floats) -> Candidates:
        """Take all tokens of a row of logits, float32 [vocab_size]."""
        return cls(_all_ids(len(row)), row, len(row))

    @classmethod
    def from_top_logits(cls, top: TopLogits) -> Candidates:
        """Take the tokens with the largest logits; the others are the tail."""
        tail = Tail.from_weight_sum(
            top.vocab_size - len(top.ids), top.logits[-1], float(top.logits[0]), top.weight_sum
        )
        return cls(top.ids, top.logits, top.vocab_size, is_sorted=True, tail=tail)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Indices) -> Candidates:
        """Keep the candidates at these indices, which are in their present order."""
        return replace(self, ids=self.ids.take(indices), logits=self.logits.take(indices))

    def keep(self, mask: Mask) -> Candidates:
        """Keep the candidates that a mask, bool [n], marks, and nothing of the tail.

        If most of many are kept, the others become impossible instead of being removed, because
        a copy of a vocabulary's ids needs fresh pages of memory, which take longer than the
        sampler itself. Callers check the tail with `require_tail_below` first.
        """
        if self.tail is not None:
            return self.take(np.flatnonzero(mask)).without_tail()
        few = len(self) < _MANY or 2 * np.count_nonzero(mask) < len(self)
        if few or self.is_sorted:
            return self.take(np.flatnonzero(mask))
        # Infinity for tokens that are kept and minus infinity for the others, without a branch.
        bounds = np.subtract(mask, _HALF)
        bounds *= np.float32(np.inf)
        return replace(self, logits=np.minimum(self.logits, bounds, out=bounds))

    def head(self, count: int) -> Candidates:
        """Keep the first `count` candidates."""
        return replace(self, ids=self.ids[:count], logits=self.logits[:count])

    def keep_from(self, floor: float, highest: float | None = None) -> Candidates:
        """Keep logits of at least `floor`, and the largest one in any case.

        Args:
            highest: if given, the floor is only known to be between `floor` and this.

        Raises:
            Undecided: the result depends on where, or the tail may contain such a logit.
        """
        largest = self.logits.max()
        bound = min(np.float32(floor), largest)
        self.require_tail_below(bound)
        mask = self.logits >= bound
        if highest is not None and highest > floor:
            other = self.logits >= min(np.float32(highest), largest)
            require_same(int(np.count_nonzero(mask)), int(np.count_nonzero(other)))
        return self.keep(mask)

    def without_tail(self) -> Candidates:
        """Drop the tail and sort by id, as samplers would leave the candidates of a whole row."""
        return self if self.tail is None else replace(self, tail=None).by_id()

    def require_tail_below(self, least: np.float32) -> None:
        """Check that the tail contains no logit of `least` or more.

        Raises:
            Undecided: it may contain one.
        """
        if self.tail is not None:
            self.tail.require_below(least)

    def totals(self, weight: Floats) -> tuple[float, float]:
        """Return an interval that contains the sum of weights over candidates and tail.

        Args:
            weight: `weights(self.logits)`.
        """
        known = total(weight)
        if self.tail is None:
            return known, known
        return self.tail.add_to(known, float(self.logits.max()))

    def by_id(self) -> Candidates:
        """Return the same candidates by rising id."""
        if not self.is_sorted:
            return self
        return replace(self.take(np.argsort(self.ids)), is_sorted=False)

    def locate(self, ids: Ids) -> tuple[Indices, Mask]:
        """Find tokens among candidates that are not sorted.

        Returns:
            The indices of the tokens that are candidates, and a mask, bool [len(ids)], of them.
        """
        assert not self.is_sorted
        if len(self) == self.num_tokens:
            found = (ids >= 0) & (ids < self.num_tokens)
            return ids[found], found
        indices = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        found = self.ids[indices] == ids
        return indices[found], found

    def indices_of(self, ids: Iterable[int]) -> Indices:
        """Return the indices of those of a few tokens that are candidates."""
        wanted = np.fromiter(ids, np.int64)
        if self.is_sorted:
            return np.flatnonzero(np.isin(self.ids, wanted))
        return self.locate(wanted)[0]

    def with_logits(self, indices: Indices, values: Floats) -> Candidates:
        """Replace the logits at these indices of candidates that are not sorted."""
        assert not self.is_sorted
        logits = self.logits.copy()
        logits[indices] = values
        return replace(self, logits=logits)

    def find(self, ids: Ids) -> tuple[Indices, Indices]:
        """Find the candidates, in any order, that are among many tokens.

        Returns:
            Their indices, rising, and for each one an index in `ids` with the same token.
        """
        if len(ids) and ids.max() >= self.num_tokens:
            ids = np.minimum(ids, self.num_tokens)
        # Index by token. Uninitialised entries hold any index; the comparison below finds them.
        index_of = np.empty(self.num_tokens + 1, np.uint32)
        index_of[ids] = np.arange(len(ids), dtype=np.uint32)
        at = np.minimum(index_of[self.ids], np.uint32(len(ids) - 1))
        indices = np.flatnonzero(ids[at] == self.ids)
        return indices, at[indices]

    def reordered(self, logits: Floats) -> Candidates:
        """Return the same tokens with other logits, float32 [n], sorted."""
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
    """Return an interval that contains `log_total` of candidates and tail."""
    low, high = candidates.totals(weights(candidates.logits))
    return math.log(low), math.log(high)


def largest(candidates: Candidates, count: int) -> Candidates:
    """Keep the `count` largest logits, of equal ones those with the lowest ids; sorted.

    Raises:
        Undecided: the tail may contain one of them.
    """
    if candidates.is_sorted:
        found = candidates.head(count)
    else:
        found = replace(
            candidates.take(largest_indices(candidates.logits, count)), is_sorted=True
        )
    candidates.require_tail_below(found.logits[-1])
    return replace(found, tail=None)


def draw(candidates: Candidates, uniform: float, skew: float = 0.0) -> int:
    """Draw a token.

    Without a skew it is the first one at which the summed probability exceeds `uniform`. With one
    the probabilities are summed from the largest to the smallest, of equal ones by rising id, and
    the token is the first at which the sum reaches uniform^(e^-skew), as in exllamav2. So a token
    whose sum is c, and c' before it, is drawn with the probability c^(e^skew) - c'^(e^skew).

    Args:
        candidates: at least one of them is possible.
        uniform: a random number in [0, 1).
        skew: above 0 favours unlikely tokens, below 0 likely ones.
    """
    weight = weights(candidates.logits)
    if skew:
        return _draw_by_rank(candidates, weight, uniform ** math.exp(-skew))
    if len(weight) < BLOCK:
        index, _ = _first_above(np.cumsum(weight, dtype=np.float64), uniform * float(weight.sum()))
        return int(candidates.ids[index])
    # Summed by blocks first, because a running sum of a whole vocabulary takes a millisecond.
    whole = len(weight) // BLOCK * BLOCK
    blocks = weight[:whole].reshape(-1, BLOCK).sum(axis=1)
    sums = np.cumsum(np.append(blocks, weight[whole:].sum()), dtype=np.float64)
    block, remaining = _first_above(sums, uniform * sums[-1])
    first = block * BLOCK
    inner = np.cumsum(weight[first : first + BLOCK], dtype=np.float64)
    index, _ = _first_above(inner, remaining)
    return int(candidates.ids[first + index])


def _draw_by_rank(candidates: Candidates, weight: Floats, share: float) -> int:
    """Return the token at which the falling weights together reach a share of their sum."""
    logits = candidates.logits
    # The key and the number of keys up to it determine the token without sorting all of them,
    # because equal keys have equal weights.
    key, count = fewest_reaching(logits, weight, share * total(weight))
    possible = weight > 0
    if not possible[logits == key].any():
        # Rounding may raise the target above the sum.
        key, count = logits[possible].min(), int(np.count_nonzero(possible))
    num_larger = int(np.count_nonzero(logits > key))
    return int(candidates.ids[np.flatnonzero(logits == key)[count - num_larger - 1]])


def _first_above(sums: npt.NDArray[np.float64], target: float) -> tuple[int, float]:
    """Find the first running sum above the target; also return the target minus the sum before."""
    # Rounding may raise the target to the whole sum. Then it is the last index that adds to it.
    last = int(np.searchsorted(sums, sums[-1], side="left"))
    index = min(int(np.searchsorted(sums, target, side="right")), last)
    return index, target - float(sums[index - 1]) if index else target
