"""The settings of a request, under the web UI's names, and how their values are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..utils.errors import InvalidSettings, shown
from ..utils.json_keys import InvalidJson, parse_json
from ..utils.setting_values import (
    check_flag,
    check_integer,
    check_number,
    check_text,
    invalid,
    plain,
    unknown_name,
    whole_numbers,
)

# The largest seed that numpy's generator accepts and a web form can send.
MAX_SEED = (1 << 63) - 1

# The web UI's default order (its modules/presets.py). These are names of samplers. Most are equal
# to the name of a setting; dry, quadratic_sampling, adaptive_p, mirostat, xtc and no_repeat_ngram
# are not.
SAMPLER_PRIORITY = (
    "repetition_penalty", "presence_penalty", "frequency_penalty", "dry", "top_n_sigma",
    "temperature", "dynamic_temperature", "quadratic_sampling", "top_k", "top_p", "typical_p",
    "epsilon_cutoff", "eta_cutoff", "tfs", "top_a", "min_p", "adaptive_p", "mirostat", "xtc",
    "encoder_repetition_penalty", "no_repeat_ngram",
)

# Settings of the web UI whose samplers this engine lacks, with the value at which they do nothing.
# At that value they are accepted, so that a web UI can pass its whole state. At any other value
# they are an error, because leaving a sampler out silently would mislead the user.
NEUTRAL_VALUES: dict[str, int | bool] = {"penalty_alpha": 0, "auto_max_new_tokens": False}

# Settings that say which texts are allowed.
GRAMMARS = ("grammar_string", "json_schema", "regex_pattern")

# While a text may be the beginning of a banned string, its tokens are held back.
LONGEST_BANNED = 1000

# Factors and divisors of logits are limited to these, because samplers compute in float32.
SMALLEST, LARGEST = 1e-6, 1_000_000

# Numbers with their smallest and largest valid value, None for no limit.
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
    # At these limits the result no longer depends on the random number.
    "skew": (-100, 100),
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
    "min_new_tokens": (0, None),
    "top_k": (0, None),
    "mirostat_mode": (0, 2),
    "dry_allowed_length": (0, MAX_SEED),
    "dry_range": (-1, None),
    "repetition_penalty_range": (0, None),
    "repetition_decay": (0, None),
    "no_repeat_ngram_size": (0, None),
    "reasoning_budget_tokens": (-1, None),
    "seed": (-1, MAX_SEED),
    "loop_detect_window": (0, None),
    "prompt_lookup_num_tokens": (0, None),
    "logprobs": (0, None),
}
_FLAGS = (
    "do_sample", "dynamic_temperature", "temperature_last", "ban_eos_token",
    "skip_special_tokens", "token_healing",
)
_TEXTS = (
    "negative_prompt", "grammar_string", "regex_pattern", "grammar_trigger",
    "reasoning_budget_message", "reasoning_start_token", "reasoning_end_token",
)
_STARTS_IN_REASONING = ("auto", "always", "never")


@dataclass(frozen=True)
class SamplingSettings:
    """How to continue a prompt. The defaults are the web UI's neutral values.

    Args:
        max_new_tokens: most new tokens; the end of the context may end a text earlier.
        min_new_tokens: before so many new tokens no end token and none of `stop_token_ids` is
            drawn. Stop strings and the end of a grammar end the text all the same.
        do_sample: False always takes the likeliest token, after penalties and bans.
        temperature: divides the logits; 0 has the same effect as do_sample False.
        dynamic_temperature: also divide by a temperature that depends on the entropy, from
            dynatemp_low for one certain token to dynatemp_high for equal probabilities.
        dynatemp_low, dynatemp_high, dynatemp_exponent: see `apply_dynamic_temperature`.
        smoothing_factor, smoothing_curve: quadratic sampling, see `smooth`; a factor of 0 turns
            it off.
        temperature_last: run temperatures and smoothing after all other samplers.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
        min_p: keep tokens whose probability is at least this times the largest; 0 keeps all.
        typical_p: keep the most typical tokens that together reach this probability; 1 keeps all.
        tfs: tail free sampling; 1 keeps all.
        top_a: keep tokens with at least this times the largest probability squared; 0 keeps all.
        top_n_sigma: keep logits at most this many standard deviations below the largest; 0 keeps
            all.
        epsilon_cutoff, eta_cutoff: remove tokens below this probability, in units of 0.0001;
            eta lowers the limit for flat distributions; 0 keeps all.
        mirostat_mode: 2 keeps the surprise near `mirostat_tau` bits per token, with the learning
            rate `mirostat_eta`; 0 turns it off; 1, llama.cpp's mode, is not supported. It always
            runs last.
        adaptive_target: favour tokens near this probability, so that the mean over the last
            1 / (1 - `adaptive_decay`) tokens approaches it; 0 turns it off. It runs after all
            samplers except mirostat.
        xtc_probability: how often all tokens of at least `xtc_threshold` except the least likely
            of them are removed; 0 is never.
        skew: above 0 favours unlikely tokens of those that all samplers leave, below 0 likely ones:
            the random number of a draw is raised to the power e^-skew, see `draw`; 0 turns it
            off.
        dry_multiplier: penalty on continuing a repeated sequence of `dry_allowed_length` tokens;
            every further token multiplies it by `dry_base`; 0 turns it off.
        dry_sequence_breakers: texts that no repeated sequence contains; a list, or text in the
            web UI's notation.
        dry_range: number of last tokens, prompt included, in which DRY looks for repeats; 0 is
            all, -1 as many as `repetition_penalty_range`.
        repetition_penalty: divides positive and multiplies negative logits of tokens that
            occurred; 1 does nothing.
        presence_penalty: subtracted from the logits of tokens that occurred.
        frequency_penalty: subtracted once per occurrence.
        repetition_penalty_range: number of last tokens, prompt included, that count for these
            penalties; 0 is all.
        repetition_decay: number of tokens before those of `repetition_penalty_range` over which
            these penalties fall to nothing.
        encoder_repetition_penalty: above 1 makes tokens of the prompt likelier.
        no_repeat_ngram_size: no sequence of this many tokens occurs twice; 0 turns it off.
        guidance_scale, negative_prompt: a scale above 1 moves the text away from what would
            follow the negative prompt (classifier-free guidance); it needs a second sequence. 1
            turns it off.
        grammar_string: a grammar that the text must follow, "" for none: in llama.cpp's GBNF if
            it contains `::=`, in llguidance's dialect of Lark if not. The text ends where the
            grammar does. Needs llguidance.
        json_schema: a JSON schema that the text must follow, as a dict or text. The text is
            valid JSON unless max_new_tokens ends it earlier.
        regex_pattern: a regular expression that the whole text must match, "" for none. Only one
            of grammar_string, json_schema and regex_pattern can be given.
        grammar_trigger: text of one token, such as `</think>`; the grammar (of any of the three)
            begins after the first such token, and everything is allowed before. "" is the
            beginning of the text. A text may end before its grammar begins.
        token_healing: draw the last token of the prompt anew: the answer's first token is one
            whose text begins with that token's, and what follows it is shown. It is one token
            more than `max_new_tokens` and `min_new_tokens` say. Stop strings, stop ids and a
            grammar are about what is shown. A prompt of one token stays as it is, and so does
            one that ends in a special token or in a part of a character.
        reasoning_budget_tokens: most tokens that a model reasons, between
            `reasoning_start_token` and `reasoning_end_token`, in all of the answer; then its
            reasoning is ended by force. 0 ends it at once, -1 never.
        reasoning_budget_message: text that is forced then, as tokens of the answer;
            `reasoning_end_token` follows unless the message contains it.
        reasoning_start_token, reasoning_end_token: the texts between which a model reasons, of
            one token or several; "" for no start, if only the prompt begins a reasoning.
        start_in_reasoning: `always` if the answer begins inside of a reasoning, `never` if not;
            `auto` if the prompt ends in `reasoning_start_token`, apart from white space.
        sampler_priority: names of samplers in the order in which they run; samplers that are not
            named run first. Empty is `SAMPLER_PRIORITY`.
        allowed_tokens: ids that alone may be drawn, end tokens included; empty for all.
        custom_token_bans: ids that are never drawn; a list, or text with commas.
        logit_bias: (token id, number to add to its logit) pairs, or a dict.
        seed: -1 takes a random one; the same seed and settings give the same text.
        prompt_lookup_num_tokens: most tokens to guess at a time where the text repeats itself.
            The text stays the same, and repetitive texts are generated faster. Fewer are guessed,
            or none, where they would take more time than they save. 0 turns it off.
        logprobs: return the log probability of each token and this many of the likeliest ones;
            0 turns it off.
        ban_eos_token: never draw an end token, so that only max_new_tokens ends the text.
        skip_special_tokens: do not show special tokens.
        stop_strings: the text ends before the first of them, and none is shown. Special tokens
            count as text whether or not they are shown.
        stop_token_ids: token ids that end the text, in addition to the model's own.
        banned_strings: texts of at most 1,000 characters that the shown text does not contain,
            in upper or lower case. Where one is complete, the text goes back to the token in
            which it begins, and another token is drawn there. Tokens are shown once they cannot
            belong to one.
        loop_detect_window: the text ends when its last tokens, so many, only repeat a pattern of
            at most half as many; 0 lets it repeat itself. Every 16th token is looked at.

    Raises:
        InvalidSettings: a value is invalid.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
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
    skew: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    dry_range: int = -1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty_range: int = 1024
    repetition_decay: int = 0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    guidance_scale: float = 1.0
    negative_prompt: str = ""
    grammar_string: str = ""
    json_schema: str = ""
    regex_pattern: str = ""
    grammar_trigger: str = ""
    token_healing: bool = False
    reasoning_budget_tokens: int = -1
    reasoning_budget_message: str = ""
    reasoning_start_token: str = "<think>"
    reasoning_end_token: str = "</think>"
    start_in_reasoning: str = "auto"
    sampler_priority: tuple[str, ...] = SAMPLER_PRIORITY
    allowed_tokens: tuple[int, ...] = ()
    custom_token_bans: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = -1
    prompt_lookup_num_tokens: int = 0
    logprobs: int = 0
    ban_eos_token: bool = False
    skip_special_tokens: bool = True
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    banned_strings: tuple[str, ...] = ()
    loop_detect_window: int = 0

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
        self._check_reasoning()

    def _check_texts(self) -> None:
        for name in _TEXTS:
            check_text(name, getattr(self, name))
        object.__setattr__(self, "json_schema", _json_schema("json_schema", self.json_schema))
        chosen = [name for name in GRAMMARS if getattr(self, name)]
        if len(chosen) > 1:
            raise InvalidSettings(
                chosen[1], expected=f"only one of {chosen[1]} and {chosen[0]}", actual="both",
                remedy="Leave one of them empty",
            )

    def _check_reasoning(self) -> None:
        start = self.start_in_reasoning
        if not isinstance(start, str) or start not in _STARTS_IN_REASONING:
            raise invalid("start_in_reasoning", f"one of {', '.join(_STARTS_IN_REASONING)}", start)
        if self.reasoning_budget_tokens < 0:
            return
        if not self.reasoning_end_token:
            raise invalid("reasoning_end_token", "a text, with which reasoning ends", "")
        forced = self.reasoning_end_text.casefold()
        if any(text.casefold() in forced for text in self.banned_strings):
            raise InvalidSettings(
                "banned_strings", expected="none that ends the reasoning by force",
                actual=shown(self.reasoning_end_text),
                remedy="Change reasoning_budget_message, or ban fewer strings",
            )
        if not any(getattr(self, name) for name in GRAMMARS):
            return
        if not self.grammar_trigger:
            raise InvalidSettings(
                "reasoning_budget_tokens", expected="-1 beside a grammar that begins with the text",
                actual=self.reasoning_budget_tokens,
                remedy="Set grammar_trigger to reasoning_end_token, so that the grammar begins "
                "after the reasoning",
            )
        _, _, after = self.reasoning_end_text.partition(self.grammar_trigger)
        if after:
            raise invalid("reasoning_budget_message", "no text after grammar_trigger, where the "
                          "grammar begins", after)

    def _read_lists(self) -> None:
        stop_strings = _texts("stop_strings", self.stop_strings)
        if "" in stop_strings:
            raise invalid("stop_strings", "texts of at least one character", "")
        banned_strings = _texts("banned_strings", self.banned_strings)
        if not all(0 < len(text) <= LONGEST_BANNED for text in banned_strings):
            lengths = sorted(map(len, banned_strings))
            raise InvalidSettings(
                "banned_strings", expected=f"texts of 1 to {LONGEST_BANNED} characters",
                actual=f"one of {lengths[0] or lengths[-1]} characters",
            )
        known = SAMPLER_PRIORITY
        read = {
            "stop_strings": stop_strings,
            "banned_strings": banned_strings,
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids),
            "allowed_tokens": _token_ids("allowed_tokens", self.allowed_tokens),
            "custom_token_bans": _token_ids("custom_token_bans", self.custom_token_bans),
            "logit_bias": biases("logit_bias", self.logit_bias),
            "dry_sequence_breakers": _quoted_texts(
                "dry_sequence_breakers", self.dry_sequence_breakers),
            "sampler_priority": _names("sampler_priority", self.sampler_priority, known) or known,
        }
        for name, value in read.items():
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature == 0 or not self.do_sample

    @property
    def reasoning_end_text(self) -> str:
        """The text that ends a reasoning by force."""
        message, end = self.reasoning_budget_message, self.reasoning_end_token
        return message if end in message else message + end

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any] | SamplingSettings | None = None, **more: Any
    ) -> SamplingSettings:
        """Read settings from a request.

        `stop` is an alias of `stop_strings`, and a string is a list of one. Integers may be given
        as whole floats, as sliders send them. None is an empty list or text, as in the web UI's
        empty fields. Settings of the web UI whose samplers this engine lacks are accepted at
        the value at which they do nothing.

        Args:
            values: settings by name.
            more: further settings, which override `values`.

        Raises:
            InvalidSettings: a value is invalid, a name is unknown, or a sampler that this engine
                lacks is turned on.
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
        """Return the values by field name, converted to the types of the fields."""
        known = {field.name: field.type for field in fields(cls)}
        chosen: dict[str, Any] = {}
        for key, value in values.items():
            name = "stop_strings" if key == "stop" else key
            if name in chosen:
                raise InvalidSettings(
                    "stop", expected="only one of stop and stop_strings, which are the same",
                    actual="both", remedy="Leave one of them out",
                )
            if name in known:
                chosen[name] = _as_kind(value, str(known[name]))
            else:
                _check_foreign(name, value, known)
        return chosen


def _json_schema(name: str, value: Any) -> str:
    """Read a JSON schema, given as text or as a dict; "" is no schema."""
    wanted = "a JSON schema, an object or its text"
    if isinstance(value, str) and not value.strip():
        return ""
    try:
        # A dict is written and parsed as well, which finds values that JSON does not have.
        text = value if isinstance(value, str) else json.dumps(value)
        schema = parse_json(text)
    except InvalidJson as error:
        raise InvalidSettings(
            name, expected=f"{wanted}, as valid JSON", actual=str(error)
        ) from None
    except (TypeError, ValueError, RecursionError):
        raise invalid(name, wanted, value) from None
    if not isinstance(schema, dict):
        raise invalid(name, wanted, value)
    return json.dumps(schema)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """Read a list of texts; a single text is a list of one."""
    values = (value,) if isinstance(value, str) else value
    if isinstance(values, bytes) or not isinstance(values, Sequence):
        raise invalid(name, "a list of texts", value)
    if not all(isinstance(item, str) for item in values):
        raise invalid(name, "a list of texts", value)
    for item in values:
        check_text(name, item)
    return tuple(values)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Read token ids: a list, one id, or as in the web UI's form "1, 2, 3"."""
    if value is None:
        return ()
    value = plain(value)
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not all(re.fullmatch("[0-9]{1,18}", part) for part in parts):
            raise invalid(name, "token ids with commas between them", value)
        value = [int(part) for part in parts]
    elif isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    ids = tuple(whole_numbers(name, value, "a list of token ids"))
    if any(not 0 <= token < 1 << 63 for token in ids):
        raise invalid(name, "token ids of at least 0", value)
    return ids


