"""Samplers that change the shape of the distribution: temperatures, smoothing, guidance."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .candidates import Candidates
from .numerics import Floats, log_total, measures
from .tail import require_no_tail

# The smallest divisor and the largest quotient that are safe in float32.
_TINY = float(np.finfo(np.float32).tiny)
_HUGE = 1e30


def apply_temperature(candidates: Candidates, temperature: float) -> Candidates:
    """Divide the logits by the temperature, 0 or more: l' = l / T."""
    if temperature == 1:
        return candidates
    divisor = max(float(temperature), _TINY)
    logits = candidates.logits
    largest = float(logits.max())
    tail = candidates.tail
    if abs(largest) / divisor > _HUGE:
        # The largest quotient must be finite, because infinity minus infinity is NaN.
        require_no_tail(tail)
        logits = logits - np.float32(largest)
    with np.errstate(over="ignore"):
        divided = logits / np.float32(divisor)
        if tail is not None:
            tail = tail.divided(np.float32(divisor), float(divided.max()))
    return replace(candidates, logits=divided, tail=tail)


def apply_dynamic_temperature(
    candidates: Candidates, low: float, high: float, exponent: float
) -> Candidates:
    """Divide the logits by a temperature that rises with the entropy.

    T = low + (high - low) (H / ln n)^exponent, with H the entropy and n the number of
    possible tokens (kalomaze's dynamic temperature, as text-generation-webui defines it).
    """
    possible = int(np.count_nonzero(candidates.logits > -np.inf))
    _, _, entropy = measures(candidates.logits)
    # Rounding may move the entropy out of its range.
    share = min(1.0, max(0.0, entropy / math.log(possible))) if possible > 1 else 0.0
    return apply_temperature(candidates, low + (high - low) * share**exponent)


def smooth(candidates: Candidates, factor: float, curve: float) -> Candidates:
    """Change the logits by a quadratic and a cubic term of their distance to the largest.

    With d = l - max(l): l' = max(l) - factor ((3 - curve) / 2 d^2 - (curve - 1) / 2 d^3)
    (kalomaze's quadratic sampling with a curve, as text-generation-webui defines it). Only
    for a curve up to 3 do the tokens certainly keep their order.
    """
    if curve > 3:
        candidates = candidates.by_id()
    quadratic, cubic = (3 - curve) / 2 * factor, (curve - 1) / 2 * factor
    largest = candidates.logits.max()
    shifted = candidates.logits - largest
    # Horner's form. An infinite distance gives infinity times zero, which is corrected below.
    with np.errstate(over="ignore", invalid="ignore"):
        bent = shifted * np.float32(cubic)
        bent -= np.float32(quadratic)
        bent *= shifted
        bent *= shifted
        bent += largest
    if shifted.min() == -np.inf:
        bent[np.isneginf(shifted)] = -np.inf
    return replace(candidates, logits=bent)


def guide(logits: Floats, negative_logits: Floats, scale: float) -> Floats:
    """Combine the logits of a prompt with those of its negative prompt.

    With a = log softmax: a_negative + scale (a - a_negative) (Sanchez et al. 2023, "Stay on
    topic with Classifier-Free Guidance", equation 7); a scale of 1 is the prompt alone.

    Args:
        logits, negative_logits: float32 [vocab_size].

    Returns:
        float32 [vocab_size], a new array.
    """
    positive = _log_softmax(logits)
    negative = _log_softmax(negative_logits)
    positive -= negative
    positive *= np.float32(scale)
    positive += negative
    return positive


def _log_softmax(logits: Floats) -> Floats:
    return logits - np.float32(float(logits.max()) + log_total(logits))
