"""Checks single values that come from outside: options, settings, arguments of calls."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection, Mapping, Set
from typing import Any

from .errors import InvalidSettings, is_text, shown


def invalid(name: str, expected: str, actual: Any) -> InvalidSettings:
    """Return the error for an invalid value."""
    return InvalidSettings(name, expected=expected, actual=shown(actual))


def plain(value: Any) -> Any:
    """Convert a scalar of numpy or PyTorch to a Python number; return anything else unchanged."""
    if isinstance(value, (bool, int, float, str, bytes, type(None))):
        return value
    shape = getattr(value, "shape", None)
    if shape == () and callable(getattr(value, "item", None)):
        return value.item()
    return value


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise InvalidSettings unless this is an integer from low to high."""
    valid = isinstance(value, int) and not isinstance(value, bool)
    if not valid or value < low or (high is not None and value > high):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise invalid(name, f"an integer {limit}", value)


def check_number(name: str, value: Any, low: float, high: float | None = None) -> None:
    """Raise InvalidSettings unless this is a finite number from low to high."""
    if not is_finite(value) or value < low or (high is not None and value > high):
        limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise invalid(name, "a finite number" if low == -math.inf else f"a number {limit}", value)


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number that a float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        # An integer of more than 309 digits.
        return False


def check_flag(name: str, value: Any) -> None:
    """Raise InvalidSettings unless this is true or false."""
    if not isinstance(value, bool):
        raise invalid(name, "true or false", value)


def check_path(name: str, value: Any, kind: str = "file") -> None:
    """Raise InvalidSettings unless this is a path, as text or a path object.

    Args:
        kind: `file` or `folder`, for the message; the file system is not read.
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
    """Raise InvalidSettings unless this is text without lone surrogates.

    A lone surrogate is half a character, as in a stream that was cut in the middle of one. No
    tokenizer and no grammar accepts it.
    """
    if not isinstance(value, str):
        raise invalid(name, "text", value)
    if not is_text(value):
        raise invalid(name, "text without lone surrogates (halves of characters)", value)


def whole_numbers(name: str, values: Any, wanted: str) -> list[int]:
    """Convert an iterable of integers, numpy's and PyTorch's included, to a list.

    Fractions, digits, bytes, true and false are refused, because as token ids they would
    silently become other ones. Sets are refused, because they have no order.

    Raises:
        InvalidSettings: `values` is something else; `wanted` is what the message expects.
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


def unknown_name(what: str, name: Any, known: Collection[str]) -> InvalidSettings:
    """Return the error for an unknown name; its remedy suggests a similar known name.

    Args:
        what: the kind of thing that the name is of, such as `setting`.
    """
    import difflib

    close = difflib.get_close_matches(name[:64], known, n=1) if isinstance(name, str) else []
    return InvalidSettings(
        f"{what} {shown(name)}", expected=f"one of {', '.join(known)}", actual="an unknown name",
        remedy=f"Did you mean {close[0]}?" if close else "Leave it out",
    )
