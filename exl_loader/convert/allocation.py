"""Choose the bit widths of layers for a requested average, by measured errors."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..utils.errors import InvalidSettings


@dataclass(frozen=True)
class Option:
    """One way to store a layer.

    Args:
        bits: bits of a code.
        group_size: rows that share a scale.
        stored_bits: bits in the file, including scales and tables.
        error: error of the layer, in any additive measure.
    """

    bits: int
    group_size: int
    stored_bits: int
    error: float


def efficient_options(options: Sequence[Option]) -> list[Option]:
    """Keep the options on the lower convex hull of error over size, smallest first.

    The remaining options have falling errors and falling gains per bit, so that taking the best
    gain per bit first is the right order.
    """
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.stored_bits, o.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) >= 2 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(smaller: Option, larger: Option) -> float:
    """Return the reduction of the error per additional bit."""
    spent = larger.stored_bits - smaller.stored_bits
    return (smaller.error - larger.error) / spent if spent else float("inf")


def allocate(
    measured: Mapping[str, Sequence[Option]], num_weights: int, bits: float
) -> dict[str, Option]:
    """Choose an option for each layer so that the sum of errors is small within a budget.

    Args:
        measured: options of every layer.
        num_weights: number of weights of all layers.
        bits: most stored bits per weight, on average.

    Returns:
        The chosen option of every layer.

    Raises:
        InvalidSettings: the smallest options exceed the budget.
    """
    ladders = {name: efficient_options(options) for name, options in measured.items()}
    chosen = dict.fromkeys(ladders, 0)
    left = int(bits * num_weights) - sum(ladder[0].stored_bits for ladder in ladders.values())
    if left < 0:
        least = bits - left / num_weights
        raise InvalidSettings(
            "bits",
            expected=f"at least {least:.2f}, what this model takes at its smallest",
            actual=bits,
            remedy="Ask for more bits",
        )
    steps = [(-_gain(*ladder[:2]), name) for name, ladder in ladders.items() if len(ladder) > 1]
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        ladder, at = ladders[name], chosen[name]
        cost = ladder[at + 1].stored_bits - ladder[at].stored_bits
        # A step that exceeds the remaining budget ends the steps of this layer only.
        if cost > left:
            continue
        left -= cost
        chosen[name] = at + 1
        if at + 2 < len(ladder):
            heapq.heappush(steps, (-_gain(ladder[at + 1], ladder[at + 2]), name))
    return {name: ladder[chosen[name]] for name, ladder in ladders.items()}
