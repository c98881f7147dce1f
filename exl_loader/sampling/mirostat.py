"""Mirostat 2: keeps the surprise of a text near a target.

Basu et al. 2020, "Mirostat: A Neural Text Decoding Algorithm that Directly Controls
Perplexity", algorithm 2 (with the error fed back from every token).
"""

from __future__ import annotations

import math

from .candidates import Candidates, log_total


class Mirostat:
    """The state of one request.

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

    def keep(self, candidates: Candidates) -> Candidates:
        """Keep tokens with -log2 p <= mu, and the likeliest in any case."""
        logits = candidates.logits
        surprise = self.mu * math.log(2)
        return candidates.keep_from(float(logits.max()) + log_total(logits) - surprise)

    def observe(self, kept: Candidates, token_id: int) -> None:
        """Learn from the token that was drawn of what `keep` kept.

        mu' = mu - eta (-log2 p - tau), with p its probability among the kept.
        """
        logits = kept.logits
        chosen = float(logits[kept.ids == token_id][0])
        log_p = chosen - float(logits.max()) - log_total(logits)
        self.mu -= self._eta * (-log_p / math.log(2) - self._tau)
