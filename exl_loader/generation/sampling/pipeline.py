"""The samplers, each with its name in `sampler_priority`, and the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...utils.errors import InvalidSettings
from ..settings import SamplingSettings
from . import curves, filters, penalties
from .candidates import Candidates
from .penalties import Past
from .rest import Undecided
from .values import Ids

# The web UI's cutoffs are in units of this probability.
_CUTOFF_UNIT = 1e-4


@dataclass(frozen=True)
class Step:
    """What samplers need for one token.

    Args:
        settings: of the request.
        past: the tokens so far.
        prompt_ids: int64, each once.
        breaker_ids: int64.
        spared_ids: tokens that XTC leaves alone.
        random: the next number of the request's generator, in [0, 1).
    """

    settings: SamplingSettings
    past: Past
    prompt_ids: Ids
    breaker_ids: Ids
    spared_ids: frozenset[int]
    random: Callable[[], float]


@dataclass(frozen=True)
class Stage:
    """One sampler.

    Args:
        name: in `sampler_priority`.
        is_on: whether the settings switch it on.
        apply: what it does.
        for_greedy: whether it matters where the likeliest token is taken anyway.
        suits_rest: whether it can do without single tokens of a rest, so that no token of it
            becomes likelier; else it needs a whole row.
        settles: whether it leaves all of a rest out, or raises `Undecided`.
    """

    name: str
    is_on: Callable[[SamplingSettings], bool]
    apply: Callable[[Candidates, Step], Candidates]
    for_greedy: bool = False
    suits_rest: Callable[[SamplingSettings], bool] = lambda settings: False
    settles: bool = False


def _penalize_repeats(candidates: Candidates, step: Step) -> Candidates:
    settings = step.settings
    return penalties.penalize_repeats(
        candidates, step.past.recent, settings.dry_multiplier, settings.dry_base,
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


# In the web UI's default order. Mirostat and adaptive-p are not here: they always come last
# (`feedback`).
STAGES = (
    Stage("repetition_penalty", lambda s: s.repetition_penalty != 1,
          lambda c, step: penalties.penalize_repetition(
              c, step.past.recent, step.settings.repetition_penalty), for_greedy=True,
          suits_rest=lambda s: s.repetition_penalty >= 1),
    Stage("presence_penalty", lambda s: s.presence_penalty != 0,
          lambda c, step: penalties.penalize_presence(
              c, step.past, step.settings.presence_penalty), for_greedy=True,
          suits_rest=lambda s: s.presence_penalty >= 0),
    Stage("frequency_penalty", lambda s: s.frequency_penalty != 0,
          lambda c, step: penalties.penalize_frequency(
              c, step.past, step.settings.frequency_penalty), for_greedy=True,
          suits_rest=lambda s: s.frequency_penalty >= 0),
    Stage("dry", lambda s: s.dry_multiplier > 0, _penalize_repeats, for_greedy=True,
          suits_rest=lambda s: True),
    Stage("top_n_sigma", lambda s: s.top_n_sigma > 0,
          lambda c, step: filters.keep_top_n_sigma(c, step.settings.top_n_sigma)),
    Stage("temperature", lambda s: s.temperature != 1,
          lambda c, step: curves.apply_temperature(c, step.settings.temperature),
          suits_rest=lambda s: True),
    Stage("dynamic_temperature", lambda s: s.dynamic_temperature, _apply_dynamic_temperature),
    Stage("quadratic_sampling", lambda s: s.smoothing_factor > 0,
          lambda c, step: curves.smooth(
              c, step.settings.smoothing_factor, step.settings.smoothing_curve)),
    Stage("top_k", lambda s: s.top_k > 0,
          lambda c, step: filters.keep_top_k(c, step.settings.top_k),
          settles=True),
    Stage("top_p", lambda s: s.top_p < 1,
          lambda c, step: filters.keep_top_p(c, step.settings.top_p),
          settles=True),
    Stage("typical_p", lambda s: s.typical_p < 1,
          lambda c, step: filters.keep_typical(c, step.settings.typical_p)),
    Stage("epsilon_cutoff", lambda s: s.epsilon_cutoff * _CUTOFF_UNIT > 0,
          lambda c, step: filters.keep_epsilon(c, step.settings.epsilon_cutoff * _CUTOFF_UNIT),
          settles=True),
    Stage("eta_cutoff", lambda s: s.eta_cutoff * _CUTOFF_UNIT > 0,
          lambda c, step: filters.keep_eta(c, step.settings.eta_cutoff * _CUTOFF_UNIT)),
    Stage("tfs", lambda s: s.tfs < 1,
          lambda c, step: filters.keep_tail_free(c, step.settings.tfs)),
    Stage("top_a", lambda s: s.top_a > 0,
          lambda c, step: filters.keep_top_a(c, step.settings.top_a),
          settles=True),
    Stage("min_p", lambda s: s.min_p > 0,
          lambda c, step: filters.keep_min_p(c, step.settings.min_p),
          settles=True),
    Stage("xtc", lambda s: s.xtc_probability > 0, _exclude_top_choices),
    Stage("encoder_repetition_penalty", lambda s: s.encoder_repetition_penalty != 1,
          lambda c, step: penalties.reward_encoder_tokens(
              c, step.prompt_ids, step.settings.encoder_repetition_penalty), for_greedy=True),
    Stage("no_repeat_ngram", lambda s: s.no_repeat_ngram_size > 0,
          lambda c, step: penalties.ban_repeated_ngrams(
              c, step.past.ids, step.settings.no_repeat_ngram_size), for_greedy=True),
)

_CURVES = ("temperature", "dynamic_temperature", "quadratic_sampling")


def chosen_stages(settings: SamplingSettings) -> tuple[Stage, ...]:
    """The samplers that are switched on, in the order in which they run.

    Those that `sampler_priority` does not name come first, as in the web UI;
    `temperature_last` moves the temperatures and smoothing to the end.
    """
    rank = {name: place for place, name in enumerate(settings.sampler_priority)}
    if settings.temperature_last:
        behind = len(rank)
        rank.update((name, behind + place) for place, name in enumerate(_CURVES))
    stages = [stage for stage in STAGES if stage.is_on(settings)]
    if settings.greedy:
        stages = [stage for stage in stages if stage.for_greedy]
    return tuple(sorted(stages, key=lambda stage: rank.get(stage.name, -1)))


def may_do_without_rest(settings: SamplingSettings, stages: Sequence[Stage]) -> bool:
    """Whether the likeliest tokens of a row can decide, with what is known of the rest.

    Args:
        stages: `chosen_stages(settings)`.
    """
    # A late ban of sequences may have to begin again with all tokens.
    if settings.no_repeat_ngram_size > 0 or any(bias > 0 for _, bias in settings.logit_bias):
        return False
    for stage in stages:
        if stage.settles or not stage.suits_rest(settings):
            return stage.settles
    return settings.greedy or settings.mirostat_mode == 2 and settings.adaptive_target == 0


def run_stages(candidates: Candidates, stages: Sequence[Stage], step: Step) -> Candidates:
    """Apply the samplers one after the other.

    A ban that comes late may leave nothing of what the filters kept; then it comes first, and
    the filters choose among what is allowed.

    Raises:
        InvalidSettings: bans leave no token at all.
        Undecided: of candidates with a rest, which matters; no random number was taken.
    """
    _check_possible(candidates)
    left = candidates
    for stage in stages:
        left = stage.apply(left, step)
        if stage.name == "no_repeat_ngram" and not _is_possible(left):
            others = [other for other in stages if other is not stage]
            return run_stages(stage.apply(candidates, step), others, step)
    _check_possible(left)
    return left


def _is_possible(candidates: Candidates) -> bool:
    """Whether any of the tokens may be drawn."""
    return bool(candidates.logits.max() > -np.inf)


def _check_possible(candidates: Candidates) -> None:
    if not _is_possible(candidates):
        if candidates.rest is not None:
            raise Undecided
        raise InvalidSettings(
            "token bans and penalties", expected="at least one token that may be drawn",
            actual="none", remedy="Ban fewer tokens, or set no_repeat_ngram_size to 0",
        )
