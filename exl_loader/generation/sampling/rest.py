"""What is known of the tokens behind a row's likeliest ones, where only those are at hand.

A card hands over the largest logits of a row and says about the others how many there are, how
large the largest of them may be, and what their probabilities add up to. Mostly that decides
which tokens samplers keep, with the very result that the whole row gives: whatever depends on
a sum is computed for both ends of the range in which the sum surely lies. Where that makes a
difference, `Undecided` asks for the whole row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

# float32 weights that one divides or subtracts first differ by this from exact ones, times
# what the logits themselves may be: twice 2^-24 for each of the two roundings.
_ROUNDING = 2.0**-22

# Weights further below the likeliest token's than exp(-this) are 0 in float32.
_DEEPEST = 104.0

# Relative error of a card's sum: some 100 additions in float32 and exponentials of 2 ulp, twice.
_SUM_ERROR = 2.0**-15

# What a card's exponential flushes to 0, relative to the likeliest token's weight.
_FLUSHED = 2.0**-126

# Relative difference between float64 sums in one order and in another, very generously.
SUM_SLACK = 1e-9


class Undecided(Exception):
    """Whether tokens outside of the known ones matter cannot be told without them."""


@dataclass(frozen=True)
class Rest:
    """Tokens that are not known one by one.

    Args:
        count: how many, at least one.
        bound: no logit of theirs is larger; float32.
        log_low, log_high: the logarithm of their sum of exp(logit) lies between these; nats.
    """

    count: int
    bound: np.float32
    log_low: float
    log_high: float

    @classmethod
    def of_sum(cls, count: int, bound: np.float32, largest: float, weight_sum: float) -> Rest:
        """Describe tokens whose weights were added up in float32.

        Args:
            largest: the row's largest logit.
            weight_sum: sum of exp(logit - largest).
        """
        low = weight_sum * (1 - _SUM_ERROR)
        high = weight_sum * (1 + _SUM_ERROR) + count * _FLUSHED
        return cls(count, bound, largest + _log(low), largest + math.log(high))

    def weight_range(self, largest: float) -> tuple[float, float]:
        """Between what the sum of exp(logit - largest) lies."""
        return _exp(self.log_low - largest), _exp(self.log_high - largest)

    def divided(self, divisor: np.float32, largest: float) -> Rest:
        """The same tokens with logits / divisor, in float32.

        Of a sum of exp(l), with l <= b for each of n tokens, that of exp(l / T) has two limits:
        exp(l / T) = exp(l) exp(l (1 / T - 1)), where b takes the place of the last l; and n
        times what all would have if they were equal (Jensen's inequality). For T below 1 the
        first is the upper limit and the second the lower one, for T above 1 the other way round.

        Args:
            divisor: above 0.
            largest: the row's largest logit after the division.
        """
        factor = 1 / float(divisor)

        def bounded(log_sum: float) -> float:
            return log_sum + float(self.bound) * (factor - 1)

        def equal(log_sum: float) -> float:
            log_count = math.log(self.count)
            return log_count + (log_sum - log_count) * factor

        low, high = (equal, bounded) if factor > 1 else (bounded, equal)
        slack = _ROUNDING * (abs(largest) + _DEEPEST)
        return replace(
            self, bound=self.bound / divisor,
            log_low=low(self.log_low) - slack, log_high=high(self.log_high) + slack,
        )

    def lowered(self, count: int) -> Rest:
        """The same tokens after at most `count` of them became less likely."""
        if count == 0:
            return self
        gone = math.log(count) + float(self.bound) - self.log_low
        left = 1 - math.exp(gone) if gone < 0 else 0.0
        return replace(self, log_low=self.log_low + _log(left))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _exp(value: float) -> float:
    # What is larger outweighs every known token anyway.
    return math.exp(min(value, 700.0))
