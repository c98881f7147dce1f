"""Samplers that remove tokens.

Each keeps at least the likeliest token, except where its docstring names another rule.
p are the probabilities of the candidates, H is their entropy in nats.
"""

from __future__ import annotations

import math
from collections.abc import Set

import numpy as np

from .candidates import Candidates, largest, log_totals
from .numerics import (
    Floats,
    Mask,
    at_least,
    counts_reaching,
    fewest_reaching,
    index_reaching,
    largest_values,
    log_total,
    measures,
    total,
    weights,
)
from .tail import require_no_tail, require_same

# This many tokens are sorted first. They suffice unless the distribution is very flat.
_TAIL_FREE_FIRST_COUNT = 2048


def keep_top_k(candidates: Candidates, top_k: int) -> Candidates:
    """Keep the k largest logits, of equal ones those with the lowest ids; sorted.

    Fan et al. 2018, "Hierarchical Neural Story Generation".
    """
    if top_k > len(candidates):
        require_no_tail(candidates.tail)
    return largest(candidates, min(top_k, len(candidates)))


def keep_top_p(candidates: Candidates, top_p: float) -> Candidates:
    """Keep the fewest likeliest tokens whose probabilities sum to top_p or more.

    A token is kept if the sum of all likelier ones is below top_p; of equal ones those with the
    lowest ids (Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration").
    """
    logits = candidates.logits
    weight = weights(logits)
    low, high = candidates.totals(weight)
    if candidates.is_sorted:
        count = require_same(*counts_reaching(weight, top_p * low, top_p * high))
        candidates.require_tail_below(logits[count - 1])
        return candidates.head(count).without_tail()
    return candidates.keep(at_least(logits, *fewest_reaching(logits, weight, top_p * low)))


def keep_min_p(candidates: Candidates, min_p: float) -> Candidates:
    """Keep tokens with p >= min_p max(p) (Nguyen et al. 2024, "Turning Up the Heat")."""
    return candidates.keep_from(float(candidates.logits.max()) + math.log(min_p))


def keep_top_a(candidates: Candidates, top_a: float) -> Candidates:
    """Keep tokens with p >= top_a max(p)^2 (BlinkDL, RWKV-LM)."""
    low, high = log_totals(candidates)
    from_largest = float(candidates.logits.max()) + math.log(top_a)
    return candidates.keep_from(from_largest - high, from_largest - low)


def keep_top_n_sigma(candidates: Candidates, num_sigmas: float) -> Candidates:
    """Keep logits that are at most `num_sigmas` standard deviations below the largest.

    Tang et al. 2024, "Top-nσ: Not All Logits Are You Need", with the sample standard deviation.
    Impossible tokens do not count; the web UI's own code counts them as logits of 0.
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

    The most typical tokens are those with the smallest |-ln p - H|. Tokens that are as typical
    as the last one are kept too (Meister et al. 2022, "Locally Typical Sampling"). The
    likeliest token may be removed.
    """
    logits = candidates.logits
    weight, log_whole, entropy = measures(logits)
    # ln p = l - max(l) - ln(whole), so that |-ln p - H| is the distance to this logit.
    centre = float(logits.max()) + log_whole - entropy
    typicality = logits - np.float32(centre)
    np.abs(typicality, out=typicality)
    np.negative(typicality, out=typicality)
    least, _ = fewest_reaching(typicality, weight, mass * math.exp(log_whole))
    return candidates.keep(typicality >= least)


def keep_tail_free(candidates: Candidates, share: float) -> Candidates:
    """Remove the unlikeliest tokens, where the curve of falling probabilities is nearly straight.

    Let d_i = |p_i - 2 p_(i+1) + p_(i+2)|, scaled to sum 1, over the whole vocabulary, with p = 0
    for tokens that were removed before. The first token is kept, and token i + 1 while
    d_1 + ... + d_i <= share (Phénix and Egan 2019, "Tail Free Sampling", centred as in
    text-generation-webui). If all d_i are 0, every token is kept.
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
        # The second differences of a falling sequence that starts at w sum to at most 2 w.
        unseen = 0.0 if is_whole else 2 * float(falling[-2])
        kept = 1 + index_reaching(curvature, share * seen, beyond=True)
        if kept == 1 + index_reaching(curvature, share * (seen + unseen), beyond=True):
            break
    if kept <= _TAIL_FREE_FIRST_COUNT or candidates.is_sorted:
        return largest(candidates, min(kept, len(candidates)))
    return candidates.keep(_heaviest(candidates.logits, weight, falling[:kept]))


def _heaviest(logits: Floats, weight: Floats, falling: Floats) -> Mask:
    """Mark the tokens whose sorted weights are `falling`; of equal weights the likeliest ones."""
    mask = weight > falling[-1]
    equal = np.flatnonzero(weight == falling[-1])
    equal = equal[np.argsort(-logits[equal], kind="stable")]
    mask[equal[: len(falling) - np.count_nonzero(mask)]] = True
    return mask


def exclude_top_choices(
    candidates: Candidates, threshold: float, spared_ids: Set[int]
) -> Candidates:
    """Remove all tokens with p >= threshold except the least likely of them.

    If one of the tokens to remove is in `spared_ids`, nothing is removed. The web UI spares the
    line break and the end token, because their probability would otherwise be distorted
    (p-e-w 2024, "Exclude Top Choices", text-generation-webui #6335). The caller applies this
    with a probability.
    """
    logits = candidates.logits
    floor = -np.inf
    if threshold > 0:
        floor = float(logits.max()) + math.log(threshold) + log_total(logits)
    keep = (logits < np.float32(floor)) | (logits == -np.inf)
    above = np.flatnonzero(~keep)
    if len(above) < 2:
        return candidates
    # Of equal ones the last, because equal logits have rising ids, sorted or not.
    values = logits[above]
    keep[above[np.flatnonzero(values == values.min())[-1]]] = True
    if not keep[candidates.indices_of(spared_ids)].all():
        return candidates
    return candidates.keep(keep)
