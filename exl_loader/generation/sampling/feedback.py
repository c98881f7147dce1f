"""Samplers with a state, which depends on the drawn tokens. Each request has its own.

They always run last, regardless of `sampler_priority`, because their state is about the
distribution that the token was drawn from. (In the web UI's own code they draw in the order of
`sampler_priority`, which disables all samplers after them.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

import numpy as np

from ..settings import SamplingSettings
from .candidates import Candidates, log_totals
from .numerics import log_total, weights

# The curve of adaptive-p: the width of the favoured range, the height at its centre, and the
# steepness. Constants of llama.cpp.
_WIDTH, _PEAK, _SHARPNESS = 0.3, 5.0, 10.0


class Feedback(Protocol):
    """A sampler with a state. For each token, `apply` is called first and then `observe`."""

    def apply(self, candidates: Candidates) -> Candidates:
        """Return the candidates to draw from."""

    def observe(self, token_id: int) -> None:
        """Update the state by the drawn token."""


class Mirostat:
    """Keeps the surprise of a text near a target by removing the most surprising tokens.

    Basu et al. 2020, "Mirostat: A Neural Text Decoding Algorithm that Directly Controls
    Perplexity", version 2, which applies the limit to the probabilities directly.

    Args:
        tau: target surprise in bits per token.
        eta: learning rate of the limit.

    Attributes:
        mu: the limit in bits; more surprising tokens are removed. It starts at 2 tau.
    """

    def __init__(self, tau: float, eta: float) -> None:
        self._tau = tau
        self._eta = eta
        self.mu = 2 * tau
        self._kept: Candidates | None = None

    def apply(self, candidates: Candidates) -> Candidates:
        """Keep tokens with -log2 p <= mu, and the likeliest one in any case."""
        low, high = log_totals(candidates)
        from_largest = float(candidates.logits.max()) - self.mu * math.log(2)
        self._kept = candidates.keep_from(from_largest + low, from_largest + high)
        return self._kept

    def observe(self, token_id: int) -> None:
        """Set mu' = mu - eta (-log2 p - tau), with p the token's probability among those kept."""
        assert self._kept is not None
        surprise = -_log_p(self._kept, token_id) / math.log(2)
        self.mu -= self._eta * (surprise - self._tau)


class AdaptiveP:
    """Favours tokens whose probability is near a target.

    l' = 5 - 10 d^2 / (1 + d) with d = |p - a| / 0.3 and a = min(1, max(0, 2 target - mean)).
    The mean is that of the drawn tokens' probabilities. It starts at the target, and the weight
    of earlier tokens falls by the factor `decay` per token (llama.cpp #17927).

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
        """Replace the logits by the curve; impossible tokens stay impossible."""
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
        """Add the probability that the token had before `apply` to the mean."""
        assert self._given is not None
        self._sum_seen = math.exp(_log_p(self._given, token_id)) + self._decay * self._sum_seen
        self._num_seen = 1 + self._decay * self._num_seen


def chosen_feedback(settings: SamplingSettings) -> tuple[Feedback, ...]:
    """Make the samplers with a state that the settings enable, in the order in which they run."""
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
