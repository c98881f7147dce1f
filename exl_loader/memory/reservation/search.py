"""The most that fits, by calculation: layers on a device, pages in a cache."""

from __future__ import annotations

from collections.abc import Callable


def largest_fitting(spare: Callable[[int], int], upper: int) -> int:
    """Find the largest count from 1 to `upper` with `spare(count) >= 0`.

    Every layer, and every page, takes nearly the same bytes as the one before, so a straight
    line between two known points hits the answer almost at once; halving every third time
    bounds the search where it does not.

    Args:
        spare: bytes left with so many; what does not fit never fits again with more.
        upper: most to consider.

    Returns:
        0 where not even one fits.
    """
    low, high = 1, upper
    spare_low = spare(low) if upper else -1
    if spare_low < 0:
        return 0
    spare_high = spare(high)
    if spare_high >= 0:
        return high
    steps = 0
    while high - low > 1:  # spare(low) >= 0 > spare(high)
        steps += 1
        if steps % 3:
            guess = low + spare_low * (high - low) // (spare_low - spare_high)
        else:
            guess = (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        left = spare(guess)
        if left >= 0:
            low, spare_low = guess, left
        else:
            high, spare_high = guess, left
    return low
