"""Samplers that look at what was written: penalties and bans.

Candidates are those at the sampler's place in the order, so a penalty that comes after a
filter cannot bring a token back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .candidates import Candidates
from .repeats import earlier_matches, longest_repeats
from .values import Floats, Ids

# Added or subtracted at most: a penalty makes a token as unlikely as can be, only a ban makes
# it impossible.
_LARGEST = 1e30

# Up to so many tokens, sorting them is quicker than counting over the whole vocabulary.
_SORTED_UP_TO = 4096


class Past:
    """The tokens so far, and what several penalties want to know of them.

    Args:
        ids: int64 [tokens so far], prompt included.
        penalty_range: how many of the last ones count; 0 is all.

    Attributes:
        ids: all tokens.
        recent: those that count.
    """

    def __init__(self, ids: Ids, penalty_range: int) -> None:
        self.ids = ids
        self.recent = ids[-penalty_range:]

    @cached_property
    def counts(self) -> tuple[Ids, Ids]:
        """Tokens that count, each once, and how often each occurs there."""
        if len(self.recent) < _SORTED_UP_TO:
            return np.unique(self.recent, return_counts=True)
        counts = np.bincount(self.recent)
        ids = np.flatnonzero(counts)
        return ids, counts[ids]


def _change(
    candidates: Candidates, ids: Ids,
    change: Callable[[Floats, npt.NDArray], Floats],
) -> Candidates:
    """Change the logits of those of the tokens that are candidates.

    Args:
        change: from their logits, and which of `ids` they are (a mask, or places), to new ones.
    """
    if len(ids) == 0:
        return candidates
    if candidates.rest is not None:
        # Only where the change makes no token likelier (`Stage.suits_rest`).
        known, which = candidates.find(ids)
        logits = candidates.logits.copy()
        logits[known] = change(logits[known], which)
        rest = candidates.rest.lowered(len(ids) - len(known))
        return replace(candidates.reordered(logits), rest=rest)
    candidates = candidates.by_id()
    places, found = candidates.locate(ids)
    return candidates.with_logits(places, change(candidates.logits[places], found))


def _subtract(candidates: Candidates, ids: Ids, amounts: npt.NDArray) -> Candidates:
    narrow = np.clip(amounts, -_LARGEST, _LARGEST).astype(np.float32)
    return _change(candidates, ids, lambda logits, found: logits - narrow[found])


def penalize_repetition(candidates: Candidates, ids: Ids, penalty: float) -> Candidates:
    """Divide positive logits of these tokens by the penalty, multiply negative ones.

    Each counts once, however often it occurred (Keskar et al. 2019, "CTRL", section 4.1, with
    transformers' multiplication where a logit is negative).
    """
    factor = np.float32(penalty)
    return _change(
        candidates, ids,
        lambda logits, _: np.where(logits > 0, logits / factor, logits * factor),
    )


def reward_encoder_tokens(candidates: Candidates, ids: Ids, penalty: float) -> Candidates:
    """Make the prompt's tokens likelier where the penalty is above 1.

    The repetition penalty with 1 / penalty (transformers'
    EncoderRepetitionPenaltyLogitsProcessor, "hallucination penalty").
    """
    return penalize_repetition(candidates, ids, 1 / penalty)


def penalize_presence(candidates: Candidates, past: Past, penalty: float) -> Candidates:
    """Subtract the penalty from the logits of tokens that occurred (OpenAI's API reference)."""
    ids, _ = past.counts
    return _subtract(candidates, ids, np.full(len(ids), penalty))


def penalize_frequency(candidates: Candidates, past: Past, penalty: float) -> Candidates:
    """Subtract the penalty once for every occurrence of a token (OpenAI's API reference)."""
    ids, counts = past.counts
    return _subtract(candidates, ids, penalty * counts)


def penalize_repeats(
    candidates: Candidates, ids: Ids, multiplier: float, base: float, allowed_length: int,
    breaker_ids: Ids,
) -> Candidates:
    """Make tokens less likely that would continue a sequence which occurred before (DRY).

    Where the last n tokens stood before a token already, n being the most over all places and
    at least `allowed_length`, multiplier base^(n - allowed_length) is subtracted from it.
    Sequences do not reach over a breaker, and no breaker is penalised (p-e-w 2024, "Don't
    Repeat Yourself", text-generation-webui #5677; n is limited to 50 as there).
    """
    tokens, lengths = longest_repeats(ids, breaker_ids)
    long = lengths >= allowed_length
    excess = (lengths[long] - allowed_length).astype(np.float64)
    with np.errstate(over="ignore"):
        amounts = multiplier * np.power(float(base), excess)
    return _subtract(candidates, tokens[long], amounts)


def ban_repeated_ngrams(candidates: Candidates, ids: Ids, size: int) -> Candidates:
    """Make tokens impossible that would complete a sequence of `size` tokens a second time.

    Paulus et al. 2017, "A Deep Reinforced Model for Abstractive Summarization", section 2.5.
    """
    if len(ids) < size:
        return candidates
    return ban(candidates, ids[earlier_matches(ids, size - 1)])


def ban(candidates: Candidates, ids: Sequence[int] | Ids) -> Candidates:
    """Make tokens impossible."""
    return _change(
        candidates, np.asarray(ids, np.int64), lambda logits, _: np.full_like(logits, -np.inf)
    )


def add_bias(candidates: Candidates, biases: Sequence[tuple[int, float]]) -> Candidates:
    """Add to the logits of single tokens (OpenAI's `logit_bias`)."""
    ids = np.array([token for token, _ in biases], np.int64)
    return _subtract(candidates, ids, np.array([-bias for _, bias in biases]))
