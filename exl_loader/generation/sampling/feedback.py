"""Samplers that learn from what is drawn. Each request has its own.

They come last, whatever their place in `sampler_priority`: what they learn is about the
distribution that the token was drawn from. (In the web UI's own code they draw at their place,
which switches off all that stands behind them.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

import numpy as np

from ..settings import SamplingSettings
from .candidates import Candidates, log_totals
from .values import log_total, weights

# Of adaptive-p's curve: the width of the favoured range, the height at its middle, and how
# steeply it falls. Fixed in llama.cpp.
_WIDTH, _PEAK, _SHARPNESS = 0.3, 5.0, 10.0


class Feedback(Protocol):
    """A sampler with a state: `apply` and then `observe`, once a token."""

    def apply(self, candidates: Candidates) -> Candidates:
        """Return what to draw from."""

    def observe(self, token_id: int) -> None:
        """Learn which token was drawn."""


class Mirostat:
    """Keeps the surprise of a text near a target, by leaving the most surprising tokens out.

    Basu et al. 2020, "Mirostat: A Neural Text Decoding Algorithm that Directly Controls
    Perplexity", with the limit applied to probabilities as they are (version 2).

    Args:
        tau: the surprise to keep, in bits a token.
        eta: how quickly the limit follows.

    Attributes:
        mu: tokens more surprising than so many bits are left out; begins at 2 tau.
    """

    def __init__(self, tau: float, eta: float) -> None:
        self._tau = tau
        self._eta = eta
        self.mu = 2 * tau
        self._kept: Candidates | None = None

    def apply(self, candidates: Candidates) -> Candidates:
        """Keep tokens with -log2 p <= mu, and the likeliest in any case."""
        low, high = log_totals(candidates)
        from_largest = float(candidates.logits.max()) - self.mu * math.log(2)
        self._kept = candidates.keep_from(from_largest + low, from_largest + high)
        return self._kept

    def observe(self, token_id: int) -> None:
        """mu' = mu - eta (-log2 p - tau), with p the token's probability among those kept."""
        assert self._kept is not None
        surprise = -_log_p(self._kept, token_id) / math.log(2)
        self.mu -= self._eta * (surprise - self._tau)


class AdaptiveP:
    """Favours tokens whose probability is near a target.

    With a the target that would bring the mean of the drawn probabilities back,
    a = min(1, max(0, 2 target - mean)), and d = |p - a| / 0.3: l' = 5 - 10 d^2 / (1 + d). The
    mean forgets by the factor `decay` a token and begins at the target (llama.cpp #17927).

    Args:
        target: above 0, at most 1.
        decay: 0 to 0.99.
    """

    def __init__(self, target: float, decay: float) -> None:
        self._target = target
        self._decay = decay
        self._num_seen = 1 / (1 - decay)
        self._sum_seen = target * self._num_seen
        self._given: Candidates | None = None

    def apply(self, candidates: Candidates) -> Candidates:
        """Bend the distribution; impossible tokens stay so."""
        self._given = candidates = candidates.by_id()
        wanted = 2 * self._target - self._sum_seen / self._num_seen
        distance = weights(candidates.logits)
        distance /= distance.sum(dtype=np.float64)
        distance -= np.float32(min(1.0, max(0.0, wanted)))
        np.abs(distance, out=distance)
        distance /= np.float32(_WIDTH)
        bent = np.float32(_PEAK) - np.float32(_SHARPNESS) * distance**2 / (1 + distance)
        bent[np.isneginf(candidates.logits)] = -np.inf
        return replace(candidates, logits=bent)

    def observe(self, token_id: int) -> None:
        """Count the probability that the token had before `apply`."""
        assert self._given is not None
        self._sum_seen = math.exp(_log_p(self._given, token_id)) + self._decay * self._sum_seen
        self._num_seen = 1 + self._decay * self._num_seen


def feedback_of(settings: SamplingSettings) -> tuple[Feedback, ...]:
    """Fresh ones of those that the settings switch on, in the order in which they run."""
    chosen: list[Feedback] = []
    if not settings.greedy and settings.adaptive_target > 0:
        chosen.append(AdaptiveP(settings.adaptive_target, settings.adaptive_decay))
    if not settings.greedy and settings.mirostat_mode == 2:
        chosen.append(Mirostat(settings.mirostat_tau, settings.mirostat_eta))
    return tuple(chosen)


def _log_p(candidates: Candidates, token_id: int) -> float:
    logits = candidates.logits
    chosen = float(logits[candidates.ids == token_id][0])
    return chosen - float(logits.max()) - log_total(logits)
