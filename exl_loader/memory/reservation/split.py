"""Splitting layers over devices, and the search for the most that fits. Integers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Bytes that a device needs for the layers from the first number up to the second, not
# included. More layers never need fewer bytes.
Costs = Callable[[int, int], int]


def split(costs: Sequence[Costs], budgets: Sequence[int], num_layers: int) -> list[range]:
    """Assign layers to devices: each device in turn takes as many layers as fit.

    No other contiguous split in this order fits where this one does not, because every device
    before the last holds the most it can. The last device takes what is left, whether it fits
    or not, so that the shortfall is seen there.

    Args:
        costs: of each device, the bytes that a range of layers needs there. It is a function
            and no list because the workspace of a range is no sum over its layers.
        budgets: bytes that each device lends.
        num_layers: layers to assign.

    Returns:
        The layers of each device, in order; an empty range for a device that holds none.
    """
    ranges: list[range] = []
    first = 0
    for cost, budget in zip(costs, budgets, strict=True):
        is_last = len(ranges) == len(budgets) - 1
        end = num_layers if is_last else first + _most_layers(cost, budget, first, num_layers)
        ranges.append(range(first, end))
        first = end
    return ranges


def _most_layers(cost: Costs, budget: int, first: int, num_layers: int) -> int:
    def headroom(count: int) -> int:
        return budget - cost(first, first + count)

    return largest_fitting(headroom, num_layers - first)


def largest_fitting(headroom: Callable[[int], int], upper: int) -> int:
    """Find the largest count from 1 to `upper` with `headroom(count) >= 0`.

    Every layer, and every page, takes nearly the same bytes as the one before, so a straight
    line between two known points hits the answer almost at once. Every third step halves the
    interval instead, which bounds the search where the line does not hit.

    Args:
        headroom: bytes left with so many. What does not fit never fits with more.
        upper: the largest count to consider.

    Returns:
        0 where not even one fits.
    """
    low, high = 1, upper
    headroom_low = headroom(low) if upper else -1
    if headroom_low < 0:
        return 0
    headroom_high = headroom(high)
    if headroom_high >= 0:
        return high
    steps = 0
    while high - low > 1:  # headroom(low) >= 0 > headroom(high)
        steps += 1
        if steps % 3:
            guess = low + headroom_low * (high - low) // (headroom_low - headroom_high)
        else:
            guess = (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        left = headroom(guess)
        if left >= 0:
            low, headroom_low = guess, left
        else:
            high, headroom_high = guess, left
    return low
