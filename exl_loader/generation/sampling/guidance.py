"""Classifier-free guidance: away from what a negative prompt would say."""

from __future__ import annotations

import numpy as np

from .values import Floats, log_total


def guide(logits: Floats, negative_logits: Floats, scale: float) -> Floats:
    """Combine the logits behind a prompt with those behind its negative prompt.

    With a = log softmax: a_negative + scale (a - a_negative) (Sanchez et al. 2023, "Stay on
    topic with Classifier-Free Guidance", equation 7); a scale of 1 is the prompt alone.

    Args:
        logits, negative_logits: float32 [vocab_size].

    Returns:
        float32 [vocab_size], of the caller's own.
    """
    positive = _log_softmax(logits)
    negative = _log_softmax(negative_logits)
    positive -= negative
    positive *= np.float32(scale)
    positive += negative
    return positive


def _log_softmax(logits: Floats) -> Floats:
    return logits - np.float32(float(logits.max()) + log_total(logits))
