"""What a request may set, under the web UI's names."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .errors import InvalidSettings

# A seed is what numpy's generator takes and a web form can write.
MAX_SEED = (1 << 63) - 1

# Settings of the web UI whose samplers this engine does not have, with the value at which
# they do nothing. At that value they are accepted, so that a web UI's whole state can be
# handed over; at any other they are an error, because a sampler that is silently left out
# would be a lie.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "smoothing_factor": (0,),
    "smoothing_curve": (1,),
    "dynamic_temperature": (False,),
    "typical_p": (1,),
    "tfs": (1,),
    "top_a": (0,),
    "top_n_sigma": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "mirostat_mode": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "adaptive_target": (0,),
    "temperature_last": (False,),
    "custom_token_bans": ("", None),
    "grammar_string": ("", None),
    "do_sample": (True,),
    "auto_max_new_tokens": (False,),
}

# Settings that only say how one of the above works, hence nothing while that one is neutral.
DEPENDENT_KEYS = frozenset({
    "dynatemp_low", "dynatemp_high", "dynatemp_exponent", "mirostat_tau", "mirostat_eta",
    "dry_allowed_length", "dry_base", "dry_sequence_breakers", "xtc_threshold",
    "negative_prompt", "adaptive_decay",
})


@dataclass(frozen=True)
class SamplingSettings:
    """How to continue a prompt. The defaults are the web UI's neutral ones.

    Args:
        max_new_tokens: tokens to generate at most; the context's end stops earlier.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all, 1 is the same as temperature 0.
        top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
        min_p: keep tokens at least this share as likely as the likeliest; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that
            occurred; 1 does nothing.
        repetition_penalty_range: how many of the last tokens count, the prompt's included;
            0 is all of them.
        seed: -1 takes a random one; the same seed and settings give the same text.
        ban_eos_token: never end the text; max_new_tokens alone does.
        skip_special_tokens: leave special tokens out of the text.
        stop_strings: the text ends before the first of them; none of it is shown.
        stop_token_ids: token ids that end the text, besides the model's own.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_penalty_range: int = 1024
    seed: int = -1
    ban_eos_token: bool = False
    skip_special_tokens: bool = True
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_integer("max_new_tokens", self.max_new_tokens, 1)
        _check_number("temperature", self.temperature, 0)
        _check_integer("top_k", self.top_k, 0)
        _check_number("top_p", self.top_p, 0, 1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 0)
        if self.repetition_penalty == 0:
            raise _invalid("repetition_penalty", "a number above 0", 0)
        _check_integer("repetition_penalty_range", self.repetition_penalty_range, 0)
        _check_integer("seed", self.seed, -1, MAX_SEED)
        for name in ("ban_eos_token", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _invalid(name, "true or false", getattr(self, name))
        stop_strings = _tuple_of("stop_strings", self.stop_strings, str)
        if "" in stop_strings:
            raise _invalid("stop_strings", "texts of at least one character", "")
        object.__setattr__(self, "stop_strings", stop_strings)
        object.__setattr__(
            self, "stop_token_ids", _tuple_of("stop_token_ids", self.stop_token_ids, int)
        )

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | SamplingSettings | None) -> SamplingSettings:
        """Read settings from a request.

        `stop` is accepted for `stop_strings`, and a string for a list of one. Numbers may be
        whole floats where integers belong, as sliders send them. Settings of the web UI that
        this engine lacks are accepted at the value at which they do nothing.

        Raises:
            InvalidSettings: a value makes no sense, a name is unknown, or a sampler that
                this engine lacks is switched on.
        """
        if values is None:
            return cls()
        if isinstance(values, SamplingSettings):
            return values
        if not isinstance(values, Mapping):
            raise _invalid("settings", "SamplingSettings or a dict", type(values).__name__)
        known = {field.name: field.type for field in fields(cls)}
        chosen: dict[str, Any] = {}
        for key, value in values.items():
            name = "stop_strings" if key == "stop" else key
            if name in known:
                chosen[name] = _coerce(value, str(known[name]))
            else:
                _check_foreign(name, value)
        return cls(**chosen)


def _coerce(value: Any, kind: str) -> Any:
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind.startswith("tuple"):
        return () if value is None else value
    return value


def _check_foreign(name: Any, value: Any) -> None:
    """Refuse a setting that would have an effect which this engine cannot give."""
    if name in DEPENDENT_KEYS:
        return
    if name in NEUTRAL_VALUES:
        if value in NEUTRAL_VALUES[name]:
            return
        neutral = NEUTRAL_VALUES[name][0]
        raise InvalidSettings(
            f"setting {name}", expected=f"{neutral!r} (this engine lacks that sampler)",
            actual=repr(value)[:80], remedy=f"Set {name} to {neutral!r}",
        )
    known = [field.name for field in fields(SamplingSettings)]
    close = difflib.get_close_matches(str(name), known, n=1)
    raise InvalidSettings(
        f"setting {name!r}", expected=f"one of {', '.join(known)}", actual="an unknown name",
        remedy=f"Did you mean {close[0]}?" if close else "Leave it out",
    )


def _invalid(name: str, expected: str, actual: Any) -> InvalidSettings:
    return InvalidSettings(name, expected=expected, actual=repr(actual)[:80])


def _check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    valid = isinstance(value, int) and not isinstance(value, bool)
    if not valid or value < low or (high is not None and value > high):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise _invalid(name, f"an integer {limit}", value)


def _check_number(name: str, value: Any, low: float, high: float | None = None) -> None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not valid or not math.isfinite(value) or value < low or (high is not None and value > high):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise _invalid(name, f"a number {limit}", value)


def _tuple_of(name: str, value: Any, kind: type) -> tuple:
    values = (value,) if isinstance(value, kind) else value
    wanted = f"a list of {'texts' if kind is str else 'token ids'}"
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise _invalid(name, wanted, value)
    if not all(isinstance(item, kind) and not isinstance(item, bool) for item in values):
        raise _invalid(name, wanted, value)
    return tuple(values)
