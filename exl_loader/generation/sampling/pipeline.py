"""The list of samplers and the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...utils.errors import InvalidSettings
from ..settings import SamplingSettings
from . import curves, filters, penalties
from .candidates import Candidates
from .numerics import Ids
from .penalties import Past
from .tail import require_no_tail

# The web UI's cutoffs are in units of this probability.
_CUTOFF_UNIT = 1e-4


class NoTokenLeft(InvalidSettings):
    """Bans and penalties leave no token that may be drawn."""


@dataclass(frozen=True)
class Step:
    """What samplers need for one token.

    Args:
        settings: the request's settings.
        past: the tokens so far.
        prompt_ids: int64, the distinct tokens of the prompt.
        breaker_ids: int64, tokens that end a repeat for DRY.
        spared_ids: tokens that XTC never removes.
        random: returns the next number of the request's generator, in [0, 1).
    """

    settings: SamplingSettings
    past: Past
    prompt_ids: Ids
    breaker_ids: Ids
    spared_ids: frozenset[int]
    random: Callable[[], float]


@dataclass(frozen=True)
class SamplerSpec:
    """One sampler.

    Args:
        name: its name in `sampler_priority`.
        is_on: returns whether the settings enable it.
        apply: returns the candidates that it leaves.
        for_greedy: True if it also matters when the likeliest token is always taken.
        lowers_tail: returns whether it makes no token of a tail likelier. Such a sampler needs
            no single token of the tail; any other needs the whole row.
        drops_tail: True if it removes the whole tail or raises `Undecided`.
    """

    name: str
    is_on: Callable[[SamplingSettings], bool]
    apply: Callable[[Candidates, Step], Candidates]
    for_greedy: bool = False
    lowers_tail: Callable[[SamplingSettings], bool] = lambda settings: False
    drops_tail: bool = False


def _penalize_repeats(candidates: Candidates, step: Step) -> Candidates:
    settings = step.settings
    return penalties.penalize_repeats(
        candidates, step.past.dry_ids, settings.dry_multiplier, settings.dry_base,
        settings.dry_allowed_length, step.breaker_ids,
    )


def _apply_dynamic_temperature(candidates: Candidates, step: Step) -> Candidates:
    settings = step.settings
    return curves.apply_dynamic_temperature(
        candidates, settings.dynatemp_low, settings.dynatemp_high, settings.dynatemp_exponent
    )


def _exclude_top_choices(candidates: Candidates, step: Step) -> Candidates:
    if step.random() >= step.settings.xtc_probability:
        return candidates
    return filters.exclude_top_choices(candidates, step.settings.xtc_threshold, step.spared_ids)


# In the web UI's default order. Mirostat and adaptive-p are not listed, because they always run
# last (`feedback`).
SAMPLERS = (
    SamplerSpec("repetition_penalty", lambda s: s.repetition_penalty != 1,
          lambda c, step: penalties.penalize_past(
              c, step.past, step.settings.repetition_penalty), for_greedy=True,
          lowers_tail=lambda s: s.repetition_penalty >= 1),
    SamplerSpec("presence_penalty", lambda s: s.presence_penalty != 0,
          lambda c, step: penalties.penalize_presence(
              c, step.past, step.settings.presence_penalty), for_greedy=True,
          lowers_tail=lambda s: s.presence_penalty >= 0),
    SamplerSpec("frequency_penalty", lambda s: s.frequency_penalty != 0,
          lambda c, step: penalties.penalize_frequency(
              c, step.past, step.settings.frequency_penalty), for_greedy=True,
          lowers_tail=lambda s: s.frequency_penalty >= 0),
    SamplerSpec("dry", lambda s: s.dry_multiplier > 0, _penalize_repeats, for_greedy=True,
          lowers_tail=lambda s: True),
    SamplerSpec("top_n_sigma", lambda s: s.top_n_sigma > 0,
          lambda c, step: filters.keep_top_n_sigma(c, step.settings.top_n_sigma)),
    SamplerSpec("temperature", lambda s: s.temperature != 1,
          lambda c, step: curves.apply_temperature(c, step.settings.temperature),
          lowers_tail=lambda s: True),
    SamplerSpec("dynamic_temperature", lambda s: s.dynamic_temperature, _apply_dynamic_temperature),
    SamplerSpec("quadratic_sampling", lambda s: s.smoothing_factor > 0,
          lambda c, step: curves.smooth(
              c, step.settings.smoothing_factor, step.settings.smoothing_curve)),
    SamplerSpec("top_k", lambda s: s.top_k > 0,
          lambda c, step: filters.keep_top_k(c, step.settings.top_k),
          drops_tail=True),
    SamplerSpec("top_p", lambda s: s.top_p < 1,
          lambda c, step: filters.keep_top_p(c, step.settings.top_p),
          drops_tail=True),
    SamplerSpec("typical_p", lambda s: s.typical_p < 1,
          lambda c, step: filters.keep_typical(c, step.settings.typical_p)),
    SamplerSpec("epsilon_cutoff", lambda s: s.epsilon_cutoff * _CUTOFF_UNIT > 0,
          lambda c, step: filters.keep_epsilon(c, step.settings.epsilon_cutoff * _CUTOFF_UNIT),
          drops_tail=True),
    SamplerSpec("eta_cutoff", lambda s: s.eta_cutoff * _CUTOFF_UNIT > 0,
          lambda c, step: filters.keep_eta(c, step.settings.eta_cutoff * _CUTOFF_UNIT)),
    SamplerSpec("tfs", lambda s: s.tfs < 1,
          lambda c, step: filters.keep_tail_free(c, step.settings.tfs)),
    SamplerSpec("top_a", lambda s: s.top_a > 0,
          lambda c, step: filters.keep_top_a(c, step.settings.top_a),
          drops_tail=True),
    SamplerSpec("min_p", lambda s: s.min_p > 0,
          lambda c, step: filters.keep_min_p(c, step.settings.min_p),
          drops_tail=True),
    SamplerSpec("xtc", lambda s: s.xtc_probability > 0, _exclude_top_choices),
    SamplerSpec("encoder_repetition_penalty", lambda s: s.encoder_repetition_penalty != 1,
          lambda c, step: penalties.reward_encoder_tokens(
              c, step.prompt_ids, step.settings.encoder_repetition_penalty), for_greedy=True),
    SamplerSpec("no_repeat_ngram", lambda s: s.no_repeat_ngram_size > 0,
          lambda c, step: penalties.ban_repeated_ngrams(
              c, step.past.ids, step.settings.no_repeat_ngram_size), for_greedy=True),
)

_CURVES = ("temperature", "dynamic_temperature", "quadratic_sampling")


def chosen_samplers(settings: SamplingSettings) -> tuple[SamplerSpec, ...]:
    """Return the samplers that the settings enable, in the order in which they run.

    Samplers that `sampler_priority` does not name run first, as in the web UI.
    `temperature_last` moves the temperatures and smoothing to the end.
    """
    rank = {name: index for index, name in enumerate(settings.sampler_priority)}
    if settings.temperature_last:
        rank |= {name: len(rank) + index for index, name in enumerate(_CURVES)}
    samplers = [sampler for sampler in SAMPLERS if sampler.is_on(settings)]
    if settings.greedy:
        samplers = [sampler for sampler in samplers if sampler.for_greedy]
    return tuple(sorted(samplers, key=lambda sampler: rank.get(sampler.name, -1)))


def run_samplers(
    candidates: Candidates, samplers: Sequence[SamplerSpec], step: Step
) -> Candidates:
    """Apply the samplers in order.

    If a late ban of n-grams removes everything that the filters have kept, the ban is applied
    first, and the filters choose among the allowed tokens.

    Raises:
        NoTokenLeft: bans leave no token at all.
        Undecided: the candidates' tail matters; no random number was taken.
    """
    _check_possible(candidates)
    left = candidates
    for sampler in samplers:
        left = sampler.apply(left, step)
        if sampler.name == "no_repeat_ngram" and not _is_possible(left):
            others = [other for other in samplers if other is not sampler]
            return run_samplers(sampler.apply(candidates, step), others, step)
    _check_possible(left)
    return left


def _is_possible(candidates: Candidates) -> bool:
    """Return whether any candidate may be drawn."""
    return bool(candidates.logits.max() > -np.inf)


def _check_possible(candidates: Candidates) -> None:
    if not _is_possible(candidates):
        require_no_tail(candidates.tail)
        raise NoTokenLeft(
            "token bans and penalties", expected="at least one token that may be drawn",
            actual="none", remedy="Ban fewer tokens, or set no_repeat_ngram_size to 0",
        )
