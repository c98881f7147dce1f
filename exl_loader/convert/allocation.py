"""Choose a mix for each block so that the sum of errors is the smallest within a budget.

This is the multiple-choice knapsack problem, which is solved exactly (Kellerer, Pferschy, Pisinger,
Knapsack Problems, 2004, chapter 11). Its relaxation has a price per bit. At that price each option
costs error + price * size, and an option's *regret* is how much more it costs than the cheapest
option of its block. The regrets of the best choice cannot add up to more than the gap between the
relaxation and any known choice. That leaves few options, and dynamic programming over the blocks
tries all of their combinations, without those that another combination beats in size and error.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..utils.errors import InvalidSettings

# Relative to the sum of errors: differences below it are rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Option:
    """One way to store a block.

    Args:
        size: bits in the file.
        error: what it adds to the sum.
    """

    size: int
    error: float


@dataclass
class _States:
    """Combinations of options of the first blocks, by rising size and falling error.

    Args:
        sizes: int64 [S].
        regrets: float64 [S], sums of regrets.
        parents: int64 [S], the state of one block less that each comes from.
        options: int64 [S], the option of the last block.
    """

    sizes: np.ndarray
    regrets: np.ndarray
    parents: np.ndarray
    options: np.ndarray


def allocate(blocks: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Choose an option for each block.

    Args:
        blocks: the options of each block, in any order.
        budget: most bits of all blocks together.

    Returns:
        The index of the chosen option of each block.

    Raises:
        InvalidSettings: the smallest options exceed the budget.
    """
    least = sum(min(option.size for option in options) for options in blocks)
    if least > budget:
        raise InvalidSettings(
            "bits of all layers", expected=f"at least {least}, the smallest that was measured",
            actual=budget, remedy="Ask for more bits",
        )
    ladders = [efficient(options) for options in blocks]
    chosen, price = _greedy(blocks, ladders, budget)
    return _improve(blocks, chosen, price, budget)


def efficient(options: Sequence[Option]) -> list[int]:
    """Return the options on the lower convex hull of error over size, smallest first.

    Each step from one to the next reduces the error by less per bit than the step before it.
    """
    hull: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i].size, options[i].error)):
        option = options[index]
        if hull and option.error >= options[hull[-1]].error:
            continue
        while len(hull) >= 2 and (
            gain(options[hull[-2]], options[hull[-1]]) <= gain(options[hull[-2]], option)
        ):
            hull.pop()
        hull.append(index)
    return hull


def gain(smaller: Option, larger: Option) -> float:
    """Return the reduction of the error per additional bit."""
    return (smaller.error - larger.error) / (larger.size - smaller.size)


def _greedy(
    blocks: Sequence[Sequence[Option]], ladders: Sequence[Sequence[int]], budget: int
) -> tuple[list[int], float]:
    """Take the best gain per bit while the budget lasts.

    Returns:
        The options, and the price per bit of the relaxation: the gain of the first step that the
        budget does not hold; 0 where it holds all of them.
    """
    at = [0] * len(blocks)
    left = budget - sum(
        options[ladder[0]].size for options, ladder in zip(blocks, ladders, strict=True)
    )
    price = 0.0
    steps: list[tuple[float, int]] = []

    def offer(block: int) -> None:
        ladder, options = ladders[block], blocks[block]
        if at[block] + 1 < len(ladder):
            pair = options[ladder[at[block]]], options[ladder[at[block] + 1]]
            heapq.heappush(steps, (-gain(*pair), block))

    for block in range(len(blocks)):
        offer(block)
    while steps:
        negative_gain, block = heapq.heappop(steps)
        ladder, options = ladders[block], blocks[block]
        cost = options[ladder[at[block] + 1]].size - options[ladder[at[block]]].size
        if cost > left:
            price = price or -negative_gain
            continue
        left -= cost
        at[block] += 1
        offer(block)
    return [ladder[index] for ladder, index in zip(ladders, at, strict=True)], price


def _improve(
    blocks: Sequence[Sequence[Option]], chosen: list[int], price: float, budget: int
) -> list[int]:
    """Return the best choice, given a good one and the price of the relaxation."""
    costs = [np.array([o.error + price * o.size for o in options]) for options in blocks]
    sizes = [np.array([o.size for o in options]) for options in blocks]
    known = sum(options[i].error for options, i in zip(blocks, chosen, strict=True))
    bound = sum(float(cost.min()) for cost in costs) - price * budget
    gap = known - bound + _ROUNDING * abs(known)
    stages: list[_States] = []
    nothing = np.zeros(1, dtype=np.int64)
    states = _States(nothing, np.zeros(1), nothing, nothing)
    for cost, size in zip(costs, sizes, strict=True):
        regret = cost - cost.min()
        states = _extend(states, np.flatnonzero(regret <= gap), regret, size, price, gap)
        stages.append(states)
    errors = states.regrets - price * states.sizes
    errors[states.sizes > budget] = np.inf
    best, found = int(errors.argmin()), []
    for states in reversed(stages):
        found.append(int(states.options[best]))
        best = int(states.parents[best])
    return found[::-1]


def _extend(
    states: _States, options: np.ndarray, regret: np.ndarray, size: np.ndarray, price: float,
    gap: float,
) -> _States:
    """Combine states with the options of one more block, and drop what cannot be the best."""
    regrets = states.regrets[:, None] + regret[options]
    sizes = states.sizes[:, None] + size[options]
    state, option = np.nonzero(regrets <= gap)
    regrets, sizes = regrets[state, option], sizes[state, option]
    errors = regrets - price * sizes
    order = np.lexsort((errors, sizes))
    errors = errors[order]
    # Of rising sizes only those whose error is below that of all smaller ones.
    best_before = np.minimum.accumulate(np.concatenate(([np.inf], errors[:-1])))
    kept = order[errors < best_before]
    return _States(sizes[kept], regrets[kept], state[kept], options[option[kept]])
