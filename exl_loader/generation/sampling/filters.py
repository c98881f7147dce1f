"""Samplers that leave tokens out. Each keeps the likeliest token at least, unless it says not.

p are the probabilities of the candidates, H is their entropy in nats.
"""

from __future__ import annotations

import math
from collections.abc import Set

import numpy as np

from .candidates import Candidates, largest, log_totals
from .rest import Undecided
from .selection import at_least, counts_reaching, fewest, largest_values
from .values import Floats, Mask, log_total, measures, reached_at, total, weights

# Tokens that are put in order first. They decide unless the distribution is very flat.
_TAIL_FREE_FIRST_COUNT = 2048


def keep_top_k(candidates: Candidates, top_k: int) -> Candidates:
    """Keep the k largest logits, of equal ones those with the lowest ids; sorted.

    Fan et al. 2018, "Hierarchical Neural Story Generation".
    """
    if candidates.rest is not None and top_k > len(candidates):
        raise Undecided
    return largest(candidates, min(top_k, len(candidates)))


def keep_top_p(candidates: Candidates, top_p: float) -> Candidates:
    """Keep the fewest likeliest tokens whose probabilities sum to top_p or more.

    A token stays where the sum of all likelier ones is below top_p, of equal ones those with
    the lowest ids (Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration").
    """
    logits = candidates.logits
    weight = weights(logits)
    low, high = candidates.totals(weight)
    if candidates.is_sorted:
        count, most = counts_reaching(weight, top_p * low, top_p * high)
        if count != most:
            raise Undecided
        candidates.settle(logits[count - 1])
        return candidates.head(count).without_rest()
    return candidates.keep(at_least(logits, *fewest(logits, weight, top_p * low)))


def keep_min_p(candidates: Candidates, min_p: float) -> Candidates:
    """Keep tokens with p >= min_p max(p) (Nguyen et al. 2024, "Turning Up the Heat")."""
    return candidates.keep_from(float(candidates.logits.max()) + math.log(min_p))


def keep_top_a(candidates: Candidates, top_a: float) -> Candidates:
    """Keep tokens with p >= top_a max(p)^2 (BlinkDL, RWKV-LM)."""
    low, high = log_totals(candidates)
    from_largest = float(candidates.logits.max()) + math.log(top_a)
    return candidates.keep_from(from_largest - high, from_largest - low)


def keep_top_n_sigma(candidates: Candidates, num_sigmas: float) -> Candidates:
    """Keep logits within so many standard deviations of the largest.

    Tang et al. 2024, "Top-nσ: Not All Logits Are You Need", with the standard deviation of a
    sample. Impossible tokens do not count; the web UI's own code takes their logit for 0.
    """
    possible = candidates.logits
    if possible.min() == -np.inf:
        possible = possible[possible > -np.inf]
    sigma = float(possible.std(ddof=1, dtype=np.float64)) if len(possible) > 1 else 0.0
    return candidates.keep_from(float(possible.max()) - num_sigmas * sigma)


def keep_epsilon(candidates: Candidates, epsilon: float) -> Candidates:
    """Keep tokens with p >= epsilon (Hewitt et al. 2022, "Truncation Sampling as Language
    Model Desmoothing")."""
    low, high = log_totals(candidates)
    from_largest = float(candidates.logits.max()) + math.log(epsilon)
    return candidates.keep_from(from_largest + low, from_largest + high)


def keep_eta(candidates: Candidates, epsilon: float) -> Candidates:
    """Keep tokens with p >= min(epsilon, sqrt(epsilon) exp(-H)) (Hewitt et al. 2022)."""
    _, log_whole, entropy = measures(candidates.logits)
    log_eta = min(math.log(epsilon), 0.5 * math.log(epsilon) - entropy)
    return candidates.keep_from(float(candidates.logits.max()) + log_eta + log_whole)


def keep_typical(candidates: Candidates, mass: float) -> Candidates:
    """Keep the fewest most typical tokens whose probabilities sum to `mass` or more.

    The most typical ones are those with the smallest |-ln p - H|; those that equal the last
    one kept stay too (Meister et al. 2022, "Locally Typical Sampling"). The likeliest token
    may go.
    """
    logits = candidates.logits
    weight, log_whole, entropy = measures(logits)
    # ln p = l - max(l) - ln(whole), so that |-ln p - H| is the distance to this logit.
    centre = float(logits.max()) + log_whole - entropy
    typicality = logits - np.float32(centre)
    np.abs(typicality, out=typicality)
    np.negative(typicality, out=typicality)
    least, _ = fewest(typicality, weight, mass * math.exp(log_whole))
    return candidates.keep(typicality >= least)


def keep_tail_free(candidates: Candidates, share: float) -> Candidates:
    """Cut the tail off where the curve of the falling probabilities has lost its curvature.

    With d_i = |p_i - 2 p_(i+1) + p_(i+2)| scaled to sum 1, over the whole vocabulary and with
    0 for tokens filtered out before, the first token stays, and token i + 1 while
    d_1 + ... + d_i <= share (Phénix and Egan 2019, "Tail Free Sampling", centred as in
    text-generation-webui). A flat curve has no tail.
    """
    weight = weights(candidates.logits)
    num_hidden = candidates.num_tokens - len(weight)
    for count in (min(_TAIL_FREE_FIRST_COUNT, len(weight)), len(weight)):
        falling = largest_values(weight, count)
        is_whole = count == len(weight)
        if is_whole:
            falling = np.append(falling, np.zeros(min(2, num_hidden), np.float32))
        curvature = np.diff(falling, 2)
        np.abs(curvature, out=curvature)
        seen = total(curvature)
        if is_whole and seen == 0:
            return candidates
        # The differences of a falling tail that begins with w change by 2 w in all at most.
        unseen = 0.0 if is_whole else 2 * float(falling[-2])
        kept = 1 + reached_at(curvature, share * seen, beyond=True)
        if kept == 1 + reached_at(curvature, share * (seen + unseen), beyond=True):
            break
    if kept <= _TAIL_FREE_FIRST_COUNT or candidates.is_sorted:
        return largest(candidates, min(kept, len(candidates)))
    return candidates.keep(_heaviest(candidates.logits, weight, falling[:kept]))


def _heaviest(logits: Floats, weight: Floats, falling: Floats) -> Mask:
    """Where the weights are that stand in order in `falling`; of equal ones the likeliest."""
    mask = weight > falling[-1]
    equal = np.flatnonzero(weight == falling[-1])
    equal = equal[np.argsort(-logits[equal], kind="stable")]
    mask[equal[: len(falling) - np.count_nonzero(mask)]] = True
    return mask


def exclude_top_choices(
    candidates: Candidates, threshold: float, spared_ids: Set[int]
) -> Candidates:
    """Leave out all tokens with p >= threshold except the least likely of them.

    Nothing goes where one of them is spared: the web UI spares the line break and the end
    token, which would otherwise become far likelier or rarer than the text wants (p-e-w 2024,
    "Exclude Top Choices", text-generation-webui #6335). How often it happens is the caller's.
    """
    logits = candidates.logits
    floor = -np.inf
    if threshold > 0:
        floor = float(logits.max()) + math.log(threshold) + log_total(logits)
    keep = (logits < np.float32(floor)) | (logits == -np.inf)
    above = np.flatnonzero(~keep)
    if len(above) < 2:
        return candidates
    # Of equal ones the last: there ids rise, whether candidates are sorted or not.
    values = logits[above]
    keep[above[np.flatnonzero(values == values.min())[-1]]] = True
    if not keep[candidates.places_of(spared_ids)].all():
        return candidates
    return candidates.keep(keep)
