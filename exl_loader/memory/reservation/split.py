"""Splitting layers over devices, and the search for the most that fits. Integers only."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
# Bytes that a device needs for the layers from the first number up to the second, not
# included. More layers never need fewer bytes.
Costs = Callable[[int, int], int]


def split(
    costs: Sequence[Costs], budgets: Sequence[int], layers: range, takes_all: bool = True
) -> list[range]:
    """Assign layers to devices: each device in turn takes as many layers as fit.

    No other contiguous split in this order fits where this one does not, because every device
    before the last holds the most it can. The last device takes what is left, whether it fits
    or not, so that the shortfall is seen there.

    Args:
        costs: of each device, the bytes that a range of layers needs there. It is a function
            and no list because the workspace of a range is no sum over its layers.
        budgets: bytes that each device lends.
        layers: the layers to assign.
        takes_all: False for devices after which come those of another machine: the last device
            takes no more than fit either.

    Returns:
        The layers of each device, in order; an empty range for a device that holds none.
    """
    ranges: list[range] = []
    first, end = layers.start, layers.stop
    for cost, budget in zip(costs, budgets, strict=True):
        if not takes_all or len(ranges) < len(budgets) - 1:
            end = first + _most_layers(cost, budget, range(first, layers.stop))
        else:
            end = layers.stop
        ranges.append(range(first, end))
        first = end
    return ranges


def _most_layers(cost: Costs, budget: int, layers: range) -> int:
    def headroom(count: int) -> int:
        return budget - cost(layers.start, layers.start + count)

    return largest_fitting(headroom, len(layers))


def largest_fitting(headroom: Callable[[int], int], upper: int) -> int:
    """Find the largest count from 1 to `upper` with `headroom(count) >= 0`.

    Args:
        headroom: bytes left with so many. What does not fit never fits with more.
        upper: the largest count to consider.

    Returns:
        0 where not even one fits.
    """
    search = _search(upper)
    try:
        count = next(search)
        while True:
            count = search.send(headroom(count))
    except StopIteration as ended:
        found: int = ended.value
        return found


def _search(upper: int) -> Generator[int, int, int]:
    """Yield counts, each for its headroom, and return the largest that fits.

    Every layer, and every page, takes nearly the same bytes as the one before, so a straight
    line between two known points hits the answer almost at once. Headroom may jump at the answer,
    because what does not fit counts for one device and what fits for all. Therefore the steps in
    turn take the line between the nearest points on both sides, then the line through the two
    nearest points that do not fit, and then half of the interval, which bounds the search where
    no line hits.
    """
    low, high = 1, upper
    headroom_low = (yield low) if upper else -1
    if headroom_low < 0:
        return 0
    headroom_high = yield high
    if headroom_high >= 0:
        return high
    beyond, headroom_beyond = high, headroom_high
    steps = 0
    while high - low > 1:  # headroom(low) >= 0 > headroom(high) >= headroom(beyond)
        steps += 1
        guess = (low + high) // 2
        if steps % 3 == 2 and headroom_beyond < headroom_high:
            bytes_each = (headroom_high - headroom_beyond) / (beyond - high)
            guess = min(max(high + math.floor(headroom_high / bytes_each), low + 1), high - 1)
        elif steps % 3:
            guess = _on_line(low, high, headroom_low, headroom_high)
        left = yield guess
        if left >= 0:
            low, headroom_low = guess, left
        else:
            beyond, headroom_beyond = high, headroom_high
            high, headroom_high = guess, left
    return low


def _on_line(low: int, high: int, headroom_low: int, headroom_high: int) -> int:
    """Return the count between two at which a straight line of headroom ends."""
    guess = low + headroom_low * (high - low) // (headroom_low - headroom_high)
    return min(max(guess, low + 1), high - 1)


def largest_fitting_each(
    headrooms: Callable[[Mapping[Key, Sequence[int]]], Mapping[Key, Sequence[int]]],
    uppers: Mapping[Key, int],
) -> dict[Key, int]:
    """Search for several things at once, with as few questions as possible.

    A question, which may go to other machines, asks for several counts of every search that goes
    on: more are computed than `largest_fitting` needs, and far fewer are waited for.

    Args:
        headrooms: counts by key -> the bytes left with each.
        uppers: the largest count to consider, by key.

    Returns:
        By key what `largest_fitting` finds.
    """
    brackets = {key: _Bracket(upper) for key, upper in uppers.items()}
    while asked := {key: counts for key, one in brackets.items() if (counts := one.counts())}:
        for key, found in headrooms(asked).items():
            brackets[key].narrow(dict(zip(asked[key], found, strict=True)))
    return {key: one.low for key, one in brackets.items()}


class _Bracket:
    """The counts between which the answer of a search is.

    Args:
        upper: the largest count to consider.

    Attributes:
        low: the largest count that is known to fit; 0 before any.
    """

    def __init__(self, upper: int) -> None:
        self.low, self._high = 0, upper + 1
        self._known: dict[int, int] = {}

    def counts(self) -> tuple[int, ...]:
        """Return the counts to ask for next; none where the answer is known."""
        low, high = self.low, self._high
        if high - low <= 1:
            return ()
        if not self._known:
            return tuple(sorted({1, high - 1}))
        # Where the line does not hit, halves of counts or of their orders of magnitude bound the
        # search. The neighbour of a hit ends it.
        guesses = {(low + high) // 2, math.isqrt(low * high)}
        if low in self._known and high in self._known:
            line = _on_line(low, high, self._known[low], self._known[high])
            guesses |= {line, line + 1}
        return tuple(sorted(guess for guess in guesses if low < guess < high))

    def narrow(self, headrooms: Mapping[int, int]) -> None:
        """Take the headroom of the counts that were asked for."""
        self._known |= headrooms
        fitting = [count for count, left in headrooms.items() if left >= 0]
        self.low = max([self.low, *fitting])
        self._high = min([self._high, *headrooms.keys() - fitting])


@dataclass(frozen=True)
class Work:
    """What machines do in a step, in bytes that they read.

    Args:
        layers: of the first n layers together, for every n from 0.
        ends: of what the first machine has besides layers.
    """

    layers: tuple[int, ...]
    ends: int

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers) - 1


def even_split(
    work: Work, speeds: Sequence[int], ends: Sequence[Sequence[int]] | None = None
) -> list[range] | None:
    """Split layers over machines so that the slowest one takes as little time as possible.

    While a machine runs its layers of one pass, the others run theirs of other passes. So the
    slowest machine decides how many passes end in a second. Of splits with the same slowest one,
    that is taken in which the first machine has the fewest layers, because it also draws tokens,
    and the layers after these are split by the same rule.

    Args:
        speeds: work that each machine does in a unit of time.
        ends: for each machine and each first layer from 0, the end of the layers that fit there;
            later first layers never have earlier ends. None where all layers fit everywhere.

    Returns:
        The layers of each machine, in order: at least one for the first machine, and an empty
        range for a machine that holds none. None where no split fits.
    """
    if ends is None:
        ends = [(work.num_layers,) * work.num_layers] * len(speeds)
    ranges: list[range] = []
    start = 0
    for place in range(len(speeds)):
        end = _fewest_layers(start, work, speeds[place:], ends[place:])
        if end is None:
            return None
        ranges.append(range(start, end))
        # What is left of the work has no ends.
        start, work = end, Work(work.layers, 0)
    return ranges


def _fewest_layers(
    start: int, work: Work, speeds: Sequence[int], ends: Sequence[Sequence[int]]
) -> int | None:
    """Return the end of the first machine's layers in the best split of those from `start` on."""
    low, high = 0, work.ends + work.layers[-1]
    found = _end_within(high, start, work, speeds, ends)
    while found is not None and low < high:
        time = (low + high) // 2
        end = _end_within(time, start, work, speeds, ends)
        if end is None:
            low = time + 1
        else:
            found, high = end, time
    return found


def _end_within(
    time: int, start: int, work: Work, speeds: Sequence[int], ends: Sequence[Sequence[int]]
) -> int | None:
    """Return the end of the first machine's layers where those after it take the most they can.

    Returns:
        None where a machine would need more than `time`, or the layers do not fit.
    """
    layers, end = work.layers, work.num_layers
    # Layer 0 stays on the first machine.
    least = max(1, start)
    for speed, own_ends in zip(speeds[:0:-1], ends[:0:-1], strict=True):
        end = least + bisect_left(
            range(least, end), True,
            key=lambda first, end=end, speed=speed, own_ends=own_ends: (  # type: ignore[misc]
                own_ends[first] >= end and layers[end] - layers[first] <= time * speed
            ),
        )
    fits = end == start or ends[0][start] >= end
    is_quick = work.ends + layers[end] - layers[start] <= time * speeds[0]
    return end if fits and is_quick else None
