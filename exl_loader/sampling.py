"""From a row of logits to a token: small pure functions in a fixed order.

    bans, repetition penalty             on the whole row
    top_k, temperature, top_p, min_p     on the candidates that are left
    one draw                             from what remains

This is the order of the web UI's other loaders (they divide by the temperature before top_k,
which keeps the same tokens, at the cost of dividing all of them). Candidates are kept with
falling logits, equal ones by rising id, so the result never depends on how a partition
happened to fall.

A vocabulary has up to 256k tokens and a step takes a few milliseconds, so nothing sorts all
of it: each filter first selects the tokens that can survive.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .errors import InvalidCheckpoint
from .settings import MAX_SEED, SamplingSettings

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

# top_p looks at so many of the likeliest tokens first, then at so many times more.
_TOP_P_FIRST = 256
_TOP_P_GROWTH = 8

_TINY = np.finfo(np.float32).tiny

# A row is looked at in blocks of so many tokens before single ones.
_BLOCK = 64


@dataclass(frozen=True)
class Candidates:
    """Tokens that may still be drawn.

    Args:
        ids: int64 [n]; rising where not `is_sorted`.
        logits: float32 [n], divided by the temperature once that step is done; -inf for
            banned tokens, at least one is finite.
        is_sorted: logits fall, equal ones by rising id.
    """

    ids: Ids
    logits: Floats
    is_sorted: bool = False

    def take(self, index: npt.NDArray[np.intp]) -> Candidates:
        """Keep the candidates at these places, which stand in their present order."""
        return replace(self, ids=self.ids[index], logits=self.logits[index])


def ban_tokens(logits: Floats, ids: Sequence[int]) -> Floats:
    """Make tokens impossible. Changes and returns `logits`, float32 [vocab]."""
    if ids:
        logits[list(ids)] = -np.inf
    return logits


def penalize_repetition(logits: Floats, history: Ids, penalty: float) -> Floats:
    """Make tokens of the history less likely. Changes and returns `logits`, float32 [vocab].

    Each token counts once, however often it occurred (Keskar et al. 2019, section 4.1, with
    transformers' multiplication where a logit is negative).
    """
    if penalty == 1 or len(history) == 0:
        return logits
    seen = logits[history]
    logits[history] = np.where(seen > 0, seen / penalty, seen * penalty)
    return logits


def apply_temperature(candidates: Candidates, temperature: float) -> Candidates:
    """Divide the logits by the temperature, which is above 0."""
    if temperature == 1:
        return candidates
    # Relative to the largest, so that a tiny temperature gives -inf and never NaN; and no
    # temperature is so small that float32 takes it for 0.
    shifted = candidates.logits - candidates.logits.max()
    with np.errstate(over="ignore"):
        return replace(candidates, logits=shifted / max(np.float32(temperature), _TINY))


def keep_top_k(candidates: Candidates, top_k: int) -> Candidates:
    """Keep the k largest logits, of equal ones those with the lowest ids; sorted."""
    if top_k <= 0 or top_k >= len(candidates.ids):
        return candidates
    return _largest(candidates, top_k)


def keep_top_p(candidates: Candidates, top_p: float) -> Candidates:
    """Keep the fewest likeliest tokens whose probabilities sum to top_p or more; sorted.

    A token stays where the sum of all likelier ones is below top_p; the likeliest stays.
    """
    if top_p >= 1:
        return candidates
    target = top_p * _weights(candidates.logits).sum(dtype=np.float64)
    count = _TOP_P_FIRST
    while True:
        head = _largest(candidates, min(count, len(candidates.ids)))
        reached = np.cumsum(_weights(head.logits), dtype=np.float64)
        if count >= len(candidates.ids) or reached[-1] >= target:
            keep = max(1, int(np.searchsorted(reached, target, side="left")) + 1)
            return head.take(np.arange(min(keep, len(head.ids))))
        count *= _TOP_P_GROWTH


def keep_min_p(candidates: Candidates, min_p: float) -> Candidates:
    """Keep tokens whose probability is at least min_p times the likeliest one's."""
    if min_p <= 0:
        return candidates
    threshold = candidates.logits.max() + math.log(min_p)
    return candidates.take(np.flatnonzero(candidates.logits >= threshold))


def draw(candidates: Candidates, uniform: float) -> int:
    """Take the token at which the summed probability passes `uniform`, in [0, 1)."""
    weights = _weights(candidates.logits)
    # Summed by blocks first: a running sum of a whole vocabulary would take a millisecond.
    whole = len(weights) // _BLOCK * _BLOCK
    blocks = weights[:whole].reshape(-1, _BLOCK).sum(axis=1)
    reached = np.cumsum(np.append(blocks, weights[whole:].sum()), dtype=np.float64)
    block, rest = _pass(reached, uniform * reached[-1])
    first = block * _BLOCK
    place, _ = _pass(np.cumsum(weights[first : first + _BLOCK], dtype=np.float64), rest)
    return int(candidates.ids[first + place])


def _pass(reached: npt.NDArray[np.float64], target: float) -> tuple[int, float]:
    """Find where a running sum passes the target, and what of the target is left there."""
    # Rounding may lift the target to the whole sum: then the last place that adds to it.
    last = int(np.searchsorted(reached, reached[-1], side="left"))
    place = min(int(np.searchsorted(reached, target, side="right")), last)
    return place, target - float(reached[place - 1]) if place else target


def _weights(logits: Floats) -> Floats:
    """Probabilities up to a common factor, the likeliest at 1."""
    return np.exp(logits - logits.max())


def _floor(logits: Floats, count: int) -> np.float32:
    """A bound that at least `count` logits reach, and not many more.

    The maxima of `count` blocks are `count` logits, so the smallest of the largest `count`
    maxima is such a bound; selecting among the maxima is far cheaper than among all.
    """
    num_blocks = len(logits) // _BLOCK
    if count > num_blocks:
        return np.partition(logits, len(logits) - count)[len(logits) - count]
    maxima = logits[: num_blocks * _BLOCK].reshape(_BLOCK, num_blocks).max(axis=0)
    return np.partition(maxima, num_blocks - count)[num_blocks - count]


def _largest(candidates: Candidates, count: int) -> Candidates:
    """The `count` largest, sorted."""
    logits = candidates.logits
    if candidates.is_sorted:
        return candidates.take(np.arange(count))
    index = np.flatnonzero(logits >= _floor(logits, count))
    order = np.argsort(-logits[index], kind="stable")[:count]
    return replace(candidates.take(index[order]), is_sorted=True)


class Sampler:
    """Draws the tokens of one request, with a generator of its own.

    Args:
        settings: how to draw.
        seed: of the generator; where None, the settings' one, or a random one for -1.
        banned_ids: tokens that are never drawn.
        vocab_size: tokens from this id on are padding and never drawn; None where all are
            real.

    Attributes:
        seed: the seed in use, for drawing the same text again.
    """

    def __init__(
        self, settings: SamplingSettings, seed: int | None = None,
        banned_ids: Sequence[int] = (), vocab_size: int | None = None,
    ) -> None:
        wanted = settings.seed if seed is None else seed
        self.seed = secrets.randbelow(MAX_SEED) if wanted < 0 else wanted
        self._settings = settings
        self._banned_ids = sorted(set(banned_ids))
        self._vocab_size = vocab_size
        # Philox: the same numbers for the same seed on every machine and numpy version.
        self._random = np.random.Generator(np.random.Philox(self.seed))

    def sample(self, logits: npt.ArrayLike, history: npt.ArrayLike) -> int:
        """Draw one token.

        Args:
            logits: float32 [vocab_size] on the CPU; left as it is.
            history: token ids so far, prompt included.

        Raises:
            InvalidCheckpoint: logits are NaN or infinite.
        """
        settings = self._settings
        row = np.array(logits, dtype=np.float32)[: self._vocab_size]
        _check_finite(row)
        row = penalize_repetition(row, self._recent(history), settings.repetition_penalty)
        row = ban_tokens(row, self._banned_ids)
        if settings.greedy:
            return int(row.argmax())
        candidates = Candidates(np.arange(len(row)), row)
        candidates = keep_top_k(candidates, settings.top_k)
        candidates = apply_temperature(candidates, settings.temperature)
        candidates = keep_top_p(candidates, settings.top_p)
        candidates = keep_min_p(candidates, settings.min_p)
        return draw(candidates, self._random.random())

    def _recent(self, history: npt.ArrayLike) -> Ids:
        if self._settings.repetition_penalty == 1:
            return np.empty(0, np.int64)
        ids = np.asarray(history, dtype=np.int64)[-self._settings.repetition_penalty_range :]
        return ids if self._vocab_size is None else ids[ids < self._vocab_size]


def _check_finite(row: Floats) -> None:
    # One sum finds every NaN and infinity, at a fraction of the cost of looking at each;
    # where finite values are so large that their sum is not, the slow look decides.
    if not np.isfinite(row.sum(dtype=np.float64)) and not np.isfinite(row).all():
        raise InvalidCheckpoint(
            "logits", expected="finite numbers", actual="NaN or infinity",
            remedy="The weights are damaged, or overflow in float16: download them again",
        )
