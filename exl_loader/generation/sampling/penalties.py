"""Samplers that depend on the tokens so far: penalties and bans.

Each one changes the candidates that earlier samplers have left, so a penalty that runs after a
filter cannot restore a removed token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .candidates import Candidates
from .numerics import Floats, Ids, Indices

# The largest amount that is added or subtracted. A penalty makes a token very unlikely; only a
# ban makes it impossible.
_LARGEST = 1e30

# Up to this many tokens, sorting them is faster than counting over the whole vocabulary.
_SORTED_UP_TO = 4096

# Longer repeats count as this long, as in the web UI. The limit keeps the penalty finite, and
# the rounds of `longest_repeats` few in a text that repeats itself.
MAX_REPEAT = 50


class Past:
    """The tokens so far, and counts that several penalties share.

    Args:
        ids: int64 [tokens so far], prompt included.
        penalty_range: only this many of the last tokens count; 0 is all.
        decay: so many tokens before them count less and less.
        dry_range: only this many of the last tokens count for DRY; 0 is all, -1 is as many as
            penalty_range.

    Attributes:
        ids: all tokens.
        recent: the tokens that count.
        dry_ids: the tokens that count for DRY.
    """

    def __init__(
        self, ids: Ids, penalty_range: int, decay: int = 0, dry_range: int = -1
    ) -> None:
        self.ids = ids
        # All tokens count, so none is before them.
        self._decay = decay if penalty_range else 0
        self._range = penalty_range
        self.recent = ids[-(penalty_range + self._decay) :]
        self.dry_ids = ids[-(penalty_range if dry_range < 0 else dry_range) :]

    @property
    def decays(self) -> bool:
        """True if some tokens count less than others."""
        return self._decay > 0

    @cached_property
    def weights(self) -> npt.NDArray[np.float64]:
        """How much each token of `recent` counts, at most 1.

        As in exllamav2: the last penalty_range + 1 tokens count whole, and each one before them
        1 / decay less than the next.
        """
        distances = np.arange(len(self.recent), 0, -1)
        return np.clip(1 - (distances - self._range - 1) / self._decay, 0, 1)

    @cached_property
    def latest_weights(self) -> npt.NDArray[np.float64]:
        """How much the last occurrence of each of the distinct tokens counts."""
        ids, _ = self.counts
        if not self.decays:
            return np.ones(len(ids))
        last = np.zeros(len(ids))
        # Weights rise towards the end.
        np.maximum.at(last, np.searchsorted(ids, self.recent), self.weights)
        return last

    @cached_property
    def counts(self) -> tuple[Ids, npt.NDArray]:
        """The distinct tokens of `recent`, and the sum of the weights of each."""
        if self.decays:
            ids, where = np.unique(self.recent, return_inverse=True)
            return ids, np.bincount(where, self.weights, len(ids))
        if len(self.recent) < _SORTED_UP_TO:
            return np.unique(self.recent, return_counts=True)
        counts = np.bincount(self.recent)
        ids = np.flatnonzero(counts)
        return ids, counts[ids]


def _change(
    candidates: Candidates, ids: Ids,
    change: Callable[[Floats, npt.NDArray], Floats],
) -> Candidates:
    """Change the logits of the given tokens, as far as they are candidates.

    Args:
        change: called with their logits and with a mask or indices of them in `ids`; returns
            their new logits.
    """
    if len(ids) == 0:
        return candidates
    if candidates.tail is not None:
        # Such a change makes no token likelier (`SamplerSpec.lowers_tail`).
        known, which = candidates.find(ids)
        logits = candidates.logits.copy()
        logits[known] = change(logits[known], which)
        tail = candidates.tail.lowered(len(ids) - len(known))
        return replace(candidates.reordered(logits), tail=tail)
    candidates = candidates.by_id()
    indices, found = candidates.locate(ids)
    return candidates.with_logits(indices, change(candidates.logits[indices], found))


def _subtract(candidates: Candidates, ids: Ids, amounts: npt.NDArray) -> Candidates:
    narrow = np.clip(amounts, -_LARGEST, _LARGEST).astype(np.float32)
    return _change(candidates, ids, lambda logits, found: logits - narrow[found])


def penalize_past(candidates: Candidates, past: Past, penalty: float) -> Candidates:
    """Apply `penalize_repetition` to the tokens so far, with what is left of it after decay."""
    if not past.decays:
        return penalize_repetition(candidates, past.recent, penalty)
    ids, _ = past.counts
    factors = (1 + (penalty - 1) * past.latest_weights).astype(np.float32)
    return _change(
        candidates, ids,
        lambda logits, found: np.where(
            logits > 0, logits / factors[found], logits * factors[found]
        ),
    )


def penalize_repetition(candidates: Candidates, ids: Ids, penalty: float) -> Candidates:
    """Divide positive logits of these tokens by the penalty, multiply negative ones.

    Each token counts once, however often it occurs (Keskar et al. 2019, "CTRL", section 4.1, with
    transformers' multiplication of negative logits).
    """
    factor = np.float32(penalty)
    return _change(
        candidates, ids,
        lambda logits, _: np.where(logits > 0, logits / factor, logits * factor),
    )


def reward_encoder_tokens(candidates: Candidates, ids: Ids, penalty: float) -> Candidates:
    """Make the prompt's tokens likelier if the penalty is above 1.

    This is the repetition penalty with 1 / penalty (transformers'
    EncoderRepetitionPenaltyLogitsProcessor, "hallucination penalty").
    """
    return penalize_repetition(candidates, ids, 1 / penalty)


def penalize_presence(candidates: Candidates, past: Past, penalty: float) -> Candidates:
    """Subtract the penalty from the logits of tokens that occurred (OpenAI's API reference)."""
    ids, _ = past.counts
    return _subtract(candidates, ids, penalty * past.latest_weights)


def penalize_frequency(candidates: Candidates, past: Past, penalty: float) -> Candidates:
    """Subtract the penalty once for every occurrence of a token (OpenAI's API reference)."""
    ids, counts = past.counts
    return _subtract(candidates, ids, penalty * counts)


def penalize_repeats(
    candidates: Candidates, ids: Ids, multiplier: float, base: float, allowed_length: int,
    breaker_ids: Ids,
) -> Candidates:
    """Make tokens less likely that would continue a sequence which occurred before (DRY).

    For each token, n is the length of the longest end of the text that is also directly
    before an earlier occurrence of the token. If n is at least `allowed_length`,
    multiplier base^(n - allowed_length) is subtracted from its logit. Sequences contain no
    breaker, and no breaker is penalised (p-e-w 2024, "Don't Repeat Yourself",
    text-generation-webui #5677, with its limit of 50 for n).
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


def earlier_matches(ids: Ids, length: int) -> Indices:
    """Find the indices after each earlier occurrence of the last `length` tokens, rising.

    All indices are compared at once, one token back per round, and those that no longer match
    are dropped. A round costs what is left, and little is left after a few rounds.

    Args:
        ids: int64 [n]; occurrences may overlap the end of the text.
        length: 0 matches everywhere.
    """
    next_index = np.arange(length, len(ids))
    for back in range(1, min(length, len(ids)) + 1):
        next_index = next_index[ids[next_index - back] == ids[-back]]
    return next_index


def longest_repeats(ids: Ids, breaker_ids: Ids) -> tuple[Ids, Ids]:
    """Find the tokens that followed an earlier occurrence of the text's end.

    Works in rounds, as `earlier_matches`.

    Args:
        ids: int64 [n].
        breaker_ids: tokens that no repeat contains and that follow none.

    Returns:
        The distinct tokens, rising, and for each the length of the longest end of the text that
        it followed, 1 to `MAX_REPEAT`.
    """
    limit = _repeat_limit(ids, breaker_ids)
    if limit == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    next_index = 1 + np.flatnonzero(ids[:-1] == ids[-1])
    next_index = next_index[~np.isin(ids[next_index], breaker_ids)]
    lengths = np.ones(len(next_index), np.int64)
    alive = np.arange(len(next_index))
    for length in range(2, limit + 1):
        alive = alive[next_index[alive] >= length]
        alive = alive[ids[next_index[alive] - length] == ids[-length]]
        if len(alive) == 0:
            break
        lengths[alive] = length
    tokens, where = np.unique(ids[next_index], return_inverse=True)
    longest = np.zeros(len(tokens), np.int64)
    np.maximum.at(longest, where, lengths)
    return tokens, longest


def _repeat_limit(ids: Ids, breaker_ids: Ids) -> int:
    """Return how many of the last tokens a repeat may contain: those after the last breaker."""
    end = ids[-MAX_REPEAT:]
    breakers = np.flatnonzero(np.isin(end, breaker_ids))
    return len(end) - 1 - int(breakers[-1]) if len(breakers) else len(end)