def _quoted_texts(name: str, value: Any) -> tuple[str, ...]:
    r"""Read texts: a list, or as in the web UI's form '"\n", ":"' or JSON."""
    if value is None:
        return ()
    if isinstance(value, str):
        written = value.strip()
        try:
            value = parse_json(written if written.startswith("[") else f"[{written}]")
        except InvalidJson:
            raise invalid(name, "texts in double quotes with commas between them",
                          written) from None
    return tuple(text for text in _texts(name, value) if text)


def _names(name: str, value: Any, known: Collection[str]) -> tuple[str, ...]:
    """Read names: a list, or text with commas or line ends; duplicates are dropped."""
    if isinstance(value, str):
        value = [part.strip() for part in re.split("[,\n]", value) if part.strip()]
    listed = _texts(name, value if value is not None else ())
    for item in listed:
        if item not in known:
            raise InvalidSettings(name, expected=f"names out of {', '.join(sorted(known))}",
                                  actual=shown(item))
    return tuple(dict.fromkeys(listed))


def biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Read (token id, bias) pairs, or an API's {"id": bias}; return pairs with rising ids."""
    wanted = "token ids with a finite number each"
    if value is None:
        return ()
    if not isinstance(value, (Mapping, Sequence)) or isinstance(value, (str, bytes)):
        raise invalid(name, wanted, value)
    read: dict[int, float] = {}
    for pair in value.items() if isinstance(value, Mapping) else value:
        if not isinstance(pair, Sequence) or isinstance(pair, (str, bytes)) or len(pair) != 2:
            raise invalid(name, wanted, value)
        ids = _token_ids(name, pair[0] if isinstance(pair[0], str) else [pair[0]])
        bias = plain(pair[1])
        if len(ids) != 1:
            raise invalid(name, wanted, value)
        check_number(name, bias, -math.inf)
        read[ids[0]] = float(bias)
    return tuple(sorted(read.items()))


def _as_kind(value: Any, kind: str) -> Any:
    """Convert a value that a form sent to the type of a field, whose annotation is `kind`.

    5.0 becomes an integer, None an empty text or list, and a scalar of numpy or PyTorch a Python
    number.
    """
    value = plain(value)
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind.startswith("tuple"):
        return () if value is None else value
    if kind == "str" and value is None:
        return ""
    return value


def _check_foreign(name: Any, value: Any, known: Collection[str]) -> None:
    """Refuse a name that is not `known`, unless it has the value at which it does nothing."""
    if name in NEUTRAL_VALUES:
        neutral = NEUTRAL_VALUES[name]
        value = plain(value)
        if isinstance(value, (bool, int, float)) and value == neutral:
            return
        raise InvalidSettings(
            f"setting {name}", expected=f"{neutral!r} (this engine lacks that sampler)",
            actual=shown(value), remedy=f"Set {name} to {neutral!r}",
        )
    raise unknown_name("setting", name, known)
