"""Reads and checks single settings, as web forms, APIs and presets write them."""

from __future__ import annotations

import difflib
import json
import math
import operator
import os
import re
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

from .errors import InvalidSettings, is_text, shown
from .json_keys import InvalidJson, parse_json

# Settings of the web UI whose samplers this engine does not have, with the value at which
# they do nothing. At that value they are accepted, so that a web UI's whole state can be
# handed over; at any other they are an error, because a sampler that is silently left out
# would be a lie.
NEUTRAL_VALUES: dict[str, int | bool] = {"penalty_alpha": 0, "auto_max_new_tokens": False}


def invalid(name: str, expected: str, actual: Any) -> InvalidSettings:
    """The error for a value that makes no sense."""
    return InvalidSettings(name, expected=expected, actual=shown(actual))


def plain(value: Any) -> Any:
    """Return Python's own number for one of numpy or PyTorch; anything else as it is."""
    if isinstance(value, (bool, int, float, str, bytes, type(None))):
        return value
    shape = getattr(value, "shape", None)
    if shape == () and callable(getattr(value, "item", None)):
        return value.item()
    return value


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise InvalidSettings where this is no integer from low to high."""
    valid = isinstance(value, int) and not isinstance(value, bool)
    if not valid or value < low or (high is not None and value > high):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise invalid(name, f"an integer {limit}", value)


def check_number(name: str, value: Any, low: float, high: float | None = None) -> None:
    """Raise InvalidSettings where this is no finite number from low to high."""
    if not is_finite(value) or value < low or (high is not None and value > high):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise invalid(name, "a finite number" if low == -math.inf else f"a number {limit}", value)


def is_finite(value: Any) -> bool:
    """Return whether a value is a number that a float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        # An integer of more than 309 digits.
        return False


def check_flag(name: str, value: Any) -> None:
    """Raise InvalidSettings where this is neither true nor false."""
    if not isinstance(value, bool):
        raise invalid(name, "true or false", value)


def check_path(name: str, value: Any, kind: str = "file") -> None:
    """Raise InvalidSettings where this is no path of a file or folder, text or a path object.

    Args:
        kind: `file` or `folder`, for the message; nothing is looked up.
    """
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        raise invalid(name, f"the path of a {kind}", value)
    try:
        encoded = os.fsencode(value)
    except ValueError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise InvalidSettings(
            name, expected=f"the path of a {kind}",
            actual=f"{shown(os.fspath(value))}, which no file system can hold",
        )


def check_text(name: str, value: Any) -> None:
    """Raise InvalidSettings where this is no text, or holds a lone surrogate.

    A lone surrogate is half a character, as a stream leaves it that was cut in two; no tokenizer
    and no grammar can take it.
    """
    if not isinstance(value, str):
        raise invalid(name, "text", value)
    if not is_text(value):
        raise invalid(name, "text without lone surrogates (halves of characters)", value)


def json_schema(name: str, value: Any) -> str:
    """Return a JSON schema as text, given so or as a dict; "" is none."""
    wanted = "a JSON schema, an object or its text"
    if isinstance(value, str) and not value.strip():
        return ""
    try:
        # A dict too is written and parsed, so that what no JSON holds is found.
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


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Return texts as a tuple; one alone is a list of one."""
    values = (value,) if isinstance(value, str) else value
    if isinstance(values, bytes) or not isinstance(values, Sequence):
        raise invalid(name, "a list of texts", value)
    if not all(isinstance(item, str) for item in values):
        raise invalid(name, "a list of texts", value)
    for item in values:
        check_text(name, item)
    return tuple(values)


def whole_numbers(name: str, values: Any, wanted: str) -> list[int]:
    """Return what an iterable holds, numpy's and PyTorch's integers too.

    A fraction is no whole number, nor are digits, bytes, true and false: taken as token ids they
    would silently be other ones. A set has no order.

    Raises:
        InvalidSettings: `values` is something else; it says what was `wanted`.
    """
    if isinstance(values, (str, bytes, bytearray, memoryview, Mapping, Set)):
        raise invalid(name, wanted, values)
    try:
        return [_whole(value) for value in values]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise invalid(name, wanted, values) from None


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return token ids, given as a list, as one id or, as in the web UI's form, as "1, 2, 3"."""
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


def quoted_texts(name: str, value: Any) -> tuple[str, ...]:
    r"""Return texts, given as a list or, as in the web UI's form, as '"\n", ":"' or JSON."""
    if value is None:
        return ()
    if isinstance(value, str):
        written = value.strip()
        try:
            value = parse_json(written if written.startswith("[") else f"[{written}]")
        except InvalidJson:
            raise invalid(name, "texts in double quotes with commas between them",
                          written) from None
    return tuple(text for text in texts(name, value) if text)


def names(name: str, value: Any, known: Collection[str]) -> tuple[str, ...]:
    """Return names, given as a list or with commas or line ends between them; the first of
    several equal ones counts."""
    if isinstance(value, str):
        value = [part.strip() for part in re.split("[,\n]", value) if part.strip()]
    listed = texts(name, value if value is not None else ())
    for item in listed:
        if item not in known:
            raise InvalidSettings(name, expected=f"names out of {', '.join(sorted(known))}",
                                  actual=shown(item))
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
        if not isinstance(pair, Sequence) or isinstance(pair, (str, bytes)) or len(pair) != 2:
            raise invalid(name, wanted, value)
        ids = token_ids(name, pair[0] if isinstance(pair[0], str) else [pair[0]])
        bias = plain(pair[1])
        if len(ids) != 1:
            raise invalid(name, wanted, value)
        check_number(name, bias, -math.inf)
        read[ids[0]] = float(bias)
    return tuple(sorted(read.items()))


def as_kind(value: Any, kind: str) -> Any:
    """Turn what forms send into what a field's annotation `kind` says: 5.0 is an integer, and
    None an empty text or list. Numbers of numpy and PyTorch are Python's."""
    value = plain(value)
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
        neutral = NEUTRAL_VALUES[name]
        value = plain(value)
        if isinstance(value, (bool, int, float)) and value == neutral:
            return
        raise InvalidSettings(
            f"setting {name}", expected=f"{neutral!r} (this engine lacks that sampler)",
            actual=shown(value), remedy=f"Set {name} to {neutral!r}",
        )
    raise unknown_name("setting", name, known)


def unknown_name(what: str, name: Any, known: Collection[str]) -> InvalidSettings:
    """The error for a name that is none of the known ones; a similar one is suggested.

    Args:
        what: kind of thing that the name is meant to be, such as `setting`.
    """
    close = difflib.get_close_matches(name[:64], known, n=1) if isinstance(name, str) else []
    return InvalidSettings(
        f"{what} {shown(name)}", expected=f"one of {', '.join(known)}", actual="an unknown name",
        remedy=f"Did you mean {close[0]}?" if close else "Leave it out",
    )
