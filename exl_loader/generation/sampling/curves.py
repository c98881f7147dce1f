"""Samplers that bend the distribution: temperatures and smoothing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .candidates import Candidates
from .rest import Undecided
from .values import measures

# Limits of what float32 divides by and holds.
_TINY = float(np.finfo(np.float32).tiny)
_HUGE = 1e30


def apply_temperature(candidates: Candidates, temperature: float) -> Candidates:
    """Divide the logits by the temperature, 0 or more: l' = l / T."""
    if temperature == 1:
        return candidates
    divisor = max(float(temperature), _TINY)
    logits = candidates.logits
    largest = float(logits.max())
    rest = candidates.rest
    if abs(largest) / divisor > _HUGE:
        # The largest must stay finite, or the rest would be infinity minus infinity.
        logits = logits - np.float32(largest)
        if rest is not None:
            raise Undecided
    with np.errstate(over="ignore"):
        divided = logits / np.float32(divisor)
        if rest is not None:
            rest = rest.divided(np.float32(divisor), float(divided.max()))
    return replace(candidates, logits=divided, rest=rest)


def apply_dynamic_temperature(
    candidates: Candidates, low: float, high: float, exponent: float
) -> Candidates:
    """Divide the logits by a temperature that rises with the entropy.

    T = low + (high - low) (H / ln n)^exponent, with H the entropy and n the number of
    possible tokens (kalomaze's dynamic temperature, as text-generation-webui defines it).
    """
    possible = int(np.count_nonzero(candidates.logits > -np.inf))
    _, _, entropy = measures(candidates.logits)
    # Rounding may take the entropy out of its bounds.
    share = min(1.0, max(0.0, entropy / math.log(possible))) if possible > 1 else 0.0
    return apply_temperature(candidates, low + (high - low) * share**exponent)


def smooth(candidates: Candidates, factor: float, curve: float) -> Candidates:
    """Bend the logits by a quadratic and a cubic term of their distance to the largest.

    With d = l - max(l): l' = max(l) - factor ((3 - curve) / 2 d^2 - (curve - 1) / 2 d^3)
    (kalomaze's quadratic sampling with a curve, as text-generation-webui defines it). Only
    for a curve up to 3 do the tokens surely keep their order.
    """
    if curve > 3:
        candidates = candidates.by_id()
    quadratic, cubic = (3 - curve) / 2 * factor, (curve - 1) / 2 * factor
    largest = candidates.logits.max()
    shifted = candidates.logits - largest
    # Horner's form; an infinite distance gives infinity times zero, which is put right below.
    with np.errstate(over="ignore", invalid="ignore"):
        bent = shifted * np.float32(cubic)
        bent -= np.float32(quadratic)
        bent *= shifted
        bent *= shifted
        bent += largest
    if shifted.min() == -np.inf:
        bent[np.isneginf(shifted)] = -np.inf
    return replace(candidates, logits=bent)
