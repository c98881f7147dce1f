"""Reads and checks single settings, as web forms, APIs and presets write them."""

from __future__ import annotations

import difflib
import json
import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .errors import InvalidSettings

# Settings of the web UI whose samplers this engine does not have, with the value at which
# they do nothing. At that value they are accepted, so that a web UI's whole state can be
# handed over; at any other they are an error, because a sampler that is silently left out
# would be a lie.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "penalty_alpha": (0,),
    "auto_max_new_tokens": (False,),
}


def invalid(name: str, expected: str, actual: Any) -> InvalidSettings:
    """The error for a value that makes no sense."""
    return InvalidSettings(name, expected=expected, actual=repr(actual)[:80])


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise InvalidSettings where this is no integer from low to high."""
    valid = isinstance(value, int) and not isinstance(value, bool)
    if not valid or value < low or (high is not None and value > high):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise invalid(name, f"an integer {limit}", value)


def check_number(name: str, value: Any, low: float, high: float | None = None) -> None:
    """Raise InvalidSettings where this is no finite number from low to high."""
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not valid or not math.isfinite(value) or value < low or (high is not None and value > high):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise invalid(name, "a finite number" if low == -math.inf else f"a number {limit}", value)


def check_flag(name: str, value: Any) -> None:
    """Raise InvalidSettings where this is neither true nor false."""
    if not isinstance(value, bool):
        raise invalid(name, "true or false", value)


def check_text(name: str, value: Any) -> None:
    """Raise InvalidSettings where this is no text."""
    if not isinstance(value, str):
        raise invalid(name, "text", value)


def json_schema(name: str, value: Any) -> str:
    """Return a JSON schema as text, given so or as a dict; "" is none."""
    wanted = "a JSON schema, an object or its text"
    if isinstance(value, str) and not value.strip():
        return ""
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        if not isinstance(schema, Mapping):
            raise invalid(name, wanted, value)
        return json.dumps(dict(schema))
    except (TypeError, ValueError, RecursionError):
        raise invalid(name, wanted, value) from None


def tuple_of(name: str, value: Any, kind: type) -> tuple:
    """Return texts or token ids as a tuple; one alone is a list of one."""
    values = (value,) if isinstance(value, kind) else value
    wanted = f"a list of {'texts' if kind is str else 'token ids'}"
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise invalid(name, wanted, value)
    if not all(isinstance(item, kind) and not isinstance(item, bool) for item in values):
        raise invalid(name, wanted, value)
    return tuple(values)


def whole_numbers(name: str, values: Any, wanted: str) -> list[int]:
    """Return what an iterable holds, numpy's and PyTorch's integers too.

    A fraction is no whole number, nor are digits or bytes: taken as token ids they would
    silently be other ones.

    Raises:
        InvalidSettings: `values` is something else; it says what was `wanted`.
    """
    try:
        if isinstance(values, (str, bytes, bytearray)):
            raise TypeError
        return [operator.index(value) for value in values]
    except TypeError:
        raise invalid(name, wanted, values) from None


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return token ids, given as a list or, as in the web UI's form, as "1, 2, 3"."""
    if value is None:
        return ()
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
        if not all(re.fullmatch("[0-9]{1,18}", part) for part in parts):
            raise invalid(name, "token ids with commas between them", value)
        value = [int(part) for part in parts]
    ids = tuple_of(name, value, int)
    if any(token < 0 for token in ids):
        raise invalid(name, "token ids of at least 0", value)
    return ids


def quoted_texts(name: str, value: Any) -> tuple[str, ...]:
    r"""Return texts, given as a list or, as in the web UI's form, as '"\n", ":"' or JSON."""
    if value is None:
        return ()
    if isinstance(value, str):
        written = value.strip()
        try:
            value = json.loads(written if written.startswith("[") else f"[{written}]")
        except ValueError:
            raise invalid(name, "texts in double quotes with commas between them",
                          written) from None
    return tuple(text for text in tuple_of(name, value, str) if text)


def names(name: str, value: Any, known: Collection[str]) -> tuple[str, ...]:
    """Return names, given as a list or with commas or line ends between them; the first of
    several equal ones counts."""
    if isinstance(value, str):
        value = [part.strip() for part in re.split("[,\n]", value) if part.strip()]
    listed = tuple_of(name, value if value is not None else (), str)
    for item in listed:
        if item not in known:
            raise InvalidSettings(name, expected=f"names out of {', '.join(sorted(known))}",
                                  actual=repr(item)[:80])
    return tuple(dict.fromkeys(listed))


def biases(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Return (token id, bias) pairs with rising ids, given so or as an API's {"id": bias}."""
    wanted = "token ids with a finite number each"
    if value is None:
        return ()
    if not isinstance(value, (Mapping, Sequence)) or isinstance(value, (str, bytes)):
        raise invalid(name, wanted, value)
    read: dict[int, float] = {}
    for pair in value.items() if isinstance(value, Mapping) else value:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise invalid(name, wanted, value)
        token, bias = pair
        (token_id,) = token_ids(name, token if isinstance(token, str) else [token]) or (-1,)
        check_number(name, bias, -math.inf)
        if token_id < 0:
            raise invalid(name, wanted, value)
        read[token_id] = float(bias)
    return tuple(sorted(read.items()))


def as_kind(value: Any, kind: str) -> Any:
    """Turn what forms send into what a field's annotation `kind` says: 5.0 is an integer, and
    None an empty text or list."""
    if kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind.startswith("tuple"):
        return () if value is None else value
    if kind == "str" and value is None:
        return ""
    return value


def check_foreign(name: Any, value: Any, known: Collection[str]) -> None:
    """Refuse a setting that is not `known` and would have an effect which this engine lacks."""
    if name in NEUTRAL_VALUES:
        if value in NEUTRAL_VALUES[name]:
            return
        neutral = NEUTRAL_VALUES[name][0]
        raise InvalidSettings(
            f"setting {name}", expected=f"{neutral!r} (this engine lacks that sampler)",
            actual=repr(value)[:80], remedy=f"Set {name} to {neutral!r}",
        )
    close = difflib.get_close_matches(str(name), known, n=1)
    raise InvalidSettings(
        f"setting {name!r}", expected=f"one of {', '.join(known)}", actual="an unknown name",
        remedy=f"Did you mean {close[0]}?" if close else "Leave it out",
    )
