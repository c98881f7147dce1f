"""Typed reading of a model folder's JSON files: every wrong value becomes a typed error.

The files come from strangers, so nothing is taken for what it should be: a missing file, a
file that is no JSON, NaN where a number belongs, a string where a list belongs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import InvalidConfig, ModelNotFound

# Real files have a few kilobytes; longrope tables and quantisation settings a few dozen.
MAX_FILE_BYTES = 16 << 20


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ModelNotFound: there is no such file.
        InvalidConfig: it cannot be read, is no JSON (NaN and Infinity are none), is larger
            than `MAX_FILE_BYTES`, or holds something other than an object.
    """
    remedy = "Download this file of the model again"
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ModelNotFound(str(path), expected="a file", actual="none", remedy=remedy) from None
    except OSError as error:
        raise InvalidConfig(
            str(path), expected="a readable file", actual=error.strerror,
            remedy="Check what it is and who may read it",
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise InvalidConfig(
            str(path), expected=f"at most {MAX_FILE_BYTES} bytes", actual="more", remedy=remedy
        )
    try:
        # A byte order mark is what some Windows editors leave behind.
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(
            str(path), expected="valid JSON", actual=str(error) or "nested too deeply",
            remedy=remedy,
        ) from None
    if not isinstance(value, dict):
        raise InvalidConfig(
            str(path), expected="a JSON object", actual=type(value).__name__, remedy=remedy
        )
    return value


class Keys:
    """Typed access to the keys of one JSON object.

    A key that is absent takes its default; a key that is null reads as None, as does a key
    without a default. `required_*` refuse None.

    Args:
        values: the object.
        where: what errors call it, e.g. the path of the file.
        defaults: values of keys that may be absent.
    """

    def __init__(self, values: Mapping[str, Any], where: str,
                 defaults: Mapping[str, Any] | None = None):
        self.values = values
        self.where = where
        self.defaults = defaults or {}

    def raw(self, key: str) -> Any:
        """Return the value as it stands, or its default, or None."""
        return self.values[key] if key in self.values else self.defaults.get(key)

    def fail(self, key: str, expected: str, actual: Any = None) -> InvalidConfig:
        """Make the error for a key; `actual` is the value itself where None."""
        value = self.raw(key) if actual is None else actual
        shown = repr(value)
        return InvalidConfig(
            f"{key} in {self.where}",
            expected=expected,
            actual=shown if len(shown) <= 80 else shown[:77] + "...",
            remedy="Compare this file with the original model's",
        )

    def integer(self, key: str, low: int, high: int) -> int | None:
        """Read an integer in [low, high], or None."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(key, f"an integer from {low} to {high}")
        return value

    def required_integer(self, key: str, low: int, high: int) -> int:
        """Read an integer in [low, high]."""
        value = self.integer(key, low, high)
        if value is None:
            raise self.fail(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float) -> float | None:
        """Read a finite number in [low, high], or None."""
        value = self.raw(key)
        if value is None:
            return None
        if not _is_number(value) or not low <= value <= high:
            raise self.fail(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def required_number(self, key: str, low: float, high: float) -> float:
        """Read a finite number in [low, high]."""
        value = self.number(key, low, high)
        if value is None:
            raise self.fail(key, f"a number from {low:g} to {high:g}")
        return value

    def numbers(self, key: str, count: int, low: float, high: float) -> tuple[float, ...] | None:
        """Read a list of `count` finite numbers in [low, high], or None."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            found = f"{len(value)} values" if isinstance(value, list) else None
            raise self.fail(key, f"a list of {count} numbers", found)
        if not all(_is_number(item) and low <= item <= high for item in value):
            raise self.fail(key, f"numbers from {low:g} to {high:g}")
        return tuple(float(item) for item in value)

    def boolean(self, key: str) -> bool | None:
        """Read true, false or None."""
        value = self.raw(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def text(self, key: str) -> str | None:
        """Read a string or None."""
        value = self.raw(key)
        if value is not None and not isinstance(value, str):
            raise self.fail(key, "a string")
        return value

    def mapping(self, key: str) -> dict[str, Any] | None:
        """Read an object or None."""
        value = self.raw(key)
        if value is not None and not isinstance(value, dict):
            raise self.fail(key, "an object")
        return value


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # An integer of hundreds of digits is a JSON number, and more than a float can hold.
    return abs(value) < 1 << 63 if isinstance(value, int) else math.isfinite(value)
