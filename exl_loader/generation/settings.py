"""What a request may set, under the web UI's names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..utils.errors import InvalidSettings
from ..utils.setting_values import (
    as_kind,
    biases,
    check_flag,
    check_foreign,
    check_integer,
    check_number,
    check_text,
    invalid,
    json_schema,
    names,
    plain,
    quoted_texts,
    texts,
    token_ids,
)

# A seed is what numpy's generator takes and a web form can write.
MAX_SEED = (1 << 63) - 1

# The web UI's default order (its modules/presets.py). The names are the samplers', which are
# the settings' own but for dry, quadratic_sampling, adaptive_p, mirostat, xtc and
# no_repeat_ngram.
SAMPLER_PRIORITY = (
    "repetition_penalty", "presence_penalty", "frequency_penalty", "dry", "top_n_sigma",
    "temperature", "dynamic_temperature", "quadratic_sampling", "top_k", "top_p", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "tfs", "top_a", "min_p", "adaptive_p", "mirostat", "xtc",
    "encoder_repetition_penalty", "no_repeat_ngram",
)

# Samplers compute in float32: what multiplies or divides logits stays far inside its range.
SMALLEST, LARGEST = 1e-6, 1_000_000

# Numbers with the least and the most that makes sense, None for no limit.
_NUMBERS: dict[str, tuple[float, float | None]] = {
    "temperature": (0, None),
    "dynatemp_low": (0, None),
    "dynatemp_high": (0, None),
    "dynatemp_exponent": (0, None),
    "smoothing_factor": (0, LARGEST),
    # Below 1 the cubic term would make the unlikeliest token the likeliest.
    "smoothing_curve": (1, LARGEST),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "tfs": (0, 1),
    "top_a": (0, 1),
    "top_n_sigma": (0, LARGEST),
    "epsilon_cutoff": (0, 10_000),
    "eta_cutoff": (0, 10_000),
    "mirostat_tau": (0, LARGEST),
    "mirostat_eta": (0, LARGEST),
    "adaptive_target": (0, 1),
    "adaptive_decay": (0, 0.99),
    "xtc_threshold": (0, 1),
    "xtc_probability": (0, 1),
    "dry_multiplier": (0, None),
    "dry_base": (1, None),
    "repetition_penalty": (SMALLEST, LARGEST),
    "presence_penalty": (-math.inf, None),
    "frequency_penalty": (-math.inf, None),
    "encoder_repetition_penalty": (SMALLEST, LARGEST),
    "guidance_scale": (-LARGEST, LARGEST),
}
_INTEGERS: dict[str, tuple[int, int | None]] = {
    "max_new_tokens": (1, None),
    "top_k": (0, None),
    "mirostat_mode": (0, 2),
    "dry_allowed_length": (0, MAX_SEED),
    "repetition_penalty_range": (0, None),
    "no_repeat_ngram_size": (0, None),
    "seed": (-1, MAX_SEED),
    "prompt_lookup_num_tokens": (0, None),
    "logprobs": (0, None),
}
_FLAGS = (
    "do_sample", "dynamic_temperature", "temperature_last", "ban_eos_token",
    "skip_special_tokens",
)


@dataclass(frozen=True)
class SamplingSettings:
    """How to continue a prompt. The defaults are the web UI's neutral ones.

    Args:
        max_new_tokens: tokens to generate at most; the context's end stops earlier.
        do_sample: False always takes the likeliest token; penalties and bans still count.
        temperature: divides the logits; 0 is the same as do_sample False.
        dynamic_temperature: divide by a temperature from dynatemp_low, where one token is
            certain, to dynatemp_high, where all are equal; besides `temperature`.
        dynatemp_low, dynatemp_high, dynatemp_exponent: see `apply_dynamic_temperature`.
        smoothing_factor, smoothing_curve: quadratic sampling, see `smooth`; a factor of 0 does
            nothing.
        temperature_last: temperatures and smoothing come after all other samplers.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
        min_p: keep tokens at least this share as likely as the likeliest; 0 keeps all.
        typical_p: keep the most typical tokens that together reach this probability; 1 all.
        tfs: tail free sampling; 1 keeps all.
        top_a: keep tokens of at least this times the largest probability squared; 0 all.
        top_n_sigma: keep logits within so many standard deviations of the largest; 0 all.
        epsilon_cutoff, eta_cutoff: leave out tokens below this probability, in units of
            0.0001; eta lowers it where the distribution is flat; 0 keeps all.
        mirostat_mode: 2 keeps the surprise near `mirostat_tau` bits a token, adapting with the
            rate `mirostat_eta`; 0 is off. It always comes last. Mode 1 is llama.cpp's.
        adaptive_target: favour tokens near this probability, so that the mean over the last
            1 / (1 - `adaptive_decay`) tokens comes near it too; 0 is off. Last but mirostat.
        xtc_probability: how often to leave out all tokens of at least `xtc_threshold` but the
            least likely of them; 0 is never.
        dry_multiplier: penalty on continuing a repeated sequence of `dry_allowed_length`
            tokens; it grows by `dry_base` with every token more; 0 is off.
        dry_sequence_breakers: texts that sequences do not reach over; a list, or the web UI's
            way of writing one.
        repetition_penalty: divides positive and multiplies negative logits of tokens that
            occurred; 1 does nothing.
        presence_penalty: subtracted from the logits of tokens that occurred.
        frequency_penalty: the same for every occurrence.
        repetition_penalty_range: how many of the last tokens count for these and DRY, the
            prompt's included; 0 is all of them.
        encoder_repetition_penalty: above 1 makes tokens of the prompt likelier.
        no_repeat_ngram_size: no sequence of so many tokens comes twice; 0 is off.
        guidance_scale, negative_prompt: above 1 leads away from how the negative prompt would
            go on (classifier-free guidance), at the cost of a second sequence; 1 is off.
        grammar_string: a grammar in llama.cpp's GBNF that the text must follow, "" for none; the
            text ends where the grammar does. Needs llguidance.
        json_schema: the same as a JSON schema, a dict or its text; the text is JSON that
            agrees with it, unless max_new_tokens cuts it off. Only one of the two may be given.
        sampler_priority: names of samplers in the order in which they run, `SAMPLER_PRIORITY`
            where empty; those not named run first.
        custom_token_bans: ids that are never drawn; a list, or text with commas.
        logit_bias: (token id, number to add to its logit) pairs, or a dict.
        seed: -1 takes a random one; the same seed and settings give the same text.
        prompt_lookup_num_tokens: how many tokens to expect at a time where the text repeats
            something; the text is the same, and where it often does, sooner there. 0 is off.
        logprobs: note how likely each token was, and so many of the likeliest; 0 is off.
        ban_eos_token: never end the text; max_new_tokens alone does.
        skip_special_tokens: leave special tokens out of the text.
        stop_strings: the text ends before the first of them; none of it is shown. Special tokens
            count as text whether or not they are shown.
        stop_token_ids: token ids that end the text, besides the model's own.

    Raises:
        InvalidSettings: a value makes no sense.
    """

    max_new_tokens: int = 512
    do_sample: bool = True
    temperature: float = 1.0
    dynamic_temperature: bool = False
    dynatemp_low: float = 1.0
    dynatemp_high: float = 1.0
    dynatemp_exponent: float = 1.0
    smoothing_factor: float = 0.0
    smoothing_curve: float = 1.0
    temperature_last: bool = False
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    tfs: float = 1.0
    top_a: float = 0.0
    top_n_sigma: float = 0.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_target: float = 0.0
    adaptive_decay: float = 0.9
    xtc_threshold: float = 0.1
    xtc_probability: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty_range: int = 1024
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    guidance_scale: float = 1.0
    negative_prompt: str = ""
    grammar_string: str = ""
    json_schema: str = ""
    sampler_priority: tuple[str, ...] = SAMPLER_PRIORITY
    custom_token_bans: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = -1
    prompt_lookup_num_tokens: int = 0
    logprobs: int = 0
    ban_eos_token: bool = False
    skip_special_tokens: bool = True
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        for name, limits in _NUMBERS.items():
            check_number(name, getattr(self, name), *limits)
            object.__setattr__(self, name, float(getattr(self, name)))
        for name, bounds in _INTEGERS.items():
            check_integer(name, getattr(self, name), *bounds)
        for name in _FLAGS:
            check_flag(name, getattr(self, name))
        if self.mirostat_mode == 1:
            raise invalid("mirostat_mode", "0 or 2 (1 is llama.cpp's own)", 1)
        self._check_texts()
        self._read_lists()

    def _check_texts(self) -> None:
        check_text("negative_prompt", self.negative_prompt)
        check_text("grammar_string", self.grammar_string)
        object.__setattr__(self, "json_schema", json_schema("json_schema", self.json_schema))
        if self.grammar_string and self.json_schema:
            raise InvalidSettings(
                "json_schema", expected="none beside grammar_string", actual="both",
                remedy="Leave one of them empty",
            )

    def _read_lists(self) -> None:
        stop_strings = texts("stop_strings", self.stop_strings)
        if "" in stop_strings:
            raise invalid("stop_strings", "texts of at least one character", "")
        known = SAMPLER_PRIORITY
        read = {
            "stop_strings": stop_strings,
            "stop_token_ids": token_ids("stop_token_ids", self.stop_token_ids),
            "custom_token_bans": token_ids("custom_token_bans", self.custom_token_bans),
            "logit_bias": biases("logit_bias", self.logit_bias),
            "dry_sequence_breakers": quoted_texts(
                "dry_sequence_breakers", self.dry_sequence_breakers),
            "sampler_priority": names("sampler_priority", self.sampler_priority, known) or known,
        }
        for name, value in read.items():
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is always taken."""
        return self.temperature == 0 or not self.do_sample

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any] | SamplingSettings | None = None, **more: Any
    ) -> SamplingSettings:
        """Read settings from a request.

        `stop` is accepted for `stop_strings`, and a string for a list of one. Numbers may be
        whole floats where integers belong, as sliders send them. Settings of the web UI that
        this engine lacks are accepted at the value at which they do nothing; None is an
        empty list or text, as the web UI's empty fields are.

        Args:
            values: the settings by name.
            more: further ones, which win over `values`.

        Raises:
            InvalidSettings: a value makes no sense, a name is unknown, or a sampler that
                this engine lacks is switched on.
        """
        if values is not None and not isinstance(values, (SamplingSettings, Mapping)):
            raise InvalidSettings(
                "settings", expected="SamplingSettings or a dict", actual=type(values).__name__,
                remedy="Give settings as a dict, or by name such as max_new_tokens=5",
            )
        if isinstance(values, SamplingSettings):
            return replace(values, **cls._read(more)) if more else values
        return cls(**(cls._read(values or {}) | cls._read(more)))

    @classmethod
    def _read(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values by the names of fields, each of its field's kind."""
        known = {field.name: field.type for field in fields(cls)}
        chosen: dict[str, Any] = {}
        for key, value in values.items():
            name = "stop_strings" if key == "stop" else key
            if name in chosen:
                raise InvalidSettings(
                    "stop", expected="none beside stop_strings, which is the same setting",
                    actual="both", remedy="Leave one of them out",
                )
            if name in known:
                chosen[name] = as_kind(value, str(known[name]))
            else:
                check_foreign(name, value, known)
        return chosen
