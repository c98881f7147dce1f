"""Decides whether a row's top logits suffice for sampling, without the other logits (the tail).

A device can compute the largest logits of a row and, for the tail, a count, an upper bound and
the sum of its weights. Mostly these determine which tokens the samplers keep, and then the
result is exactly that of the whole row. A sampler that depends on a sum computes with both ends
of the interval that certainly contains the sum. If the two results differ, or if a token of the
tail might be kept, `Undecided` is raised, and the sampler starts again with the whole row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..settings import SamplingSettings

if TYPE_CHECKING:
    from .pipeline import SamplerSpec

# float32 weights whose logits were divided or subtracted first differ from exact ones by at
# most this, times the size of the logits: twice 2^-24 for each of the two roundings.
_ROUNDING = 2.0**-22

# Weights that are further below the likeliest token's than exp(-this) are 0 in float32.
_DEEPEST = 104.0

# Relative error of the device's sum: about 100 additions in float32 and exponentials with an
# error of 2 ulp, doubled.
_SUM_ERROR = 2.0**-15

# The device's exponential returns 0 for weights below this, relative to the likeliest token's.
_FLUSHED = 2.0**-126

# A generous bound of the relative difference between float64 sums in two orders.
_ORDER_ERROR = 1e-9


class Undecided(Exception):
    """The top logits do not determine the result; the whole row is needed."""


@dataclass(frozen=True)
class Tail:
    """The tokens of a row that are not among its top logits.

    Args:
        count: how many tokens, at least one.
        bound: every logit of the tail is at most this; float32.
        log_low, log_high: bounds of ln of the tail's sum of exp(logit).
    """

    count: int
    bound: np.float32
    log_low: float
    log_high: float

    @classmethod
    def from_weight_sum(
        cls, count: int, bound: np.float32, largest: float, weight_sum: float
    ) -> Tail:
        """Make a tail from a sum of weights that a device has computed in float32.

        Args:
            count, bound: as above.
            largest: the row's largest logit.
            weight_sum: sum of exp(logit - largest) over the tail.
        """
        low = weight_sum * (1 - _SUM_ERROR)
        high = weight_sum * (1 + _SUM_ERROR) + count * _FLUSHED
        return cls(count, bound, largest + _log(low), largest + math.log(high))

    def require_below(self, least: np.float32) -> None:
        """Check that every logit of the tail is below `least`.

        Raises:
            Undecided: one may be `least` or larger.
        """
        if not least > self.bound:
            raise Undecided

    def add_to(self, known: float, largest: float) -> tuple[float, float]:
        """Return the interval of the sum of exp(logit - largest) over the whole row.

        Args:
            known: the sum over the top logits.
        """
        low, high = self.weight_range(largest)
        return (known + low) * (1 - _ORDER_ERROR), (known + high) * (1 + _ORDER_ERROR)

    def weight_range(self, largest: float) -> tuple[float, float]:
        """Return the interval of the sum of exp(logit - largest) over the tail."""
        return _exp(self.log_low - largest), _exp(self.log_high - largest)

    def divided(self, divisor: np.float32, largest: float) -> Tail:
        """Return the tail after all logits were divided by `divisor` in float32.

        The sum of exp(l) over n tokens with l <= b bounds the sum of exp(l / T) on both sides.
        One bound is exp(l) exp(b (1 / T - 1)), because exp(l / T) = exp(l) exp(l (1 / T - 1)).
        The other is n times the value that equal logits would have (Jensen's inequality). For T
        below 1 the first one is the upper bound, for T above 1 the lower one.

        Args:
            divisor: above 0.
            largest: the row's largest logit after the division.
        """
        factor = 1 / float(divisor)
        if factor > 1:
            low = self._if_equal(self.log_low, factor)
            high = self._if_at_bound(self.log_high, factor)
        else:
            low = self._if_at_bound(self.log_low, factor)
            high = self._if_equal(self.log_high, factor)
        slack = _ROUNDING * (abs(largest) + _DEEPEST)
        return replace(
            self, bound=self.bound / divisor, log_low=low - slack, log_high=high + slack
        )

    def lowered(self, count: int) -> Tail:
        """Return the tail after at most `count` of its logits became smaller."""
        if count == 0:
            return self
        log_share = math.log(count) + float(self.bound) - self.log_low
        left = 1 - math.exp(log_share) if log_share < 0 else 0.0
        return replace(self, log_low=self.log_low + _log(left))

    def _if_at_bound(self, log_sum: float, factor: float) -> float:
        return log_sum + float(self.bound) * (factor - 1)

    def _if_equal(self, log_sum: float, factor: float) -> float:
        log_count = math.log(self.count)
        return log_count + (log_sum - log_count) * factor


def require_no_tail(tail: Tail | None) -> None:
    """Raise Undecided if there is a tail, because what follows needs every logit."""
    if tail is not None:
        raise Undecided


def require_same(count: int, other: int) -> int:
    """Return a result that both ends of an interval give; raise Undecided if they differ."""
    if count != other:
        raise Undecided
    return count


def top_logits_may_suffice(
    settings: SamplingSettings, samplers: Sequence[SamplerSpec]
) -> bool:
    """Return False if these settings always need the whole row.

    Args:
        settings: the request's.
        samplers: `pipeline.chosen_samplers(settings)`.
    """
    # A ban of n-grams may remove every token that was kept, and then all tokens are needed.
    if settings.no_repeat_ngram_size > 0 or any(bias > 0 for _, bias in settings.logit_bias):
        return False
    for sampler in samplers:
        if sampler.drops_tail or not sampler.lowers_tail(settings):
            return sampler.drops_tail
    # Of the samplers with a state, mirostat drops the tail and adaptive-p needs it.
    return settings.greedy or settings.mirostat_mode == 2 and settings.adaptive_target == 0


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _exp(value: float) -> float:
    # A larger sum outweighs every known token anyway.
    return math.exp(min(value, 700.0))
